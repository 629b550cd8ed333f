"""What the refiner sees of a sequence, and what it is rewarded for.

Letters: ``B`` batch, ``N`` tokens, ``C`` dims, ``S`` segments (blocks of ``size`` tokens, the last
one shorter), ``H`` heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adms.attention.adaptive_span import AdaptiveSpan, soft_span_share
from adms.attention.projections import add_mask

NUM_FEATURES = 4

# Queries of a segment on which the retained mass is measured: enough for a mean, and few beside
# the attention itself.
_SAMPLED_QUERIES = 16


@dataclass(frozen=True)
class SpanReport:
    """What the last forward decided and did; detached.

    Attributes:
        span_scale: ``[B, N]``, share of the longest span each query was given.
        actions: ``[B, S]``, the refiner's choices.
        rewards: ``[B, S]``, or None where the refiner wasn't learning.
        iterations: ``[B, N]``, how often each query attended before its output was stable.
        win_size: queries of a window, tokens.
        reach: how far beyond a window its keys go, tokens.
    """

    span_scale: Tensor
    actions: Tensor
    rewards: Tensor | None
    iterations: Tensor
    win_size: int
    reach: int


def _blocks(per_token: Tensor, size: int) -> Tensor:
    """Return ``[B, S, size, C]`` of ``[B, N, C]``, padded with zeros."""
    padding = -per_token.shape[1] % size
    return F.pad(per_token, (0, 0, 0, padding)).unflatten(1, (-1, size))


def segment_means(per_token: Tensor, size: int, present: Tensor | None = None) -> Tensor:
    """Return every segment's mean, ``[B, S]`` of ``[B, N]``, over tokens in ``present`` ``[N]``."""
    weights = torch.ones_like(per_token) if present is None else present.expand_as(per_token)
    total = _blocks((per_token * weights)[..., None], size).sum(dim=(2, 3))
    return total / _blocks(weights[..., None], size).sum(dim=(2, 3)).clamp(min=1.0)


def segment_features(x: Tensor, span_scale: Tensor, size: int, ctx: int) -> Tensor:
    """Return features, each 0..1, of every segment: ``[B, S, 4]`` of tokens ``[B, N, C]``.

    In order: the share of energy in the segment's mean (how alike its tokens are), the mean change
    of direction from token to token, the mean of ``span_scale`` ``[B, N]``, and where the segment
    starts within ``ctx`` tokens.
    """
    wide = x.to(span_scale.dtype)
    tokens = x.shape[1]
    energy = segment_means(wide.square().sum(dim=-1), size)
    lengths = _blocks(wide.new_ones(1, tokens, 1), size).sum(dim=(2, 3))
    center = _blocks(wide, size).sum(dim=2) / lengths[..., None]
    alike = center.square().sum(dim=-1) / energy.clamp(min=torch.finfo(wide.dtype).tiny)
    turn = (1.0 - F.cosine_similarity(wide[:, 1:], wide[:, :-1], dim=-1)) / 2.0
    # A segment's first token has its predecessor elsewhere.
    inside = (torch.arange(tokens, device=x.device) % size != 0).to(wide.dtype)
    change = segment_means(F.pad(turn, (1, 0)), size, inside)
    place = torch.arange(alike.shape[1], device=x.device, dtype=wide.dtype) * size / ctx
    scale = segment_means(span_scale, size)
    return torch.stack([alike, change, scale, place.expand_as(alike)], dim=-1)


@torch.no_grad()
def retained_mass(
    layer: AdaptiveSpan,
    x: Tensor,
    span_scale: Tensor,
    size: int,
    longest: int,
    is_causal: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """Return, per segment, the share of attention that the chosen spans keep: ``[B, S]``.

    The whole is what a span of ``longest`` tokens would attend to. Measured on up to 16 queries of
    a segment; one that ``mask`` leaves without keys loses nothing.

    Args:
        layer: whose projections, temperature and edge are measured.
        x: tokens ``[B, N, C]``.
        span_scale: the chosen shares of ``longest``, ``[B, N]``.
        size: tokens of a segment.
        longest: the span of scale 1, tokens.
        is_causal: nobody looks ahead.
        mask: 4-D, as `check_mask` returns it.
    """
    tokens = x.shape[1]
    starts = torch.arange(0, tokens, size, device=x.device)[:, None]
    lengths = (tokens - starts).clamp(max=size)
    steps = torch.arange(min(_SAMPLED_QUERIES, size), device=x.device)
    # Where a segment is shorter than the sample, its tokens repeat: the mean stays one over it.
    at = (starts + steps * lengths // len(steps)).flatten()
    scale = span_scale[:, at]
    temperature = layer.temperature(scale).to(x.dtype)[:, None, :, None]
    query = layer.query_module(x[:, at]) / temperature
    distance = at[:, None] - torch.arange(tokens, device=x.device)
    whole = layer.edge_bias(distance, scale.new_tensor(longest), layer.max_dist, is_causal)
    if mask is not None:
        whole = add_mask(whole, mask.expand(-1, -1, tokens, tokens)[:, :, at])
    scores = query @ layer.key_module(x).transpose(-1, -2)
    weights = (scores.to(scale.dtype) + whole).softmax(dim=-1)
    span = (scale * longest)[:, None, :, None]
    kept = (weights * soft_span_share(distance.abs().to(scale.dtype), span, layer.ramp)).sum(-1)
    lost_nothing = (whole == float("-inf")).all(dim=-1)
    kept = torch.where(lost_nothing, 1.0, kept).mean(dim=1)
    return kept.unflatten(1, (-1, len(steps))).mean(dim=2)
