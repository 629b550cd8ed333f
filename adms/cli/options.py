"""Options that several subcommands share, and how they become an ``Evaluation``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from adms.config import ADMSConfig, config_from
from adms.errors import ADMSTypeError, ADMSValueError
from adms.evaluation.console import console, print_table
from adms.evaluation.methods import DEFAULT_COMPARISON, method_names
from adms.evaluation.models import SMOLLM2
from adms.evaluation.processes import this_process
from adms.evaluation.report import display, title, without_empty
from adms.evaluation.run_folder import Row, command_line
from adms.evaluation.runner import run_evaluation
from adms.evaluation.settings import Evaluation
from adms.evaluation.texts import PYDOC

_MODEL, _TEXT, _MEMORY, _RUN = "Model", "Text", "Memory of the caches", "Run"

Model = Annotated[
    str,
    typer.Option(
        help="smollm2, a folder written by save_pretrained, or a hub id.", rich_help_panel=_MODEL
    ),
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16 or auto.", rich_help_panel=_MODEL)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.", rich_help_panel=_MODEL)]
Text = Annotated[
    str,
    typer.Option(help="pydoc, a text file, or the name of a data set.", rich_help_panel=_TEXT),
]
TextConfig = Annotated[
    str | None,
    typer.Option(
        help="The data set's configuration, e.g. wikitext-2-raw-v1.", rich_help_panel=_TEXT
    ),
]
Split = Annotated[str, typer.Option(help="The data set's split.", rich_help_panel=_TEXT)]
Column = Annotated[str, typer.Option(help="The data set's column of text.", rich_help_panel=_TEXT)]
Offset = Annotated[
    int, typer.Option(min=0, help="Tokens left out at the start.", rich_help_panel=_TEXT)
]
StartSize = Annotated[int, typer.Option(min=0, help="Attention sinks.", rich_help_panel=_MEMORY)]
CompressedBudget = Annotated[
    list[int],
    typer.Option(
        min=1,
        help="The middle's memory in exact 16-bit tokens per KV head; give it several times to "
        "draw quality against bytes.",
        rich_help_panel=_MEMORY,
    ),
]
RecentSize = Annotated[
    int, typer.Option(min=1, help="Recent tokens kept exactly.", rich_help_panel=_MEMORY)
]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other parameter of ADMSConfig, e.g. --set compressor_type=low_rank --set "
        "importance_ratio=0.25.",
        rich_help_panel=_MEMORY,
    ),
]
EqualMemory = Annotated[
    bool,
    typer.Option(
        help="Give StreamingLLM the same bytes: its window is budget + recent.",
        rich_help_panel=_MEMORY,
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        help=f"Comma-separated, among {', '.join(method_names())}; or all.", rich_help_panel=_RUN
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        help="Folder of the run. The same command goes on with what a kill left undone.",
        rich_help_panel=_RUN,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Forget finished work first.", rich_help_panel=_RUN)
]
# Of 32 bits: seeds of trials and steps are made from it, and must not leave 64.
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**32 - 1, help="Of trials and intervals.", rich_help_panel=_RUN),
]

DEFAULT_MODEL, DEFAULT_TEXT = SMOLLM2, PYDOC
DEFAULT_METHODS = ",".join(DEFAULT_COMPARISON)
DEFAULT_BUDGETS = [252]

# Have options of their own, whose values --set would contradict.
_SIZES = ("start_size", "compressed_budget", "recent_size")


def chosen_methods(text: str) -> tuple[str, ...]:
    """Methods from their comma-separated names."""
    if text.strip() == "all":
        return method_names()
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str, kind: type[int] | type[float], name: str) -> tuple[Any, ...]:
    """Comma-separated numbers.

    Raises:
        ADMSValueError: one of them is none.
    """
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ADMSValueError(f"{name} must be numbers with commas between, got {text!r}") from error


def adms_config(
    start_size: int, budgets: list[int], recent_size: int, parameters: list[str] | None
) -> ADMSConfig:
    """The configuration that options and ``--set`` describe.

    Raises:
        ADMSValueError: ``--set`` names no parameter, one that has an option of its own, or a value
            that cannot work.
    """
    values: dict[str, Any] = {
        "start_size": start_size,
        "compressed_budget": budgets[0],
        "recent_size": recent_size,
    }
    for word in parameters or []:
        name, equals, value = word.partition("=")
        if not equals:
            raise ADMSValueError(f"--set takes NAME=VALUE, got {word!r}")
        if name in _SIZES:
            raise ADMSValueError(
                f"--set takes parameters without an option of their own, got {word!r}; use "
                f"--{name.replace('_', '-')} {value}"
            )
        try:
            values[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            values[name] = value
    try:
        return config_from(None, values)
    except ADMSTypeError as error:
        raise ADMSValueError(str(error)) from error


def run_and_show(evaluation: Evaluation, output: Path, force: bool) -> list[Row]:
    """Runs an evaluation, prints its tables and says where its files are."""
    summary = run_evaluation(evaluation, output, command=command_line(), force=force)
    if this_process().is_main_process:
        for task in evaluation.tasks:
            rows = [row for row in summary if row["task"] == task]
            shown = display(rows, task)
            print_table(f"{task}: {title(evaluation)}", without_empty(terminal_rows(shown)))
            for row in shown:
                if row["note"]:
                    console().print(f"  {row['method']}: {row['note']}", markup=False)
        console().print(f"written to {output}: report.md, rows.csv, plots/", markup=False)
    return summary


def terminal_rows(rows: list[Row]) -> list[Row]:
    """Rows in what eighty columns hold: MiB for bytes, and no sentences in narrow columns."""

    def shown(name: str, value: Any) -> Any:
        return f"{value / 2**20:,.1f}" if name.endswith(" bytes") and value else value

    return [
        {
            name.replace(" bytes", " MiB"): shown(name, value)
            for name, value in row.items()
            if name != "note"
        }
        for row in rows
    ]
