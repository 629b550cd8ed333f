"""Fixtures of the gates' tests."""

from tests.evaluation.tiny import text_file, tiny_model_folder

__all__ = ["text_file", "tiny_model_folder"]
