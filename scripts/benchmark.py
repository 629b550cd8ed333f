"""Times a token through ``generate`` for several caches, and writes a folder with the results.

    python scripts/benchmark.py --model llama-3-8b --device cuda --dtype bfloat16 \
        --positions 2048,8192,32768 --batches 1,4,16 --output outputs/benchmark

The folder holds ``config.json``, ``environment.json``, ``rows.csv``, ``report.md`` and ``plots/``.
Weights and the directions of the code are random: times do not depend on them.
"""

import argparse
import gc
from pathlib import Path

import torch

from adms import ADMSConfig
from adms.evaluation.latency import METHODS, measure_all, random_llama
from adms.evaluation.plots.latency import plot_latency
from adms.evaluation.run_folder import (
    Row,
    command_line,
    csv_text,
    environment,
    markdown_table,
    write_atomic,
    write_json,
)
from adms.kernels import KERNELS


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def show(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", choices=["llama-3-8b", "smollm2-135m", "tiny"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--positions", type=numbers, default=[2048])
    parser.add_argument("--batches", type=numbers, default=[1])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--start-size", type=int, default=4)
    parser.add_argument("--compressed-budget", type=int, default=256)
    parser.add_argument("--recent-size", type=int, default=512)
    parser.add_argument("--compressor-type", default="low_rank")
    parser.add_argument("--kernel", default="auto", choices=KERNELS)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model = random_llama(arguments.model, device, getattr(torch, arguments.dtype))
    config = ADMSConfig(
        start_size=arguments.start_size,
        compressed_budget=arguments.compressed_budget,
        recent_size=arguments.recent_size,
        compressor_type=arguments.compressor_type,
    )
    gc.freeze()
    rows: list[Row] = measure_all(
        model,
        arguments.methods.split(","),
        config,
        batches=arguments.batches,
        positions=arguments.positions,
        tokens=arguments.tokens,
        kernel=arguments.kernel,
        random_code=True,
        on_row=lambda row: print({name: show(value) for name, value in row.items()}, flush=True),
    )
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = [{name: row.get(name) for name in columns} for row in rows]
    folder = arguments.output
    write_json(folder / "config.json", {**vars(arguments), "output": str(folder)})
    write_json(folder / "environment.json", environment())
    write_atomic(folder / "rows.csv", csv_text(table))
    report = f"# Milliseconds per token\n\n    {command_line()}\n\n{markdown_table(table, show)}"
    write_atomic(folder / "report.md", report)
    plot_latency(table, folder / "plots")
    print(report)


if __name__ == "__main__":
    main()
