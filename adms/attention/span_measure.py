"""How much attention goes to each part of the recent tier: what spans are learned from.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``Q`` new tokens, ``N`` entries, ``X`` those
of the exact tiers (the first of them), ``S`` steps of the recent tier, ``D`` head size.
"""

import torch

from adms.attention.grouped import attention_weights
from adms.attention.span_learner import SAMPLED_QUERIES, SPAN_STEPS
from adms.positions import ForwardView


def sampled_columns(view: ForwardView) -> list[int]:
    """A few columns of the pass, spread evenly, that are real tokens of its fullest row."""
    row = max(range(len(view.new)), key=lambda index: view.new[index])
    columns = view.columns_of(row)
    count = min(SAMPLED_QUERIES, len(columns))
    return [columns[(index + 1) * len(columns) // count - 1] for index in range(count)]


def recent_mass(
    view: ForwardView,
    tokens: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """The share of attention on each step of the recent tier, ``[S]``, from the newest on.

    A mean over heads, rows and a few queries; sinks, middle and the pass's own tokens are left out.

    Args:
        view: the pass.
        tokens: ``[1 or B, X]`` text positions in the exact tiers, sinks first.
        query: ``[B, H, Q, D]`` at their positions.
        keys: ``[B, K, N, D]`` at their positions, the exact tiers' first.
        bias: ``[B or 1, 1 or K or H, Q or 1, N]`` added to the scores, or None.
        scaling: factor of the scores.
        softcap: bound of the scores by tanh, or None.
    """
    device = query.device
    columns = torch.tensor(sampled_columns(view), device=device)
    if bias is not None and bias.shape[2] > 1:
        bias = bias[:, :, columns]
    weights = attention_weights(
        query[:, :, columns], keys, bias, is_causal=False, scaling=scaling, softcap=softcap
    )
    sinks, held = view.sizes.sink, tokens.shape[1]
    tokens, seen = tokens.to(device), view.seen.to(device)
    age = seen[:, None] - tokens
    step = ((age - 1) * SPAN_STEPS // view.sizes.recent).clamp(max=SPAN_STEPS - 1)
    step[:, :sinks] = -1
    member = (step[..., None] == torch.arange(SPAN_STEPS, device=device)).to(weights.dtype)
    # [B, K, G, q, X] -> [B, q, S]
    mass = weights[..., :held].mean((1, 2)) @ member
    if view.column_valid is None:
        return mass.mean((0, 1)).float()
    real = view.column_valid.to(device)[:, columns, None].to(mass.dtype)
    return ((mass * real).sum((0, 1)) / real.sum().clamp(min=1)).float()
