"""TOVA: drops what the latest token attends to least, the same tokens in all heads of a layer."""

import torch

from adms.evaluation.baselines.policy import Eviction, Held


class TOVA(Eviction):
    """Token omission via attention.

    Source: Oren et al. (2024), arXiv 2401.06104; differs in that sinks are always kept and a
    chunk's evictions follow its last token together. There is no protected window, as published.
    """

    label = "TOVA"
    needs_weights = True

    def reduce(self, held: Held, weights: torch.Tensor | None, new: int) -> Held:
        """Keeps what the last query of the pass weighs most."""
        if weights is None:
            raise RuntimeError("TOVA was given no attention weights")
        score = weights[:, -1].mean(0, keepdim=True).expand(weights.shape[0], -1)
        return self.keep_best(held, score, recent=1)
