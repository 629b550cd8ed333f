"""Attention of one new token per row over exact and coded entries: in plain PyTorch, or fused.

Shapes: ``B`` rows, ``R`` rows or 1 where all agree, ``H`` query heads, ``K`` KV heads,
``G = H / K``, ``N`` entries, ``D`` head size, ``C`` coded channels of a block of heads.
"""

from collections.abc import Sequence

import torch

from adms.compressors.tables import Projection
from adms.entries import all_finite
from adms.kernels.parts import CodedPart, ExactPart, channels_of, gains_of, restore


def decode_attention(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    exact: Sequence[ExactPart],
    coded: Sequence[CodedPart],
    *,
    scaling: float,
    fused: bool,
) -> torch.Tensor:
    """Softmax attention over all parts together.

    Args:
        query: ``[B, H, D]`` before positions.
        cos, sin: ``[R, D]`` of the queries' positions, in halves (the second repeats the first).
        exact: at least one part, with at least one valid entry in every row among them.
        coded: parts read through their codes.
        scaling: factor of the scores.
        fused: by Triton kernels, which never write the decoded entries to memory.

    Returns:
        ``[B, H, D]``.
    """
    if fused:
        from adms.kernels.decode_attention_triton import fused_decode_attention

        return fused_decode_attention(query, cos, sin, exact, coded, scaling)
    return plain_decode_attention(query, cos, sin, exact, coded, scaling)


def plain_decode_attention(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    exact: Sequence[ExactPart],
    coded: Sequence[CodedPart],
    scaling: float,
) -> torch.Tensor:
    """The twin: rotates and scores part by part, and sums values of codes as channels.

    Computes in float32 (float64 where the query is), so only scores are ever joined.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows, heads = query.shape[:2]
    kv_heads = exact[0].keys.shape[1]
    rotated = rotate(query.to(dtype), cos[:, None].to(dtype), sin[:, None].to(dtype))
    grouped = rotated.unflatten(1, (kv_heads, heads // kv_heads)) * scaling
    scores: list[torch.Tensor] = []
    sums: list[tuple[torch.Tensor, CodedPart | None]] = []
    for part in exact:
        score = _scores(grouped, part.keys.to(dtype), part, part.valid)
        if part.log_weight is not None:
            bias = part.log_weight[:, :, None].to(dtype)
            score = torch.where(part.valid[:, None, None], score + bias, -torch.inf)
        scores.append(score)
        values = part.values.to(dtype)
        if not part.is_finite:
            # What is not read may be anything, and nothing times NaN is NaN.
            values = values.masked_fill(~part.valid[:, None, :, None], 0)
        sums.append((values, None))
    known = _Directions(dtype, coded)
    for coded_part in coded:
        side, tables = coded_part.tables.keys, coded_part.tables
        split = side.blocks * side.channels
        channels = channels_of(coded_part.records, tables).to(dtype)
        gain = gains_of(coded_part.records, tables, side, coded_part.valid)
        keys = restore(side, channels[:, :, :split], gain, kv_heads, known.of(side))
        score = _scores(grouped, keys, coded_part, coded_part.valid)
        log_weight = tables.log_weight
        if log_weight is not None:
            score = score + log_weight[:, :, None, None].to(dtype)
        scores.append(score)
        sums.append((channels[:, :, split:], coded_part))
    weights = (scores[0] if len(scores) == 1 else torch.cat(scores, dim=3)).softmax(3)
    total: torch.Tensor | None = None
    start = 0
    for score, (values, source) in zip(scores, sums, strict=True):
        own = weights[..., start : start + score.shape[3]]
        start += score.shape[3]
        summed = own @ values if source is None else _sum_codes(own, values, source, known)
        total = summed if total is None else total + summed
    if total is None:
        raise RuntimeError("attention over nothing")
    return total.flatten(1, 2).to(query.dtype)


class _Directions:
    """The directions of coded parts: made once for parts with one header.

    Args:
        dtype: in which they are wanted.
        parts: of which some may have more channels of the same than others.
    """

    def __init__(self, dtype: torch.dtype, parts: Sequence[CodedPart]) -> None:
        self.dtype = dtype
        self.most: dict[int, Projection] = {}
        self.made: dict[int, torch.Tensor] = {}
        for part in parts:
            for side in (part.tables.keys, part.tables.values):
                most = self.most.get(id(side.mean), side)
                self.most[id(side.mean)] = side if side.channels >= most.channels else most

    def of(self, side: Projection) -> torch.Tensor:
        """``[R, blocks, C, J]`` of a side of one of the parts."""
        key = id(side.mean)
        if key not in self.made:
            self.made[key] = self.most[key].directions(self.dtype)
        return self.made[key][:, :, : side.channels]


def _scores(
    grouped: torch.Tensor, keys: torch.Tensor, part: ExactPart | CodedPart, shown: torch.Tensor
) -> torch.Tensor:
    """``[B, K, G, N]``, minus infinity where nothing is to be read."""
    dtype = grouped.dtype
    turned = rotate(keys, part.cos[:, None].to(dtype), part.sin[:, None].to(dtype))
    return (grouped @ turned.transpose(2, 3)).masked_fill(~shown[:, None, None], -torch.inf)


def _sum_codes(
    weights: torch.Tensor, channels: torch.Tensor, part: CodedPart, known: _Directions
) -> torch.Tensor:
    """Values ``[B, K, G, D]``: channels ``[B, N, blocks * C]`` are summed, then projected once."""
    side = part.tables.values
    kv_heads = weights.shape[1]
    share = kv_heads // side.blocks
    # [B, blocks, share * G, N]: the heads of a block read the same channels.
    joined = weights.unflatten(1, (side.blocks, share)).flatten(2, 3)
    gain = gains_of(part.records, part.tables, side, part.valid)
    weighted = joined * gain.transpose(1, 2)[:, :, None].to(weights.dtype)
    summed = weighted @ channels.unflatten(2, (side.blocks, side.channels)).transpose(1, 2)
    summed = summed.unflatten(2, (share, -1))
    basis = known.of(side).unflatten(3, (share, -1)).transpose(2, 3)
    mass = joined.sum(3).unflatten(2, (share, -1))[..., None]
    mean = side.mean.to(weights.dtype).unflatten(2, (share, -1))[:, :, :, None]
    return (summed @ basis + mass * mean).flatten(1, 2)


def write_token(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    flag: torch.Tensor,
) -> None:
    """The twin of ``fused_write_token``."""
    if len(slots) == 1:
        keys.index_copy_(2, slots, key)
        values.index_copy_(2, slots, value)
    else:
        rows = torch.arange(key.shape[0], device=key.device)
        keys[rows, :, slots] = key[:, :, 0]
        values[rows, :, slots] = value[:, :, 0]
    flag.copy_(~all_finite(key, value))


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions in halves: channel ``i`` turns with channel ``i + D / 2``.

    ``cos`` and ``sin`` broadcast to ``states``.
    """
    half = states.shape[-1] // 2
    first, second = states[..., :half], states[..., half:]
    turned = torch.empty_like(states, memory_format=torch.contiguous_format)
    torch.mul(first, cos[..., :half], out=turned[..., :half]).addcmul_(
        second, sin[..., :half], value=-1
    )
    torch.mul(second, cos[..., half:], out=turned[..., half:]).addcmul_(first, sin[..., half:])
    return turned
