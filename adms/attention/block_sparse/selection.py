"""Choosing k of N: hard, soft, and hard with the gradient of soft.

Shapes: `...` leading dimensions, `N` candidates.
"""

import math

import torch
from torch import Tensor

from adms.errors import ADMSTypeError, ADMSValueError

# 2^-50 of the starting interval is below float32's and near float64's resolution.
_BISECTIONS = 50


def gumbel_softmax_topk(
    logits: Tensor,
    k: int | Tensor,
    temperature: float | Tensor = 1.0,
    hard: bool = False,
    *,
    allowed: Tensor | None = None,
    noise: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How much each candidate is chosen, [..., N] within 0 and 1, summing to k.

    Soft: sigmoid((z - t) / temperature) of the perturbed logits z, with the threshold t at which
    the sum is k: the k-subset of largest z as temperature goes to 0. Hard: exactly 0 or 1 for the
    k largest (k rounded, half to even), with the soft gradient (straight-through).

    Args:
        logits: [..., N], floating point.
        k: How many: an int, or a tensor [...] that may be fractional and require gradients. Where
            fewer candidates are allowed, all of them are chosen.
        temperature: Above 0; a tensor may require gradients.
        hard: Whether to choose hard.
        allowed: bool [..., N]; others are never chosen. None allows all.
        noise: Whether to add Gumbel(0, 1) noise to the logits, which samples a subset without
            replacement instead of taking the likeliest.
        generator: Source of the noise.

    Raises:
        ADMSTypeError: `logits` is not floating point.
        ADMSValueError: `k` or `temperature` is out of range, or `allowed` has another shape.

    Source: Kool, van Hoof and Welling (2019), arXiv:1903.06059, for Gumbel top-k; the relaxation
    is the entropy-regularised one of Xie et al. (2020), arXiv:2002.06504, solved in its threshold
    by bisection and differentiated implicitly; Bengio et al. (2013), arXiv:1308.3432, for
    straight-through.
    """
    if not logits.is_floating_point():
        raise ADMSTypeError(f"logits must be floating point, got {logits.dtype}")
    if allowed is None:
        allowed = torch.ones_like(logits, dtype=torch.bool)
    if allowed.dtype != torch.bool or allowed.shape[-1] != logits.shape[-1]:
        raise ADMSValueError(
            f"allowed must be bool and broadcast to {list(logits.shape)}, got {allowed.dtype} "
            f"{list(allowed.shape)}"
        )
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ADMSValueError(f"temperature must be above 0, got {temperature}")
    if not isinstance(k, Tensor):
        if k < 0:
            raise ADMSValueError(f"k must be at least 0, got {k}")
        k = logits.new_tensor(float(k))
    allowed = allowed.expand(logits.shape)
    counts = allowed.sum(-1)
    k = torch.minimum(k.to(logits.dtype).expand(counts.shape), counts.to(logits.dtype))
    if noise:
        uniform = torch.empty_like(logits).exponential_(generator=generator)
        logits = logits - uniform.clamp(min=torch.finfo(logits.dtype).tiny).log()
    if not hard:
        return _soft_topk(logits, k, temperature, allowed)
    chosen = hard_topk(logits, k.detach().round().long(), allowed).to(logits.dtype)
    if not torch.is_grad_enabled():
        return chosen
    soft = _soft_topk(logits, k, temperature, allowed)
    # Not chosen + (soft - soft): that is chosen exactly, also where soft is not finite.
    return chosen + (soft - soft.detach())


def hard_topk(logits: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """The k [...] largest allowed of logits [..., N], as bool [..., N]; ties go to the first."""
    masked = logits.detach().masked_fill(~allowed, -math.inf)
    order = masked.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    chosen = torch.zeros_like(allowed, dtype=torch.bool).expand(logits.shape).clone()
    chosen.scatter_(-1, order, ranks < k.unsqueeze(-1))
    return chosen & allowed


def _soft_topk(logits: Tensor, k: Tensor, temperature: float | Tensor, allowed: Tensor) -> Tensor:
    """sigmoid((logits - t) / temperature) over the allowed, summing to k [...]."""
    scaled = (logits / temperature).masked_fill(~allowed, 0.0)
    with torch.no_grad():
        low = scaled.masked_fill(~allowed, math.inf).amin(-1, keepdim=True) - 40.0
        high = scaled.masked_fill(~allowed, -math.inf).amax(-1, keepdim=True) + 40.0
        # Rows without an allowed candidate have no ends; their result is masked anyway.
        none = ~allowed.any(-1, keepdim=True)
        low, high = low.masked_fill(none, 0.0), high.masked_fill(none, 0.0)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            total = torch.sigmoid(scaled - middle).masked_fill(~allowed, 0.0)
            above = total.sum(-1, keepdim=True) > k.unsqueeze(-1)
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        threshold = (low + high) / 2
        chosen = torch.sigmoid(scaled - threshold).masked_fill(~allowed, 0.0)
        slope = chosen * (1 - chosen)
        total = slope.sum(-1, keepdim=True)
        steep = total > 1e-6
        slope = slope / total.clamp(min=1e-6)
    # The threshold solves sum(sigmoid(scaled - t)) = k: its derivatives are `slope` for the
    # logits and -1 / total for k. Where all or none are chosen it has none.
    moved = (slope * (scaled - scaled.detach())).sum(-1, keepdim=True)
    moved = moved - ((k - k.detach()).unsqueeze(-1) / total.clamp(min=1e-6))
    threshold = threshold + torch.where(steep, moved, torch.zeros_like(moved))
    return torch.sigmoid(scaled - threshold).masked_fill(~allowed, 0.0)
