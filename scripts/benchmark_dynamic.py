"""Times a lazily updated attention against attending again, and writes a folder with the results.

    python scripts/benchmark_dynamic.py --output outputs/dynamic
    python scripts/benchmark_dynamic.py --entries 1737 --queries 192 --changes 8 --updates 200

A round changes keys with `update_key` and reads all rows. Over at least as many changes as there
are entries, every row is summed afresh once, so that the mean has that cost in it. "SDPA" attends
again in float32; "float64" is the same object made to sum everything at every read; "set up" is
what its first sums take. On a CPU times are of the process's CPU, which a busy machine hardly
changes; on CUDA they are of the clock, with the device's work done.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from adms.attention.dynamic import DynamicAttention
from adms.evaluation.run_folder import Row, markdown_table, write_run

# Between two rounds in which what it is compared with is timed too.
COMPARE_EVERY = 100
SIZE = 64


def milliseconds(call: Callable[[], object], on_cuda: bool) -> float:
    """Time of one call, with the device's work done."""
    if on_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if on_cuda else time.process_time
    start = clock()
    call()
    if on_cuda:
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def measure(heads: int, chunk_size: int | None, arguments: argparse.Namespace) -> Row:
    """One way to hold the scores, at one number of heads."""
    entries, changes = arguments.entries, arguments.changes
    on_cuda = arguments.device.startswith("cuda")
    shape = (1, heads, entries, SIZE)
    k, v = (torch.randn(shape, device=arguments.device) for _ in range(2))
    q = torch.randn(1, heads, arguments.queries or entries, SIZE, device=arguments.device)
    # Exchanges what changes in a round; the other one sums everything at every read.
    lazy = DynamicAttention(q, k, v, lazy_threshold=max(8, changes), chunk_size=chunk_size)
    summed = DynamicAttention(q, k, v, lazy_threshold=0, chunk_size=chunk_size)

    def round_of(attention: DynamicAttention, step: int) -> None:
        changed = [(step * changes + place) % entries for place in range(changes)]
        attention.update_key(changed, k[..., [place - 1 for place in changed], :])
        attention.output()

    def set_up() -> None:
        DynamicAttention(q, k, v, chunk_size=chunk_size)

    times, dense, exact, first = [], [], [], []
    for step in range(arguments.updates):
        times.append(milliseconds(lambda now=step: round_of(lazy, now), on_cuda))
        if step % COMPARE_EVERY == 0:
            dense.append(milliseconds(lambda: scaled_dot_product_attention(q, k, v), on_cuda))
            exact.append(milliseconds(lambda now=step: round_of(summed, now), on_cuda))
            first.append(milliseconds(set_up, on_cuda))
    return {
        "heads": heads,
        "chunk_size": chunk_size,
        "round_ms_median": statistics.median(times),
        "round_ms_mean": statistics.mean(times),
        "sdpa_ms": statistics.median(dense),
        "float64_ms": statistics.median(exact),
        "set_up_ms": statistics.median(first),
        "nbytes": lazy.nbytes,
    }


def display(row: Row) -> Row:
    """A row in the columns that people read."""
    chunk, base = row["chunk_size"], row["sdpa_ms"]
    median, mean = row["round_ms_median"], row["round_ms_mean"]
    return {
        "heads": row["heads"],
        "scores": "kept" if chunk is None else f"in chunks of {chunk}",
        "round ms, median": f"{median:.2f}",
        "mean": f"{mean:.2f}",
        "SDPA ms": f"{base:.2f}",
        "faster (median, mean)": f"{base / median:.1f}x, {base / mean:.1f}x",
        "float64 ms": f"{row['float64_ms']:.2f}",
        "faster (mean)": f"{row['float64_ms'] / mean:.1f}x",
        "set up ms": f"{row['set_up_ms']:.2f}",
        "MiB held": f"{row['nbytes'] / 2**20:.0f}",
    }


def main() -> None:
    """Times the cases and prints the report."""
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--entries", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=None, help="as many as entries by default")
    parser.add_argument("--changes", type=int, default=1, help="keys changed in a round")
    parser.add_argument("--heads", type=int, nargs="+", default=[1])
    parser.add_argument("--updates", type=int, default=4300, help="rounds")
    parser.add_argument("--output", type=Path, default=Path("outputs/dynamic"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for heads in arguments.heads:
            for chunk_size in (None, 64):
                rows.append(measure(heads, chunk_size, arguments))
                print(display(rows[-1]), flush=True)
    name = torch.cuda.get_device_name() if arguments.device != "cpu" else platform.machine()
    about = (
        f"{name}, torch {torch.__version__}, one CPU thread, float32 inputs, "
        f"{arguments.entries} entries, {arguments.queries or arguments.entries} queries, size "
        f"{SIZE}; {arguments.updates} rounds of {arguments.changes} changed keys and a read."
    )
    body = f"{about}\n\n{markdown_table([display(row) for row in rows])}"
    config = {name: value for name, value in vars(arguments).items() if name != "output"}
    print(write_run(arguments.output, "Lazily updated attention", config, rows, body))


if __name__ == "__main__":
    main()
