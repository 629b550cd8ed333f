"""Block-sparse attention for the chunks of a long input: `enable_adms_llm(sparse_prefill=...)`.

Entries are put in the order of the text and cut into blocks, those that the cache holds apart from
the chunk's own tokens. For each block of queries and each KV head, a scorer estimates how much
attention every block of entries would get; the best are kept, and the rest is not read.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``G = H / K``, ``Q`` new tokens, ``N``
entries (the new tokens are the last ``Q``), ``D``/``E`` head sizes of keys/values, ``I`` query
blocks, ``J`` entry blocks, ``S`` most blocks kept, ``T`` tokens in a block. ``R`` and ``M`` are
``B`` and ``H`` or ``K``, or 1 where all agree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from adms.attention.block_sparse.scorer import ImportanceScorer
from adms.attention.grouped import grouped_attention
from adms.binding import LayerKind
from adms.errors import ADMSTypeError, ADMSValueError

BLOCK_MEANS = "block_means"


@dataclass(frozen=True, kw_only=True)
class SparsePrefillConfig:
    """How chunks of more than one token attend; single tokens always attend to everything.

    Attributes:
        density: share of the blocks that a query may see which is kept, sinks and the queries' own
            block among them; 1 is dense attention, bit for bit.
        block_size: entries in a block.
        query_block_size: queries that share a choice of blocks.
        min_tokens: entries, the chunk's own among them, below which attention stays dense.
        scorer: "block_means", which needs no training, or an ``ImportanceScorer`` for all layers,
            or a tuple of one for each attention layer.
    """

    density: float = 0.5
    block_size: int = 8
    query_block_size: int = 64
    min_tokens: int = 512
    scorer: str | ImportanceScorer | tuple[ImportanceScorer, ...] = BLOCK_MEANS

    def __post_init__(self) -> None:
        """Checks types and ranges.

        Raises:
            ADMSTypeError: a field has a type that cannot work.
            ADMSValueError: a field is out of range.
        """
        if isinstance(self.density, bool) or not isinstance(self.density, int | float):
            raise ADMSTypeError(f"density must be a number, got {self.density!r}")
        if not 0.0 < self.density <= 1.0:
            raise ADMSValueError(f"density must be above 0 and at most 1, got {self.density}")
        for name, low in (("block_size", 1), ("query_block_size", 1), ("min_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ADMSTypeError(f"{name} must be an integer, got {value!r}")
            if value < low:
                raise ADMSValueError(f"{name} must be at least {low}, got {value}")
        if isinstance(self.scorer, str):
            if self.scorer != BLOCK_MEANS:
                raise ADMSValueError(
                    f"scorer must be {BLOCK_MEANS!r} or an ImportanceScorer, got {self.scorer!r}"
                )
            return
        scorers = self.scorer if isinstance(self.scorer, tuple) else (self.scorer,)
        for scorer in scorers:
            if not isinstance(scorer, ImportanceScorer):
                raise ADMSTypeError(
                    f"scorer must be {BLOCK_MEANS!r}, an ImportanceScorer or a tuple of one for "
                    f"each attention layer, got {scorer!r}"
                )

    def check_kinds(self, kinds: Sequence[LayerKind]) -> None:
        """Checks the scorers against a model's attention layers.

        Raises:
            ADMSValueError: they are made for other layers or heads.
        """
        if isinstance(self.scorer, tuple) and len(self.scorer) != len(kinds):
            raise ADMSValueError(
                f"scorer must have one ImportanceScorer for each of the model's {len(kinds)} "
                f"attention layers, got {len(self.scorer)}"
            )
        for index, kind in enumerate(kinds):
            scorer = self.scorer[index] if isinstance(self.scorer, tuple) else self.scorer
            if isinstance(scorer, str):
                continue
            patterns, size = scorer.query_map.shape[:2]
            if size != kind.shape.key_dim or patterns not in (1, kind.num_query_heads):
                raise ADMSValueError(
                    f"the scorer of layer {index} must be an ImportanceScorer(head_dim="
                    f"{kind.shape.key_dim}, patterns={kind.num_query_heads} or 1), got head_dim="
                    f"{size}, patterns={patterns}"
                )

    def applies(self, queries: int, entries: int) -> bool:
        """Whether a pass of so many new tokens over so many entries is made sparse."""
        return self.density < 1.0 and queries > 1 and entries >= self.min_tokens


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


def attend_sparsely(
    config: SparsePrefillConfig,
    layer_idx: int,
    blocks: Blocks,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    *,
    sinks: int,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of a pass's new tokens over the blocks of entries that matter most to them.

    Args:
        config: how sparse, and who scores.
        layer_idx: which attention layer, for a scorer of its own.
        blocks: the entries' order.
        query: ``[B, H, Q, D]`` at their positions.
        keys: ``[B, K, N, D]`` at their positions.
        values: ``[B, K, N, E]``.
        bias: ``[R, M, Q, N]`` added to the scores; the least finite number hides an entry.
        sinks: entries at the start of the text that are always kept.
        scaling: factor of the scores.
        dropout: probability of dropping an attention weight.
        softcap: bound of the scores by tanh, or None.

    Returns:
        ``[B, Q, H, E]``.
    """
    # Half of it: a slope may have been added to the number that hides an entry.
    hidden = max(torch.finfo(query.dtype).min, torch.finfo(bias.dtype).min)
    means, variances = _block_moments(blocks, keys)
    sink_blocks = min(-(-sinks // blocks.size), blocks.num_held)
    outputs = []
    for start in range(0, query.shape[2], config.query_block_size):
        rows = slice(start, min(start + config.query_block_size, query.shape[2]))
        part, part_bias = query[:, :, rows], bias[:, :, rows]
        own = (
            blocks.num_held + rows.start // blocks.size,
            blocks.num_held + -(-rows.stop // blocks.size),
        )
        reach = _reach(blocks, part_bias, hidden / 2)
        real = blocks.filled[:, blocks.num_held :].flatten(1)[:, rows]
        match config.scorer:
            case str():
                mass = _mean_mass(part, real, means, variances, reach, scaling, softcap)
            case tuple():
                mass = _scored_mass(config.scorer[layer_idx], part, real, means, reach)
            case _:
                mass = _scored_mass(config.scorer, part, real, means, reach)
        index, kept = _choose(mass, _per_kv_head(reach, mass), sink_blocks, own, config.density)
        outputs.append(
            grouped_attention(
                part,
                *_gather(blocks, index, kept, keys, values, part_bias, hidden),
                is_causal=False,
                scaling=scaling,
                dropout=dropout,
                softcap=softcap,
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _block_moments(blocks: Blocks, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance ``[B, K, J, D]`` of the keys in each block, in float32 (or float64)."""
    entries = _take(keys, blocks.tokens.flatten(1)[:, None])
    entries = entries if keys.dtype == torch.float64 else entries.float()
    weights = blocks.filled.to(entries.dtype)
    weights = (weights / weights.sum(2, keepdim=True).clamp(min=1.0))[:, None, :, None]
    cut = entries.unflatten(2, (-1, blocks.size))
    means = (weights @ cut).squeeze(3)
    return means, ((weights @ cut.square()).squeeze(3) - means.square()).clamp(min=0.0)


def _reach(blocks: Blocks, bias: torch.Tensor, hidden: float) -> torch.Tensor:
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


def _mean_mass(
    query: torch.Tensor,
    real: torch.Tensor,
    means: torch.Tensor,
    variances: torch.Tensor,
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


def _scored_mass(
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


def _per_kv_head(reach: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Which blocks any head of a group may see: ``[R, K or 1, J]``."""
    seen = reach > -math.inf
    if seen.shape[1] in (1, mass.shape[1]):
        return seen
    return seen.unflatten(1, (mass.shape[1], -1)).any(2)


def _choose(
    mass: torch.Tensor, seen: torch.Tensor, sink_blocks: int, own: tuple[int, int], density: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks kept, ``[B, K, S]``, and which of those places count.

    Args:
        mass: ``[B, K, J]``.
        seen: ``[R, K or 1, J]`` blocks to choose from.
        sink_blocks: blocks at the start that are kept whatever their mass.
        own: first block of the queries themselves, and the one after their last.
        density: share of the seen that is kept.
    """
    forced = torch.zeros_like(seen)
    forced[..., :sink_blocks] = True
    forced[..., own[0] : own[1]] = True
    forced &= seen
    # Rounding aside, never above the density asked for, but for what is forced.
    wanted = torch.maximum((seen.sum(-1) * density + 1e-6).long(), forced.sum(-1))
    # Known on the host, so that no layer waits for the device.
    most = max(sink_blocks + own[1] - own[0], int(own[1] * density + 1e-6))
    ranked = mass.masked_fill(~seen, -1.0).masked_fill(forced, math.inf)
    index = ranked.topk(min(most, own[1]), dim=-1).indices
    kept = torch.arange(index.shape[-1], device=mass.device) < wanted[..., None]
    return index, kept.expand(index.shape)


def _gather(
    blocks: Blocks,
    index: torch.Tensor,
    kept: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    hidden: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values ``[B, K, S * T, ...]`` and bias ``[B, K or H, Q, S * T]`` of blocks chosen."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None, None]
    rows = rows % blocks.tokens.shape[0]
    tokens = blocks.tokens[rows, index].flatten(2)
    shown = (blocks.filled[rows, index] & kept[..., None]).flatten(2)
    heads = max(bias.shape[1], index.shape[1])
    repeats = heads // index.shape[1]
    across = tokens.repeat_interleave(repeats, 1)[:, :, None].expand(-1, -1, bias.shape[2], -1)
    own_bias = bias.expand(index.shape[0], heads, -1, -1).gather(3, across)
    own_bias = own_bias.masked_fill(~shown.repeat_interleave(repeats, 1)[:, :, None], hidden)
    return _take(keys, tokens), _take(values, tokens), own_bias


def _take(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Entries ``tokens [R, K or 1, P]`` of ``[B, K, N, D]``: ``[B, K, P, D]``."""
    rows, heads, count, size = states.shape
    first = torch.arange(rows * heads, device=states.device).view(rows, heads, 1) * count
    index = (first + tokens).flatten()
    return states.reshape(-1, size).index_select(0, index).view(rows, heads, -1, size)
