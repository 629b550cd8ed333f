"""Times a token through several caches side by side, and writes a folder with the results.

    python scripts/benchmark.py --model llama-3-8b --device cuda --dtype bfloat16
    python scripts/benchmark.py --model smollm2 --device cpu
    python scripts/benchmark.py --only sweep --positions 2048,8192 --batches 1,4,16

Parts (``--only``, by default those that fit the device):

- ``batch1``: a compiled StaticCache of as many exact slots, StreamingLLM, ADMS along the stream;
- ``batch16``: ADMS against the same cache without a middle;
- ``context32k``: DynamicCache and StaticCache filled with random keys, against ADMS;
- ``prefill``: a long prompt in chunks against dense prefill of one chunk;
- ``memory``: the device's peak against what must be held;
- ``crossover``: from which context on a token costs less than with DynamicCache;
- ``first_call``: seconds of the first tokens, in which the step is compiled and captured; a second
  run of the command shows what the compilers find in their caches on disk;
- ``sweep``: every cache of ``--methods`` at ``--positions`` and ``--batches``.

The folder holds ``config.json``, ``environment.json``, ``rows.csv``, ``report.md`` and ``plots/``;
it is written anew after every part, so that a run that is cut short keeps what it has. Far
positions are reached by advancing a cache's counts. ``smollm2`` has its own weights and code and
reads a text; other models are random, with random directions in place of a fitted code.
"""

import argparse
import gc
import pydoc_data.topics
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch

from adms import ADMSConfig
from adms.evaluation.latency import METHODS, measure_all
from adms.evaluation.models import SMOLLM2, load_model
from adms.evaluation.random_models import random_llama
from adms.evaluation.run_folder import Row
from adms.evaluation.speed_bench import Bench
from adms.evaluation.speed_parts import PARTS
from adms.evaluation.speed_report import SpeedReport
from adms.kernels import KERNELS

ON_CUDA = ("batch1", "batch16", "context32k", "prefill", "memory")
ON_CPU = ("crossover",)
SWEEP = "sweep"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shapes = ["llama-3-8b", "smollm2-135m", "tiny", SMOLLM2]
    parser.add_argument("--model", default="tiny", choices=shapes)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="of sweep")
    parser.add_argument("--positions", type=numbers, default=None)
    parser.add_argument("--batches", type=numbers, default=[1], help="of sweep")
    parser.add_argument("--tokens", type=int, default=64, help="timed for each row")
    parser.add_argument("--batch", type=int, default=Bench.batch, help="of batch16")
    parser.add_argument("--context", type=int, default=None, help="of context32k and crossover")
    parser.add_argument("--context-batch", type=int, default=Bench.context_batch)
    parser.add_argument("--prompt", type=int, default=Bench.prompt, help="of prefill")
    parser.add_argument("--chunks", type=numbers, default=list(Bench.chunks), help="of prefill")
    parser.add_argument("--start-size", type=int, default=4)
    parser.add_argument("--compressed-budget", type=int, default=256)
    parser.add_argument("--recent-size", type=int, default=512)
    parser.add_argument("--compressor-type", default="low_rank")
    parser.add_argument("--kernel", default="auto", choices=KERNELS)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"))
    arguments = parser.parse_args()
    arguments.parts = [part for part in arguments.only.split(",") if part]
    if not arguments.parts:
        arguments.parts = list(ON_CUDA if arguments.device.startswith("cuda") else ON_CPU)
    known = (*PARTS, SWEEP)
    unknown = [part for part in arguments.parts if part not in known]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; the parts are {', '.join(known)}")
    arguments.methods = list(dict.fromkeys(arguments.methods.split(",")))
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown cache {unknown[0]!r}; the caches are {', '.join(METHODS)}")
    return arguments


def parts_rows(name: str, arguments: argparse.Namespace, bench: Bench) -> Iterable[Row]:
    """The rows of a part, as they come."""
    if name in PARTS:
        return PARTS[name].rows(bench)
    return measure_all(
        bench.model,
        arguments.methods,
        bench.config,
        batches=arguments.batches,
        positions=arguments.positions or [2048],
        tokens=arguments.tokens,
        kernel=arguments.kernel,
        random_code=bench.random_code,
    )


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    report = SpeedReport(arguments.output, vars(arguments))
    start, text = time.perf_counter(), None
    if arguments.model == SMOLLM2:
        model, tokenizer = load_model(SMOLLM2, arguments.dtype, device)
        model.generation_config.eos_token_id = None
        words = "\n\n".join(pydoc_data.topics.topics.values())[:20_000]
        text = tokenizer(words, return_tensors="pt")["input_ids"]
    else:
        model = random_llama(arguments.model, device, getattr(torch, arguments.dtype))
    config = ADMSConfig(
        start_size=arguments.start_size,
        compressed_budget=arguments.compressed_budget,
        recent_size=arguments.recent_size,
        compressor_type=arguments.compressor_type,
    )
    gc.freeze()
    bench = Bench(
        model,
        config,
        kernel=arguments.kernel,
        tokens=arguments.tokens,
        positions=tuple(arguments.positions or Bench.positions),
        batch=arguments.batch,
        context=arguments.context or (32768 if device.type == "cuda" else 8192),
        context_batch=arguments.context_batch,
        prompt=arguments.prompt,
        chunks=tuple(arguments.chunks),
        ids=text,
        random_code=text is None,
    )
    failed = []
    for name in arguments.parts:
        rows: list[Row] = []
        try:
            for row in parts_rows(name, arguments, bench):
                report.show(row)
                rows.append(row)
        except Exception:
            # Said, counted below, and no reason to lose the parts that follow.
            traceback.print_exc()
            failed.append(name)
        finally:
            # Also where the run is cut short.
            title = PARTS[name].title if name in PARTS else "Sweep"
            goals = PARTS[name].goals(bench, rows) if name in PARTS else []
            report.add(name, title, rows, goals)
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
