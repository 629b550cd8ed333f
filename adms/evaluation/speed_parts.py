"""The parts of the speed benchmark: each measures caches side by side and says what must hold.

Rows are those of ``latency.measure`` with ``part`` and ``way`` (through ``generate``, or a loop of
``steps``) before them. Parts yield rows as they come, so that a run that is cut short keeps them.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from adms.cache import ADMSKVCache
from adms.config import ADMSConfig
from adms.evaluation.latency import (
    STATIC,
    advance_counts,
    fill_tensors,
    measure,
    release,
    settle,
    spare_tokens,
    step_times,
    times_row,
    token_times,
)
from adms.evaluation.methods import ADMS, FULL, STREAMING
from adms.evaluation.run_folder import Row
from adms.evaluation.speed_bench import Bench, Goal, Part

NO_MIDDLE = "adms without a middle"
GENERATE, STEPS = "generate", "steps"


# --- decoding ------------------------------------------------------------------------------------


def _timed(bench: Bench, cache: Any, batch: int, way: str, row: Row) -> Row:
    clock = token_times if way == GENERATE else step_times
    times, first_s = clock(bench.model, cache, batch, bench.tokens)
    return {"way": way, **row, "batch": batch} | times_row(cache, times, first_s, batch)


def forget_compiled(model: PreTrainedModel) -> None:
    """Makes the next static cache compile for its own shape, as a process of its own would."""
    torch.compiler.reset()
    model.__dict__.pop("_compiled_call", None)


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


def _streaming_label(config: ADMSConfig) -> str:
    return f"streaming, {config.start_size} + {config.recent_size + config.compressed_budget}"


def batch1(bench: Bench) -> Iterator[Row]:
    """A static cache, StreamingLLM, and ADMS along the stream."""
    release(bench.model.device)
    if bench.model.device.type == "cuda":
        yield _static(bench, bench.slots, 1, bench.tokens)
    for method in (STREAMING, ADMS):
        release(bench.model.device)
        cache = bench.open(method)
        bench.fill(cache, 1, bench.positions[0])
        label = _streaming_label(bench.config) if method == STREAMING else method
        places = bench.positions[:1] if method == STREAMING else bench.positions
        for way in (GENERATE, STEPS):
            for place in places:
                advance_counts(cache, place)
                row: Row = {"method": label, "position": cache.tokens_seen}
                yield _timed(bench, cache, 1, way, row)
            # Where it started; what it holds is the same.
            _set_back(cache, places[0])


def _set_back(cache: ADMSKVCache, position: int) -> None:
    """Has a cache believe that it has seen fewer tokens: whole rounds, as ``advance_counts``."""
    timeline = cache.timeline
    if timeline is None:
        raise RuntimeError("an empty cache was to be set back")
    step = int(np.lcm(timeline.sizes.ring, timeline.sizes.interval * timeline.block))
    by = max(0, timeline.seen[0] - position - step) // step * step
    cache.timeline = dataclasses.replace(
        timeline,
        seen=[seen - by for seen in timeline.seen],
        evicted=[evicted - by for evicted in timeline.evicted],
        length=timeline.length - by,
    )
    if cache.step is not None:
        cache.step.stale = True


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
        label = _streaming_label(bench.config) if method == STREAMING else method
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
        reading = bench.fill(cache, bench.batch, bench.positions[0])
        row: Row = {"method": label, "position": cache.tokens_seen}
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


# --- reading -------------------------------------------------------------------------------------


@torch.no_grad()
def _read(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> float:
    """Seconds that one call takes to read ``ids``."""
    settle(model.device)
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    settle(model.device)
    return time.perf_counter() - start


def prefill(bench: Bench) -> Iterator[Row]:
    """A long prompt through ADMS against prompts of one chunk through a full cache."""
    model = bench.model
    for chunk in bench.chunks:
        release(model.device)
        ids = torch.randint(3, 90, (1, max(bench.prompt, chunk)), device=model.device)
        dense = []
        for _ in range(6):
            dense.append(_read(model, ids[:, :chunk], DynamicCache(config=model.config)))
        # The first passes set libraries up.
        dense_s = float(np.median(dense[2:]))
        cache = bench.open(ADMS, config=bench.config.replace(prefill_chunk_size=chunk))
        bench.fill(cache, 1, 2**30)
        _read(model, ids[:, :chunk], cache)
        own_s = _read(model, ids, cache)
        chunks = ids.shape[1] / chunk
        yield {
            "way": "prompt",
            "method": ADMS,
            "batch": 1,
            "chunk": chunk,
            "prompt_tokens": ids.shape[1],
            "dense_chunk_ms": 1e3 * dense_s,
            "chunk_ms": 1e3 * own_s / chunks,
            "dense_tokens_per_s": chunk / dense_s,
            "read_tokens_per_s": ids.shape[1] / own_s,
            "cache_bytes": cache.nbytes,
        }


def prefill_goals(bench: Bench, rows: list[Row]) -> list[Goal]:
    """Tokens a second against dense prefill."""
    return [
        Goal(
            f"a prompt of {row['prompt_tokens']} tokens in chunks of {row['chunk']}: ADMS / dense "
            "prefill of a chunk, tokens/s",
            row["read_tokens_per_s"] / row["dense_tokens_per_s"],
            0.8,
            at_most=False,
        )
        for row in rows
    ]


# --- memory --------------------------------------------------------------------------------------


def memory(bench: Bench) -> Iterator[Row]:
    """The device's peak while a prompt is read and tokens are written."""
    model, device = bench.model, bench.model.device
    if device.type != "cuda":
        return
    forget_compiled(model)
    release(device)
    weights = torch.cuda.memory_allocated(device)
    chunk = bench.config.prefill_chunk_size
    ids = torch.randint(3, 90, (1, max(bench.prompt, 2 * chunk)), device=device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.no_grad():
            model(ids[:, :chunk], use_cache=False, logits_to_keep=1)
    workspace = torch.cuda.max_memory_allocated(device) - before
    cache = bench.open(ADMS)
    bench.fill(cache, 1, 2**30)
    reading, _ = _peak(device, lambda: _read(model, ids, cache))
    writing, (times, first_s) = _peak(device, lambda: token_times(model, cache, 1, bench.tokens))
    row: Row = {"way": "prompt, generate", "method": ADMS, "batch": 1, "weights_bytes": weights}
    row |= times_row(cache, times, first_s, 1)
    row |= {
        "max_nbytes": cache.max_nbytes,
        "workspace_bytes": workspace,
        "peak_reading_bytes": reading,
        "peak_writing_bytes": writing,
        "device_peak_bytes": max(reading, writing),
    }
    yield row


def _peak(device: torch.device, run: Callable[[], Any]) -> tuple[int, Any]:
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    return torch.cuda.max_memory_allocated(device), result


def memory_goals(bench: Bench, rows: list[Row]) -> list[Goal]:
    """Against what must be held anyway."""
    what = "peak memory / (weights + max_nbytes + workspace of one layer of a chunk)"
    return [
        Goal(
            what,
            row["device_peak_bytes"]
            / (row["weights_bytes"] + row["max_nbytes"] + row["workspace_bytes"]),
            1.05,
        )
        for row in rows
    ]


# --- a CPU ---------------------------------------------------------------------------------------


def crossover(bench: Bench) -> Iterator[Row]:
    """Full caches of several lengths, StreamingLLM, and ADMS near and far, in turns.

    Turn by turn a few tokens of each, so that what else the machine does falls on all of them.
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
    for method, position in (
        (STREAMING, bench.slots),
        (ADMS, bench.positions[0]),
        (ADMS, bench.positions[-1]),
    ):
        cache = bench.open(method)
        bench.fill(cache, 1, position)
        label = _streaming_label(config) if method == STREAMING else method
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
    if len(full) < 2 or len(own) < 2 or not streaming:
        return []
    # Means have every token's share of the commits; of a full cache the median says as much and
    # is not moved by what else the machine does.
    line = [row["token_ms_median"] for row in full]
    near, far = own[0]["token_ms_mean"], own[-1]["token_ms_mean"]
    at = crossing([row["position"] for row in full], line, near)
    spread = 100 * (max(near, far) / min(near, far) - 1)
    same = streaming[0]["token_ms_median"] / line[0]
    return [
        Goal("crossover with DynamicCache, tokens of context", at, 8192, 2048),
        Goal(f"spread from {bench.positions[0]:,} to {bench.positions[-1]:,} tokens, %", spread, 3),
        Goal(f"StreamingLLM / DynamicCache of {bench.slots} tokens, time per token", same, 1.0),
    ]


PARTS = {
    "batch1": Part("Batch 1", batch1, batch1_goals),
    "batch16": Part("Several streams at once", batch16, batch16_goals),
    "context32k": Part("A long context", context32k, context32k_goals),
    "prefill": Part("Reading", prefill, prefill_goals),
    "memory": Part("Memory", memory, memory_goals),
    "first_call": Part("The first call", first_call, lambda bench, rows: []),
    "crossover": Part("Against a cache that grows", crossover, crossover_goals),
}
