"""Reading a prompt: tokens a second, and the device's peak memory."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from adms.evaluation.latency import forget_compiled, release, settle, times_row, token_times
from adms.evaluation.methods import ADMS
from adms.evaluation.run_folder import Row
from adms.evaluation.speed_bench import Bench, Goal


@torch.no_grad()
def _read(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> float:
    """Seconds that one call takes to read ``ids``."""
    settle(model.device)
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    settle(model.device)
    return time.perf_counter() - start


def prefill(bench: Bench) -> Iterator[Row]:
    """A long prompt through ADMS, the second of its shape, against prompts of one chunk through a
    full cache.
    """
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
        # In the first prompt of a shape kernels are compiled; every prompt captures its chunks.
        first_s = _read(model, ids, cache)
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
            "first_call_s": first_s,
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
    bench.fill(cache, 1, bench.positions[-1])
    reading, _ = _peak(device, lambda: _read(model, ids, cache))
    writing, (times, first_s) = _peak(device, lambda: token_times(model, cache, 1, bench.tokens))
    row: Row = {"way": "prompt, generate", "method": ADMS, "batch": 1}
    row |= {"position": cache.tokens_seen, "weights_bytes": weights}
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
