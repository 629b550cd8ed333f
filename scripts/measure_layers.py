"""SmolLM2 over texts: plain ADMS, adaptive update and integrated attention at equal bytes.

Each text is read in chunks through a cache; perplexity is over the tokens from --first on. Admitted
is the share of the tokens that get an entry of their own in the middle, reach how many tokens the
same bytes hold there (the least and the most of any layer); read is the share of the recent tier's
entries that attention reads. Beside stand the full cache and StreamingLLM of the same bytes, and
how much of the gap between them is closed. With --passkeys, so many numbers are hidden halfway in
--passkey-tokens of the last text, and recalled is how many the model finds again. With --speed,
tokens a second are measured last and alone: in chunks, and one by one.

    python scripts/measure_layers.py TEXT_FILE ... --output FOLDER [--admissions 0.6] [--blocks 64]
        [--bounds 0.005 0.02] [--gates gates.safetensors ...] [--jobs 12] [--device cuda:0,cuda:1]

The folder holds config.json, environment.json, rows.csv and report.md. Every finished measurement
stays in it; the same command goes on after an interruption.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from functools import cache as once
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adms import disable_adms, enable_adms_llm, enable_streaming_llm
from adms.attention import IntegratedAttentionConfig
from adms.evaluation.console import user_errors
from adms.evaluation.models import load_model
from adms.evaluation.needles import PASSKEY, make_trial
from adms.evaluation.run_folder import (
    Row,
    RunFolder,
    command_line,
    environment,
    markdown_table,
    write_atomic,
    write_json,
)
from adms.evaluation.texts import collect_ids
from adms.gates import AdaptiveUpdateConfig
from adms.kernels import Kernel

FULL, STREAMING, PLAIN = "full cache", "StreamingLLM", "plain ADMS"
# Tokens in which a number of five digits is told.
ANSWER_TOKENS = 7
# A number's answer stands in a text of its own, that many tokens after the one before.
BETWEEN_TRIALS = 1500
SINKS = 4
DECISIVE = (
    *("texts", "model", "offset", "tokens", "first", "chunk", "recent", "budget", "compressor"),
    *("passkeys", "passkey_tokens"),
)


def settings(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each row of the table turns on."""
    rows: dict[str, dict[str, Any]] = {FULL: {}, STREAMING: {}, PLAIN: {}}
    for share in arguments.admissions:
        for block in arguments.blocks:
            update = AdaptiveUpdateConfig(admission=share, block_tokens=block)
            rows[f"similarity, {share:g} of {block}"] = {"adaptive_update": update}
    for path in arguments.gates:
        learned = AdaptiveUpdateConfig(policy="learned", gates=path)
        rows[f"learned, {Path(path).stem}"] = {"adaptive_update": learned}
    for bound in arguments.bounds:
        config = IntegratedAttentionConfig(mass_bound=bound)
        rows[f"integrated, bound {bound:g}"] = {"integrated_attention": config}
    if arguments.gates and arguments.bounds:
        both = rows[f"learned, {Path(arguments.gates[0]).stem}"]
        rows["both"] = both | rows[f"integrated, bound {arguments.bounds[0]:g}"]
    return rows


@once
def loaded(name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a process."""
    return load_model(name, device=device)


def new_cache(
    model: PreTrainedModel, arguments: argparse.Namespace, name: str, kernel: Kernel = "torch"
) -> Any:
    """The memory of one row of the table; None for the full cache.

    The general path takes single tokens, since compiling a pass of one takes longer than a trial.
    """
    disable_adms(model)
    if name == FULL:
        return None
    if name == STREAMING:
        return enable_streaming_llm(
            model,
            start_size=SINKS,
            recent_size=arguments.recent + arguments.budget,
            prefill_chunk_size=arguments.chunk,
        )
    return enable_adms_llm(
        model,
        start_size=SINKS,
        recent_size=arguments.recent,
        compressed_budget=arguments.budget,
        prefill_chunk_size=arguments.chunk,
        compressor_type=arguments.compressor,
        kernel=kernel,
        **settings(arguments)[name],
    )


@torch.inference_mode()
def read_text(arguments: argparse.Namespace, device: str, name: str, text: str) -> Row:
    """Perplexity, and what the layers did."""
    model, tokenizer = loaded(arguments.model, device)
    memory = new_cache(model, arguments, name, kernel="auto")
    ids = collect_ids(tokenizer, text, num_tokens=arguments.tokens, offset=arguments.offset)
    ids = ids.to(model.device)
    losses = []
    for part, targets in zip(
        ids[:, :-1].split(arguments.chunk, 1), ids[:, 1:].split(arguments.chunk, 1), strict=True
    ):
        result = model(part, past_key_values=memory, use_cache=True)
        memory, logits = result.past_key_values, result.logits.float()
        losses.append(
            torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        )
    loss = torch.cat(losses, dim=1)[:, arguments.first - 1 :].mean().item()
    row = {"loss": loss, "perplexity": math.exp(loss)}
    if name == FULL:
        return row
    row |= {"nbytes": memory.nbytes, "max_nbytes": memory.max_nbytes}
    plans = [layer.middle.plan for layer in memory.layers if getattr(layer, "middle", None)]
    if plans:
        geometries = [plan.geometry for plan in plans]
        entries = [own.entries_per_record / own.block_tokens for own in geometries]
        row |= {
            "admitted": sum(entries) / len(entries),
            "least_reach": min(own.capacity for own in geometries),
            "most_reach": max(own.capacity for own in geometries),
        }
    spans = memory.summary().get("integrated_attention", {})
    for key in ("recent_entries_read", "mass_given_up", "mass_given_up_worst_layer"):
        if key in spans:
            row[key] = spans[key]
    return row


@torch.inference_mode()
def recall(arguments: argparse.Namespace, device: str, name: str) -> Row:
    """How many hidden numbers are found again."""
    model, tokenizer = loaded(arguments.model, device)
    memory = new_cache(model, arguments, name)
    trials, length = arguments.passkeys, arguments.passkey_tokens
    filler = collect_ids(
        tokenizer, arguments.texts[-1], num_tokens=length + BETWEEN_TRIALS * trials, offset=3000
    )
    rows, answers = [], []
    for trial in range(trials):
        own = filler[:, BETWEEN_TRIALS * trial :]
        made = make_trial(tokenizer, own, PASSKEY, length=length, depth=0.5, seed=trial)
        rows.append(torch.cat([made.text, made.question], dim=1))
        answers.append(made.answer)
    ids = torch.cat(rows).to(model.device)
    for part in ids[:, :-1].split(arguments.chunk, dim=1):
        result = model(part, past_key_values=memory, use_cache=True, logits_to_keep=1)
        memory = result.past_key_values
    said, ids = [], ids[:, -1:]
    for _ in range(ANSWER_TOKENS):
        result = model(ids, past_key_values=memory, use_cache=True, logits_to_keep=1)
        memory, ids = result.past_key_values, result.logits[:, -1:].argmax(-1)
        said.append(ids)
    found = tokenizer.batch_decode(torch.cat(said, dim=1))
    hits = [answer in words for answer, words in zip(answers, found, strict=True)]
    return {"recalled": sum(hits), "passkeys": trials}


@torch.inference_mode()
def speed(arguments: argparse.Namespace, device: str, name: str) -> Row:
    """Tokens a second behind ``--first`` tokens of the first text."""
    model, tokenizer = loaded(arguments.model, device)
    count = arguments.first + 10 * arguments.chunk + 33
    ids = collect_ids(tokenizer, arguments.texts[0], num_tokens=count).to(model.device)
    row: Row = {}
    ways: tuple[tuple[str, Kernel, int, int], ...] = (
        ("in chunks", "auto", arguments.chunk, 8),
        ("one by one", "torch", 1, 32),
    )
    for key, kernel, columns, passes in ways:
        memory, at = new_cache(model, arguments, name, kernel), 0
        before = [arguments.chunk] * (arguments.first // arguments.chunk) + [columns]
        for index, width in enumerate([*before, *[columns] * passes]):
            if index == len(before):
                _wait()
                start = time.perf_counter()
            part = ids[:, at : at + width]
            result = model(part, past_key_values=memory, use_cache=True, logits_to_keep=1)
            memory, at = result.past_key_values, at + width
        _wait()
        row[f"tokens/s {key}"] = columns * passes / (time.perf_counter() - start)
    return row


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pieces(arguments: argparse.Namespace, kinds: list[str]) -> list[tuple[str, str, str]]:
    """Key, row of the table, and text or kind of each measurement."""
    return [
        (f"{key_of(name, layers)}/{Path(kind).stem}", name, kind)
        for kind in kinds
        for name, layers in settings(arguments).items()
    ]


def key_of(name: str, layers: dict[str, Any]) -> str:
    """A row's name, with what tells its gates from others of that name."""
    update = layers.get("adaptive_update")
    return f"{name} {update.gates.digest()}" if update is not None and update.gates else name


# Of a process that measures.
_DEVICE: list[str] = []


def _take_device(devices: Any) -> None:
    _DEVICE[:] = [devices.get()]


def _measure(task: tuple[argparse.Namespace, tuple[str, str, str]]) -> tuple[str, Row]:
    arguments, (key, name, text) = task
    if text == "passkeys":
        row = recall(arguments, _DEVICE[0], name)
    elif text == "speed":
        row = speed(arguments, _DEVICE[0], name)
    else:
        row = {"text": Path(text).stem, **read_text(arguments, _DEVICE[0], name, text)}
    return key, {"layer": name, **row}


def measure(arguments: argparse.Namespace, folder: RunFolder) -> list[str]:
    """Does what is not done yet; returns the keys of all."""
    kinds = [*arguments.texts, *(["passkeys"] if arguments.passkeys else [])]
    beside = pieces(arguments, kinds)
    # Times are of one that has the machine to itself.
    alone = pieces(arguments, ["speed"] if arguments.speed else [])
    devices = arguments.device.split(",")
    for jobs, asked in ((arguments.jobs, beside), (1, alone)):
        tasks = [(arguments, piece) for piece in asked if not folder.is_done(piece[0])]
        for key, row in _worked_off(tasks, min(jobs, len(tasks)), devices):
            folder.finish(key, [row])
            print(key, {name: shown(value) for name, value in row.items()}, flush=True)
    return [key for key, *_ in (*beside, *alone)]


def _worked_off(tasks: list[Any], jobs: int, devices: list[str]) -> Iterator[tuple[str, Row]]:
    """Results as they come, by so many processes, dealt out to the devices."""
    if jobs <= 1:
        _DEVICE[:] = devices[:1]
        yield from map(_measure, tasks)
        return
    context = get_context("spawn")
    queue = context.Queue()
    for job in range(jobs):
        queue.put(devices[job % len(devices)])
    with context.Pool(jobs, _take_device, (queue,)) as pool:
        yield from pool.imap_unordered(_measure, tasks)


def table(rows: list[Row], texts: list[str]) -> list[Row]:
    """One row a layer, each cell with all texts in their order."""
    by_layer: dict[str, list[Row]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], []).append(row)
    losses = {
        name: [row["loss"] for text in texts for row in own if row.get("text") == text]
        for name, own in by_layer.items()
    }
    found = []
    for name, own in by_layer.items():
        facts: Row = {}
        for row in own:
            facts |= row
        rises = [
            math.expm1(one - plain) for one, plain in zip(losses[name], losses[PLAIN], strict=True)
        ]
        ends = list(zip(losses[FULL], losses[STREAMING], losses[name], strict=True))
        closed = [(low - one) / (low - full) for full, low, one in ends]
        reach = ""
        if "least_reach" in facts:
            low, high = facts["least_reach"], facts["most_reach"]
            reach = f"{low}" if low == high else f"{low} to {high}"
        read = [row["recent_entries_read"] for row in own if "recent_entries_read" in row]
        given = [row["mass_given_up"] for row in own if "mass_given_up" in row]
        found.append(
            {
                "layer": name,
                "admitted": f"{facts['admitted']:.0%}" if "admitted" in facts else "",
                "reach": reach,
                "read": f"{sum(read) / len(read):.0%}" if read else "",
                "given up": f"{sum(given) / len(given):.2%}" if given else "",
                "perplexity": " / ".join(f"{math.exp(value):.3f}" for value in losses[name]),
                "against plain": " / ".join(f"{rise:+.1%}" for rise in rises),
                "mean": f"{sum(rises) / len(rises):+.2%}" if rises else "",
                "gap closed": " / ".join(f"{share:.3f}" for share in closed),
                "recalled": f"{facts['recalled']}/{facts['passkeys']}"
                if "recalled" in facts
                else "",
                **{key: shown(facts[key]) for key in facts if key.startswith("tokens/s")},
            }
        )
    columns = list(dict.fromkeys(name for row in found for name in row))
    full = [{name: row.get(name, "") for name in columns} for row in found]
    used = [name for name in columns if any(row[name] for row in full)]
    return [{name: row[name] for name in used} for row in full]


def shown(value: Any) -> str:
    """A number with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(given: Sequence[str] | None = None) -> None:
    """Writes a run folder and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--admissions", type=float, nargs="*", default=[0.6])
    parser.add_argument("--blocks", type=int, nargs="*", default=[63])
    parser.add_argument("--bounds", type=float, nargs="*", default=[0.005, 0.02])
    parser.add_argument("--gates", nargs="*", default=[], help="files from adms train-gates")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto", help="one, or several with commas between")
    parser.add_argument("--offset", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--first", type=int, default=1280)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--budget", type=int, default=252)
    parser.add_argument("--compressor", default="low_rank")
    parser.add_argument("--passkeys", type=int, default=0)
    parser.add_argument("--passkey-tokens", type=int, default=6000)
    parser.add_argument("--speed", action="store_true", help="tokens a second, alone")
    parser.add_argument("--jobs", type=int, default=1, help="measurements at a time")
    arguments = parser.parse_args(given)
    # What else is asked for decides which measurements there are, not what they find.
    decisive = {name: getattr(arguments, name) for name in DECISIVE}
    folder = RunFolder(arguments.output, decisive)
    rows_done = measure(arguments, folder)
    rows = folder.write_rows(rows_done)
    write_json(arguments.output / "environment.json", environment())
    texts = [Path(text).stem for text in arguments.texts]
    report = f"# Layers of {arguments.model}\n\n    {command_line()}\n\n"
    report += markdown_table(table(rows, texts))
    write_atomic(arguments.output / "report.md", report)
    print(report)


if __name__ == "__main__":
    # Processes that share a machine must not each take all of it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with user_errors():
        main()
