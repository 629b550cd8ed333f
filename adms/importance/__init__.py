"""Importance metrics: entries (and evidence) to scores, one metric a file."""

from adms.importance import (
    attention,
    coding_error,
    expected_attention,
    key_diff,
    norms,
    novelty,
)
from adms.importance.base import METRICS, Evidence, Metric, needs_queries, register_metric

__all__ = [
    "METRICS",
    "Evidence",
    "Metric",
    "attention",
    "coding_error",
    "expected_attention",
    "key_diff",
    "needs_queries",
    "norms",
    "novelty",
    "register_metric",
]
