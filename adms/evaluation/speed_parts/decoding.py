"""Milliseconds a token: one row along the stream, several rows, and a long context."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from adms.evaluation.latency import (
    STATIC,
    advance_counts,
    forget_compiled,
    measure,
    release,
    spare_tokens,
    step_times,
    times_row,
    token_times,
)
from adms.evaluation.methods import ADMS, FULL, STREAMING, fit_first
from adms.evaluation.run_folder import Row
from adms.evaluation.speed_bench import GENERATE, STEPS, Bench, Goal

NO_MIDDLE = "adms without a middle"


def _timed(bench: Bench, cache: Any, batch: int, way: str, row: Row) -> Row:
    clock = token_times if way == GENERATE else step_times
    times, first_s = clock(bench.model, cache, batch, bench.tokens)
    return {"way": way, **row, "batch": batch} | times_row(cache, times, first_s, batch)


def _static(bench: Bench, slots: int, batch: int, tokens: int) -> Row:
    """A static cache of as many slots, which it reads all, however many are filled."""
    forget_compiled(bench.model)
    row = measure(
        bench.model, STATIC, bench.config, batch=batch, position=slots - spare_tokens(tokens),
        tokens=tokens, slots=slots,
    )  # fmt: skip
    forget_compiled(bench.model)
    release(bench.model.device)
    return {"way": GENERATE, **row, "method": f"static, {slots} slots"}


def batch1(bench: Bench) -> Iterator[Row]:
    """A static cache, StreamingLLM, and ADMS along the stream."""
    release(bench.model.device)
    if bench.model.device.type == "cuda":
        yield _static(bench, bench.slots, 1, bench.tokens)
    for method in (STREAMING, ADMS):
        release(bench.model.device)
        cache = bench.open(method)
        bench.fill(cache, 1, bench.positions[0])
        label = bench.streaming_label if method == STREAMING else method
        places = bench.positions[:1] if method == STREAMING else bench.positions
        for way in (GENERATE, STEPS):
            for place in places:
                advance_counts(cache, place)
                row: Row = {"method": label, "position": cache.tokens_seen}
                yield _timed(bench, cache, 1, way, row)
            # Where it started; what it holds is the same.
            advance_counts(cache, places[0])


def _ms(rows: list[Row], method: str, way: str = GENERATE) -> list[float]:
    """Mean milliseconds of a token, commits included."""
    return [
        row["token_ms_mean"]
        for row in rows
        if row["method"].startswith(method) and row["way"] == way and "token_ms_mean" in row
    ]


def first_call(bench: Bench) -> Iterator[Row]:
    """Until the first tokens are there, in which the step is compiled and captured."""
    for method in (STREAMING, ADMS):
        release(bench.model.device)
        cache = bench.open(method)
        bench.fill(cache, 1, bench.positions[0])
        label = bench.streaming_label if method == STREAMING else method
        yield _timed(bench, cache, 1, STEPS, {"method": label, "position": cache.tokens_seen})


def batch1_goals(bench: Bench, rows: list[Row]) -> list[Goal]:
    """Against the static cache and StreamingLLM, and flatness."""
    own, goals = _ms(rows, ADMS), []
    if not own:
        return []
    mean = float(np.mean(own))
    static, streaming = _ms(rows, STATIC), _ms(rows, STREAMING)
    if static:
        what = f"batch 1: ADMS / compiled StaticCache of {bench.slots} slots, time per token"
        goals.append(Goal(what, mean / static[0], 1.20, 1.05))
    if streaming:
        what = "batch 1: ADMS / StreamingLLM in the same implementation, time per token"
        goals.append(Goal(what, mean / streaming[0], 1.15, 1.03))
    if len(own) > 1:
        spread = 100 * (max(own) / min(own) - 1)
        first, last = bench.positions[0], bench.positions[-1]
        goals.append(Goal(f"batch 1: spread from {first:,} to {last:,} tokens, %", spread, 3))
    return goals


def batch16(bench: Bench) -> Iterator[Row]:
    """ADMS, and the same cache without a middle."""
    without = bench.config.replace(compressed_budget=0)
    for label, config in ((NO_MIDDLE, without), (ADMS, bench.config)):
        release(bench.model.device)
        cache = bench.open(ADMS, config=config)
        fit_s = fit_first(cache, bench.positions[0], bench.batch)
        reading = bench.fill(cache, bench.batch, bench.positions[0])
        row: Row = {"method": label, "position": cache.tokens_seen, "fit_s": fit_s}
        row = _timed(bench, cache, bench.batch, GENERATE, row)
        yield row | {"read_tokens_per_s": reading}


def batch16_goals(bench: Bench, rows: list[Row]) -> list[Goal]:
    """The price of a middle."""
    own = [row["token_ms_mean"] for row in rows if row["method"] == ADMS]
    without = _ms(rows, NO_MIDDLE)
    if not own or not without:
        return []
    what = f"batch {bench.batch}: ADMS / the same cache without a middle, time per token"
    return [Goal(what, own[0] / without[0], 1.5, 1.1)]


def context32k(bench: Bench) -> Iterator[Row]:
    """A long context of several rows: full caches filled with random keys, and ADMS."""
    batch, length, tokens = bench.context_batch, bench.context, bench.context_tokens
    release(bench.model.device)
    cache = bench.open(ADMS)
    bench.fill(cache, batch, length)
    yield _timed(bench, cache, batch, GENERATE, {"method": ADMS, "position": cache.tokens_seen})
    del cache
    release(bench.model.device)
    row = measure(bench.model, FULL, bench.config, batch=batch, position=length, tokens=tokens)
    yield {"way": GENERATE, **row}
    if bench.model.device.type == "cuda":
        yield _static(bench, length, batch, tokens)


def context32k_goals(bench: Bench, rows: list[Row]) -> list[Goal]:
    """Tokens a second and bytes against both full caches."""
    own = [row for row in rows if row["method"] == ADMS]
    if not own:
        return []
    goals = []
    for row in rows:
        if row["method"] == ADMS or "tokens_per_s" not in row:
            continue
        name = f"{bench.context:,} tokens, batch {bench.context_batch}"
        faster = own[0]["tokens_per_s"] / row["tokens_per_s"]
        goals.append(Goal(f"{name}: ADMS / {row['method']}, tokens/s", faster, 4, at_most=False))
        smaller = row["cache_bytes"] / own[0]["cache_bytes"]
        goals.append(Goal(f"{name}: bytes of {row['method']} / ADMS", smaller, 20, at_most=False))
    return goals
