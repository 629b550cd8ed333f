"""``python -m adms.evaluation.demo``: a real model reads a long text with a compressed memory.

One text, three caches, equal bytes for the two bounded ones; tables, files and a picture of what
each remembers. Then the model goes on writing from its compressed memory.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.panel import Panel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from adms.config import ADMSConfig
from adms.errors import ADMSValueError
from adms.evaluation import needles
from adms.evaluation.console import console, print_table, progress, show, significant, user_errors
from adms.evaluation.methods import ADMS, FULL, STREAMING, Method, open_method, trained_length
from adms.evaluation.models import SMOLLM2, load_model
from adms.evaluation.plots.streams import Line, plot_streams
from adms.evaluation.run_folder import (
    command_line,
    csv_text,
    environment,
    markdown_table,
    write_atomic,
    write_json,
)
from adms.evaluation.statistics import block_bootstrap, gap_closed, perplexity
from adms.evaluation.stream import Trace, answer, check_length, read
from adms.evaluation.texts import PYDOC, decode_ids, encode_text, load_text
from adms.generation import generate_turn

OFFSET = 2000
# Far enough that sinks and the recent window of the default sizes have long moved on.
MEASURE_FROM = 1280
PASSKEY_DISTANCE = 1024
PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Material:
    """What is read: the measured text, the text after it with a passkey, and the question."""

    text: torch.Tensor
    more: torch.Tensor
    question: torch.Tensor
    key: str
    prompt: torch.Tensor
    offset: int

    @property
    def num_tokens(self) -> int:
        """Tokens that one method reads, its answer included."""
        return self.text.shape[1] + self.more.shape[1] + self.question.shape[1] + len(self.key) + 1


@dataclass(frozen=True)
class Outcome:
    """One method's results."""

    method: Method
    trace: Trace
    reply: str
    is_right: bool
    peak_nbytes: int


def prepare(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, offset: int | None, seed: int
) -> Material:
    """Cuts a text into what is measured and what hides the passkey."""
    wanted = tokens + PASSKEY_DISTANCE
    ids = encode_text(tokenizer, text)
    if offset is None:
        offset = OFFSET if ids.shape[1] >= OFFSET + wanted else 0
    if ids.shape[1] < offset + wanted:
        raise ADMSValueError(
            f"the text has {ids.shape[1]} tokens; {offset} left out, {tokens} measured and "
            f"{PASSKEY_DISTANCE} after the passkey need {offset + wanted}; use a longer text or a "
            "smaller --tokens"
        )
    ids = ids[:, offset : offset + wanted]
    facts = needles.make_facts(needles.PASSKEY, seed)
    sentence, question = (
        torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"])[None]
        for part in (facts.sentences[0], facts.question)
    )
    after = ids[:, tokens:]
    return Material(
        text=ids[:, :tokens],
        more=torch.cat([sentence, after], dim=1),
        question=question,
        key=facts.answer,
        prompt=after[:, :PROMPT_TOKENS],
        offset=offset,
    )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    material: Material,
    chunk: int,
) -> tuple[Outcome, Any]:
    """One method reads everything; also returns ADMS's cache as it was after the measured text."""
    total = material.num_tokens
    check_length(method, total)
    with progress(total, f"{method.label:24}") as bar:
        trace = read(model, method, material.text, chunk=chunk, on_chunk=bar.update)
        snapshot = copy.deepcopy(method.cache) if method.name == ADMS else None
        rest = read(model, method, material.more, chunk=chunk, on_chunk=bar.update)
        produced = answer(
            model,
            method,
            material.question,
            chunk=chunk,
            max_new_tokens=needles.answer_tokens(tokenizer, material.key),
        )[0]
        bar.update(total - bar.n)
    outcome = Outcome(
        method=method,
        trace=trace,
        reply=" ".join(decode_ids(tokenizer, produced).split()),
        is_right=needles.is_correct(tokenizer, produced, material.key),
        peak_nbytes=max(*trace.nbytes, *rest.nbytes),
    )
    return outcome, snapshot


def table_rows(outcomes: list[Outcome], first: int) -> list[dict[str, Any]]:
    """One row a method."""
    quality = {one.method.name: perplexity(one.trace.losses[0, first - 1 :]) for one in outcomes}
    rows = []
    for one in outcomes:
        name = one.method.name
        closed = None
        if FULL in quality and name == ADMS:
            closed = gap_closed(quality[STREAMING], quality[FULL], quality[ADMS])
        rows.append(
            {
                "method": one.method.label,
                "perplexity": round(quality[name], 3),
                "gap closed": None if closed is None else f"{closed:.0%}",
                "cache bytes": one.peak_nbytes,
                "max bytes": one.method.max_nbytes,
                "tokens/s": one.trace.tokens_per_second,
                "passkey": f"{'right' if one.is_right else 'wrong'}: {one.reply}",
            }
        )
    return rows


def terminal_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table in what eighty columns hold."""
    return [
        {
            "method": row["method"],
            "perplexity": row["perplexity"],
            "gap closed": row["gap closed"] or "",
            "cache MiB": f"{row['cache bytes'] / 2**20:.1f}",
            "tokens/s": significant(row["tokens/s"]),
            "passkey": row["passkey"].partition(":")[0],
        }
        for row in rows
    ]


def difference_line(outcomes: list[Outcome], first: int) -> str:
    """ADMS against StreamingLLM token by token, with an interval."""
    by_name = {one.method.name: one.trace.losses[0, first - 1 :] for one in outcomes}
    interval = block_bootstrap(by_name[ADMS] - by_name[STREAMING])
    return (
        f"ADMS minus StreamingLLM, loss per token: {interval.estimate:+.4f} nats "
        f"(95% interval {interval.low:+.4f} to {interval.high:+.4f}, paired block bootstrap)"
    )


def report_text(
    rows: list[dict[str, Any]],
    facts: list[str],
    config: dict[str, Any],
    environment_: dict[str, Any],
) -> str:
    """The report as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in config.items())
    versions = ", ".join(f"{name} {value}" for name, value in environment_["packages"].items())
    lines = "\n".join(f"- {fact}" for fact in facts)
    shown = [{**row, "tokens/s": significant(row["tokens/s"])} for row in rows]
    return (
        "# A stream in bounded memory\n\n"
        f"{markdown_table(shown, show)}\n{lines}\n- ADMS configuration: {settings}\n"
        f"- made with {versions}, {environment_['torch_threads']} threads on "
        f"{environment_['cuda_device'] or environment_['system']}\n\n"
        f"![loss and bytes along the stream](stream.png)\n\n"
        f"```\n{command_line()}\n```\n"
    )


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Any,
    prompt: torch.Tensor,
    num_tokens: int,
    seed: int,
) -> str:
    """Streams a continuation to the terminal, from a cache that has read the text."""
    out = console()
    before = cache.tokens_seen
    out.print(
        Panel(
            decode_ids(tokenizer, prompt[0]).strip(),
            title=f"{before:,} tokens are behind; the text goes on",
            title_align="left",
        ),
        markup=False,
    )
    torch.manual_seed(seed)
    produced = generate_turn(
        model,
        cache,
        prompt.to(model.device),
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    out.print(f"\n{cache!r}", markup=False)
    return decode_ids(tokenizer, produced[0, prompt.shape[1] :])


def run(
    model_name: str,
    text_name: str,
    output: Path,
    config: ADMSConfig,
    *,
    tokens: int,
    offset: int | None,
    new_tokens: int,
    seed: int,
    dtype: str,
    device: str,
) -> None:
    """The demonstration; see ``main`` for what the arguments mean."""
    out = console()
    text = load_text(text_name)
    model, tokenizer = load_model(model_name, dtype, device)
    material = prepare(tokenizer, text, tokens, offset, seed)
    first = MEASURE_FROM if tokens >= 2 * MEASURE_FROM else tokens // 2
    limit = trained_length(model)
    names = [FULL, STREAMING, ADMS]
    facts = []
    if limit is not None and material.num_tokens > limit:
        names.remove(FULL)
        facts.append(
            f"no full cache: {material.num_tokens} tokens, the model was trained on {limit}"
        )
    outcomes, snapshot, sizes, chunk = [], None, None, 0
    for name in names:
        with open_method(model, name, config) as method:
            if sizes is None:
                with open_method(model, ADMS, config) as probe:
                    sizes, chunk = probe.cache.sizes, probe.cache.sizes.chunk
                if sizes.budget + sizes.recent >= PASSKEY_DISTANCE:
                    raise ADMSValueError(
                        f"the passkey lies {PASSKEY_DISTANCE} tokens back, inside the "
                        f"{sizes.budget + sizes.recent} tokens of StreamingLLM's window; lower "
                        "--recent-size or --compressed-budget"
                    )
            outcome, kept = measure(model, tokenizer, method, material, chunk)
        outcomes.append(outcome)
        snapshot = snapshot or kept
    rows = table_rows(outcomes, first)
    bounds = {one.method.label: one.method.max_nbytes for one in outcomes if one.method.max_nbytes}
    facts += [
        f"before the clock, {one.method.label} was fitted to the model, once, in "
        f"{significant(one.trace.fit_seconds)} s"
        for one in outcomes
        if one.trace.fit_seconds is not None
    ]
    facts += [
        "most bytes ever: " + ", ".join(f"{label} {count:,}" for label, count in bounds.items()),
        f"{Path(model_name).name} read {tokens} tokens of {Path(text_name).name} from token "
        f"{material.offset} in chunks of {chunk}; perplexity over tokens {first} to {tokens}",
        difference_line(outcomes, first),
        f"passkey: {material.key}, hidden {PASSKEY_DISTANCE} tokens before the question, where "
        "StreamingLLM's window no longer reaches; the replies: "
        + "; ".join(f"{one.method.label}: {one.reply}" for one in outcomes),
    ]
    print_table("One text, one model, equal bytes", terminal_rows(rows))
    for fact in facts:
        out.print(f"  {fact}", markup=False)
    settings = config.to_dict()
    out.print(
        "  ADMS configuration: " + ", ".join(f"{key} {value}" for key, value in settings.items()),
        markup=False,
        style="dim",
    )
    surroundings = environment()
    run_config = {
        "model": model_name,
        "text": Path(text_name).name,
        "tokens": tokens,
        "offset": material.offset,
        "measured_from": first,
        "chunk": chunk,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "adms": settings,
        "command": command_line(),
    }
    write_json(output / "config.json", run_config)
    write_json(output / "environment.json", surroundings)
    write_atomic(output / "rows.csv", csv_text(rows))
    plot_streams(
        output / "stream.png",
        [
            Line(
                one.method.name,
                one.method.label,
                one.trace.losses[0],
                one.trace.tokens,
                one.trace.nbytes,
            )
            for one in outcomes
        ],
        title=f"{Path(model_name).name} reading {Path(text_name).name}",
    )
    write_atomic(output / "report.md", report_text(rows, facts, settings, surroundings))
    out.print(
        f"\nwritten to {output}: report.md, rows.csv, stream.png, config.json, environment.json\n",
        markup=False,
    )
    if new_tokens:
        continue_text(model, tokenizer, snapshot, material.prompt, new_tokens, seed)


def main(
    text: Annotated[
        str, typer.Option(help="A text file; or pydoc, the help topics of every CPython.")
    ] = PYDOC,
    model: Annotated[
        str, typer.Option(help="smollm2, a folder written by save_pretrained, or a hub id.")
    ] = SMOLLM2,
    output: Annotated[Path, typer.Option(help="Folder for report, rows and picture.")] = Path(
        "adms-demo"
    ),
    tokens: Annotated[int, typer.Option(min=64, help="Tokens over which loss is measured.")] = 4096,
    offset: Annotated[
        int | None,
        typer.Option(
            min=0, help="Tokens left out at the start; 2000 if the text has so many to spare."
        ),
    ] = None,
    start_size: Annotated[int, typer.Option(min=0, help="Attention sinks.")] = 4,
    compressed_budget: Annotated[
        int, typer.Option(min=1, help="The middle's memory, in exact 16-bit tokens per KV head.")
    ] = 252,
    recent_size: Annotated[int, typer.Option(min=1, help="Recent tokens kept exactly.")] = 256,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of the continuation at the end; 0 for none.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Of the passkey and the continuation.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
) -> None:
    """Shows a pretrained model reading a long text with a full cache, StreamingLLM and ADMS.

    StreamingLLM and ADMS get the same bytes. The table has perplexity, bytes, speed, and whether
    each remembers a passkey from the evicted middle; the picture has loss and bytes along the text.
    """
    with user_errors():
        config = ADMSConfig(
            start_size=start_size, compressed_budget=compressed_budget, recent_size=recent_size
        )
        run(
            model,
            text,
            output,
            config,
            tokens=tokens,
            offset=offset,
            new_tokens=new_tokens,
            seed=seed,
            dtype=dtype,
            device=device,
        )


if __name__ == "__main__":
    typer.run(main)
