"""Importance by how far a key lies from every other: a few layers look for what is nearest."""

import torch

from adms.entries import Entries
from adms.importance.base import Evidence, register_metric
from adms.importance.novelty import novelty

# Tokens nearer than this in the text are no other ones: a fact may say its number twice.
APART = 40


def rarity(entries: Entries, evidence: Evidence) -> torch.Tensor:
    """Distance of keys, all heads together, to the nearest others, or ``novelty``: ``[B, N]``.

    What is odd but comes again and again, headings or symbols of code, is far from what the stream
    has in common and near to its like; what is said once is near to nothing. Layers that see no
    others give ``novelty``.

    Source: the distance to the nearest neighbour as a measure of outliers (Ramaswamy, Rastogi and
    Shim, 2000). Measured (docs/middle-tier.md): of sentences with a number, 74% of the tokens are
    still landmarks 2000 tokens later in a handbook full of names and symbols, by ``novelty`` 38%.
    """
    if evidence.others is None or evidence.tokens is None:
        return novelty(entries, evidence)
    keys, others = entries.keys.float(), evidence.others()
    # Distances are differences of squares, so what is common is taken away first.
    common = keys.mean(2) if evidence.key_mean is None else evidence.key_mean
    squares = _squares(keys - common[:, :, None], others.keys.float() - common[:, :, None])
    near = (evidence.tokens[:, :, None] - others.tokens[:, None]).abs() < APART
    none = near | (others.tokens < 0)[:, None]
    least = evidence.ranks.total(squares).masked_fill(none, torch.inf).amin(2)
    known = (least < torch.inf) & (evidence.tokens >= 0)
    found = least.clamp(min=0).sqrt().masked_fill(~known, 0)
    # Tokens that have no other get the mean of those that have.
    mean = found.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    # Each rank says the same, and what ranks say is added up.
    return torch.where(known, found, mean) / evidence.ranks.size


def _squares(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Squared distances ``[B, N, M]`` over these heads of ``[B, K, N, D]`` and ``[B, K, M, D]``."""
    sizes = own.square().sum((1, 3))[:, :, None] + other.square().sum((1, 3))[:, None]
    return sizes - 2.0 * (own @ other.transpose(2, 3)).sum(1)


rarity.compares = True  # type: ignore[attr-defined]
register_metric("rarity", rarity)
