"""Means with intervals for losses along a text, whose neighbours are not independent.

Shapes: ``N`` tokens.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adms.errors import ADMSValueError

Losses = npt.NDArray[np.floating]

BLOCK_TOKENS = 64
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its 95% interval."""

    estimate: float
    low: float
    high: float


def perplexity(losses: Losses) -> float:
    """``exp`` of the mean of losses in nats."""
    if not len(losses):
        raise ADMSValueError("no losses to average; use more tokens, or measure from earlier on")
    return math.exp(float(np.mean(losses, dtype=np.float64)))


def gap_closed(streaming: float, full: float, method: float) -> float | None:
    """Share of the gap between StreamingLLM and the full cache that a method closes.

    Args:
        streaming, full, method: perplexities at the same positions of the same text.

    Returns:
        The share, or None where the full cache is not better by at least 3%: there a ratio is
        mostly noise (or, where a model was trained on shorter texts, there is no gap), and the
        paired difference with its interval is the figure to read.
    """
    if streaming - full < 0.03 * full:
        return None
    return (streaming - method) / (streaming - full)


def block_bootstrap(
    values: Losses,
    *,
    block: int = BLOCK_TOKENS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of a series with a 95% interval from resampled blocks of neighbours.

    Given a difference of two methods' losses token by token, this is the paired comparison.

    Args:
        values: ``[N]`` in the order of the text.
        block: neighbours that are drawn together; longer than what the series remembers.
        resamples: how often the series is drawn anew.
        seed: of the draws.

    Source: Künsch (1989), moving-block bootstrap; differs in that blocks wrap around the end
    (Politis and Romano 1992), so that all tokens are drawn equally often.
    """
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or not len(series):
        raise ADMSValueError(f"expected a series of values, got shape {series.shape}")
    if block < 1 or resamples < 1:
        raise ADMSValueError(f"block and resamples must be at least 1, got {block}, {resamples}")
    block = min(block, len(series))
    # Sums of every block, so that a resample is a sum of sums.
    padded = np.concatenate([series, series[: block - 1]])
    totals = np.concatenate([[0.0], np.cumsum(padded)])
    block_means = (totals[block:] - totals[:-block]) / block
    count = math.ceil(len(series) / block)
    starts = np.random.default_rng(seed).integers(0, len(series), size=(resamples, count))
    means = block_means[starts].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(series.mean()), float(low), float(high))


def wilson(hits: int, trials: int) -> Interval:
    """A rate with its 95% interval; sensible at 0% and 100% too.

    Source: Wilson (1927).
    """
    if trials < 1 or not 0 <= hits <= trials:
        raise ADMSValueError(f"expected 0 <= hits <= trials and a trial, got {hits} of {trials}")
    z = 1.959964
    rate = hits / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    half /= 1 + z * z / trials
    return Interval(rate, min(rate, centre - half), max(rate, centre + half))


def smooth(values: Losses, width: int) -> Losses:
    """Moving average over ``width`` neighbours; only whole windows, ``N - width + 1`` of them."""
    if not 1 <= width <= len(values):
        raise ADMSValueError(f"width must lie in 1..{len(values)}, got {width}")
    return np.convolve(np.asarray(values, dtype=np.float64), np.full(width, 1 / width), "valid")
