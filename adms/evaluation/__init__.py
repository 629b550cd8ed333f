"""Evaluation: where models and texts come from, what is measured, how it is reported."""
