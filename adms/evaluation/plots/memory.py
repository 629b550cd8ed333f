"""Memory against tokens, and time per token."""

from collections.abc import Mapping, Sequence
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
    times: Mapping[str, npt.NDArray[np.floating]],
    labels: Mapping[str, str],
    *,
    title: str,
) -> None:
    """Milliseconds of written tokens: for each method the share that was at least as fast."""
    with figure(path) as axes:
        for method, values in times.items():
            share = np.arange(1, len(values) + 1) / len(values)
            axes.step(
                np.sort(values), share, where="post", label=labels[method], **line_look(method)
            )
            median = float(np.median(values))
            axes.plot([median], [0.5], **{**look(method), "linestyle": ""}, markersize=5)
        axes.set_xlabel("milliseconds for a token (marker: median)")
        axes.set_ylabel("share of tokens")
        axes.set_title(title, fontsize=10)
        axes.figure.legend(loc="outside right upper", fontsize=8)
