"""``adms inspect``: what a cache holds of the text it has read."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text as Styled

from adms.cli import options
from adms.enable import enable_adms_llm
from adms.evaluation.console import console, print_table, progress, user_errors
from adms.evaluation.models import load_model
from adms.evaluation.plots.tiers import plot_tiers
from adms.evaluation.settings import short_name
from adms.evaluation.texts import collect_ids
from adms.evaluation.tiers import FORGOTTEN, MIDDLE, RECENT, SINK, Span, landmarks, spans

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
    picture: Annotated[
        Path | None, typer.Option(help="Writes the picture of the tiers to this PNG.")
    ] = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
) -> None:
    """Reads a text with ADMS and shows where each of its tokens is now.

    S: sinks, exact. m: the compressed middle. R: the recent window, exact. Dots: forgotten.

    Example:

    - `adms inspect --tokens 4096 --picture tiers.png`
    """
    with user_errors():
        config = options.adms_config(start_size, compressed_budget, recent_size, parameters)
        loaded, tokenizer = load_model(model, dtype, device)
        cache = enable_adms_llm(loaded, config)
        ids = collect_ids(tokenizer, text, num_tokens=tokens).to(loaded.device)
        step = cache.sizes.chunk
        with progress(tokens, "reading") as bar, torch.no_grad():
            for start in range(0, tokens, step):
                piece = ids[:, start : start + step]
                loaded(piece, past_key_values=cache, logits_to_keep=1)
                bar.update(piece.shape[1])
        found = spans(cache)
        show_spans(found, cache)
        if picture is not None:
            name = f"{short_name(model)} after {tokens:,} tokens of {short_name(text)}"
            plot_tiers(picture, found, title=name)
            console().print(f"written to {picture}", markup=False)


def show_spans(found: list[Span], cache: Any) -> None:
    """Prints the tiers as a bar over the text, and a table."""
    out = console()
    out.print(bar(found, max(20, out.width - 2)))
    rows = [
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
    print_table("Where the text is", rows)
    exact = landmarks(cache)
    if exact:
        out.print(f"  {exact} chosen tokens of each layer stay exact, forgotten stretches included")
    out.print(repr(cache), markup=False)


def bar(found: list[Span], width: int) -> Styled:
    """One character for every so many tokens; each tier at least one."""
    total = found[-1].stop
    line = Styled()
    for span in found:
        letter, style = _LOOKS[span.tier]
        line.append(letter * max(1, round(span.tokens / total * width)), style=style)
    return line
