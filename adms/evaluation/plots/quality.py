"""Quality against bytes, one line a method."""

from collections.abc import Sequence
from pathlib import Path

from adms.evaluation.plots.streams import MIB, without_sizes
from adms.evaluation.plots.style import figure, line_look, look
from adms.evaluation.run_folder import Row


def plot_quality(path: Path, rows: Sequence[Row], *, title: str) -> None:
    """Perplexity over the bytes a cache never exceeds; the full cache as a level line."""
    with figure(path, figsize=(7.2, 4.4)) as axes:
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            name = without_sizes(own[0]["label"]) if len(own) > 1 else own[0]["label"]
            if method == "full":
                size = own[0]["cache_bytes"] / MIB
                label = f"full cache ({size:.0f} MiB at the end)"
                axes.axhline(own[0]["perplexity"], label=label, **line_look(method))
                continue
            own.sort(key=lambda row: row["max_bytes"])
            sizes = [row["max_bytes"] / MIB for row in own]
            axes.plot(
                sizes, [row["perplexity"] for row in own], label=name, markersize=5, **look(method)
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("bytes the cache never exceeds (MiB)")
        axes.set_ylabel("perplexity")
        axes.set_title(title, fontsize=10)
        axes.figure.legend(loc="outside right upper", fontsize=8)
