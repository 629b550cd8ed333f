"""KeyDiff: keeps the tokens whose keys are least like the mean key."""

import torch
from torch.nn.functional import cosine_similarity

from adms.evaluation.baselines.policy import Eviction, Held


class KeyDiff(Eviction):
    """Keys that stand out, beside the sinks and the recent window.

    Source: Park et al. (2025), arXiv 2504.15364: score = -cos(key, mean key); differs in that keys
    are compared before positions, and that sinks and the recent window are always kept.
    """

    label = "KeyDiff"

    def reduce(self, held: Held, weights: torch.Tensor | None, new: int) -> Held:
        """Keeps the keys farthest in angle from the mean of all held."""
        keys = held.keys.float()
        return self.keep_best(held, -cosine_similarity(keys, keys.mean(1, keepdim=True), dim=-1))
