"""The report of one run: tables, pictures, and the command that makes them again."""

from adms.evaluation.console import percent, show, significant
from adms.evaluation.methods import FULL
from adms.evaluation.needles import KINDS
from adms.evaluation.plots.memory import plot_latency, plot_memory
from adms.evaluation.plots.quality import plot_quality
from adms.evaluation.plots.recall import plot_recall
from adms.evaluation.plots.streams import Line, plot_streams
from adms.evaluation.run_folder import Row, RunFolder, csv_text, markdown_table, write_atomic
from adms.evaluation.settings import PERPLEXITY, SPEED, Evaluation, short_name
from adms.evaluation.summary import curve_rows
from adms.evaluation.units import Unit

ABOUT = {
    PERPLEXITY: (
        "Loss of each token as the model reads the text once, in chunks, through the cache. "
        "`gap closed` is the share of the way from StreamingLLM to the full cache; where the "
        "full cache is not better by at least 3% it is left out. Differences are paired by token, "
        "with 95% intervals from a block bootstrap; below 0 is better than StreamingLLM. The full "
        "cache and the exact window (of as many tokens as ADMS holds) use more bytes and are "
        "ceilings."
    ),
    SPEED: (
        "Reading in chunks, then writing token by token. Baselines other than full, window, "
        "streaming and adms are simulated: their speed and process memory mean nothing. `fit s` is "
        "what ADMS takes to fit its code to a model, once in a process and before the clock "
        "starts: no other column holds it. Process memory is the peak of the process so far, "
        "earlier methods included."
    ),
}
RECALL = "Share of questions answered right, with a 95% interval (Wilson)."


def display(rows: list[Row], task: str) -> list[Row]:
    """A task's summary in the columns that people read."""
    if task == PERPLEXITY:
        return [_perplexity_row(row) for row in rows]
    if task in KINDS:
        return [_recall_row(row) for row in rows]
    return [_speed_row(row) for row in rows]


def _interval(row: Row, name: str, digits: int = 4) -> str | None:
    if row.get(name) is None:
        return None
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def _perplexity_row(row: Row) -> Row:
    return {
        "method": row["label"],
        "perplexity": row.get("perplexity"),
        "gap closed": _share(row.get("gap_closed")),
        "nats over StreamingLLM": _interval(row, "nats_over_streaming"),
        "cache bytes": row.get("cache_bytes"),
        "max bytes": row.get("max_bytes"),
        "note": row.get("note", ""),
    }


def _recall_row(row: Row) -> Row:
    known = "recall" in row
    return {
        "method": row["label"],
        "length": row["context"],
        "depth": percent(row["depth"]) if "depth" in row else None,
        "recall": _share(row["recall"]) if known else None,
        "interval": f"{row['recall_low']:.0%} to {row['recall_high']:.0%}" if known else None,
        "trials": row.get("trials"),
        "cache bytes": row.get("cache_bytes"),
        "note": row.get("note", ""),
    }


def _speed_row(row: Row) -> Row:
    speeds = {
        "fit s": "fit_s",
        "read tokens/s": "read_tokens_per_s",
        "first token ms": "first_token_ms",
        "token ms median": "token_ms_median",
        "token ms p99": "token_ms_p99",
        "write tokens/s": "write_tokens_per_s",
    }
    nbytes = {
        "cache bytes": "cache_bytes",
        "process peak bytes": "process_peak_bytes",
        "device peak bytes": "device_peak_bytes",
    }
    return {
        "method": row["label"],
        **{shown: significant(row.get(name)) for shown, name in speeds.items()},
        **{shown: row.get(name) for shown, name in nbytes.items()},
        "note": row.get("note", ""),
    }


def without_empty(rows: list[Row]) -> list[Row]:
    """Rows without the columns that say nothing in any of them."""
    names = [
        name
        for name in (rows[0] if rows else {})
        if any(row[name] not in (None, "") for row in rows)
    ]
    return [{name: row[name] for name in names} for row in rows]


def write_report(
    evaluation: Evaluation, folder: RunFolder, units: list[Unit], summary: list[Row], command: str
) -> None:
    """Writes report.md, curve.csv and the pictures of a finished run."""
    parts = [f"# {title(evaluation)}\n", _setting(evaluation)]
    pictures = draw(evaluation, folder, units, summary)
    for task in evaluation.tasks:
        rows = [row for row in summary if row["task"] == task]
        about = ABOUT.get(task, RECALL)
        parts.append(
            f"## {task}\n\n{about}\n\n{markdown_table(without_empty(display(rows, task)), show)}"
        )
        parts += [f"![{name}](plots/{name})\n" for name in pictures.get(task, [])]
    curve = curve_rows(evaluation, folder, units)
    if curve:
        write_atomic(folder.path / "curve.csv", csv_text(curve))
    parts.append(f"```\n{command}\n```\n")
    write_atomic(folder.path / "report.md", "\n".join(parts))


def title(evaluation: Evaluation) -> str:
    """What was measured, in a line."""
    name = " ".join(filter(None, [evaluation.scenario, evaluation.profile]))
    what = f"{short_name(evaluation.model)} on {short_name(evaluation.text)}"
    return f"{name}: {what}" if name else what


def _setting(evaluation: Evaluation) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in evaluation.config.to_dict().items())
    memory = (
        "StreamingLLM has the same bytes as ADMS (its window is budget + recent)."
        if evaluation.equal_memory
        else "**StreamingLLM has fewer bytes than ADMS** (`equal_memory` is off)."
    )
    return f"{memory} Configuration: {settings}.\n"


def draw(
    evaluation: Evaluation, folder: RunFolder, units: list[Unit], summary: list[Row]
) -> dict[str, list[str]]:
    """Draws what the results allow; returns the files of ``plots/`` by task."""
    plots = folder.path / "plots"
    found: dict[str, list[str]] = {}
    for task in evaluation.tasks:
        rows = [row for row in summary if row["task"] == task and "note" not in row]
        if not rows:
            continue
        names = found.setdefault(task, [])
        if task == PERPLEXITY:
            lines = stream_lines(folder, units, rows)
            plot_streams(plots / "loss.png", lines, title=title(evaluation))
            plot_memory(plots / "memory.png", lines, title=title(evaluation))
            names += ["loss.png", "memory.png"]
            if len({row["compressed_budget"] for row in rows}) > 1:
                plot_quality(plots / "quality.png", rows, title=title(evaluation))
                names.append("quality.png")
        elif task in KINDS:
            plot_recall(plots / f"{task}.png", rows, title=f"{title(evaluation)}, {task}")
            names.append(f"{task}.png")
        else:
            labels = {(row["method"], row["compressed_budget"]): row["label"] for row in rows}
            times = [
                (
                    unit.method,
                    labels[unit.method, unit.config.compressed_budget],
                    arrays["token_ms"],
                )
                for unit in units
                if unit.task == SPEED and (arrays := folder.arrays(unit.key))
            ]
            plot_latency(plots / "latency.png", times, title=title(evaluation))
            names.append("latency.png")
    return found


def stream_lines(folder: RunFolder, units: list[Unit], rows: list[Row]) -> list[Line]:
    """One line a method, of the first stream at the largest budget."""
    largest = max(row["compressed_budget"] for row in rows)
    labels = {(row["method"], row["compressed_budget"]): row["label"] for row in rows}
    lines = []
    for unit in units:
        budget = unit.config.compressed_budget
        if (
            unit.task != PERPLEXITY
            or unit.texts[0][0]
            or (budget != largest and unit.method != FULL)
        ):
            continue
        arrays = folder.arrays(unit.key)
        if arrays:
            lines.append(
                Line(
                    unit.method,
                    labels[unit.method, budget],
                    arrays["losses"][0],
                    arrays["tokens"].tolist(),
                    arrays["nbytes"].tolist(),
                )
            )
    return lines
