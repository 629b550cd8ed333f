"""The tiers of one layer: exact (sinks and recent ring) and middle (raw or coded, landmarks)."""
