"""Importance by the size of values or keys: cheap, and blind to the queries."""

import torch

from adms.entries import Entries
from adms.importance.base import Evidence, register_metric


def value_norm(entries: Entries, evidence: Evidence | None = None) -> torch.Tensor:
    """``|v|`` over all heads: ``[B, N]``."""
    return entries.values.float().square().sum((1, 3)).sqrt()


def key_norm(entries: Entries, evidence: Evidence | None = None) -> torch.Tensor:
    """``|k|`` over all heads: ``[B, N]``."""
    return entries.keys.float().square().sum((1, 3)).sqrt()


def mixed(entries: Entries, evidence: Evidence | None = None) -> torch.Tensor:
    """Geometric mean of ``value_norm`` and ``key_norm``: ``[B, N]``."""
    return (value_norm(entries) * key_norm(entries)).sqrt()


register_metric("value_norm", value_norm)
register_metric("key_norm", key_norm)
register_metric("mixed", mixed)
