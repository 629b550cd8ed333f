"""``adms bench``: throughput, latency per token, and memory."""

from pathlib import Path
from typing import Annotated

import typer

from adms.cli import options
from adms.evaluation.console import user_errors
from adms.evaluation.methods import ADMS, FULL, STREAMING
from adms.evaluation.settings import SPEED, Evaluation


def main(
    model: options.Model = options.DEFAULT_MODEL,
    text: options.Text = options.DEFAULT_TEXT,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens read before writing.")] = 2048,
    decode_tokens: Annotated[int, typer.Option(min=2, help="Tokens written and timed.")] = 64,
    methods: options.Methods = f"{FULL},{STREAMING},{ADMS}",
    start_size: options.StartSize = 4,
    compressed_budget: options.CompressedBudget = options.DEFAULT_BUDGETS,
    recent_size: options.RecentSize = 256,
    parameters: options.Parameters = None,
    output: options.Output = Path("outputs/bench"),
    force: options.Force = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
) -> None:
    """Times a model reading a text and then writing token by token, through each cache.

    Shows tokens a second while reading, the time to the first token, the median and 99th percentile
    of the time for a token, bytes of the cache, and the peak memory of process and device. Times
    depend on what else the machine does; environment.json says where they were taken.

    Example:

    - `adms bench --tokens 4096 --decode-tokens 128`
    """
    with user_errors():
        evaluation = Evaluation(
            model=model,
            text=text,
            tasks=(SPEED,),
            methods=options.chosen_methods(methods),
            config=options.adms_config(start_size, compressed_budget, recent_size, parameters),
            budgets=tuple(compressed_budget),
            tokens=tokens,
            decode_tokens=decode_tokens,
            dtype=dtype,
            device=device,
        )
        options.run_and_show(evaluation, output, force)
