"""Pictures of results, readable in print and for the colour-blind."""

from adms.evaluation.plots.memory import plot_latency, plot_memory
from adms.evaluation.plots.quality import plot_quality
from adms.evaluation.plots.recall import plot_recall
from adms.evaluation.plots.streams import Line, plot_streams
from adms.evaluation.plots.tiers import plot_tiers

__all__ = [
    "Line",
    "plot_latency",
    "plot_memory",
    "plot_quality",
    "plot_recall",
    "plot_streams",
    "plot_tiers",
]
