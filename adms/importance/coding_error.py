"""Importance by how badly the code represents a token: what is unlike the rest of the stream."""

import torch

from adms.entries import Entries
from adms.importance.base import Evidence, register_metric
from adms.importance.representatives import representatives

# Weight of a value's relative error against a key's, as in ``low_rank``.
VALUE_WEIGHT = 0.3


def coding_error(entries: Entries, evidence: Evidence) -> torch.Tensor:
    """Squared error of keys plus weighted error of values, each relative to its spread: ``[B, N]``.

    A basis fitted to a stream serves what the stream is like; names and numbers that occur once
    are what it serves worst and what a reader may be asked for.
    """

    def relative(exact: torch.Tensor, coded: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
        error = (exact.float() - coded.float()).square().sum((1, 3))
        return error / spread[:, None].clamp(min=1e-12)

    decoded = representatives(entries, evidence.decoded, evidence.block_tokens)
    keys = relative(entries.keys, decoded.keys, evidence.key_spread)
    values = relative(entries.values, decoded.values, evidence.value_spread)
    return keys + VALUE_WEIGHT * values


register_metric("coding_error", coding_error)
