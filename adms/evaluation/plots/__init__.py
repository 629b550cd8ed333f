"""Pictures of results, readable in print and for the colour-blind."""

from adms.evaluation.plots.streams import plot_streams

__all__ = ["plot_streams"]
