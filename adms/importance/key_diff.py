"""Importance by how unlike its neighbours a key is."""

import torch
from torch.nn.functional import cosine_similarity

from adms.entries import Entries
from adms.importance.base import Evidence, register_metric


def key_diff(entries: Entries, evidence: Evidence | None = None) -> torch.Tensor:
    """Minus the cosine between a token's key and the mean direction: ``[B, N]``, heads averaged.

    Source: Park et al. (2025), KeyDiff, arXiv 2504.15364; differs in that keys are taken before
    positions and the mean is over the arriving tokens.
    """
    keys = entries.keys.float()
    direction = torch.nn.functional.normalize(keys, dim=-1).mean(2, keepdim=True)
    return -cosine_similarity(keys, direction, dim=-1).mean(1)


register_metric("key_diff", key_diff)
