"""Importance metrics: entries (and evidence) to scores, one metric a file."""

from adms.importance import (
    attention,
    coding_error,
    expected_attention,
    key_diff,
    norms,
    novelty,
    rarity,
)
from adms.importance.base import (
    METRICS,
    Evidence,
    Metric,
    Others,
    compares,
    needs_queries,
    register_metric,
)

__all__ = [
    "METRICS",
    "Evidence",
    "Metric",
    "Others",
    "attention",
    "coding_error",
    "compares",
    "expected_attention",
    "key_diff",
    "needs_queries",
    "norms",
    "novelty",
    "rarity",
    "register_metric",
]
