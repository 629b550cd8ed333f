"""Recall by depth and length, one panel a method."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adms.evaluation.console import percent
from adms.evaluation.plots.style import figure
from adms.evaluation.run_folder import Row

# Cells of the heat maps side by side on a page.
PANELS_WIDTH = 10


def plot_recall(path: Path, rows: Sequence[Row], *, title: str) -> None:
    """A heat map for each method: depth downwards, length to the right, the share written in.

    The scale runs from white to dark blue, which keeps its order in black and white.
    """
    panels = list(dict.fromkeys(row["label"] for row in rows))
    lengths = sorted({row["context"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    across = min(len(panels), max(1, PANELS_WIDTH // max(2, len(lengths))))
    down = -(-len(panels) // across)
    width = 1.2 + max(1.3, 0.65 * len(lengths)) * across
    height = 0.6 + (0.8 + 0.36 * len(depths)) * down
    with figure(path, down, across, figsize=(width, height), sharey=True, squeeze=False) as axes:
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            share = np.full((len(depths), len(lengths)), np.nan)
            for row in rows:
                if row["label"] == panel:
                    share[depths.index(row["depth"]), lengths.index(row["context"])] = row["recall"]
            _heat_map(axis, share, depths, lengths)
            axis.set_title(panel.replace(" ", "\n", 1), fontsize=8)
        drawing = axes[0][0].figure
        drawing.supylabel("depth in the text", fontsize=9)
        drawing.supxlabel("tokens", fontsize=9)
        # A narrow picture has no room for all of it in a line.
        lines = textwrap.wrap(f"{title}: share answered right", int(14 * width))
        drawing.suptitle("\n".join(lines), fontsize=9)


def _heat_map(axis: Any, share: Any, depths: list[float], lengths: list[int]) -> None:
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axis.set_yticks(range(len(depths)), [percent(depth) for depth in depths], fontsize=8)
    axis.grid(visible=False)
    for row, column in np.ndindex(*share.shape):
        value = share[row, column]
        text = "n/a" if np.isnan(value) else f"{value:.0%}"
        colour = "white" if value > 0.6 else "black"
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
