"""Attention over the tiers, and the stand-alone attention modules of the project's sources."""
