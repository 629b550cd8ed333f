"""Iterative focus: attention that feeds its output back to its queries until it is stable.

Letters: ``M`` rows (windows of all batch rows), ``H`` heads, ``Q`` queries, ``K`` keys, ``D`` head
size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adms.attention.projections import calculate_attention, check_positive


def focus(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    temperature: Tensor | float,
    *,
    max_iterations: int = 10,
    threshold: float = 1e-4,
    s_factor: float = 0.1,
    use_sdpa: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend, add the output to the query, and repeat until the output is stable.

    Each query stops on its own, once its output moved by at most ``threshold + s_factor * mean
    |output|`` (mean absolute change over heads and features; the first output counts as a move from
    zero), or after ``max_iterations``. A common rule for all would let rows, and later tokens,
    decide over each other.

    Args:
        query: ``[M, H, Q, D]``, scaled.
        key: ``[M, H, K, D]``, scaled.
        value: ``[M, H, K, D]``.
        mask: see `projections`.
        temperature: divides the scores; a tensor broadcasts to ``[M, H, Q, 1]``.
        max_iterations: how often a query may attend, at least 1; 1 is plain attention.
        threshold: the absolute part of the change that counts as stable.
        s_factor: the part relative to the output's size.
        use_sdpa: see `calculate_attention`.

    Returns:
        The output ``[M, H, Q, D]`` and how often each query attended, int64 ``[M, 1, Q, 1]``.

    Raises:
        ADMSTypeError, ADMSValueError: ``max_iterations`` is no int of at least 1.
    """
    check_positive("max_iterations", max_iterations)
    out = torch.zeros_like(query)
    active = torch.ones_like(query[:, :1, :, :1], dtype=torch.bool)
    iterations = torch.zeros_like(active, dtype=torch.long)
    for left in reversed(range(max_iterations)):
        new, _ = calculate_attention(query, key, value, mask, temperature, use_sdpa)
        change = (new - out).detach().abs().mean(dim=(1, 3), keepdim=True)
        size = new.detach().abs().mean(dim=(1, 3), keepdim=True)
        out = torch.where(active, new, out)
        iterations = iterations + active
        active = active & (change > threshold + s_factor * size)
        if left == 0 or not bool(active.any()):
            break
        query = query + out
    return out, iterations
