"""Throughput, latency per token, and the memory of process and device."""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from adms.evaluation.methods import Method
from adms.evaluation.run_folder import Arrays, Row

WARMUP_TOKENS = 4


def peak_process_bytes() -> int | None:
    """Most memory this process ever held; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        # Windows has no such module.
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def measure_speed(
    model: PreTrainedModel,
    method: Method,
    ids: torch.Tensor,
    *,
    chunk: int,
    decode_tokens: int,
    on_chunk: Callable[[int], object] | None = None,
) -> tuple[Row, Arrays]:
    """Reads a text and then writes token by token, with a clock.

    Args:
        model: the model.
        method: an opened method.
        ids: ``[1, N]``, what is read first.
        chunk: tokens of one forward pass while reading.
        decode_tokens: tokens written, after a few that are not timed.
        on_chunk: called with the number of tokens after each chunk.

    Returns:
        Seconds of what is fitted to the model once, before the clock starts (None where nothing
        was); tokens a second while reading, milliseconds to the first token (the reading included),
        the median and 99th percentile of a token's milliseconds, tokens a second while writing, and
        bytes; and the arrays ``token_ms``, ``tokens``, ``nbytes``.
    """
    device = model.device

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ids = ids.to(device)
    tokens, nbytes = [], []
    fit_s = method.fit(ids.shape[1] + WARMUP_TOKENS + decode_tokens)
    settle()
    start = time.perf_counter()
    for at in range(0, ids.shape[1], chunk):
        piece = ids[:, at : at + chunk]
        logits = model(piece, past_key_values=method.cache, logits_to_keep=1).logits
        tokens.append(at + piece.shape[1])
        nbytes.append(method.nbytes)
        if on_chunk is not None:
            on_chunk(piece.shape[1])
    token = logits[0, -1].argmax().view(1, 1)
    settle()
    first_ms = (time.perf_counter() - start) * 1000
    times = []
    for index in range(WARMUP_TOKENS + decode_tokens):
        before = time.perf_counter()
        logits = model(token, past_key_values=method.cache).logits
        token = logits[0, -1].argmax().view(1, 1)
        settle()
        if index >= WARMUP_TOKENS:
            times.append((time.perf_counter() - before) * 1000)
    nbytes.append(method.nbytes)
    tokens.append(ids.shape[1] + WARMUP_TOKENS + decode_tokens)
    token_ms = np.asarray(times)
    row: Row = {
        "fit_s": fit_s,
        "read_tokens_per_s": ids.shape[1] / first_ms * 1000,
        "first_token_ms": first_ms,
        "token_ms_median": float(np.median(token_ms)),
        "token_ms_p99": float(np.quantile(token_ms, 0.99)),
        "write_tokens_per_s": 1000 / float(token_ms.mean()),
        "cache_bytes": max(nbytes),
        "process_peak_bytes": peak_process_bytes(),
        "device_peak_bytes": (
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        ),
    }
    arrays = {
        "token_ms": token_ms,
        "tokens": np.asarray(tokens),
        "nbytes": np.asarray(nbytes),
    }
    return row, arrays
