"""Time per token against position and batch, a line for each method."""

from collections.abc import Sequence
from pathlib import Path

from adms.evaluation.plots.style import figure, look
from adms.evaluation.run_folder import Row

MIB = 2**20


def plot_latency(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws what was measured at more than one position, or in more than one batch.

    Args:
        rows: of ``adms.evaluation.latency.measure_all``.
        folder: of the PNGs.

    Returns:
        The files.
    """
    timed = [row for row in rows if row.get("token_ms_median") is not None]
    if not timed:
        return []
    batch, position = timed[0]["batch"], timed[0]["position"]
    alike = [row for row in timed if row["batch"] == batch]
    at_first = [row for row in timed if row["position"] == position]
    drawn = []
    for name, chosen, axis, value, label, scale in (
        ("position", alike, "position", "token_ms_median", "milliseconds for a token", 1),
        ("memory", alike, "position", "cache_bytes", "cache (MiB)", MIB),
        ("batch", at_first, "batch", "tokens_per_s", "tokens a second", 1),
    ):
        if len({row[axis] for row in chosen}) < 2:
            continue
        path = folder / f"{name}.png"
        with figure(path) as axes:
            for method in dict.fromkeys(row["method"] for row in chosen):
                own = [row for row in chosen if row["method"] == method]
                places = [row[axis] for row in own]
                axes.plot(places, [row[value] / scale for row in own], label=method, **look(method))
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel(axis)
            axes.set_ylabel(label)
            axes.figure.legend(loc="outside right upper", fontsize=8)
        drawn.append(path)
    return drawn
