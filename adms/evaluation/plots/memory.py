"""Memory against tokens, and time per token."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adms.evaluation.plots.streams import MIB, Line
from adms.evaluation.plots.style import figure, line_look, look


def plot_memory(path: Path, lines: Sequence[Line], *, title: str) -> None:
    """Bytes of the caches as the text goes by, both axes logarithmic."""
    with figure(path) as axes:
        for line in lines:
            held = [count / MIB for count in line.nbytes]
            axes.plot(line.tokens, held, label=line.label, **line_look(line.method))
        axes.set_xscale("log")
        axes.set_yscale("log")
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
