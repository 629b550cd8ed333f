"""H2O: keeps the tokens that received most attention so far, per head."""

import torch

from adms.evaluation.baselines.policy import Eviction, Held


class H2O(Eviction):
    """Heavy hitters beside the sinks and the recent window.

    Source: Zhang et al. (2023), arXiv 2306.14048; differs in that sinks are always kept, scores are
    means over the query heads of a KV head, and a chunk's evictions happen together.
    """

    label = "H2O"
    needs_weights = True
    numbers = 1

    def reduce(self, held: Held, weights: torch.Tensor | None, new: int) -> Held:
        """Adds the pass's attention to the scores and drops the lowest."""
        if weights is None:
            raise RuntimeError("H2O was given no attention weights")
        score = weights.sum(1)
        if "score" in held.fields:
            score = score + held.fields["score"]
        return self.keep_best(held.with_fields(score=score), score)
