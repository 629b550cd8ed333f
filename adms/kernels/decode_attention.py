"""Attention of one new token per row over exact and coded entries: the twin, and the choice.

Shapes: ``B`` rows, ``R`` rows or 1 where all agree, ``H`` query heads, ``K`` KV heads, ``N``
entries, ``D`` head size.
"""

from collections.abc import Sequence

import torch

from adms.kernels.parts import CodedPart, ExactPart, decode


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
    """The twin: decodes, rotates, scores and sums in float32 (or float64, if the query is)."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows, heads = query.shape[:2]
    kv_heads = exact[0].keys.shape[1]
    rotated = rotate(query.to(dtype), cos[:, None].to(dtype), sin[:, None].to(dtype))
    grouped = rotated.unflatten(1, (kv_heads, heads // kv_heads))
    scores, values = [], []
    parts: list[ExactPart | CodedPart] = [*exact, *coded]
    for part in parts:
        if isinstance(part, ExactPart):
            keys, own, shown = part.keys, part.values, part.valid
        else:
            keys, own = decode(part, kv_heads)
            shown = part.visible()
        tables = part.cos[:, None].to(dtype), part.sin[:, None].to(dtype)
        score = grouped @ rotate(keys.to(dtype), *tables).transpose(2, 3) * scaling
        if isinstance(part, ExactPart) and part.log_weight is not None:
            score = score + part.log_weight[:, :, None].to(dtype)
        scores.append(score.masked_fill(~shown[:, None, None], -torch.inf))
        # What is not read may be anything, and nothing times NaN is NaN.
        values.append(own.to(dtype).masked_fill(~shown[:, None, :, None], 0))
    weights = torch.cat(scores, dim=3).softmax(3)
    return (weights @ torch.cat(values, dim=2)).flatten(1, 2).to(query.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions in halves: channel ``i`` turns with channel ``i + D / 2``."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
