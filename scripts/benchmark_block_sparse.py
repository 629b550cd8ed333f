"""Times hard block-sparse attention against dense SDPA, and writes a folder with the results.

    python scripts/benchmark_block_sparse.py --output outputs/block_sparse
    python scripts/benchmark_block_sparse.py --device cuda --block-size 128 --sparsities 0.9 \
        --cases bfloat16:32x128x8192,float32:16x64x8192

Timed are attention alone ("kernel"), the choice of blocks by an untrained scorer ("selection"), and
both in one call ("module"), on random inputs; "faster" compares dense attention with the module.
On a CPU times are of the process's CPU, which a busy machine hardly changes.

On CUDA they are recorded in a CUDA graph, as servers run them, so that what the device computes is
timed and not how fast Python launches it; "calls in turn" are calls one after the other. "Dense" is
PyTorch's own choice, and in half precision also its flash kernel.
"""

import argparse
import functools
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from adms.attention.block_sparse import AdaptiveConfig, BlockSparseAdaptive, block_sparse_attention
from adms.evaluation.run_folder import Row, markdown_table, write_run

Call = Callable[[], object]
IN_TURN, IN_A_GRAPH = "in turn", "in a graph"


class Case(NamedTuple):
    """A shape to time."""

    dtype: str
    heads: int
    head_dim: int
    tokens: int


def cases(text: str) -> list[Case]:
    """Shapes from ``DTYPE:HEADSxSIZExTOKENS`` with commas between."""
    found = []
    for word in text.split(","):
        parts = re.fullmatch(r"(float32|bfloat16|float16):(\d+)x(\d+)x(\d+)", word.strip())
        if parts is None:
            raise argparse.ArgumentTypeError(
                f"a case is DTYPE:HEADSxSIZExTOKENS, e.g. float32:4x64x8192, got {word!r}"
            )
        found.append(Case(parts[1], int(parts[2]), int(parts[3]), int(parts[4])))
    return found


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Call) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def device_seconds(call: Call, count: int = 20) -> float:
    """Mean time of one of many calls, launched one after the other."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count / 1e3


def milliseconds(calls: list[Call], repeats: int, on_cuda: bool) -> list[float]:
    """Median time of each call, taken in turns so that a busy machine slows all alike."""
    for call in calls:
        # Once to compile, once to settle.
        call()
        call()
    settle()
    of_one = device_seconds if on_cuda else seconds
    rounds = [[of_one(call) for call in calls] for _ in range(repeats)]
    return [1e3 * statistics.median(times) for times in zip(*rounds, strict=True)]


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


def measure(case: Case, causal: bool, asked: float, arguments: argparse.Namespace) -> list[Row]:
    """A row for calls in turn, and on CUDA one for a graph before it."""
    on_cuda = arguments.device.startswith("cuda")
    dtype, block_size = getattr(torch, case.dtype), arguments.block_size
    shape = (1, case.tokens, case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, device=arguments.device, dtype=dtype) for _ in range(3))
    q_, k_, v_ = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    config = AdaptiveConfig(base_sparsity=asked, budget_range=0.0, block_size=block_size)
    segments = [case.tokens // 4, case.tokens // 2, case.tokens]
    module = BlockSparseAdaptive(segments, [1, 2, 4], case.heads, case.head_dim, config)
    module = module.to(arguments.device).eval()
    blocks, sparsity = module.block_weights(q_, k_, causal)
    calls: dict[str, Call] = {
        "dense_ms": functools.partial(scaled_dot_product_attention, q_, k_, v_, is_causal=causal),
        "kernel_ms": functools.partial(
            block_sparse_attention, q_, k_, v_, blocks, block_size, is_causal=causal
        ),
        "selection_ms": functools.partial(module.block_weights, q_, k_, causal),
        "module_ms": functools.partial(module, q, k, v, causal),
    }
    if on_cuda and case.dtype != "float32":
        calls["dense_flash_ms"] = functools.partial(flash, q_, k_, v_, causal)
    rows = []
    for how in (IN_A_GRAPH, IN_TURN) if on_cuda else (IN_TURN,):
        timed = [recorded(call) if how == IN_A_GRAPH else call for call in calls.values()]
        found = dict(zip(calls, milliseconds(timed, arguments.repeats, on_cuda), strict=True))
        share = float(sparsity.mean())
        rows.append({**case._asdict(), "causal": causal, "sparsity": share, "calls": how, **found})
    return rows


def display(rows: list[Row]) -> list[Row]:
    """The rows of one case as one row, in the columns that people read."""
    shown = []
    for row in rows:
        bases = [row[name] for name in ("dense_ms", "dense_flash_ms") if name in row]
        faster = " / ".join(f"{base / row['module_ms']:.1f}x" for base in bases)
        if row["calls"] == IN_TURN and shown and rows[0]["calls"] == IN_A_GRAPH:
            shown[-1] |= {
                "module ms, calls in turn": f"{row['module_ms']:.2f}",
                "faster, calls in turn": faster,
            }
            continue
        shown.append(
            {
                "dtype": row["dtype"],
                "heads x size": f"{row['heads']} x {row['head_dim']}",
                "tokens": row["tokens"],
                "causal": "yes" if row["causal"] else "no",
                "sparsity": f"{row['sparsity']:.1%}",
                "dense ms": " / ".join(f"{base:.2f}" for base in bases),
                **{
                    f"{name} ms": f"{row[f'{name}_ms']:.2f}"
                    for name in ("kernel", "selection", "module")
                },
                "faster": faster,
            }
        )
    return shown


def main() -> None:
    """Times the cases and prints the report."""
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument(
        "--cases", type=cases, default="float32:4x64x8192", help="DTYPE:HEADSxSIZExTOKENS,..."
    )
    parser.add_argument("--sparsities", type=numbers, default="0.5,0.9,0.95")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--output", type=Path, default=Path("outputs/block_sparse"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.inference_mode():
        for case in arguments.cases:
            for causal in (False, True):
                for asked in arguments.sparsities:
                    rows += measure(case, causal, asked, arguments)
                    print(display(rows[-2:])[-1], flush=True)
    name = torch.cuda.get_device_name() if arguments.device != "cpu" else platform.machine()
    about = (
        f"{name}, torch {torch.__version__}, one CPU thread, blocks of "
        f"{arguments.block_size}, medians of {arguments.repeats}."
    )
    body = f"{about}\n\n{markdown_table(display(rows))}"
    config = {**vars(arguments), "cases": [case._asdict() for case in arguments.cases]}
    del config["output"]
    print(write_run(arguments.output, "Block-sparse attention", config, rows, body))


if __name__ == "__main__":
    main()
