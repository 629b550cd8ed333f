"""SnapKV-style: keeps what the last window of queries attends to, smoothed over neighbours."""

import torch
from torch.nn.functional import avg_pool1d

from adms.evaluation.baselines.policy import Eviction, Held

WINDOW = 32
KERNEL = 7


class SnapKV(Eviction):
    """Attention of the latest queries, pooled over neighbouring keys.

    Source: Li et al. (2024), arXiv 2404.14469; differs in that it is applied to a stream after
    every pass instead of once to a prompt, and that sinks are always kept. In passes shorter than
    the window, earlier queries count with what is left of it.
    """

    label = "SnapKV-style"
    needs_weights = True
    numbers = 1

    def reduce(self, held: Held, weights: torch.Tensor | None, new: int) -> Held:
        """Scores by the window's attention and drops the lowest."""
        if weights is None:
            raise RuntimeError("SnapKV was given no attention weights")
        latest = weights[:, -WINDOW:]
        score = latest.sum(1)
        if "score" in held.fields:
            score = score + held.fields["score"] * (1 - latest.shape[1] / WINDOW)
        pooled = avg_pool1d(
            score[:, None], KERNEL, stride=1, padding=KERNEL // 2, count_include_pad=False
        )[:, 0]
        return self.keep_best(held.with_fields(score=score), pooled)
