"""What an importance metric is, and where its name leads.

Shapes: ``B`` rows, ``K`` KV heads, ``H`` query heads, ``N`` tokens, ``Q`` queries, ``D``/``E`` head
size of keys/values.
"""

from collections.abc import Callable

import torch

from adms.entries import Entries
from adms.registry import Registry

# Entries and the last queries before positions ([B, H, Q, D] or None) -> scores [B, N].
Metric = Callable[[Entries, torch.Tensor | None], torch.Tensor]

METRICS: Registry[Metric] = Registry("importance metric")


def register_metric(name: str, metric: Metric, *, replace: bool = False) -> Metric:
    """Makes ``importance_metric=name`` mean ``metric``.

    Raises:
        ADMSTypeError: ``name`` is not a string.
        ADMSValueError: ``name`` is empty or taken (and ``replace`` is False).
    """
    return METRICS.register(name, metric, replace=replace)


def needs_queries(metric: Metric) -> bool:
    """Whether a metric looks at queries (it says so by an attribute ``needs_queries``)."""
    return bool(getattr(metric, "needs_queries", False))
