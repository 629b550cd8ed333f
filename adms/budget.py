"""Which tokens are kept exactly: by score, with a share spread over the text.

Shapes: ``B`` rows, ``N`` candidates, ``L`` landmarks.
"""

import torch


def select_landmarks(
    scores: torch.Tensor,
    tokens: torch.Tensor,
    count: int,
    *,
    segments: int,
    priority: float,
    limits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Chooses the candidates that are kept exactly.

    ``priority`` of the places are dealt evenly to ``segments`` equal spans of the candidates' text,
    each to its span's best scores; the others go to the best of what remains.

    Args:
        scores: ``[B, N]`` importance, higher is more.
        tokens: ``[B, N]`` text positions; -1 marks a candidate that is not there.
        count: places (``L``).
        segments: spans of the text.
        priority: share of the places dealt to segments, 0..1.
        limits: ``[B]`` places to deal out in each row, at most ``count``; None: all.

    Returns:
        ``[B, L]`` indices of candidates, the foremost choice first; where there are too few,
        indices of absent ones.
    """
    present = tokens >= 0
    scores = torch.where(present, scores.float(), -torch.inf)
    first = torch.where(present, tokens, tokens.amax(1, keepdim=True)).amin(1, keepdim=True)
    span = (tokens.amax(1, keepdim=True) - first + 1).clamp(min=1)
    segment = ((tokens - first) * segments // span).clamp(0, segments - 1)
    # Rank within the own segment; ties go to the earlier index, so the choice is deterministic.
    rank = ranks(torch.argsort(scores, dim=1, descending=True, stable=True))
    same = segment[:, :, None] == segment[:, None, :]
    ahead = rank[:, None, :] < rank[:, :, None]
    rank_in_segment = (same & ahead).sum(2)
    if limits is None:
        favoured = present & (rank_in_segment < int(count * priority) // segments)
    else:
        quota = (limits.double() * priority).long() // segments
        favoured = present & (rank_in_segment < quota[:, None])
    key = rank - favoured.long() * tokens.shape[1] + (~present).long() * tokens.shape[1]
    return torch.argsort(key, dim=1, stable=True)[:, :count]


def ranks(order: torch.Tensor) -> torch.Tensor:
    """Where each index stands in an order ``[B, N]`` of indices: its inverse."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
