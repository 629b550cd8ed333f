"""Attention of a sliding-window layer over its ring and the pass's new tokens.

Shapes: ``B`` rows (1 where all rows agree), ``H`` query heads, ``Q`` new tokens, ``S`` ring slots,
``D``/``E`` head sizes of keys/values.
"""

from dataclasses import dataclass
from typing import Any

import torch

from adms.attention.chunk import applies, attend_chunk
from adms.attention.grouped import grouped_attention
from adms.attention.tiered import attend
from adms.binding import PositionScheme
from adms.cache import ADMSKVCache
from adms.positions import ForwardView
from adms.tiers.window import WindowLayer
from adms.timeline import ring_tokens


@dataclass(frozen=True)
class WindowPass:
    """What all layers with the same window share within a pass.

    Attributes:
        used: ring slots that hold anything.
        ring_tables, new_tables: what rotates the ring's keys, and the new keys and queries.
        bias: ``[B, 1, Q, used + Q]`` added to the scores, or None.
    """

    used: int
    ring_tables: Any
    new_tables: Any
    bias: torch.Tensor | None


def attend_layer(
    cache: ADMSKVCache,
    layer_idx: int,
    query: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of one layer of a bound cache, over its tiers or its window.

    Args:
        cache: the cache, with a pass under way.
        layer_idx: the layer, which has received the pass's keys and values.
        query: ``[B, H, Q, D]`` before positions.
        scaling: factor of the scores.
        dropout: probability of dropping an attention weight.
        softcap: bound of the scores by tanh, or None.

    Returns:
        ``[B, Q, H, E]``.
    """
    layer = cache.layers[layer_idx]
    scheme = cache.binding_for_use.kinds[layer_idx].scheme
    if hasattr(layer, "attention"):
        # The trainer of gates puts layers of its own in place.
        return layer.attention(scheme, query, scaling, softcap)
    if isinstance(layer, WindowLayer):
        return attend_window(cache, layer, scheme, query, scaling, dropout, softcap)
    if softcap is None and not dropout and applies(cache, layer, scheme):
        return attend_chunk(cache, layer, scheme, query, scaling)
    return attend(cache, layer, scheme, query, scaling, dropout, softcap)


def attend_window(
    cache: ADMSKVCache,
    layer: WindowLayer,
    scheme: PositionScheme,
    query: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of the pass's queries over the last ``layer.window`` tokens each.

    Args:
        cache: the cache, with a pass under way.
        layer: the layer, which has received the pass's keys and values.
        scheme: how positions enter.
        query: ``[B, H, Q, D]`` before positions.
        scaling: factor of the scores.
        dropout: probability of dropping an attention weight.
        softcap: bound of the scores by tanh, or None.

    Returns:
        ``[B, Q, H, E]``.
    """
    view = cache.require_view()
    key = ("window", layer.window, id(scheme), query.device, query.dtype)
    if key not in view.shared:
        view.shared[key] = _prepare(cache, layer, scheme, view, query)
    plan: WindowPass = view.shared[key]  # type: ignore[assignment]
    staged = layer.require_staged()
    keys, values = scheme.rotate(staged.keys, plan.new_tables), staged.values
    if plan.used and layer.keys is not None and layer.values is not None:
        ring = scheme.rotate(layer.keys[:, :, : plan.used], plan.ring_tables)
        keys = torch.cat([ring, keys], dim=2)
        values = torch.cat([layer.values[:, :, : plan.used], values], dim=2)
    return grouped_attention(
        scheme.rotate(query, plan.new_tables),
        keys,
        values,
        plan.bias,
        is_causal=plan.bias is None and query.shape[2] > 1,
        scaling=scaling,
        dropout=dropout,
        softcap=softcap,
    )


def _prepare(
    cache: ADMSKVCache,
    layer: WindowLayer,
    scheme: PositionScheme,
    view: ForwardView,
    query: torch.Tensor,
) -> WindowPass:
    slots, device = layer.slots, query.device
    used = min(max(view.timeline.seen), slots)
    seen = view.seen.to(device)
    offsets = view.column_offsets().to(device)
    new_tokens = seen[:, None] + offsets
    old_tokens = ring_tokens(seen, slots)[:, :used]
    # Only distances matter, so positions count from the oldest token that the ring can hold.
    base = (seen - slots).clamp(min=0)[:, None]
    if view.text_positions:
        base = torch.zeros_like(base)
    new_positions = (new_tokens - base).float()
    top = new_tokens.float()
    if view.sizes.max_positions is not None:
        # What picks the frequencies of a dynamic rotary embedding is where the text is.
        top = top.clamp(max=view.sizes.max_positions - 1)
    old_positions = (old_tokens - base).clamp(min=0).float()
    return WindowPass(
        used,
        scheme.tables(old_positions, query, top) if used else None,
        scheme.tables(new_positions, query, top),
        _bias(layer.window, view, old_tokens, new_tokens, query),
    )


def _bias(
    window: int,
    view: ForwardView,
    old_tokens: torch.Tensor,
    new_tokens: torch.Tensor,
    query: torch.Tensor,
) -> torch.Tensor | None:
    """The mask as numbers to add, or None where plain (or plain causal) attention is right."""
    count, device = view.columns, query.device
    used = old_tokens.shape[1]
    if view.is_uniform and (count == 1 or (used == 0 and count <= window)):
        # A single token sees the whole ring; an input within one window needs no further mask.
        return None
    distance = new_tokens[:, :, None] - old_tokens[:, None, :]
    old = (old_tokens >= 0)[:, None, :] & (distance < window)
    distance = new_tokens[:, :, None] - new_tokens[:, None, :]
    order = torch.arange(count, device=device)
    new = (order[:, None] >= order[None, :]) & (distance < window)
    if view.column_valid is not None:
        # A padding column sees only itself, so that no row of the softmax is empty.
        itself = torch.eye(count, dtype=torch.bool, device=device)
        new = new & view.column_valid.to(device)[:, None, :] | itself
    allowed = torch.cat([old, new], dim=2)[:, None]
    bias = torch.zeros(1, device=device, dtype=query.dtype)
    return torch.where(allowed, bias, torch.finfo(query.dtype).min)
