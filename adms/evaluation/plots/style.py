"""One look for all plots: a colour, a line style and a marker for each method.

The colours are Okabe and Ito's, which the colour-blind can tell apart; line style and marker say
the same again, so that a copy in black and white stays readable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from adms.errors import ADMSError
from adms.evaluation.run_folder import write_atomic

_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION, _PURPLE, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"

_LOOKS: dict[str, tuple[str, Any, str]] = {
    "full": (_BLACK, ":", "o"),
    "window": (_GREY, (0, (1, 1)), "s"),
    "streaming": (_VERMILION, "--", "^"),
    "adms": (_BLUE, "-", "D"),
    "int4": (_GREEN, "-.", "v"),
    "int3": (_GREEN, (0, (3, 1, 1, 1, 1, 1)), "<"),
    "int2": (_GREEN, (0, (1, 2)), ">"),
    "h2o": (_ORANGE, "--", "P"),
    "tova": (_ORANGE, "-.", "X"),
    "snapkv": (_ORANGE, ":", "*"),
    "keydiff": (_PURPLE, "-.", "p"),
    "lacache": (_SKY, "--", "h"),
    "zsmerge": (_PURPLE, "--", "d"),
}


def look(method: str) -> dict[str, Any]:
    """Colour, line style and marker of a method, as matplotlib's keywords."""
    colour, line, marker = _LOOKS.get(method, (_GREY, "-", "."))
    return {"color": colour, "linestyle": line, "marker": marker}


def line_look(method: str) -> dict[str, Any]:
    """The look of a line without markers; ADMS drawn above the others."""
    return {
        **look(method),
        "marker": "",
        "linewidth": 2.0 if method in ("adms", "full") else 1.6,
        "zorder": 3 if method == "adms" else 2,
    }


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """Axes to draw on; the file is written when the block ends.

    Args:
        path: of the PNG.
        rows, columns: of axes.
        **options: of ``matplotlib.pyplot.subplots``.

    Raises:
        ADMSError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ADMSError(
            "plots need matplotlib, not installed here; use pip install matplotlib"
        ) from error
    from matplotlib import rc_context

    style: Any = {
        "font.size": 10,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with rc_context(style):
        size = options.pop("figsize", (7.2 * columns, 3.4 * rows))
        drawing = Figure(figsize=size, layout="constrained")
        # Attached by hand: pyplot would keep every figure alive and ask for a display.
        FigureCanvasAgg(drawing)
        yield drawing.subplots(rows, columns, **options)
        buffer = BytesIO()
        drawing.savefig(buffer, dpi=160, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
