"""Importance by how far a key lies from every other: a few layers look for what is nearest."""

import torch

from adms.entries import Entries
from adms.importance.base import Evidence, register_metric
from adms.importance.novelty import novelty
from adms.ranks import Ranks

# Tokens nearer than this in the text are no other ones: a fact may say its number twice.
APART = 40
# Tokens that are compared at once: a stream that turns to codes brings a whole middle.
TOGETHER = 512


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
    own, other = keys - common[:, :, None], others.keys.float() - common[:, :, None]
    least = torch.cat(
        [
            _nearest(some, tokens, other, others.tokens, evidence.ranks)
            for some, tokens in zip(
                own.split(TOGETHER, dim=2), evidence.tokens.split(TOGETHER, dim=1), strict=True
            )
        ],
        dim=1,
    )
    known = (least < torch.inf) & (evidence.tokens >= 0)
    found = least.clamp(min=0).sqrt().masked_fill(~known, 0)
    # Tokens that have no other get the mean of those that have.
    mean = found.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    # Each rank says the same, and what ranks say is added up.
    return torch.where(known, found, mean) / evidence.ranks.size


def _nearest(
    own: torch.Tensor,
    tokens: torch.Tensor,
    other: torch.Tensor,
    places: torch.Tensor,
    ranks: Ranks,
) -> torch.Tensor:
    """Least squared distance ``[B, N]`` of tokens to others that are apart, inf where none is."""
    near = (tokens[:, :, None] - places[:, None]).abs() < APART
    squares = ranks.total(_squares(own, other))
    return squares.masked_fill(near | (places < 0)[:, None], torch.inf).amin(2)


def _squares(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Squared distances ``[B, N, M]`` over these heads of ``[B, K, N, D]`` and ``[B, K, M, D]``."""
    sizes = own.square().sum((1, 3))[:, :, None] + other.square().sum((1, 3))[:, None]
    return sizes - 2.0 * (own @ other.transpose(2, 3)).sum(1)


rarity.compares = True  # type: ignore[attr-defined]
register_metric("rarity", rarity)
