"""Times hard block-sparse attention against dense SDPA, and a dynamic update against recomputing.

Prints Markdown tables of milliseconds. The sparse rows time attention alone ("kernel"), the choice
of blocks by an untrained scorer ("selection"), and both in one call ("module"), on random inputs;
the last column compares dense attention with the module.
The dynamic rows time `update_key` and a read of all rows, over more updates than it takes for all
rows to be summed afresh, so that the mean has that cost in it; "float64 dense" is the same object
made to sum everything at every read.

    python scripts/benchmark_sparse_dynamic.py [--device cuda] [--dtype bfloat16] [--threads 1]

On CUDA, times are of calls one after the other; a second row has them recorded in a CUDA graph, as
servers run them, so that what the device computes is timed and not how fast Python launches it.
"Dense SDPA" is PyTorch's own choice, and in half precision also its flash kernel.
"""

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from adms.attention.block_sparse import AdaptiveConfig, BlockSparseAdaptive, block_sparse_attention
from adms.attention.dynamic import DynamicAttention

Call = Callable[[], object]


def seconds(call: Call) -> float:
    """Time of one call, with the device's work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def milliseconds(calls: list[Call], repeats: int) -> list[float]:
    """Median time of each call, taken in turns so that a busy machine slows all alike."""
    for call in calls:
        # Once to compile, once to settle.
        call()
        call()
    of_one = device_seconds if torch.cuda.is_available() else seconds
    rounds = [[of_one(call) for call in calls] for _ in range(repeats)]
    return [1e3 * statistics.median(times) for times in zip(*rounds, strict=True)]


def device_seconds(call: Call, count: int = 20) -> float:
    """Mean time of one of many calls, launched one after the other."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count / 1e3


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Dense attention by PyTorch's flash kernel."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


def recorded(call: Call) -> Call:
    """The call as a CUDA graph."""
    # Kernels are compiled and libraries set up before.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def sparse_rows(arguments: argparse.Namespace, device: str, dtype: torch.dtype) -> None:
    """Prints one row (on CUDA two) for each sparsity, with and without causality."""
    tokens, heads, size = arguments.tokens, arguments.heads, arguments.head_dim
    block_size = arguments.block_size
    q, k, v = (torch.randn(1, tokens, heads, size, device=device, dtype=dtype) for _ in range(3))
    q_, k_, v_ = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    print(
        "| causal | sparsity | calls | dense SDPA ms | kernel ms | selection ms | module ms | "
        "faster |\n|---|---|---|---|---|---|---|---|"
    )
    on_cuda = device.startswith("cuda")
    for causal, asked in ((c, s) for c in (False, True) for s in arguments.sparsities):
        config = AdaptiveConfig(base_sparsity=asked, budget_range=0.0, block_size=block_size)
        segments = [tokens // 4, tokens // 2, tokens]
        module = BlockSparseAdaptive(segments, [1, 2, 4], heads, size, config).to(device).eval()
        blocks, sparsity = module.block_weights(q_, k_, causal)
        dense: list[Call] = [
            functools.partial(scaled_dot_product_attention, q_, k_, v_, is_causal=causal)
        ]
        if dtype in (torch.float16, torch.bfloat16) and on_cuda:
            dense.append(functools.partial(flash, q_, k_, v_, causal))
        calls: list[Call] = [
            functools.partial(
                block_sparse_attention, q_, k_, v_, blocks, block_size, is_causal=causal
            ),
            functools.partial(module.block_weights, q_, k_, causal),
            functools.partial(module, q, k, v, causal),
        ]
        timed = {"in turn": dense + calls}
        if on_cuda:
            timed["a graph"] = [recorded(call) for call in dense + calls]
        for how, these in timed.items():
            *bases, kernel, selection, whole = milliseconds(these, arguments.repeats)
            ours = " | ".join(f"{time:.3f}" for time in (kernel, selection, whole))
            print(
                f"| {causal} | {float(sparsity.mean()):.1%} | {how} | "
                f"{' / '.join(f'{base:.3f}' for base in bases)} | {ours} | "
                f"{' / '.join(f'{base / whole:.1f}x' for base in bases)} |",
                flush=True,
            )


def update_and_read(attention: DynamicAttention, keys: Tensor, step: int) -> None:
    """Replaces one key by another's and reads all rows."""
    index = step % keys.shape[-2]
    attention.update_key(index, keys[..., index - 1, :])
    attention.output()


def dynamic_rows(arguments: argparse.Namespace, device: str) -> None:
    """Prints one row for each way to hold the scores and each number of heads."""
    entries, updates, every = arguments.entries, arguments.updates, 100
    print(
        "\n| heads | scores | update + read, median ms | mean ms | float32 SDPA ms | "
        "faster (median, mean) | float64 dense ms | faster (mean) | MiB held |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for heads, chunk_size in ((h, c) for h in arguments.dynamic_heads for c in (None, 64)):
        q, k, v = (torch.randn(1, heads, entries, 64, device=device) for _ in range(3))
        attention = DynamicAttention(q, k, v, chunk_size=chunk_size)
        summed = DynamicAttention(q, k, v, lazy_threshold=0, chunk_size=chunk_size)
        times, dense, exact = [], [], []
        for step in range(updates):
            times.append(1e3 * seconds(functools.partial(update_and_read, attention, k, step)))
            if step % every == 0:
                sdpa = functools.partial(scaled_dot_product_attention, q, k, v)
                dense.append(1e3 * seconds(sdpa))
                exact.append(1e3 * seconds(functools.partial(update_and_read, summed, k, step)))
        median, mean = statistics.median(times), statistics.mean(times)
        base, full = statistics.median(dense), statistics.median(exact)
        kept = "kept" if chunk_size is None else f"chunks of {chunk_size}"
        print(
            f"| {heads} | {kept} | {median:.3f} | {mean:.3f} | {base:.2f} | {base / median:.0f}x, "
            f"{base / mean:.0f}x | {full:.2f} | {full / mean:.0f}x | "
            f"{attention.nbytes / 2**20:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="of the sparse rows; bfloat16 on CUDA")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.9, 0.95])
    parser.add_argument("--entries", type=int, default=4096)
    parser.add_argument("--dynamic-heads", type=int, nargs="+", default=[1])
    parser.add_argument("--updates", type=int, default=4200, help="0 leaves these rows out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    on_cuda = arguments.device.startswith("cuda")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_cuda else "float32"))
    name = torch.cuda.get_device_name() if on_cuda else platform.machine()
    print(f"{name}, torch {torch.__version__}, {arguments.threads} threads, sparse rows: {dtype}, "
          f"{arguments.tokens} tokens, {arguments.heads} heads of {arguments.head_dim}, blocks of "
          f"{arguments.block_size}; dynamic rows: n = {arguments.entries}, d = 64\n")  # fmt: skip
    with torch.inference_mode():
        sparse_rows(arguments, arguments.device, dtype)
        if arguments.updates:
            dynamic_rows(arguments, arguments.device)
