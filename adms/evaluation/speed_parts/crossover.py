"""From which context on a token costs less than with a cache that grows; for a CPU."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from adms.cache import ADMSKVCache
from adms.evaluation.latency import advance_counts, fill_tensors, settle, times_row
from adms.evaluation.methods import ADMS, FULL, STREAMING
from adms.evaluation.run_folder import Row
from adms.evaluation.speed_bench import STEPS, Bench, Goal


def crossover(bench: Bench) -> Iterator[Row]:
    """Full caches of several lengths, StreamingLLM, and ADMS near, full and far, in turns.

    Turn by turn a few tokens of each, so that what else the machine does falls on all of them. A
    CPU reads no slot of the middle that is still empty, so the goals begin where all are taken.
    """
    model, config = bench.model, bench.config
    lengths = [bench.slots]
    while lengths[-1] < bench.context:
        lengths.append(min(bench.context, 2 * lengths[-1]))
    caches: list[tuple[str, int, Any]] = []
    for length in lengths:
        full = bench.open(FULL)
        fill_tensors(model, full, 1, length)
        caches.append((FULL, length, full))
    near, far = bench.positions[0], bench.positions[-1]
    for method, position in ((STREAMING, bench.slots), (ADMS, near), (ADMS, None), (ADMS, far)):
        cache = bench.open(method)
        bench.fill(cache, 1, near if position is None else position)
        if position is None:
            advance_counts(cache, _full_from(cache))
        label = bench.streaming_label if method == STREAMING else method
        caches.append((label, cache.tokens_seen, cache))
    # A multiple of the interval, so that every turn has its commits.
    turns = max(1, bench.tokens // config.compression_interval)
    times: list[list[float]] = [[] for _ in caches]
    for _ in range(turns):
        for (_, _, cache), own in zip(caches, times, strict=True):
            own += _few_steps(model, cache, config.compression_interval)
    for (label, length, cache), own in zip(caches, times, strict=True):
        row: Row = {"way": STEPS, "method": label, "batch": 1, "position": length}
        yield row | times_row(cache, own, None, 1)


def _full_from(cache: ADMSKVCache) -> int:
    """Tokens after which every slot of the middle is taken, though counts move in whole rounds."""
    summary, ring = cache.summary(), cache.sizes.ring
    return int(summary["middle"].get("capacity_tokens", 0)) + cache.sizes.sink + 3 * ring


@torch.no_grad()
def _few_steps(model: PreTrainedModel, cache: Any, count: int) -> list[float]:
    token = torch.full((1, 1), 5, device=model.device)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        model(token, past_key_values=cache)
        settle(model.device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def crossing(lengths: list[float], full: list[float], own: float) -> float:
    """Context length at which a full cache takes ``own`` milliseconds, by its least-squares line.

    Args:
        lengths: tokens of the full caches.
        full: their milliseconds a token.
        own: those of the other cache.
    """
    slope, start = np.polyfit(lengths, full, 1)
    return float((own - start) / slope) if slope > 0 else float("inf")


def crossover_goals(bench: Bench, rows: list[Row]) -> list[Goal]:
    """Where ADMS overtakes a full cache, flatness, and StreamingLLM against the same length."""
    full = [row for row in rows if row["method"] == FULL]
    own = [row for row in rows if row["method"] == ADMS]
    streaming = [row for row in rows if row["method"].startswith(STREAMING)]
    if len(full) < 2 or len(own) < 3 or not streaming:
        return []
    # Means have every token's share of the commits; of a full cache the median says as much and
    # is not moved by what else the machine does.
    line = [row["token_ms_median"] for row in full]
    filled, far = own[1:]
    ends = filled["token_ms_mean"], far["token_ms_mean"]
    at = crossing([row["position"] for row in full], line, max(ends))
    spread = 100 * (max(ends) / min(ends) - 1)
    places = f"{filled['position']:,} to {far['position']:,}"
    same = streaming[0]["token_ms_median"] / line[0]
    return [
        Goal("crossover with DynamicCache, tokens of context", at, 8192, 2048),
        Goal(f"spread from {places} tokens, %", spread, 3),
        Goal(f"StreamingLLM / DynamicCache of {bench.slots} tokens, time per token", same, 1.0),
    ]
