"""CPU time of one layer's attention over a chunk, dense and sparse, written into a folder.

Random inputs; the choice of blocks is included. Times are of this process's CPU, medians of rounds
in which every way takes its turn.

    python scripts/benchmark_sparse_prefill.py [--cases 2048x64,8192x512] [--heads 9] [--kv-heads 3]
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from adms.attention.grouped import grouped_attention
from adms.attention.sparse_prefill import SparsePrefillConfig, attend_sparsely
from adms.attention.sparse_scores import cut_blocks
from adms.evaluation.run_folder import Row, markdown_table, write_run

WAYS = {
    "50%": SparsePrefillConfig(density=0.5),
    "25%": SparsePrefillConfig(density=0.25),
    "10%": SparsePrefillConfig(density=0.1),
    "10%, every 16th query sampled": SparsePrefillConfig(density=0.1, sample_every=16),
}
SINKS = 4


def cases(text: str) -> list[tuple[int, int]]:
    """Entries and chunks from ``ENTRIESxCHUNK`` with commas between."""
    found = []
    for word in text.split(","):
        parts = re.fullmatch(r"(\d+)x(\d+)", word.strip())
        if parts is None or int(parts[2]) >= int(parts[1]):
            raise argparse.ArgumentTypeError(
                f"a case is ENTRIESxCHUNK, the chunk the smaller, e.g. 2048x64, got {word!r}"
            )
        found.append((int(parts[1]), int(parts[2])))
    return found


def measure(entries: int, chunk: int, arguments: argparse.Namespace) -> Row:
    """CPU milliseconds of each way to attend."""
    size, kv_heads = arguments.head_dim, arguments.kv_heads
    query = torch.randn(1, arguments.heads, chunk, size)
    keys, values = (torch.randn(1, kv_heads, entries, size) for _ in range(2))
    bias = torch.zeros(1, 1, chunk, entries)
    later = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
    bias[..., entries - chunk :].masked_fill_(later, torch.finfo(bias.dtype).min)
    scaling = size**-0.5
    calls: dict[str, Callable[[], object]] = {
        "dense": partial(
            grouped_attention, query, keys, values, bias, is_causal=False, scaling=scaling
        )
    }
    for name, config in WAYS.items():
        held = torch.arange(float(entries - chunk))[None]
        blocks = cut_blocks(held, None, None, chunk, config.block_size)
        calls[name] = partial(
            attend_sparsely, config, 0, blocks, query, keys, values, bias,
            sinks=SINKS, scaling=scaling,
        )  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in calls}
    # The first round is for warming up.
    for round_ in range(arguments.repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if round_:
                times[name].append(1e3 * (time.process_time() - start))
    found = {name: statistics.median(own) for name, own in times.items()}
    return {"entries": entries, "chunk": chunk, **found}


def main() -> None:
    """Times the cases and prints the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=cases, default="2048x64,8192x64,8192x512,16384x512")
    parser.add_argument("--heads", type=int, default=9, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("outputs/sparse_prefill_layer"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [measure(*case, arguments) for case in arguments.cases]
    shown = [
        {name: f"{value:.1f}" if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    ]
    about = (
        f"CPU milliseconds of one layer's attention: {arguments.heads} query and "
        f"{arguments.kv_heads} KV heads of {arguments.head_dim}, float32, torch "
        f"{torch.__version__}, one thread, medians of {arguments.repeats}."
    )
    config = {name: value for name, value in vars(arguments).items() if name != "output"}
    body = f"{about}\n\n{markdown_table(shown)}"
    print(write_run(arguments.output, "Sparse prefill of one layer", config, rows, body))


if __name__ == "__main__":
    main()
