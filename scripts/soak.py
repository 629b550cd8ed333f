"""Streams N tokens through a model and records memory, bytes, latency and loss, with a plot.

    python scripts/soak.py --tokens 1000000 --out runs/soak

The default model is tiny and has random weights: what is on trial is the cache, not the model. Text
comes in single steps and in chunks of many sizes. The bound is checked after every call. The folder
gets config.json, environment.json, rows.csv, report.md and plots/soak.png.
"""

import argparse
import csv
import gc
import json
import platform
import random
import sys
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import adms

# Rows of rows.csv: enough for a plot, few enough to read.
NUM_ROWS = 400
SINGLE_STEPS_AT_A_TIME = 64
# One single step in so many is followed by one of a younger cache: see ``Record.beside``.
REFERENCE_EVERY = 4
REFERENCE_TOKENS = 4_096


def tiny_model(seed: int) -> transformers.PreTrainedModel:
    """A Llama of two layers with random weights and 256 positions."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    return transformers.LlamaForCausalLM(config).eval()


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class Text:
    """An endless, seeded text of ids: a drifting mix of repeated phrases and noise."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.vocab = vocab
        self.phrases = torch.randint(vocab, (32, 16), generator=self.generator)

    def take(self, count: int) -> torch.Tensor:
        """``[1, count]`` further ids."""
        noise = torch.randint(self.vocab, (count,), generator=self.generator)
        which = torch.randint(32, (count // 16 + 1,), generator=self.generator)
        phrases = self.phrases[which].flatten()[:count]
        keep = torch.rand(count, generator=self.generator) < 0.8
        return torch.where(keep, phrases, noise)[None]


@dataclass
class Record:
    """What is measured, in flat arrays of numbers so that measuring does not grow the process.

    A machine that others use changes its speed over the minutes of a run by more than 5%.
    ``beside`` is free of that: the CPU time of a single step over that of the step which a second
    cache, a few thousand tokens old, takes right after it.
    """

    single_at: array = field(default_factory=lambda: array("q"))
    single_wall: array = field(default_factory=lambda: array("d"))
    single_cpu: array = field(default_factory=lambda: array("d"))
    beside_at: array = field(default_factory=lambda: array("q"))
    beside: array = field(default_factory=lambda: array("d"))
    rows: list[list[float]] = field(default_factory=list)

    def reserve(self, steps: int) -> None:
        """Allocates the arrays once: their growth would look like a leak."""
        singles = (self.single_at, self.single_wall, self.single_cpu)
        for values in (*singles, self.beside_at, self.beside):
            values.frombytes(bytes(values.itemsize * steps))
            del values[:]


def soak(args: argparse.Namespace, model: Any, cache: adms.ADMSKVCache) -> tuple[Record, dict]:
    """Streams; returns the record and the totals."""
    chooser = random.Random(args.seed)
    text = Text(model.config.vocab_size, args.seed)
    record = Record()
    record.reserve(args.single_steps + SINGLE_STEPS_AT_A_TIME)
    rounds = max(1, args.single_steps // SINGLE_STEPS_AT_A_TIME)
    in_chunks = max(1, (args.tokens - rounds * SINGLE_STEPS_AT_A_TIME) // rounds)
    totals = {"calls": 0, "largest_nbytes": 0, "max_nbytes": 0, "losses_not_finite": 0}
    losses, row_every = [], max(1, rounds // NUM_ROWS)
    reference, own_text = fresh(model, cache, args.seed + 2, min(args.tokens, REFERENCE_TOKENS))
    singles: list[tuple[float, float]] = []

    def feed(count: int) -> None:
        ids = text.take(count)
        wall, cpu = time.perf_counter(), time.thread_time()
        logits = model(ids, past_key_values=cache).logits
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        totals["calls"] += 1
        nbytes, bound = cache.nbytes, cache.max_nbytes
        if nbytes > bound:
            raise SystemExit(f"bound broken at token {cache.tokens_seen}: {nbytes} > {bound}")
        totals["largest_nbytes"] = max(totals["largest_nbytes"], nbytes)
        totals["max_nbytes"] = bound
        if count == 1:
            record.single_at.append(cache.tokens_seen)
            record.single_wall.append(wall)
            record.single_cpu.append(cpu)
            singles.append((wall, cpu))
            return
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item()
        if loss != loss or loss == float("inf"):
            totals["losses_not_finite"] += 1
        losses.append(loss)

    started = time.perf_counter()
    for round_index in range(rounds):
        for step in range(SINGLE_STEPS_AT_A_TIME):
            feed(1)
            if step % REFERENCE_EVERY == REFERENCE_EVERY - 1:
                ids, cpu = own_text.take(1), time.thread_time()
                model(ids, past_key_values=reference)
                record.beside_at.append(cache.tokens_seen)
                record.beside.append(record.single_cpu[-1] / (time.thread_time() - cpu))
        left = in_chunks
        if round_index == rounds - 1:
            left = args.tokens - cache.tokens_seen
        while left > 0:
            # Short ones, ones around the size at which a call is split, and long ones.
            size = min(left, chooser.choice((2, 3, 7, 31, 63, 64, 65, 100, 129, 257, 600)))
            feed(size)
            left -= size
        if round_index % row_every == 0 or round_index == rounds - 1:
            wall = sorted(pair[0] for pair in singles)[len(singles) // 2]
            cpu = sorted(pair[1] for pair in singles)[len(singles) // 2]
            mean_loss = sum(losses) / max(len(losses), 1)
            record.rows.append(
                [
                    cache.tokens_seen,
                    time.perf_counter() - started,
                    resident_bytes(),
                    cache.nbytes,
                    cache.max_nbytes,
                    wall * 1e3,
                    cpu * 1e3,
                    mean_loss,
                ]
            )
            losses.clear()
            singles.clear()
        if time.perf_counter() - started > 30 * (1 + totals.get("reports", 0)):
            totals["reports"] = totals.get("reports", 0) + 1
            print(f"{cache.tokens_seen:,} tokens, {resident_bytes() / 2**20:.1f} MiB", flush=True)
    totals["seconds"] = time.perf_counter() - started
    return record, totals


def fresh(
    model: Any, cache: adms.ADMSKVCache, seed: int, tokens: int
) -> tuple[adms.ADMSKVCache, Text]:
    """Another cache of the same configuration that has read ``tokens``, and more text for it."""
    text = Text(model.config.vocab_size, seed)
    other = adms.enable_adms_llm(model, cache.config)
    model(text.take(tokens), past_key_values=other)
    return other, text


def young_against_old(
    args: argparse.Namespace, model: Any, old: adms.ADMSKVCache, young_tokens: int
) -> dict[str, float]:
    """Median step time of a fresh cache and of the soaked one, taken in turns.

    A busy machine changes its speed over the minutes of a run; taking turns, both see the same.
    """
    young, text = fresh(model, old, args.seed + 1, young_tokens)
    times: dict[str, list[float]] = {"young": [], "old": []}
    for _ in range(args.compare_steps):
        ids = text.take(1)
        for name, cache in (("young", young), ("old", old)):
            start = time.thread_time()
            model(ids, past_key_values=cache)
            times[name].append(time.thread_time() - start)
    return {name: sorted(own)[len(own) // 2] * 1e3 for name, own in times.items()}


def median(values: Any) -> float:
    """The middle value."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def findings(record: Record, totals: dict, compared: dict[str, float], tokens: int) -> dict:
    """The figures that must hold, from the record."""
    memory = [row[2] for row in record.rows if row[0] >= tokens / 2]
    # Warm-up: until every tier is full and the allocator has settled.
    warm = tokens * 0.02

    def ratio(values: array, places: array) -> float:
        after = [value for value, at in zip(values, places, strict=True) if at >= warm]
        tenth = max(1, len(after) // 10)
        return median(after[-tenth:]) / median(after[:tenth])

    return {
        "tokens": tokens,
        "calls": totals["calls"],
        "single_steps": len(record.single_at),
        "seconds": round(totals["seconds"], 1),
        "largest_nbytes": totals["largest_nbytes"],
        "max_nbytes": totals["max_nbytes"],
        "losses_not_finite": totals["losses_not_finite"],
        "memory_last_half_min_mib": min(memory) / 2**20,
        "memory_last_half_max_mib": max(memory) / 2**20,
        "memory_last_half_spread_percent": 100 * (max(memory) / min(memory) - 1),
        "step_cpu_last_tenth_over_first": ratio(record.single_cpu, record.single_at),
        "step_wall_last_tenth_over_first": ratio(record.single_wall, record.single_at),
        "beside_a_reference_last_tenth_over_first": ratio(record.beside, record.beside_at),
        "young_step_cpu_ms": compared["young"],
        "old_step_cpu_ms": compared["old"],
        "old_over_young": compared["old"] / compared["young"],
    }


COLUMNS = (
    "tokens_seen",
    "seconds",
    "resident_bytes",
    "nbytes",
    "max_nbytes",
    "step_wall_ms",
    "step_cpu_ms",
    "loss",
)


def write_plot(rows: list[list[float]], path: Path) -> None:
    """Memory, cache bytes, step time and loss over the stream."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens = [row[0] for row in rows]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.5), sharex=True)
    panels = axes.flatten()
    panels[0].plot(tokens, [row[2] / 2**20 for row in rows])
    panels[0].set(title="process memory (MiB)", ylim=(0, None))
    panels[1].plot(tokens, [row[3] / 1024 for row in rows], label="cache.nbytes")
    panels[1].plot(tokens, [row[4] / 1024 for row in rows], "--", label="cache.max_nbytes")
    panels[1].set(title="cache (KiB)", ylim=(0, None))
    panels[1].legend(loc="lower right")
    panels[2].plot(tokens, [row[6] for row in rows], label="CPU time")
    panels[2].plot(tokens, [row[5] for row in rows], alpha=0.4, label="wall")
    panels[2].set(title="median single step (ms)", ylim=(0, None), xlabel="tokens seen")
    panels[2].legend(loc="lower right")
    panels[3].plot(tokens, [row[7] for row in rows])
    panels[3].set(title="loss (nats per token)", xlabel="tokens seen")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_folder(
    out: Path, args: argparse.Namespace, cache: Any, record: Record, found: dict
) -> None:
    """config.json, environment.json, rows.csv, report.md and the plot."""
    out.mkdir(parents=True, exist_ok=True)
    options = {name: value for name, value in vars(args).items() if name != "out"}
    settings = {"command": options, "cache": cache.config.to_dict(), "sizes": vars(cache.sizes)}
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "adms": adms.__version__,
        "threads": torch.get_num_threads(),
    }
    (out / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    with open(out / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(record.rows)
    write_plot(record.rows, out / "plots" / "soak.png")
    shown = "\n".join(
        f"| {name.replace('_', ' ')} | "
        f"{f'{value:,}' if isinstance(value, int) else f'{value:,.4f}'} |"
        for name, value in found.items()
    )
    arguments = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())
    (out / "report.md").write_text(
        f"# Soak\n\n`python scripts/soak.py {arguments}`\n\n"
        f"| what | value |\n|---|---|\n{shown}\n\n"
        "Step times compare medians of single steps; CPU time leaves out waiting for other "
        "processes. `beside a reference` divides every fourth single step by the one that a second "
        f"cache, {REFERENCE_TOKENS:,} tokens old at the start, takes right after it, so that the "
        "machine's own speed falls out. `old over young` takes turns between a fresh cache and the "
        "soaked one at the end.\n\n"
        "![soak](plots/soak.png)\n"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Soak test of the cache; see the file.")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--single-steps", type=int, default=60_000)
    parser.add_argument("--compare-steps", type=int, default=3_000)
    parser.add_argument("--model", default="tiny", help="tiny, smollm2, a folder or a hub id")
    parser.add_argument("--recent-size", type=int, default=64)
    parser.add_argument("--compressed-budget", type=int, default=64)
    parser.add_argument("--importance-ratio", type=float, default=0.1)
    parser.add_argument("--compressor-type", default="low_rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    if args.single_steps >= args.tokens:
        parser.error("--single-steps must be smaller than --tokens")
    return args


@torch.no_grad()
def main() -> int:
    """Runs the soak; returns 1 where a figure that must hold does not."""
    args = arguments()
    if args.model == "tiny":
        model = tiny_model(args.seed)
    else:
        from adms.evaluation.models import load_model

        model, _ = load_model(args.model)
    cache = adms.enable_adms_llm(
        model,
        recent_size=args.recent_size,
        compressed_budget=args.compressed_budget,
        importance_ratio=args.importance_ratio,
        compressor_type=args.compressor_type,
    )
    gc.collect()
    record, totals = soak(args, model, cache)
    if cache.tokens_seen != args.tokens:
        raise SystemExit(f"streamed {cache.tokens_seen} tokens instead of {args.tokens}")
    compared = young_against_old(args, model, cache, min(args.tokens, 20_000))
    found = findings(record, totals, compared, args.tokens)
    write_folder(args.out, args, cache, record, found)
    print(json.dumps(found, indent=2))
    failed = [
        name
        for name, holds in (
            ("loss is finite", found["losses_not_finite"] == 0),
            ("memory flat within 1%", found["memory_last_half_spread_percent"] <= 1),
            # Beside one another, since a machine that others use changes its speed during the run.
            (
                "step time within 5%",
                abs(found["beside_a_reference_last_tenth_over_first"] - 1) <= 0.05,
            ),
            ("as fast as a fresh cache", abs(found["old_over_young"] - 1) <= 0.05),
        )
        if not holds
    ]
    for name in failed:
        print(f"does not hold: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
