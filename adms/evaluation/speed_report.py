"""The folder of a speed benchmark: written anew after every part, in the form the README quotes."""

from pathlib import Path
from typing import Any

from adms.evaluation.plots.latency import plot_latency
from adms.evaluation.run_folder import (
    Row,
    command_line,
    csv_text,
    environment,
    markdown_table,
    write_atomic,
    write_json,
)
from adms.evaluation.speed_bench import Goal

MIB = 2**20
# Columns of a report: name of the figure, heading, divisor, digits after the point.
COLUMNS = (
    ("method", "cache", 0, 0),
    ("way", "measured through", 0, 0),
    ("batch", "batch", 0, 0),
    ("position", "position", 1, 0),
    ("chunk", "chunk", 1, 0),
    ("token_ms_median", "median ms", 1, 2),
    ("token_ms_mean", "mean ms", 1, 2),
    ("token_ms_p99", "p99 ms", 1, 2),
    ("tokens_per_s", "tokens/s", 1, 1),
    ("fit_s", "fit s", 1, 1),
    ("first_call_s", "first call s", 1, 1),
    ("dense_chunk_ms", "dense ms a chunk", 1, 1),
    ("chunk_ms", "ms a chunk", 1, 1),
    ("dense_tokens_per_s", "dense tokens/s", 1, 0),
    ("read_tokens_per_s", "tokens/s read", 1, 0),
    ("cache_bytes", "cache MiB", MIB, 1),
    ("weights_bytes", "weights MiB", MIB, 0),
    ("max_nbytes", "max_nbytes MiB", MIB, 1),
    ("workspace_bytes", "workspace MiB", MIB, 1),
    ("device_peak_bytes", "peak MiB", MIB, 0),
    ("note", "note", 0, 0),
)


def shown(row: Row) -> dict[str, str]:
    """A row as a report shows it: headings with units, what was not measured left out."""
    cells = {}
    for name, heading, divisor, digits in COLUMNS:
        value = row.get(name)
        if value is None or value == "":
            continue
        cells[heading] = f"{value / divisor:,.{digits}f}" if divisor else str(value)
    return cells


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; columns that are empty everywhere are left out."""
    cells = [shown(row) for row in rows]
    order = [heading for _, heading, _, _ in COLUMNS]
    columns = [heading for heading in order if any(heading in cell for cell in cells)]
    return markdown_table([{name: cell.get(name, "") for name in columns} for cell in cells])


class SpeedReport:
    """What a run has found so far.

    Args:
        folder: where it goes.
        settings: of the run, for ``config.json``.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self.goals: list[Goal] = []
        self.parts: list[str] = []
        plain = (str, int, float, list, type(None))
        config = {
            name: value if isinstance(value, plain) else str(value)
            for name, value in settings.items()
        }
        write_json(folder / "config.json", config)
        write_json(folder / "environment.json", environment())

    def show(self, row: Row) -> None:
        """Says what was just measured."""
        print("  ".join(f"{name} {value}" for name, value in shown(row).items()), flush=True)

    def add(self, name: str, title: str, rows: list[Row], goals: list[Goal]) -> None:
        """Takes a part in, if anything of it was measured, and writes the folder anew."""
        if not rows:
            return
        self.rows += [{"part": name, **row} for row in rows]
        self.goals += goals
        text = f"## {title}\n\n{table(rows)}"
        if goals:
            text += "\n" + markdown_table([goal.row for goal in goals])
        self.parts.append(text)
        print("\n" + text, flush=True)
        write_atomic(self.folder / "rows.csv", csv_text(self.rows))
        write_atomic(self.folder / "report.md", self.text())
        plot_latency(
            [row for row in self.rows if row["part"] == name], self.folder / "plots" / name
        )

    def text(self) -> str:
        """The whole report."""
        found = environment()
        packages = found["packages"]
        place = found["cuda_device"] or f"CPU, {found['torch_threads']} threads, {found['system']}"
        where = f"{place}; torch {packages['torch']}, transformers {packages['transformers']}"
        head = f"# Speed\n\n{where}.\n\n"
        return head + "\n".join(f"{part}\n`{command_line()}`\n" for part in self.parts)
