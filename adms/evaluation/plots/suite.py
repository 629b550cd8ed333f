"""All scenarios in one picture."""

from collections.abc import Sequence
from pathlib import Path

from adms.evaluation.plots.style import figure, look
from adms.evaluation.run_folder import Row


def plot_suite(path: Path, rows: Sequence[Row]) -> None:
    """Perplexity relative to StreamingLLM's, one line of markers a scenario and profile."""
    groups = list(dict.fromkeys((row["scenario"], row["profile"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if "perplexity" in row))
    found: dict[str, tuple[list[float], list[int]]] = {method: ([], []) for method in methods}
    for place, group in enumerate(groups):
        own = {
            row["method"]: row["perplexity"]
            for row in rows
            if (row["scenario"], row["profile"]) == group and "perplexity" in row
        }
        if "streaming" not in own:
            continue
        for method, value in own.items():
            found[method][0].append(value / own["streaming"])
            found[method][1].append(place)
    with figure(path, figsize=(7.2, 1.3 + 0.36 * len(groups))) as axes:
        for method, (ratios, places) in found.items():
            if ratios:
                style = {**look(method), "linestyle": ""}
                axes.plot(ratios, places, label=method, markersize=6, **style)
        axes.axvline(1, color="black", linewidth=0.8)
        names = [" ".join(filter(None, group)) for group in groups]
        axes.set_yticks(range(len(groups)), names, fontsize=8)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel("perplexity, as a multiple of StreamingLLM's (left is better)")
        axes.figure.legend(loc="outside upper center", ncols=5, fontsize=8)
