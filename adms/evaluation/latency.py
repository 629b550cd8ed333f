"""Milliseconds per token through ``generate``, for caches side by side in one run.

Far positions are reached without reading a text: a full cache is filled with random keys and
values, a bounded one is filled and its counts are advanced. Times do not depend on what is held.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` tokens, ``D`` head size.
"""

import dataclasses
import gc
import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from adms.cache import ADMSKVCache
from adms.config import ADMSConfig
from adms.enable import enable_adms_llm, enable_streaming_llm
from adms.errors import ADMSValueError
from adms.evaluation.methods import ADMS, FULL, STREAMING, cache_bytes, fit_first
from adms.evaluation.random_models import random_calibration
from adms.evaluation.run_folder import Row
from adms.kernels import Kernel

STATIC, QUANTIZED = "static", "quantized_cache"
METHODS = (FULL, STATIC, QUANTIZED, STREAMING, ADMS)
# Tokens of the first call, in which kernels are compiled and graphs captured.
FIRST_TOKENS = 4


class _Clock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        settle(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def settle(device: torch.device) -> None:
    """Waits for a device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def token_times(
    model: PreTrainedModel, cache: Any, rows: int, tokens: int
) -> tuple[list[float], float]:
    """Milliseconds of each token that ``generate`` adds, and seconds of the first call.

    Args:
        model: the model.
        cache: filled with as many rows.
        rows: how many.
        tokens: how many are timed, after a first call that is timed as a whole.
    """
    generate: Any = model.generate

    def run(count: int) -> _Clock:
        seen = int(cache.get_seq_length())
        ids = torch.full((rows, seen + 1), 5, device=model.device)
        clock = _Clock(model.device)
        generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=count,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return clock

    start = time.perf_counter()
    run(FIRST_TOKENS)
    first_s = time.perf_counter() - start
    # The first token's time has the call's own preparation in it.
    clock = run(tokens + 1)
    return [1e3 * float(step) for step in np.diff(clock.times)], first_s


@torch.no_grad()
def step_times(
    model: PreTrainedModel, cache: Any, rows: int, tokens: int
) -> tuple[list[float], float]:
    """The same of a loop over ``model(token, past_key_values=cache)``."""
    token = torch.full((rows, 1), 5, device=model.device)
    times: list[float] = []
    first_s = 0.0
    for index in range(FIRST_TOKENS + tokens):
        settle(model.device)
        start = time.perf_counter()
        model(token, past_key_values=cache)
        settle(model.device)
        took = time.perf_counter() - start
        if index < FIRST_TOKENS:
            first_s += took
        else:
            times.append(1e3 * took)
    return times, first_s


def fill_tensors(model: PreTrainedModel, cache: Any, rows: int, position: int) -> None:
    """Random keys and values of ``position`` tokens in a cache of transformers."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (rows, config.num_key_value_heads, position, size)
    for index in range(config.num_hidden_layers):
        keys, values = (
            torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2)
        )
        cache.update(keys, values, index)


@torch.no_grad()
def fill_bounded(
    model: PreTrainedModel,
    cache: ADMSKVCache,
    rows: int,
    position: int,
    text: torch.Tensor | None = None,
) -> float:
    """Reads as much as fills the exact tiers and starts coding, then advances the counts.

    ``text`` ``[1, N]`` is read, over and over; None: random tokens.

    Returns:
        Tokens a second while reading.
    """
    sizes = cache.sizes
    reading = min(position, sizes.sink + sizes.ring + sizes.budget + 2 * sizes.chunk)
    if text is None:
        ids = torch.randint(3, 90, (rows, reading), device=model.device)
    else:
        ids = text.repeat(rows, -(-reading // text.shape[1]))[:, :reading].to(model.device)
    settle(model.device)
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    settle(model.device)
    speed = rows * reading / (time.perf_counter() - start)
    for layer in cache.layers:
        middle = layer.middle
        if middle is not None and middle.plan.coder is not None:
            # Every slot holds a code, as it would after as many tokens.
            records = middle.records()
            records[:] = records[:, :1].clone()
    advance_counts(cache, position)
    return speed


def advance_counts(cache: ADMSKVCache, position: int) -> None:
    """Has a cache believe that it has seen ``position`` tokens; what it holds stays.

    Forward or back, and never past ``position``.
    """
    timeline = cache.timeline
    if timeline is None:
        raise RuntimeError("an empty cache was to be advanced")
    # Whole rounds of ring and interval, so that slots keep what belongs there.
    step = int(np.lcm(timeline.sizes.ring, timeline.sizes.interval * timeline.block))
    by = int((position - timeline.seen[0]) / step) * step
    cache.timeline = dataclasses.replace(
        timeline,
        seen=[seen + by for seen in timeline.seen],
        evicted=[evicted + by for evicted in timeline.evicted],
        length=timeline.length + by,
    )
    if cache.step is not None:
        cache.step.stale = True


def open_cache(
    model: PreTrainedModel,
    method: str,
    config: ADMSConfig,
    position: int,
    tokens: int,
    kernel: Kernel = "auto",
    random_code: bool = False,
    slots: int | None = None,
) -> Any:
    """An empty cache of a method, with room for what will be timed.

    ``random_code`` gives the model random directions for its code, for good; for random models.
    ``slots`` are those of a static cache; None: as many as will be used.

    Raises:
        ADMSValueError: ``method`` is none of ``METHODS``.
    """
    total = slots or position + spare_tokens(tokens)
    match method:
        case "full":
            return DynamicCache(config=model.config)
        case "static":
            return StaticCache(config=model.config, max_cache_len=total)
        case "quantized_cache":
            return QuantizedCache(backend="quanto", config=model.config, nbits=4)
        case "streaming":
            recent = config.recent_size + config.compressed_budget
            return enable_streaming_llm(model, config.start_size, recent, kernel=kernel)
        case "adms":
            cache = enable_adms_llm(model, config, kernel=kernel)
            calibration = cache.binding_for_use.calibration
            if random_code and calibration is not None and not calibration.is_fitted:
                random_calibration(calibration, model.device)
            return cache
    raise ADMSValueError(f"unknown cache {method!r}; the caches are {', '.join(METHODS)}")


def spare_tokens(tokens: int) -> int:
    """Tokens that timing ``tokens`` of them adds to a cache."""
    return tokens + FIRST_TOKENS + 4


def obstacle(method: str) -> str | None:
    """Why a method cannot be measured here."""
    if method == QUANTIZED and importlib.util.find_spec("optimum") is None:
        return "optimum-quanto is not installed"
    return None


def measure(
    model: PreTrainedModel,
    method: str,
    config: ADMSConfig,
    *,
    batch: int,
    position: int,
    tokens: int,
    kernel: Kernel = "auto",
    random_code: bool = False,
    slots: int | None = None,
) -> Row:
    """One row of the benchmark: a cache at a position of the stream.

    Returns:
        Median, mean and 99th percentile of a token's milliseconds, tokens a second of all rows,
        seconds of what was fitted to the model before the clock started (None where nothing was),
        the longest token less the median (where compression happens), seconds of the first call,
        and bytes of the cache and of the device at its peak.
    """
    device = model.device
    row: Row = {"method": method, "batch": batch, "position": position}
    reason = obstacle(method)
    if reason is not None:
        return {**row, "note": reason}
    release(device)
    cache = open_cache(model, method, config, position, tokens, kernel, random_code, slots)
    reading: float | None = None
    try:
        if isinstance(cache, ADMSKVCache):
            # Once a model, so no part of its reading.
            row["fit_s"] = fit_first(cache, position, batch)
            reading = fill_bounded(model, cache, batch, position)
        else:
            fill_tensors(model, cache, batch, position)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times, first_s = token_times(model, cache, batch, tokens)
    except torch.OutOfMemoryError as error:
        return {**row, "note": str(error).split(".")[0]}
    return row | times_row(cache, times, first_s, batch) | {"read_tokens_per_s": reading}


def times_row(cache: Any, times: list[float], first_s: float | None, batch: int) -> Row:
    """What was measured of a cache: see ``measure``."""
    median = float(np.median(times))
    row: Row = {
        "token_ms_median": median,
        "token_ms_mean": float(np.mean(times)),
        "token_ms_p99": float(np.quantile(times, 0.99)),
        "tokens_per_s": 1e3 * batch / float(np.mean(times)),
        "commit_ms": float(max(times)) - median,
        "first_call_s": first_s,
        "cache_bytes": cache_bytes(cache),
        "device_peak_bytes": (
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        ),
    }
    if isinstance(cache, ADMSKVCache):
        row["note"] = "static step" if cache.step is not None else cache.step_obstacle
    return row


def release(device: torch.device) -> None:
    """Gives back what an earlier cache held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def forget_compiled(model: PreTrainedModel) -> None:
    """Makes the next static cache compile for its own shape, as a process of its own would."""
    torch.compiler.reset()
    model.__dict__.pop("_compiled_call", None)


def measure_all(
    model: PreTrainedModel,
    methods: list[str],
    config: ADMSConfig,
    *,
    batches: list[int],
    positions: list[int],
    tokens: int,
    kernel: Kernel = "auto",
    random_code: bool = False,
) -> Iterator[Row]:
    """Every method at every position (batch of the first) and every batch (at the first position).

    A cache that grows is measured up to the longest position that fits.
    """
    cases = [(batches[0], position) for position in positions]
    cases += [(batch, positions[0]) for batch in batches[1:]]
    for method in methods:
        for batch, position in cases:
            yield measure(
                model,
                method,
                config,
                batch=batch,
                position=position,
                tokens=tokens,
                kernel=kernel,
                random_code=random_code,
            )
