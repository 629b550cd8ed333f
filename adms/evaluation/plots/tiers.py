"""The tiers of a cache over the text, and what each costs."""

from collections.abc import Sequence
from pathlib import Path

from adms.evaluation.plots.streams import MIB
from adms.evaluation.plots.style import figure
from adms.evaluation.tiers import FORGOTTEN, MIDDLE, RECENT, SINK, Span

# Colour and hatching: the second tells tiers apart in black and white.
_LOOKS = {
    SINK: ("#D55E00", "xx"),
    MIDDLE: ("#56B4E9", "//"),
    RECENT: ("#0072B2", ""),
    FORGOTTEN: ("#FFFFFF", ".."),
}


def plot_tiers(
    path: Path, spans: Sequence[Span], *, title: str, landmarks: Sequence[int] = ()
) -> None:
    """Two bars: tokens of the text by tier with landmarks as ticks above, and bytes by tier.

    Sinks are a few tokens of thousands, so their share is drawn at least as wide as a line.
    """
    with figure(path, 2, 1, figsize=(7.2, 3.2)) as axes:
        total = max(span.stop for span in spans)
        for span in spans:
            colour, hatch = _LOOKS[span.tier]
            axes[0].barh(
                0,
                max(span.tokens, total / 300),
                left=span.start,
                color=colour,
                hatch=hatch,
                edgecolor="black",
                linewidth=0.6,
                label=f"{span.tier}: {span.tokens:,} tokens, {span.nbytes / MIB:.1f} MiB",
            )
        if landmarks:
            places = [place + 0.5 for place in landmarks]
            label = f"landmarks: {len(landmarks):,} tokens, inside the middle's bytes"
            axes[0].vlines(places, 0.46, 0.62, color="black", linewidth=0.5, label=label)
        left = 0.0
        for span in spans:
            colour, hatch = _LOOKS[span.tier]
            size = span.nbytes / MIB
            axes[1].barh(
                0, size, left=left, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6
            )
            left += size
        for axis, what in zip(axes, ("token of the text", "bytes of the cache (MiB)"), strict=True):
            axis.set_yticks([])
            axis.set_xlabel(what)
            axis.grid(visible=False)
            axis.margins(x=0.01)
        axes[0].set_title(title, fontsize=10)
        axes[0].figure.legend(loc="outside lower center", ncols=2, fontsize=8)
