"""Fixtures of the evaluation's tests."""

import time
from typing import Any

import pytest

from adms import installation
from tests.evaluation.tiny import text_file, tiny_model_folder

__all__ = ["slow_fit", "text_file", "tiny_model_folder"]


@pytest.fixture
def slow_fit(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A fit to the model takes a thousand seconds, by the clock that everything is timed with.

    Returns:
        Those that have passed.
    """
    passed, clock, fit = [0.0], time.perf_counter, installation.fit_to_own_texts

    def fit_slowly(*arguments: Any) -> None:
        fit(*arguments)
        passed[0] += 1000

    monkeypatch.setattr(installation, "fit_to_own_texts", fit_slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])
    return passed
