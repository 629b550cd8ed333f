"""How much attention each block of entries gets from a block of queries: exactly, or estimated.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``G = H / K``, ``Q`` queries, ``N``
entries (the pass's new tokens are the last), ``D`` head size, ``J`` entry blocks, ``T`` tokens in
a block. ``R`` and ``M`` are ``B`` and ``H`` or ``K``, or 1 where all agree.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from adms.attention.block_sparse.scorer import ImportanceScorer


class Blocks(NamedTuple):
    """Entries in the order of the text, cut into blocks.

    What the cache held before comes first; the chunk's own tokens begin a block of their own.

    Attributes:
        tokens: ``[R, J, T]`` which entry lies at each place; 0 at places that hold none.
        filled: ``[R, J, T]`` whether a place holds an entry that any head may see.
        num_held: blocks of entries that the cache held before.
    """

    tokens: torch.Tensor
    filled: torch.Tensor
    num_held: int

    @property
    def num_blocks(self) -> int:
        """``J``."""
        return self.tokens.shape[1]

    @property
    def size(self) -> int:
        """``T``."""
        return self.tokens.shape[2]


def cut_blocks(
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    new_valid: torch.Tensor | None,
    queries: int,
    size: int,
) -> Blocks:
    """Cuts the entries of a pass into blocks.

    Args:
        positions: ``[R, N - Q]`` where each entry held before lies in the text.
        valid: ``[R, N - Q]`` which of them any head may see, or None for all.
        new_valid: ``[R, Q]`` which new tokens are real, or None for all.
        queries: ``Q``.
        size: ``T``.
    """
    device, held = positions.device, positions.shape[1]
    rows = max(part.shape[0] for part in (positions, valid, new_valid) if part is not None)
    seen = torch.ones(1, held, dtype=torch.bool, device=device) if valid is None else valid
    real = torch.ones(1, queries, dtype=torch.bool, device=device)
    real = real if new_valid is None else new_valid
    # What no head sees goes to the end, where it shares few blocks with what is seen.
    order = positions.masked_fill(~seen, math.inf).argsort(dim=1, stable=True).expand(rows, -1)
    seen = seen.expand(rows, -1).gather(1, order)
    new = torch.arange(held, held + queries, device=device)
    parts = ((order, seen), (new.expand(rows, -1), real.expand(rows, -1)))
    tokens, filled = (
        torch.cat([pad(part[n], (0, -part[n].shape[1] % size)) for part in parts], 1)
        for n in range(2)
    )
    return Blocks(
        tokens.unflatten(1, (-1, size)), filled.unflatten(1, (-1, size)), -(-held // size)
    )


def take(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Entries ``tokens [R, K or 1, P]`` of ``[B, K, N, D]``: ``[B, K, P, D]``."""
    rows, heads, count, size = states.shape
    first = torch.arange(rows * heads, device=states.device).view(rows, heads, 1) * count
    index = (first + tokens).flatten()
    return states.reshape(-1, size).index_select(0, index).view(rows, heads, -1, size)


def reach_of(blocks: Blocks, bias: torch.Tensor, hidden: float) -> torch.Tensor:
    """What bias says of whole blocks, ``[R, M, J]``: the log of the sum of their exponentials.

    An entry counts as the query sees it to which it is most visible; -inf where none is. A block
    of ten entries so weighs log 10 more than one of a single entry.
    """
    best = bias.amax(2)
    best = best if best.dtype == torch.float64 else best.float()
    best = best.masked_fill(best < hidden, -math.inf)
    rows = max(best.shape[0], blocks.tokens.shape[0])
    index = blocks.tokens.flatten(1)[:, None].expand(rows, best.shape[1], -1)
    placed = best.expand(rows, -1, -1).gather(2, index).unflatten(2, (-1, blocks.size))
    return placed.masked_fill(~blocks.filled[:, None], -math.inf).logsumexp(3)


def sampled_mass(
    blocks: Blocks,
    every: int,
    query: torch.Tensor,
    real: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention ``[B, K, J]`` that every ``every``-th query gives each block, exactly.

    Summed over the sampled queries that are ``real [R, Q]`` and over the heads of a group. The
    first and the last query are always sampled, so that a padded row has one of its own.

    Source: Lai et al. (2025), FlexPrefill, arXiv:2502.20766, which samples the last queries of a
    text; differs in sampling queries of every block.
    """
    count, kv_heads = query.shape[2], keys.shape[1]
    index = torch.arange(0, count + every - 1, every, device=query.device).clamp(max=count - 1)
    grouped = query[:, :, index].unflatten(1, (kv_heads, -1))
    scores = (grouped @ keys[:, :, None].transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    bias = bias[:, :, index]
    per_head = bias.shape[1] not in (1, kv_heads)
    scores = scores + (bias.unflatten(1, (kv_heads, -1)) if per_head else bias[:, :, None])
    dtype = torch.promote_types(scores.dtype, torch.float32)
    shares = torch.softmax(scores, -1, dtype=dtype)
    mass = (shares * real[:, index][:, None, None, :, None]).sum((2, 3))
    placed = take(mass[..., None], blocks.tokens.flatten(1)[:, None])[..., 0]
    return (placed.unflatten(2, (-1, blocks.size)) * blocks.filled[:, None]).sum(3)


def block_moments(blocks: Blocks, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance ``[B, K, J, D]`` of the keys in each block, in float32 (or float64)."""
    entries = take(keys, blocks.tokens.flatten(1)[:, None])
    entries = entries if keys.dtype == torch.float64 else entries.float()
    weights = blocks.filled.to(entries.dtype)
    weights = (weights / weights.sum(2, keepdim=True).clamp(min=1.0))[:, None, :, None]
    cut = entries.unflatten(2, (-1, blocks.size))
    means = (weights @ cut).squeeze(3)
    return means, ((weights @ cut.square()).squeeze(3) - means.square()).clamp(min=0.0)


def mean_mass(
    query: torch.Tensor,
    real: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    reach: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Share of attention ``[B, K, J]`` if a block's keys were normal with independent channels.

    The mean of ``exp(score)`` over a block is then ``exp(mean + variance / 2)`` of its scores.
    Summed over the ``real [R, Q]`` queries and over the heads of a group.

    Source: Jiang et al. (2024), MInference, arXiv:2407.02490 (block-sparse heads); differs in
    keeping queries apart, whose mean hides what single ones look for, in the variance, without
    which a block with one key that matters looks like any other, and in counting entries.
    """
    means, variances = moments
    kv_heads = means.shape[1]
    grouped = query.to(means.dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    scores = (grouped @ means.transpose(-1, -2)) * scaling
    scores += (grouped.square() @ variances.transpose(-1, -2)) * (scaling**2 / 2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.unflatten(2, (-1, query.shape[2]))
    per_head = reach.shape[1] not in (1, kv_heads)
    reach = reach.unflatten(1, (kv_heads, -1)) if per_head else reach[:, :, None]
    # A block that no query sees (all of it padding) would make NaN of a row that sees nothing.
    shares = torch.softmax(scores + reach[:, :, :, None], -1).nan_to_num(0.0)
    return (shares * real[:, None, None, :, None]).sum((2, 3))


def scored_mass(
    scorer: ImportanceScorer,
    query: torch.Tensor,
    real: torch.Tensor,
    means: torch.Tensor,
    reach: torch.Tensor,
) -> torch.Tensor:
    """Share of attention ``[B, K, J]`` by a trained scorer, averaged over the heads of a group."""
    heads, kv_heads = query.shape[1], means.shape[1]
    weights = real.to(means.dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1.0)
    summary = weights[:, None, None] @ query.to(means.dtype)
    repeated = means.repeat_interleave(heads // kv_heads, 1)
    seen = reach.repeat_interleave(heads // reach.shape[1], 1) > -math.inf
    seen = seen[:, :, None]
    scores = scorer(summary, repeated, seen).masked_fill(~seen, -math.inf)
    shares = torch.softmax(scores.to(means.dtype), -1).nan_to_num(0.0)[:, :, 0]
    return shares.unflatten(1, (kv_heads, -1)).sum(2)
