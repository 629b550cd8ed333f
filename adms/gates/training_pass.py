"""A differentiable picture of gates at work: one dense pass in which old tokens are folded.

Every query sees the newest tokens exactly and older blocks as a gate folds them, without codes: a
folded token has the keys, values and position of the entry it became part of, which in a softmax is
that entry with its weight. Gradients reach a gate through the choice: more importance moves what a
token reads as towards the token itself. What that is worth is the integral of the gradient on the
way from folded to not, so in training every token reads as a random point of that way; at its end
the gradient says nothing, or the contrary.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``N`` tokens, ``R`` blocks, ``T`` tokens of a
block, ``M`` admitted ones, ``D``/``E`` head sizes of keys/values.
"""

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from adms.attention.grouped import grouped_attention
from adms.binding import Binding, PositionScheme
from adms.cache import ADMSKVCache
from adms.gates.fold import choose_hosts, token_distance
from adms.gates.learned import log_importance
from adms.patches import find_family
from adms.patches.base import bind_method
from adms.streaming import named_arguments, slice_arguments


@dataclass(frozen=True)
class FoldingSizes:
    """Which tokens are folded, and how.

    Attributes:
        sink: first tokens of the text, never folded.
        recent: tokens that a query sees exactly, itself included.
        block: tokens of a block (``T``).
        admitted: entries of a block (``M``).
    """

    sink: int
    recent: int
    block: int
    admitted: int

    @property
    def first_reader(self) -> int:
        """The first token of a text that sees folded ones."""
        return self.sink + self.block + self.recent - 1

    def num_blocks(self, tokens: int) -> int:
        """Whole blocks (``R``) after the sinks of a text."""
        return max(0, tokens - self.sink) // self.block


class FoldingLayer(CacheLayerMixin):
    """Stands in for a layer of the cache in one training pass.

    Args:
        weight: ``[F]`` the gate.
        sizes: what it folds.
        generator: see ``fold_softly``.
    """

    is_sliding = False

    def __init__(
        self, weight: torch.Tensor, sizes: FoldingSizes, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.generator = generator
        self.weight = weight
        self.sizes = sizes
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the pass's keys before positions and values."""
        self.states = (key_states, value_states)
        return key_states, value_states

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is allocated."""

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (the name before transformers 5.13)."""
        return -1

    def get_seq_length(self) -> int:
        """Nothing came before the pass."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The pass alone."""
        return query_length, 0

    def attention(
        self,
        scheme: PositionScheme,
        query: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Attention ``[B, Q, H, E]`` over exact and folded tokens."""
        if self.states is None:
            raise RuntimeError("attention before the layer received its tokens")
        keys, values = self.states
        count, device = keys.shape[2], keys.device
        text = torch.arange(count, device=device, dtype=torch.float32)[None]
        tables = scheme.tables(text, query, text)
        folded_keys, folded_values, places = fold_softly(
            keys, values, self.weight, self.sizes, self.generator
        )
        own = scheme.tables(places, query, text)
        bias = visibility(count, self.sizes, query)
        slope = scheme.bias(text, torch.cat([text.expand_as(places), places], 1), query.shape[1])
        return grouped_attention(
            scheme.rotate(query, tables),
            torch.cat([scheme.rotate(keys, tables), scheme.rotate(folded_keys, own)], dim=2),
            torch.cat([values, folded_values], dim=2),
            # Adding to the lowest finite number may leave the range.
            bias if slope is None else (bias + slope).clamp(min=torch.finfo(bias.dtype).min),
            is_causal=False,
            scaling=scaling,
            softcap=softcap,
        )


def fold_softly(
    keys: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    sizes: FoldingSizes,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What every token reads as once its block is folded.

    Args:
        keys: ``[B, K, N, D]``.
        values: ``[B, K, N, E]``.
        weight: ``[F]``, with gradient.
        sizes: blocks and entries.
        generator: draws how far each token is on its way from folded to itself; None takes the
            end that the gate chose.

    Returns:
        Keys and values of the entry that each token is part of, ``[B, K, N, ...]`` (tokens outside
        of whole blocks as they are), and the entries' positions ``[B, N]``.
    """
    rows, count, block = keys.shape[0], keys.shape[2], sizes.block
    start, blocks = sizes.sink, sizes.num_blocks(count)
    stop = start + blocks * block
    places = torch.arange(count, device=keys.device, dtype=torch.float32).repeat(rows, 1)
    if blocks == 0 or sizes.admitted == block:
        return keys, values, places
    inside = [part[:, :, start:stop].unflatten(2, (-1, block)) for part in (keys, values)]
    scores = log_importance(weight, *inside)
    # Only differences within a block matter.
    scores = scores - scores.mean(2, keepdim=True)
    with torch.no_grad():
        distance = token_distance(*inside)
        hosts = choose_hosts(distance, sizes.admitted, scores)
        index = torch.arange(block, device=keys.device)
        same = hosts[..., None] == hosts[..., None, :]
        alone = same.sum(3) == 1
        # What would become of a token that stands for itself alone: the nearest.
        itself = torch.eye(block, dtype=torch.bool, device=keys.device)
        nearest = distance.masked_fill(itself, torch.inf).argmin(3)
        entry = torch.where(alone, nearest, hosts)[:, None, :, :, None]
        is_host = hosts == index
        rank = is_host.long().cumsum(2) - 1
        order = rank.gather(2, hosts).float()
        grid = (order + 0.5) * block / sizes.admitted - 0.5
        first = start + torch.arange(blocks, device=keys.device)[:, None] * block
        places[:, start:stop] = (first + grid).flatten(1)

    way = alone.float()
    if generator is not None:
        way = torch.rand(scores.shape, generator=generator).to(scores.device)
    # No more than that in value; its gradient is that of the score.
    way = (way + scores - scores.detach())[:, None, :, :, None]
    results = []
    for states, part in zip((keys, values), inside, strict=True):
        folded = part.gather(3, entry.expand(-1, part.shape[1], -1, -1, part.shape[4]))
        moved = folded + way.to(part.dtype) * (part - folded.detach())
        own = moved.flatten(2, 3)
        results.append(torch.cat([states[:, :, :start], own, states[:, :, stop:]], dim=2))
    return results[0], results[1], places


def visibility(count: int, sizes: FoldingSizes, like: torch.Tensor) -> torch.Tensor:
    """What is added to scores ``[1, 1, N, 2 N]``: each token is seen exactly or folded, once."""
    index = torch.arange(count, device=like.device)
    block_end = sizes.sink + ((index - sizes.sink) // sizes.block + 1) * sizes.block
    last_whole = sizes.sink + sizes.num_blocks(count) * sizes.block
    foldable = (index >= sizes.sink) & (index < last_whole)
    is_old = foldable & (index[:, None] - block_end + 1 >= sizes.recent)
    causal = index[None] <= index[:, None]
    seen = torch.cat([causal & ~is_old, causal & is_old], dim=1)[None, None]
    shown = torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.where(seen, shown, torch.finfo(like.dtype).min)


class FoldingCache(ADMSKVCache):
    """A cache for one pass, whose layers fold softly."""

    def fold_with(
        self,
        weights: Sequence[torch.Tensor],
        sizes: Sequence[FoldingSizes],
        generator: torch.Generator | None,
    ) -> None:
        """Puts gates in place of the layers that have a middle."""
        self.layers = [
            FoldingLayer(weights[index], sizes[index], generator)
            if self.binding_for_use.is_adms_layer(index)
            else self.binding_for_use.plain_layer(index)
            for index in range(len(weights))
        ]


def folded_logits(
    model: nn.Module,
    binding: Binding,
    ids: torch.Tensor,
    weights: Sequence[torch.Tensor],
    sizes: Sequence[FoldingSizes],
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Logits of ``ids [B, N]`` as they would be with gates, with gradients to their weights.

    Args:
        model: an enabled model.
        binding: any of a cache of it.
        ids: within the trained length.
        weights: per layer ``[F]``.
        sizes: per layer, what is folded; blocks and recent tokens are alike in all of them.
        generator: see ``fold_softly``.
    """
    family = find_family(model)
    cache = FoldingCache()
    cache.bind(binding)
    cache.fold_with(weights, sizes, generator)
    decoder = family.decoder(model)
    undo = bind_method(decoder, "forward", _whole_pass)
    try:
        output: Any = model(input_ids=ids, past_key_values=cache)
        return output.logits
    finally:
        undo()


def _whole_pass(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The decoder's own forward over all tokens at once, gradients and all."""
    forward = types.MethodType(type(decoder).forward, decoder)
    arguments = named_arguments(forward, args, kwargs)
    cache: FoldingCache = arguments["past_key_values"]
    rows, columns = arguments["input_ids"].shape
    own = slice_arguments(arguments, 0, columns, columns)
    cache.begin(rows, columns, None, arguments["input_ids"].device)
    own["past_key_values"] = own["adms_cache"] = cache
    find_family(decoder).adjust(own, cache)
    return forward(**own)
