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

import torch

from adms.attention.block_sparse.scorer import ImportanceScorer
from adms.attention.grouped import grouped_attention
from adms.attention.sparse_scores import (
    Blocks,
    block_moments,
    mean_mass,
    reach_of,
    sampled_mass,
    scored_mass,
    take,
)
from adms.binding import LayerKind
from adms.errors import ADMSTypeError, ADMSValueError

SAMPLED_QUERIES = "sampled_queries"
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
        sample_every: with "sampled_queries", one query of so many is sampled.
        scorer: who says which blocks matter. "sampled_queries" attends with a few queries of the
            block to everything; "block_means" needs no more than means and variances of the keys,
            at lower quality. Or an ``ImportanceScorer`` for all layers, or a tuple of one for each
            attention layer.
    """

    density: float = 0.5
    block_size: int = 16
    query_block_size: int = 64
    min_tokens: int = 512
    sample_every: int = 4
    scorer: str | ImportanceScorer | tuple[ImportanceScorer, ...] = SAMPLED_QUERIES

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
        for name in ("block_size", "query_block_size", "min_tokens", "sample_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ADMSTypeError(f"{name} must be an integer, got {value!r}")
            low = 0 if name == "min_tokens" else 1
            if value < low:
                raise ADMSValueError(f"{name} must be at least {low}, got {value}")
        if isinstance(self.scorer, str):
            if self.scorer not in (SAMPLED_QUERIES, BLOCK_MEANS):
                raise ADMSValueError(
                    f"scorer must be {SAMPLED_QUERIES!r}, {BLOCK_MEANS!r} or an ImportanceScorer, "
                    f"got {self.scorer!r}"
                )
            return
        scorers = self.scorer if isinstance(self.scorer, tuple) else (self.scorer,)
        for scorer in scorers:
            if not isinstance(scorer, ImportanceScorer):
                raise ADMSTypeError(
                    f"scorer must be {SAMPLED_QUERIES!r}, {BLOCK_MEANS!r}, an ImportanceScorer or "
                    f"a tuple of one for each attention layer, got {scorer!r}"
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
            if isinstance(self.scorer, str):
                return
            scorer = self.scorer_of(index)
            patterns, size = scorer.query_map.shape[:2]
            if size != kind.shape.key_dim or patterns not in (1, kind.num_query_heads):
                raise ADMSValueError(
                    f"the scorer of layer {index} must be an ImportanceScorer(head_dim="
                    f"{kind.shape.key_dim}, patterns={kind.num_query_heads} or 1), got head_dim="
                    f"{size}, patterns={patterns}"
                )

    def scorer_of(self, layer_idx: int) -> ImportanceScorer:
        """The trained scorer of a layer.

        Raises:
            ADMSTypeError: there is none.
        """
        scorer = self.scorer[layer_idx] if isinstance(self.scorer, tuple) else self.scorer
        if isinstance(scorer, str):
            raise ADMSTypeError(f"{scorer!r} is no ImportanceScorer")
        return scorer

    def applies(self, queries: int, entries: int) -> bool:
        """Whether a pass of so many new tokens over so many entries is made sparse."""
        return self.density < 1.0 and queries > 1 and entries >= self.min_tokens


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
    # The sampled queries need no moments of the keys.
    moments = None if config.scorer == SAMPLED_QUERIES else block_moments(blocks, keys)
    sink_blocks = min(-(-sinks // blocks.size), blocks.num_held)
    outputs = []
    for start in range(0, query.shape[2], config.query_block_size):
        rows = slice(start, min(start + config.query_block_size, query.shape[2]))
        part, part_bias = query[:, :, rows], bias[:, :, rows]
        own = (
            blocks.num_held + rows.start // blocks.size,
            blocks.num_held + -(-rows.stop // blocks.size),
        )
        reach = reach_of(blocks, part_bias, hidden / 2)
        real = blocks.filled[:, blocks.num_held :].flatten(1)[:, rows]
        if moments is None:
            every = config.sample_every
            mass = sampled_mass(blocks, every, part, real, keys, part_bias, scaling, softcap)
        elif isinstance(config.scorer, str):
            mass = mean_mass(part, real, moments, reach, scaling, softcap)
        else:
            mass = scored_mass(config.scorer_of(layer_idx), part, real, moments[0], reach)
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
    return take(keys, tokens), take(values, tokens), own_bias
