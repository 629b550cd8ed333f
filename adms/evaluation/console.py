"""What every command shares: the terminal, progress bars, and one clear line for a user's error."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from adms.errors import ADMSError

USER_ERROR = 2
"""Exit code for what the user can put right: a wrong name, file, value."""

RESUMABLE = "interrupted; what was finished is kept, run the same command to go on"


def console(*, stderr: bool = False) -> Console:
    """A console on the stream as it is now, so that a redirected stream is honoured."""
    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False)


def print_table(title: str, rows: list[dict[str, Any]], *, caption: str | None = None) -> None:
    """Prints rows of equal keys as a table, numbers to the right."""
    # Names of files and data sets are no markup.
    table = Table(
        title=escape(title), caption=caption, title_justify="left", caption_justify="left"
    )
    columns = list(rows[0]) if rows else []
    for name in columns:
        numeric = any(
            isinstance(row[name], int | float) or str(row[name])[:1].isdigit() for row in rows
        )
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(show(row[name])) for name in columns))
    console().print(table)


def show(value: Any) -> str:
    """A value as tables print it."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def significant(value: float | None) -> str | None:
    """A measured time or speed as far as it repeats: three digits."""
    return None if value is None else f"{float(f'{value:.3g}'):,.15g}"


def percent(share: float) -> str:
    """A share in percent, all its digits."""
    return f"{100 * share:.10g}%"


def progress(total: int, what: str, unit: str = "token") -> Any:
    """A progress bar on standard error; only shown where somebody watches."""
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=True, disable=None)


@contextlib.contextmanager
def user_errors(*, quiet: bool = True, on_interrupt: str = RESUMABLE) -> Iterator[None]:
    """Turns an ``ADMSError`` into one line on standard error and exit code 2.

    Args:
        quiet: leave out the notices of libraries, which would bury the line; ADMS's own stay.
        on_interrupt: the line after Ctrl-C.
    """
    if quiet:
        _calm_libraries()
    try:
        yield
    except ADMSError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print(on_interrupt, file=sys.stderr)
        sys.exit(130)


def _calm_libraries() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Every retry would be a line; that a hub cannot be reached is said once, by our own error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # A library's notice to its developers says nothing to the reader of a table.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
