"""``adms passkey``: are facts from the middle of the text remembered?"""

from pathlib import Path
from typing import Annotated

import typer

from adms.cli import options
from adms.evaluation.console import user_errors
from adms.evaluation.methods import ADMS, FULL, STREAMING
from adms.evaluation.needles import KINDS, PASSKEY
from adms.evaluation.settings import Evaluation


def main(
    model: options.Model = options.DEFAULT_MODEL,
    text: options.Text = options.DEFAULT_TEXT,
    text_config: options.TextConfig = None,
    split: options.Split = "test",
    offset: options.Offset = 0,
    kinds: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated, among {', '.join(KINDS)}: one number; four numbers under "
            "names; a list of numbers and words."
        ),
    ] = PASSKEY,
    lengths: Annotated[str, typer.Option(help="Tokens of text and question together.")] = "2048",
    depths: Annotated[
        str, typer.Option(help="Where the fact stands, 0 (start) to 1 (end).")
    ] = "0.3,0.5,0.7",
    trials: Annotated[int, typer.Option(min=1, help="Questions for each length and depth.")] = 5,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens from one trial's text to the next one's; else the length, so that no "
            "text is read twice.",
        ),
    ] = None,
    together: Annotated[
        int,
        typer.Option(
            min=1,
            help="Trials of all depths read at a time, as rows of a batch, for a GPU. Baselines "
            "take one.",
        ),
    ] = 1,
    methods: options.Methods = f"{FULL},{STREAMING},{ADMS}",
    start_size: options.StartSize = 4,
    compressed_budget: options.CompressedBudget = options.DEFAULT_BUDGETS,
    recent_size: options.RecentSize = 256,
    parameters: options.Parameters = None,
    output: options.Output = Path("outputs/passkey"),
    force: options.Force = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
) -> None:
    """Hides facts in a long text and asks for one of them at the end.

    Draws recall over depth and length, one panel a method. StreamingLLM can only answer what its
    window still holds.

    Examples:

    - `adms passkey --lengths 1024,2048 --depths 0.1,0.5,0.9 --trials 10`

    - `adms passkey --kinds passkey,multikey,lookup --methods adms,h2o,keydiff`
    """
    with user_errors():
        evaluation = Evaluation(
            model=model,
            text=text,
            text_config=text_config,
            split=split,
            offset=offset,
            tasks=tuple(name.strip() for name in kinds.split(",") if name.strip()),
            methods=options.chosen_methods(methods),
            config=options.adms_config(start_size, compressed_budget, recent_size, parameters),
            budgets=tuple(compressed_budget),
            lengths=options.numbers(lengths, int, "--lengths"),
            depths=options.numbers(depths, float, "--depths"),
            trials=trials,
            stride=stride,
            together=together,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        options.run_and_show(evaluation, output, force)
