"""Memory against tokens, and time per token."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adms.evaluation.plots.streams import Line, draw_bytes
from adms.evaluation.plots.style import figure, line_look, look


def plot_memory(path: Path, lines: Sequence[Line], *, title: str) -> None:
    """Bytes of the caches as the text goes by, both axes logarithmic."""
    with figure(path) as axes:
        for line in lines:
            draw_bytes(axes, line)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            axis.set_major_formatter("{x:g}")
            # Between powers of ten only where there are not two of them to read.
            axis.set_minor_formatter("{x:g}" if ends[1] < 20 * ends[0] else "")
        axes.set_xlabel("tokens read")
        axes.set_ylabel("cache (MiB)")
        axes.set_title(title, fontsize=10)
        axes.figure.legend(loc="outside right upper", fontsize=8)


def plot_latency(
    path: Path,
    times: Sequence[tuple[str, str, npt.NDArray[np.floating]]],
    *,
    title: str,
) -> None:
    """Milliseconds of written tokens: for each line the share that was at least as fast.

    ``times`` has method, label and milliseconds of each line; a method's lines, one a budget, grow
    thinner from the first on.
    """
    drawn: Counter[str] = Counter()
    with figure(path) as axes:
        for method, label, values in times:
            share = np.arange(1, len(values) + 1) / len(values)
            style = line_look(method)
            style["linewidth"] *= 0.6 ** drawn[method]
            drawn[method] += 1
            axes.step(np.sort(values), share, where="post", label=label, **style)
            median = float(np.median(values))
            axes.plot([median], [0.5], **{**look(method), "linestyle": ""}, markersize=5)
        axes.set_xlabel("milliseconds for a token (marker: median)")
        axes.set_ylabel("share of tokens")
        axes.set_title(title, fontsize=10)
        axes.figure.legend(loc="outside right upper", fontsize=8)
