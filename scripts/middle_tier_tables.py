"""The tables of docs/middle-tier.md: every figure from an ``adms`` command in a folder of its own.

    python scripts/middle_tier_tables.py handbook.txt pydoc sotu.txt --output outputs/middle-tier
        [--tables sizes,methods,compressors,settings,sinks,recall,capacity,texts,beyond]
        [--model smollm2] [--devices cuda:0,cuda:1] [--jobs 8] [--list]

``--list`` prints the commands and runs none. The same call goes on where a kill or ``--limit``
seconds left off. ``report.md`` has the tables of what is finished; below each stand its commands.
Recall uses the last text. Sizes are sinks + budget + recent tokens; all else is the default
configuration unless a row names it.
"""

import argparse
import contextlib
import csv
import functools
import gc
import itertools
import math
import os
import queue
import re
import shlex
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import Queue, get_context
from pathlib import Path

from adms.evaluation.run_folder import Row, markdown_table, write_atomic
from adms.evaluation.settings import short_name
from adms.evaluation.statistics import gap_closed

SIZES = {256: (124, 128), 512: (252, 256), 1024: (508, 512)}
COMPRESSORS = ("low_rank", "auto", "quantized", "pq", "vq", "summary", "attention_matching")
COMPARED = "full,window,streaming,adms"
MEAN = "anchor_mode=mean"
# One parameter changed at a time; the names are those of ADMSConfig.
SETTINGS = (
    *(
        f"importance_metric={name}"
        for name in (
            *("value_norm", "key_norm", "mixed", "attention"),
            *("key_diff", "expected_attention", "snap", "coding_error", "novelty"),
        )
    ),
    *("importance_ratio=0", "importance_ratio=0.05", "importance_ratio=0.2"),
    "importance_ratio=0.5",
    "importance_ratio=0.5 importance_metric=value_norm",
    *("coverage_priority=0", "coverage_priority=1", "coverage_segments=16"),
    *("use_adaptive_budget=true", "enable_pos_shift=false"),
    *("compression_interval=1", "compression_interval=32"),
    *("prefill_chunk_size=16", "prefill_chunk_size=256"),
    MEAN,
    *(f"compressor_type=vq anchor_mode={mode}" for mode in ("mean", "grid", "hybrid")),
)
DEPTHS, FEW_DEPTHS = "0.1,0.3,0.5,0.7,0.9", "0.1,0.5,0.9"
# Stretches of each text, one after the other; the first is the one that figures are quoted of.
SAMPLES = 6
LENGTHS = (1024, 2048, 4096, 8064, 16384, 32768, 65536)


@dataclass(frozen=True)
class Job:
    """One ``adms`` command.

    Attributes:
        table: that it belongs to.
        row, column: where its figures stand.
        arguments: of ``adms``.
    """

    table: str
    row: tuple[str, ...]
    column: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        words = " ".join([self.table, *self.row, self.column])
        return "".join(letter if letter.isalnum() else "-" for letter in words).lower()


def sizes(size: int) -> list[str]:
    """The options that set sinks + budget + recent to ``size`` tokens."""
    budget, recent = SIZES[size]
    return ["--compressed-budget", str(budget), "--recent-size", str(recent)]


def with_settings(words: str) -> list[str]:
    """``NAME=VALUE`` words as options; sinks have one of their own."""
    options = []
    for word in words.split():
        name, _, value = word.partition("=")
        options += ["--start-size", value] if name == "start_size" else ["--set", word]
    return options


def stream(text: str, tokens: int, first: int, methods: str, size: int, *more: str) -> list[str]:
    """``adms eval`` of tokens after the 2000th of a text, and of the five stretches after those."""
    place = ["--offset", "2000", "--tokens", str(tokens), "--measure-from", str(first)]
    streams = ["--samples", str(SAMPLES), "--together", str(SAMPLES)]
    return ["eval", "--text", text, *place, *streams, "--methods", methods, *sizes(size), *more]


def size_jobs(texts: Sequence[str]) -> Iterable[Job]:
    """Caches of three sizes on every text, two lengths, two dtypes."""
    for dtype, tokens, size, text in itertools.product(
        ("float32", "bfloat16"), (4096, 8192), SIZES, texts
    ):
        # From where every cache but those of 1024 has long overflowed.
        first = 1280 if size < 1024 else 2560
        arguments = stream(text, tokens, first, COMPARED, size, "--dtype", dtype)
        yield Job(
            "sizes",
            (short_name(text), str(tokens), dtype, str(size)),
            "",
            tuple(arguments),
        )


def method_jobs(texts: Sequence[str]) -> Iterable[Job]:
    """Every method at 512 tokens."""
    for text in texts:
        place = ["--offset", "2000", "--tokens", "4096", "--measure-from", "1280"]
        arguments = ("eval", "--text", text, *place, "--methods", "all", *sizes(512))
        yield Job("methods", (), short_name(text), arguments)


def compressor_jobs(texts: Sequence[str]) -> Iterable[Job]:
    """Every compressor at 512 tokens."""
    for name, text in itertools.product(COMPRESSORS, texts):
        arguments = stream(text, 4096, 1280, "adms", 512)
        arguments += with_settings(f"compressor_type={name}")
        yield Job("compressors", (name,), short_name(text), tuple(arguments))


def setting_jobs(texts: Sequence[str]) -> Iterable[Job]:
    """The default with one setting changed, at 512 tokens."""
    for words, text in itertools.product(("", *SETTINGS), texts):
        # The others of the same text are those of the first row.
        methods = "adms" if words else "full,streaming,adms"
        arguments = stream(text, 4096, 1280, methods, 512, *with_settings(words))
        yield Job("settings", (words or "default",), short_name(text), tuple(arguments))


def sink_jobs(texts: Sequence[str]) -> Iterable[Job]:
    """Sinks of 1% of the longest context against four, in the same bytes, far past 16K tokens."""
    text = texts[-1]
    for words, budget in (
        ("start_size=4", 508),
        ("enable_dynamic_sink=true max_seq_length=16384", 349),
        ("enable_dynamic_sink=true max_seq_length=32768", 185),
    ):
        options = ["--compressed-budget", str(budget), "--recent-size", "512"]
        place = ["--offset", "2000", "--tokens", "24576", "--measure-from", "16384"]
        options += ["--methods", "streaming,adms", *with_settings(words)]
        streams = ["--samples", "4", "--together", "4"]
        arguments = ["eval", "--text", text, *place, *streams, *options]
        yield Job("sinks", (words, str(budget)), short_name(text), tuple(arguments))


def question(
    text: str,
    kind: str,
    length: int,
    methods: str,
    *more: str,
    trials: int = 10,
    most_stride: int = 24000,
) -> tuple[str, ...]:
    """``adms passkey`` with so many questions a cell, in bfloat16: the long ones are for a GPU."""
    # Ten texts of 65,536 tokens that begin so far apart fit into 288,000.
    stride = min(length, most_stride)
    asked = ["--trials", str(trials), "--together", "50", "--stride", str(stride)]
    place = ["--text", text, "--kinds", kind, "--lengths", str(length), "--dtype", "bfloat16"]
    return ("passkey", *place, *asked, "--methods", methods, *more)


def recall_jobs(texts: Sequence[str]) -> Iterable[Job]:
    """Passkeys and one of several keys by depth, length and method at 512 tokens."""
    text = texts[-1]
    for kind, length in itertools.product(("passkey", "multikey"), LENGTHS):
        depths = ("--depths", DEPTHS if length <= 16384 else FEW_DEPTHS)
        # The model has read no more than 8192 tokens at a time.
        methods = ["adms", "streaming"] + (["full"] if length < 8192 else [])
        for method in methods:
            arguments = question(text, kind, length, method, *depths)
            yield Job("recall", (kind, method), str(length), arguments)
        if length > 2048:  # before that nothing is older than all codes
            arguments = question(text, kind, length, "adms", *depths, *with_settings(MEAN))
            yield Job("recall", (kind, MEAN), str(length), arguments)
        for name in COMPRESSORS[1:]:
            words = f"compressor_type={name}"
            chosen = ["--depths", FEW_DEPTHS, *with_settings(words)]
            arguments = question(text, kind, length, "adms", *chosen)
            yield Job("recall", (kind, name), str(length), arguments)
            if length > 1024:  # most of these hold fewer tokens than the default
                arguments = (*arguments, *with_settings(MEAN))
                yield Job("recall", (kind, f"{name} {MEAN}"), str(length), arguments)


def capacity_jobs(texts: Sequence[str]) -> Iterable[Job]:
    """What is lost within the capacity of some 2,170 tokens: 200 questions a cell, two texts."""
    for text, (kind, length), (method, words) in itertools.product(
        (texts[0], texts[-1]),
        (("passkey", 1024), ("passkey", 2048), ("multikey", 2048)),
        (("full", ""), ("adms", ""), ("adms", "importance_ratio=0.2")),
    ):
        options = ("--depths", DEPTHS, *with_settings(words))
        arguments = question(text, kind, length, method, *options, trials=40)
        yield Job("capacity", (short_name(text), words or method), f"{kind} {length}", arguments)


def text_jobs(texts: Sequence[str]) -> Iterable[Job]:
    """Passkeys at 512 tokens in the other texts, by what chooses the landmarks."""
    for text, length, words in itertools.product(
        texts[:-1],
        (2048, 4096, 8064, 16384),
        ("", "importance_metric=novelty", "importance_ratio=0"),
    ):
        chosen = ("--depths", FEW_DEPTHS, *with_settings(words))
        # Ten texts that begin so far apart fit into 100,000 tokens.
        arguments = question(text, "passkey", length, "adms", *chosen, most_stride=9000)
        yield Job("texts", (short_name(text), words or "default"), str(length), arguments)


def beyond_jobs(texts: Sequence[str]) -> Iterable[Job]:
    """What survives when a middle of some 1,000 tokens has seen many times as much."""
    text = texts[-1]
    for words, length in itertools.product(
        (
            *("", "importance_metric=novelty", "importance_metric=value_norm"),
            *("coverage_priority=1", "importance_ratio=0"),
        ),
        (1024, 2048, 4096, 16384, 65536),
    ):
        arguments = question(text, "passkey", length, "adms", "--depths", FEW_DEPTHS, *sizes(256))
        arguments += tuple(with_settings(words))
        yield Job("beyond", (words or "default",), str(length), arguments)


TABLES: dict[str, Callable[[Sequence[str]], Iterable[Job]]] = {
    "sizes": size_jobs,
    "methods": method_jobs,
    "compressors": compressor_jobs,
    "settings": setting_jobs,
    "sinks": sink_jobs,
    "recall": recall_jobs,
    "capacity": capacity_jobs,
    "texts": text_jobs,
    "beyond": beyond_jobs,
}


def work(
    waiting: "Queue[Job | None]",
    ended: "Queue[tuple[Job, str, float]]",
    asked: argparse.Namespace,
    device: str,
) -> None:
    """One process: ``adms`` commands one after the other, the model loaded once for each dtype."""
    import torch
    import typer

    from adms.cli import app
    from adms.evaluation import runner

    runner.load_model = functools.cache(runner.load_model)
    while (job := waiting.get()) is not None:
        start, said = time.monotonic(), "done"
        own = ["--model", asked.model, "--device", device, "--output", str(asked.output / job.name)]
        sys.argv = ["adms", *job.arguments]
        with (
            (asked.output / f"{job.name}.log").open("w") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            try:
                code = app([*job.arguments, *own], standalone_mode=False)
            except (typer.Exit, SystemExit) as error:
                code = getattr(error, "exit_code", getattr(error, "code", 1))
            except Exception:  # of one job; the others go on, and the log says what it was
                traceback.print_exc()
                code = 1
        if code:
            said = f"failed ({code})"
        # What one job has held another process may need.
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        ended.put((job, said, time.monotonic() - start))


def run(jobs: Sequence[Job], asked: argparse.Namespace) -> None:
    """Runs what is not done yet, so many processes at a time, until the time is over."""
    open_jobs = [job for job in jobs if not (asked.output / job.name / "summary.json").is_file()]
    deadline = time.monotonic() + asked.limit
    context = get_context("spawn")
    waiting, ended = context.Queue(), context.Queue()
    for job in open_jobs:
        waiting.put(job)
    devices = asked.devices.split(",")
    processes = []
    for index in range(min(asked.jobs, len(open_jobs))):
        waiting.put(None)
        device = devices[index % len(devices)]
        processes.append(context.Process(target=work, args=(waiting, ended, asked, device)))
        processes[-1].start()
    left = len(open_jobs)
    while left and time.monotonic() < deadline and any(one.is_alive() for one in processes):
        with contextlib.suppress(queue.Empty):
            job, said, seconds = ended.get(timeout=1)
            left -= 1
            print(f"{said} {seconds:6.1f} s  {job.name}", flush=True)
    for process in processes:
        if left:
            process.kill()
        process.join()
    if left:
        print(f"{left} jobs are not done", flush=True)


@dataclass(frozen=True)
class Found:
    """What a method did to a text.

    Attributes:
        label: of the method.
        first: perplexity of the first stretch.
        every: of all stretches, the geometric mean.
        nbytes, bound: bytes of the cache, and what they never exceed.
    """

    label: str
    first: float
    every: float
    nbytes: str
    bound: str


def results(folder: Path) -> dict[str, Found]:
    """Perplexities of a finished run by method."""
    if not (folder / "summary.json").is_file():
        return {}
    groups: dict[str, list[Row]] = defaultdict(list)
    with (folder / "rows.csv").open() as file:
        for row in csv.DictReader(file):
            if row.get("perplexity"):
                groups[row["method"]].append(row)
    found = {}
    for name, rows in groups.items():
        values = [float(row["perplexity"]) for row in sorted(rows, key=lambda row: row["sample"])]
        every = math.exp(sum(map(math.log, values)) / len(values))
        first = rows[0]
        found[name] = Found(
            first["label"], values[0], every, first["cache_bytes"], first["max_bytes"]
        )
    return found


def cell(found: Found | None, ends: dict[str, Found]) -> str:
    """Perplexity, the gap closed on the first stretch, and on all of them."""
    if found is None:
        return ""
    shares = gaps(found, ends)
    shown = " / ".join("–" if share is None else f"{share:.0%}" for share in shares)
    return (
        f"{found.first:.3f} ({shown})"
        if any(share is not None for share in shares)
        else (f"{found.first:.3f}")
    )


def gaps(found: Found, ends: dict[str, Found]) -> list[float | None]:
    """The gap to the full cache that is closed on the first stretch, and on all of them."""
    if "full" not in ends or "streaming" not in ends:
        return [None, None]
    full, streaming = ends["full"], ends["streaming"]
    return [
        gap_closed(streaming.first, full.first, found.first),
        gap_closed(streaming.every, full.every, found.every),
    ]


def size_table(jobs: list[Job], output: Path) -> list[Row]:
    """One row a dtype, length, size and text."""
    table = []
    for job in jobs:
        found = results(output / job.name)
        if found:
            names = dict(zip(("text", "tokens", "dtype", "cache"), job.row, strict=True))
            shown = {
                found[name].label.split()[0] if name != "window" else "exact window": cell(
                    found[name], {} if name in ("full", "streaming") else found
                )
                for name in COMPARED.split(",")
                if name in found
            }
            table.append({**names, **shown, "max bytes": found["adms"].bound})
    return table


def method_table(jobs: list[Job], output: Path) -> list[Row]:
    """One row a method, one column a text."""
    cells: dict[str, Row] = defaultdict(dict)
    for job in jobs:
        found = results(output / job.name)
        for one in found.values():
            share = gaps(one, found)[0]
            cells[one.label][job.column] = f"{one.first:.3f}" + (
                "" if share is None else f" ({share:.0%})"
            )
            cells[one.label]["cache bytes"] = one.nbytes
    columns = [*(job.column for job in jobs), "cache bytes"]
    return [
        {"method": label, **{name: found.get(name, "") for name in columns}}
        for label, found in cells.items()
    ]


def adms_table(jobs: list[Job], output: Path) -> list[Row]:
    """One row a setting, one column a text, and the mean of the gaps over all stretches.

    The full cache and StreamingLLM that gaps are measured against are those of the settings'
    first row.
    """
    cells: dict[tuple[str, ...], dict[str, Found]] = defaultdict(dict)
    for job in jobs:
        found = results(output / job.name)
        if "adms" in found:
            cells[job.row][job.column] = found["adms"]
    columns = list(dict.fromkeys(job.column for job in jobs))
    ends = {
        job.column: results(output / job.name)
        for job in setting_jobs(columns)
        if job.row == ("default",)
    }
    table = []
    for names, values in cells.items():
        shares = [gaps(one, ends[text])[1] for text, one in values.items()]
        known = [share for share in shares if share is not None]
        shown = {text: cell(values.get(text), ends[text]) for text in columns}
        mean = f"{sum(known) / len(known):.3f}" if len(known) == len(columns) else ""
        table.append({"setting": " ".join(names), **shown, "mean": mean})
    return table


def sink_table(jobs: list[Job], output: Path) -> list[Row]:
    """One row a kind of sinks."""
    table = []
    for job in jobs:
        found = results(output / job.name)
        if found:
            names = {"sinks": job.row[0], "budget": job.row[1]}
            shown = {found[name].label.split()[0]: f"{found[name].first:.3f}" for name in found}
            table.append({**names, **shown, "max bytes": found["adms"].bound})
    return table


def recall_table(jobs: list[Job], output: Path) -> list[Row]:
    """One row a method, one column a length: right answers by depth, of ten if not said."""
    cells: dict[tuple[str, ...], Row] = defaultdict(dict)
    for job in jobs:
        folder = output / job.name
        if not (folder / "rows.csv").is_file():
            continue
        with (folder / "rows.csv").open() as file:
            answers: dict[float, list[bool]] = defaultdict(list)
            for row in csv.DictReader(file):
                if row.get("correct"):
                    answers[float(row["depth"])].append(row["correct"] == "True")
        shown = (
            f"{sum(right)}" if len(right) == 10 else f"{sum(right)} of {len(right)}"
            for _, right in sorted(answers.items())
        )
        cells[job.row][job.column] = " ".join(shown)
    columns = list(dict.fromkeys(job.column for job in jobs))
    return [
        {"what": " ".join(names), **{name: found.get(name, "") for name in columns}}
        for names, found in cells.items()
    ]


SHOWN: dict[str, Callable[[list[Job], Path], list[Row]]] = {
    "sizes": size_table,
    "methods": method_table,
    "compressors": adms_table,
    "settings": adms_table,
    "sinks": sink_table,
    "recall": recall_table,
    "capacity": recall_table,
    "texts": recall_table,
    "beyond": recall_table,
}


def as_typed(job: Job) -> str:
    """The command of a job as a user types it."""
    words = [short_name(word) if Path(word).is_file() else word for word in job.arguments]
    return f"adms {shlex.join(words)}"


def write_report(jobs: list[Job], output: Path) -> str:
    """Writes ``report.md`` and gives its text."""
    parts = ["# The middle tier\n"]
    for name, shown in SHOWN.items():
        own = [job for job in jobs if job.table == name]
        rows = shown(own, output)
        if rows:
            done = [job for job in own if (output / job.name / "summary.json").is_file()]
            commands = "\n".join(map(as_typed, done))
            table = markdown_table(rows)
            parts.append(f"## {name}\n\n{table}\n```\n{commands}\n```\n")
    text = "\n".join(parts)
    write_atomic(output / "report.md", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", help="text files, or pydoc")
    parser.add_argument("--output", type=Path, default=Path("outputs/middle-tier"))
    parser.add_argument("--tables", default=",".join(TABLES), help="comma-separated")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--devices", default="auto", help="comma-separated")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help="run the jobs of these names (patterns), in this order",
    )
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--list", action="store_true", help="print the commands")
    asked = parser.parse_args()
    names = asked.tables.split(",")
    unknown = sorted(set(names) - set(TABLES))
    if unknown:
        parser.error(f"unknown table {unknown[0]!r}; expected some of {', '.join(TABLES)}")
    jobs = [job for name in names for job in TABLES[name](asked.texts)]
    wanted = [
        job for pattern in asked.only for job in jobs if re.search(pattern, job.name) is not None
    ]
    if asked.list:
        print("\n".join(map(as_typed, dict.fromkeys(wanted))))
        return
    asked.output.mkdir(parents=True, exist_ok=True)
    # Many processes on one machine: one thread each unless the user has said otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run(list(dict.fromkeys(wanted)), asked)
    print(write_report(jobs, asked.output))


if __name__ == "__main__":
    main()
