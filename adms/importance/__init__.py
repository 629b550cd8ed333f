"""Importance metrics: entries (and queries) to scores, one metric a file."""

from adms.importance import key_diff, norms
from adms.importance.base import METRICS, Metric, needs_queries, register_metric

__all__ = ["METRICS", "Metric", "key_diff", "needs_queries", "norms", "register_metric"]
