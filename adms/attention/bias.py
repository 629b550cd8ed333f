"""What attention over the tiers adds to scores: log-weights, masks, slopes, weights of sinks.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``Q`` new tokens, ``N`` entries of a part.
"""

from dataclasses import dataclass
from typing import Any

import torch

from adms.attention.sparse_scores import Blocks, cut_blocks
from adms.binding import PositionScheme
from adms.entries import Entries
from adms.places import MiddleGeometry
from adms.positions import ForwardView


@dataclass
class Part:
    """Entries of one tier with their cache positions ``[B, N]``; ``tables`` rotate them."""

    entries: Entries
    positions: torch.Tensor
    tables: Any


def attention_bias(
    scheme: PositionScheme,
    view: ForwardView,
    geometry: MiddleGeometry | None,
    parts: list[Part],
    query_positions: torch.Tensor,
    query: torch.Tensor,
    span: int | None,
) -> torch.Tensor | None:
    """What is added to the scores, or None where plain (or plain causal) attention is right."""
    has_landmarks = len(parts) > 2 and geometry is not None and geometry.landmarks > 0
    weighted = any(part.entries.log_weight is not None for part in parts)
    key = ("bias", geometry, id(scheme), query.device, query.dtype, span)
    # Landmarks and weights differ between layers.
    is_shared = not (has_landmarks or weighted)
    if is_shared and key in view.shared:
        return view.shared[key]  # type: ignore[return-value]
    bias = _make_bias(scheme, view, geometry, parts, query_positions, query, span)
    if is_shared:
        view.shared[key] = bias
    return bias


def _masks(
    view: ForwardView, parts: list[Part], device: torch.device, span: int | None
) -> list[torch.Tensor | None]:
    """Which entries of each part hold something, ``[B or 1, K or 1, N]``; None where all do."""
    masks: list[torch.Tensor | None] = []
    for part in parts:
        valid = part.entries.valid
        if valid is not None:
            masks.append(valid[:, None] if valid.dim() == 2 else valid)
        else:
            masks.append(None)
    start, stop = view.exact_slice
    if stop > start and span is None:
        exact_valid = view.exact_tokens()[1]
        masks[0] = None if exact_valid is None else exact_valid.to(device)[:, None]
    return masks


def blocks_of_text(
    view: ForwardView,
    geometry: MiddleGeometry | None,
    parts: list[Part],
    query: torch.Tensor,
    size: int,
    span: int | None,
) -> Blocks:
    """The pass's entries in the order of the text, in blocks for sparse attention."""
    device = query.device
    has_landmarks = len(parts) > 2 and geometry is not None and geometry.landmarks > 0
    key = ("blocks", geometry, device, span)
    if not has_landmarks and key in view.shared:
        return view.shared[key]  # type: ignore[return-value]
    held = parts[:-1]
    masks = _masks(view, parts, device, span)[:-1]
    seen = [None if mask is None else mask.any(1) for mask in masks]
    rows = max([part.positions.shape[0] for part in held] + [1])
    rows = max([rows] + [mask.shape[0] for mask in seen if mask is not None])
    positions = [part.positions.expand(rows, -1) for part in held]
    valid = None
    if any(mask is not None for mask in seen):
        valid = torch.cat(
            [
                torch.ones_like(place, dtype=torch.bool) if mask is None else mask.expand(rows, -1)
                for place, mask in zip(positions, seen, strict=True)
            ],
            dim=1,
        )
    new_valid = None if view.column_valid is None else view.column_valid.to(device)
    places = torch.cat(positions, dim=1) if held else torch.zeros(1, 0, device=device)
    blocks = cut_blocks(places, valid, new_valid, query.shape[2], size)
    view.shared[key] = blocks
    return blocks


def _make_bias(
    scheme: PositionScheme,
    view: ForwardView,
    geometry: MiddleGeometry | None,
    parts: list[Part],
    query_positions: torch.Tensor,
    query: torch.Tensor,
    span: int | None,
) -> torch.Tensor | None:
    device, count = query.device, view.columns
    masks = _masks(view, parts, device, span)
    alone = len(parts) == 1
    fresh: torch.Tensor | None = None
    if not view.in_ring and not (alone and view.column_valid is None):
        fresh = causal(view, device)
    # Landmarks differ between rows even where everything else agrees.
    most = max(part.positions.shape[0] for part in parts)
    positions = [part.positions.expand(most, -1) for part in parts]
    slope = scheme.bias(query_positions, torch.cat(positions, dim=1), query.shape[1])
    dtype = query.dtype if slope is None else slope.dtype
    lowest = max(torch.finfo(query.dtype).min, torch.finfo(dtype).min)
    weights = [part.entries.log_weight for part in parts]
    if (
        all(mask is None for mask in masks)
        and fresh is None
        and slope is None
        and not any(weight is not None for weight in weights)
    ):
        return None
    if fresh is None and not view.in_ring:
        fresh = causal(view, device)
    sinks = view.sink_weight(geometry) if scheme.weighs_sinks else None
    columns = []
    for index, part in enumerate(parts):
        width = part.entries.num_entries
        is_fresh = not view.in_ring and index == len(parts) - 1
        mask = fresh if is_fresh else masks[index]
        weight = weights[index]
        piece = torch.zeros(1, 1, 1, width, device=device, dtype=dtype)
        if weight is not None:
            piece = piece + weight[:, :, None].to(dtype)
        if index == 0 and sinks is not None:
            # Tokens have left the exact tiers, so the exact part is the first and has the sinks.
            piece = piece.repeat(len(sinks), 1, 1, 1)
            piece[..., : view.sizes.sink] += torch.tensor(sinks, device=device)[:, None, None, None]
        if mask is not None:
            allowed = mask if mask.dim() == 4 else mask[:, :, None]
            piece = torch.where(allowed, piece, lowest)
        columns.append(piece)
    rows = max(piece.shape[0] for piece in columns)
    heads = max(piece.shape[1] for piece in columns)
    queries = count if any(piece.shape[2] > 1 for piece in columns) else 1
    bias = torch.cat([piece.expand(rows, heads, queries, -1) for piece in columns], dim=3)
    if slope is not None:
        if heads not in (1, slope.shape[1]):
            bias = bias.repeat_interleave(slope.shape[1] // heads, dim=1)
        # Adding to the lowest finite number may leave the range; a maximum keeps it finite.
        bias = (bias + slope).clamp(min=lowest)
    return bias


def causal(view: ForwardView, device: torch.device) -> torch.Tensor:
    """Which new tokens see which: ``[B or 1, 1, Q, Q]``; a padding column sees only itself."""
    count = view.columns
    seen = torch.ones(count, count, dtype=torch.bool, device=device).tril()[None, None]
    if view.column_valid is None:
        return seen
    itself = torch.eye(count, dtype=torch.bool, device=device)
    return seen & view.column_valid.to(device)[:, None, None, :] | itself
