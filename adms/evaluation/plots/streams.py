"""Loss and memory along one stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adms.evaluation.plots.style import figure, line_look
from adms.evaluation.statistics import Losses, smooth

MIB = 2**20


@dataclass(frozen=True)
class Line:
    """One method along a stream.

    Attributes:
        method, label: its name and how the legend calls it.
        losses: ``[N - 1]`` of tokens 1 to N - 1.
        tokens, nbytes: bytes held after so many tokens.
    """

    method: str
    label: str
    losses: Losses
    tokens: Sequence[int]
    nbytes: Sequence[int]


def without_sizes(label: str) -> str:
    """A label less its last word where that gives sizes, such as ``4+252``."""
    words = label.split()
    return " ".join(words[:-1] if "+" in words[-1] else words)


def draw_bytes(axes: Any, line: Line) -> None:
    """The bytes of a cache; ADMS as a broad line below the one that has the same bytes."""
    look = line_look(line.method)
    if line.method == "adms":
        look |= {"linewidth": 4.0, "zorder": 1}
    axes.plot(line.tokens, [count / MIB for count in line.nbytes], label=line.label, **look)


def plot_streams(path: Path, lines: Sequence[Line], *, title: str, width: int = 256) -> None:
    """Draws the loss of each method along the text, what it pays over a reference, and its bytes.

    Args:
        path: of the PNG.
        lines: methods on the same text; the reference is the full cache, or else StreamingLLM.
        title: what was read.
        width: tokens of the moving average.
    """
    by_name = {line.method: line for line in lines}
    reference = by_name.get("full") or by_name.get("streaming")
    others = [line for line in lines if line is not reference]
    panels = 3 if reference is not None and others else 2
    width = max(1, min(width, len(lines[0].losses) // 4))
    with figure(path, panels, 1, sharex=True, figsize=(7.2, 2.7 * panels)) as axes:
        top, bottom = axes[0], axes[-1]
        for line in lines:
            mean = smooth(line.losses, width)
            at = range(width, width + len(mean))
            top.plot(at, mean, label=line.label, **line_look(line.method))
            draw_bytes(bottom, line)
        top.set_ylabel("loss (nats per token)")
        top.set_title(f"{title} (average over {width} tokens)", fontsize=10)
        handles, labels = top.get_legend_handles_labels()
        top.figure.legend(
            handles, labels, loc="outside lower center", ncols=min(3, len(lines)), fontsize=9
        )
        if panels == 3 and reference is not None:
            for line in others:
                extra = smooth(line.losses - reference.losses, width)
                at = range(width, width + len(extra))
                axes[1].plot(at, extra, label=line.label, **line_look(line.method))
            axes[1].axhline(0, **{**line_look(reference.method), "zorder": 1})
            axes[1].set_ylabel(f"loss above {without_sizes(reference.label)}")
        bottom.set_ylabel("cache (MiB)")
        bottom.set_xlabel("tokens read")
        bottom.set_ylim(bottom=0)
