"""``adms eval``: perplexity (or any task) of several methods on one text."""

from pathlib import Path
from typing import Annotated

import typer

from adms.cli import options
from adms.evaluation.console import user_errors
from adms.evaluation.settings import PERPLEXITY, TASKS, Evaluation


def main(
    model: options.Model = options.DEFAULT_MODEL,
    text: options.Text = options.DEFAULT_TEXT,
    text_config: options.TextConfig = None,
    split: options.Split = "test",
    column: options.Column = "text",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each stream.")] = 4096,
    samples: Annotated[
        int, typer.Option(min=1, help="Streams, each beginning where the last ended.")
    ] = 1,
    together: Annotated[
        int,
        typer.Option(
            min=1, help="Streams read at a time, as rows of a batch, for a GPU. Baselines take one."
        ),
    ] = 1,
    offset: options.Offset = 0,
    measure_from: Annotated[
        int | None,
        typer.Option(
            min=1, help="Average from this token on; else from where every cache has overflowed."
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help=f"Comma-separated, among {', '.join(TASKS)}.")
    ] = PERPLEXITY,
    methods: options.Methods = options.DEFAULT_METHODS,
    start_size: options.StartSize = 4,
    compressed_budget: options.CompressedBudget = options.DEFAULT_BUDGETS,
    recent_size: options.RecentSize = 256,
    parameters: options.Parameters = None,
    equal_memory: options.EqualMemory = True,
    log_every: Annotated[
        int, typer.Option(min=1, help="Tokens between two rows of curve.csv.")
    ] = 512,
    output: options.Output = Path("outputs/eval"),
    force: options.Force = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
) -> None:
    """Compares ADMS with other caches on one text, at equal bytes.

    The model reads the text once, in chunks, through each cache. Perplexity is over the tokens that
    no bounded cache could still hold whole; differences to StreamingLLM are paired by token, with a
    95% interval.

    Two of the methods use more memory and are there as ceilings: full (every token) and window (an
    exact window of as many tokens as ADMS holds).

    Examples:

    - `adms eval --tokens 2048 --output outputs/first`

    - `adms eval --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --text wikitext
      --text-config wikitext-2-raw-v1 --methods all`

    - `adms eval --compressed-budget 124 --compressed-budget 252 --compressed-budget 508`

    - `accelerate launch --cpu --num_processes 2 -m adms.cli eval --samples 8`
    """
    with user_errors():
        evaluation = Evaluation(
            model=model,
            text=text,
            text_config=text_config,
            split=split,
            column=column,
            tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
            methods=options.chosen_methods(methods),
            config=options.adms_config(start_size, compressed_budget, recent_size, parameters),
            budgets=tuple(compressed_budget),
            tokens=tokens,
            samples=samples,
            together=together,
            offset=offset,
            measure_from=measure_from,
            equal_memory=equal_memory,
            log_every=log_every,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        options.run_and_show(evaluation, output, force)
