"""Means, intervals and the figure of merit."""

import math

import numpy as np
import pytest

from adms import ADMSValueError
from adms.evaluation.statistics import block_bootstrap, gap_closed, perplexity, smooth, wilson


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    assert perplexity(np.array([1.0, 3.0])) == pytest.approx(math.exp(2))
    with pytest.raises(ADMSValueError, match="no losses"):
        perplexity(np.array([]))


def test_gap_closed_as_in_the_published_figures() -> None:
    assert gap_closed(5.46, 4.28, 4.61) == pytest.approx(0.72, abs=0.005)
    # Less than 3% apart: a ratio would be noise.
    assert gap_closed(10.2, 10.0, 9.9) is None
    assert gap_closed(10.0, 12.0, 9.0) is None


def test_interval_covers_the_mean_of_correlated_series() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        noise = rng.normal(size=600)
        series = np.convolve(noise, np.ones(20) / 20, "valid") + 0.3
        interval = block_bootstrap(series, block=64, resamples=300)
        assert interval.low <= interval.estimate <= interval.high
        hits += interval.low <= 0.3 <= interval.high
    # 95% asymptotically; blocks of a short series lose some. Single draws would cover about 35.
    assert 80 <= hits <= 100


def test_interval_is_reproducible_and_pairs_cancel() -> None:
    series = np.random.default_rng(1).normal(size=300)
    assert block_bootstrap(series) == block_bootstrap(series)
    assert block_bootstrap(series) != block_bootstrap(series, seed=1)
    same = block_bootstrap(series - series)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)


def test_interval_of_a_series_shorter_than_a_block() -> None:
    interval = block_bootstrap(np.array([1.0, 2.0]), block=64)
    assert interval.estimate == interval.low == interval.high == 1.5


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((2, 2))])
def test_only_series_have_intervals(values: np.ndarray) -> None:
    with pytest.raises(ADMSValueError, match="series"):
        block_bootstrap(values)


def test_wilson_against_known_values() -> None:
    interval = wilson(8, 10)
    assert interval.low == pytest.approx(0.4902, abs=1e-3)
    assert interval.high == pytest.approx(0.9433, abs=1e-3)
    assert wilson(0, 10).low == 0 and wilson(10, 10).high == pytest.approx(1)
    assert wilson(0, 10).high > 0.2
    with pytest.raises(ADMSValueError, match="a trial"):
        wilson(0, 0)


def test_smoothing() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, 2, 3, 4]), 2), [1.5, 2.5, 3.5])
    with pytest.raises(ADMSValueError, match="1..4"):
        smooth(np.zeros(4), 5)
