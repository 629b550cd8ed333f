"""``adms inspect``: what a cache holds of the text it has read."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text as Styled

from adms.cli import options
from adms.enable import enable_adms_llm
from adms.evaluation.console import console, print_table, progress, show, user_errors
from adms.evaluation.models import load_model
from adms.evaluation.plots.tiers import plot_tiers
from adms.evaluation.run_folder import markdown_table, write_run
from adms.evaluation.settings import short_name
from adms.evaluation.texts import collect_ids
from adms.evaluation.tiers import FORGOTTEN, MIDDLE, RECENT, SINK, Span, landmarks, spans
from adms.outputs import ready_folder

# A letter beside the colour, for terminals and eyes without colours.
_LOOKS = {SINK: ("S", "red"), MIDDLE: ("m", "cyan"), RECENT: ("R", "blue"), FORGOTTEN: (".", "dim")}


def main(
    model: options.Model = options.DEFAULT_MODEL,
    text: options.Text = options.DEFAULT_TEXT,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 1024,
    start_size: options.StartSize = 4,
    compressed_budget: options.CompressedBudget = options.DEFAULT_BUDGETS,
    recent_size: options.RecentSize = 256,
    parameters: options.Parameters = None,
    output: Annotated[Path, typer.Option(help="Folder for report, rows and picture.")] = Path(
        "outputs/inspect"
    ),
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
) -> None:
    """Reads a text with ADMS and shows where each of its tokens is now.

    S: sinks, exact. m: the compressed middle. R: the recent window, exact. Dots: forgotten.

    The folder gets report.md, rows.csv and plots/tiers.png, the picture of the tiers over the text.

    Example:

    - `adms inspect --tokens 4096 --output outputs/tiers`
    """
    with user_errors(on_interrupt="interrupted; nothing was written, run the same command again"):
        config = options.adms_config(start_size, compressed_budget, recent_size, parameters)
        ready_folder(output)
        loaded, tokenizer = load_model(model, dtype, device)
        cache = enable_adms_llm(loaded, config)
        ids = collect_ids(tokenizer, text, num_tokens=tokens).to(loaded.device)
        step = cache.sizes.chunk
        with progress(tokens, "reading") as bar, torch.no_grad():
            for start in range(0, tokens, step):
                piece = ids[:, start : start + step]
                loaded(piece, past_key_values=cache, logits_to_keep=1)
                bar.update(piece.shape[1])
        found, marked = spans(cache), landmarks(cache)
        show_spans(found, marked, cache)
        title = f"{short_name(model)} after {tokens:,} tokens of {short_name(text)}"
        plot_tiers(output / "plots" / "tiers.png", found, title=title, landmarks=marked)
        write_run(
            output,
            title,
            {
                "model": short_name(model),
                "text": short_name(text),
                "tokens": tokens,
                "dtype": dtype,
                "config": config.to_dict(),
                "landmarks": marked,
            },
            [dataclasses.asdict(span) for span in found],
            f"`{cache!r}`\n\n{markdown_table(table_rows(found), show)}\n"
            f"{landmark_line(marked)}\n\n![tiers](plots/tiers.png)",
        )
        console().print(f"written to {output}: report.md, rows.csv, plots/", markup=False)


def table_rows(found: list[Span]) -> list[dict[str, Any]]:
    """One row a tier."""
    return [
        {
            "tier": span.tier,
            "from token": span.start,
            "to": span.stop - 1,
            "tokens": span.tokens,
            "bytes": span.nbytes,
            "bytes a token": round(span.nbytes / span.tokens),
        }
        for span in found
    ]


def landmark_line(marked: list[int]) -> str:
    """What the landmarks are, in a sentence."""
    if not marked:
        return "No landmarks yet: the middle is exact."
    return (
        f"{len(marked)} landmarks of the middle are kept in a finer form, forgotten stretches "
        "included."
    )


def show_spans(found: list[Span], marked: list[int], cache: Any) -> None:
    """Prints the tiers as a bar over the text, and a table."""
    out = console()
    out.print(bar(found, max(20, out.width - 2)))
    print_table("Where the text is", table_rows(found))
    out.print(landmark_line(marked), markup=False)
    out.print(repr(cache), markup=False)


def bar(found: list[Span], width: int) -> Styled:
    """One character for every so many tokens; each tier at least one."""
    total = found[-1].stop
    line = Styled()
    for span in found:
        letter, style = _LOOKS[span.tier]
        line.append(letter * max(1, round(span.tokens / total * width)), style=style)
    return line
