"""Projections, masks and the one attention call that the stand-alone modules share.

Letters: ``B`` batch, ``H`` heads, ``Q`` queries, ``N`` keys, ``D`` head size, ``C = H * D`` dims.

Masks: a boolean mask is True where a query may attend; a floating mask is added to the scores.
A mask is ``[Q, N]``, ``[B, Q, N]`` or ``[B, 1 or H, Q, N]``; any of its sizes may be 1 and is then
repeated. A query that may attend to nothing gets zeros, never NaN.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adms.errors import ADMSTypeError, ADMSValueError

ProjectionType = Literal["query", "key", "value"]


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype, whatever its weights are stored in."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]`` in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with statistics in at least float32; returns the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[..., C]`` over its last dimension."""
        wide = torch.promote_types(input.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(wide)
        bias = None if self.bias is None else self.bias.to(wide)
        out = F.layer_norm(input.to(wide), self.normalized_shape, weight, bias, self.eps)
        return out.to(input.dtype)


def check_positive(name: str, value: int) -> int:
    """Return ``value``, an int of at least 1.

    Raises:
        ADMSTypeError: it is not an int.
        ADMSValueError: it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ADMSTypeError(f"{name} must be an int, got {type(value).__name__}; pass a number")
    if value < 1:
        raise ADMSValueError(f"{name} must be at least 1, got {value}; use a positive number")
    return value


def check_heads(dims: int, heads: int) -> int:
    """Return the head size ``dims // heads``.

    Raises:
        ADMSTypeError: one of the two is not an int.
        ADMSValueError: one of the two is below 1, or ``dims`` is not a multiple of ``heads``.
    """
    check_positive("dims", dims)
    check_positive("heads", heads)
    if dims % heads:
        raise ADMSValueError(
            f"dims must be a multiple of heads, got dims {dims} and heads {heads}; "
            f"use {dims // heads * heads or heads} or {(dims // heads + 1) * heads} dims"
        )
    return dims // heads


def check_states(name: str, states: Tensor, dims: int) -> None:
    """Check that ``states`` is a floating tensor ``[B, N, dims]`` with at least one entry each.

    Raises:
        ADMSTypeError: not a floating tensor.
        ADMSValueError: another shape, or empty.
    """
    if not isinstance(states, Tensor) or not states.is_floating_point():
        kind = states.dtype if isinstance(states, Tensor) else type(states).__name__
        raise ADMSTypeError(
            f"{name} must be a floating-point tensor, got {kind}; "
            "embed token ids or convert the data with .float() first"
        )
    if states.dim() != 3 or states.shape[-1] != dims or 0 in states.shape:
        raise ADMSValueError(
            f"{name} must be [batch, length, {dims}] with no empty dimension, "
            f"got {list(states.shape)}; add the batch dimension or project to {dims} features"
        )


def check_mask(mask: Tensor, batch: int, heads: int, queries: int, num_keys: int) -> Tensor:
    """Return ``mask`` as a 4-D view that broadcasts to ``[B, H, Q, N]``.

    Raises:
        ADMSTypeError: neither boolean nor floating point. Integer masks are refused since 0 and 1
            would be taken for scores.
        ADMSValueError: a shape that doesn't broadcast to ``[B, H, Q, N]``.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ADMSTypeError(
            f"mask must be boolean (True = attend) or floating point (added to the scores), "
            f"got {mask.dtype}; use mask.bool()"
        )
    shape = mask.shape
    if mask.dim() == 2:
        mask = mask[None, None]
    elif mask.dim() == 3:
        mask = mask[:, None]
    wanted = (batch, heads, queries, num_keys)
    if mask.dim() != 4 or any(a not in (1, b) for a, b in zip(mask.shape, wanted, strict=True)):
        raise ADMSValueError(
            f"mask must be [queries, keys], [batch, queries, keys] or [batch, 1 or heads, queries, "
            f"keys] for batch, heads, queries, keys = {list(wanted)}, got {list(shape)}; "
            "a key-padding mask [batch, keys] is passed as mask[:, None, :]"
        )
    return mask


def add_mask(bias: Tensor, mask: Tensor) -> Tensor:
    """Return a floating ``bias`` (or scores) under a boolean or floating ``mask``, broadcast."""
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return bias + mask.to(bias.dtype)


def combine_masks(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return a mask that allows what both allow; biases of floating masks add up."""
    if first is None or second is None:
        return second if first is None else first
    if first.dtype == torch.bool:
        return first & second if second.dtype == torch.bool else add_mask(second, first)
    return add_mask(first, second)


def distance_mask(
    queries: int, num_keys: int, max_dist: int, is_causal: bool, device: torch.device
) -> Tensor | None:
    """Return the boolean mask ``[Q, N]`` of keys near enough, or None where all are allowed.

    The last query stands at the last key. Distances are in tokens and must be below ``max_dist``.
    """
    if not is_causal and max_dist >= max(queries, num_keys):
        return None
    query_at = torch.arange(queries, device=device) + (num_keys - queries)
    distance = query_at[:, None] - torch.arange(num_keys, device=device)
    near = distance.abs() < max_dist
    return near & (distance >= 0) if is_causal else near


def prepare_mask_for_attention(attn: Tensor, mask: Tensor) -> Tensor:
    """Return scores ``attn`` ``[B, H, Q, N]`` under ``mask``; ``attn`` itself is left as it is."""
    return add_mask(attn, check_mask(mask, *attn.shape))


def _open_dead_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``mask`` with its empty rows opened, and which rows were not empty ``[..., 1]``."""
    allowed = mask if mask.dtype == torch.bool else mask > float("-inf")
    alive = allowed.any(dim=-1, keepdim=True)
    if mask.dtype == torch.bool:
        return mask | ~alive, alive
    return mask.masked_fill(~alive, 0.0), alive


def calculate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    use_sdpa: bool = True,
    *,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend with queries and keys that are already scaled (``D ** -0.25`` each).

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, H, N, D]``.
        v: ``[B, H, N, D]``.
        mask: see the module; combined with ``is_causal`` when both are given.
        temperature: divides the scores; a tensor broadcasts to ``[B, H, Q, 1]``.
        use_sdpa: True for ``scaled_dot_product_attention``; False for the plain twin, which also
            returns the weights.
        is_causal: the last query stands at the last key, and nobody looks past itself.

    Returns:
        The output ``[B, H, Q, D]`` and the weights ``[B, H, Q, N]``, None under SDPA.

    Raises:
        ADMSValueError: a temperature that is not above 0, a mask that doesn't fit, or
            ``is_causal`` with more queries than keys.
    """
    batch, heads, queries, _ = q.shape
    num_keys = k.shape[2]
    if isinstance(temperature, Tensor):
        q = q / temperature
    elif temperature > 0:
        q = q if temperature == 1.0 else q / temperature
    else:
        raise ADMSValueError(f"temperature must be above 0, got {temperature}; use 1.0 for none")
    if mask is not None:
        mask = check_mask(mask, batch, heads, queries, num_keys)
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    if is_causal and queries > num_keys:
        raise ADMSValueError(
            f"is_causal needs at least as many keys as queries, got {queries} queries and "
            f"{num_keys} keys; pass a mask that says who sees whom"
        )
    if is_causal and use_sdpa and mask is None and queries == num_keys:
        # The only case in which SDPA's own flag means the same as here, and its fastest.
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0), None
    if is_causal:
        mask = combine_masks(mask, distance_mask(queries, num_keys, num_keys + 1, True, q.device))
    alive = None
    if mask is not None:
        mask, alive = _open_dead_rows(mask)
    weights = None
    if use_sdpa:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    else:
        scores = q @ k.transpose(-1, -2)
        if mask is not None:
            scores = prepare_mask_for_attention(scores, mask)
        weights = scores.softmax(dim=-1)
        if alive is not None:
            weights = weights.masked_fill(~alive, 0.0)
        out = weights @ v
    return (out if alive is None else out.masked_fill(~alive, 0.0)), weights


class ProjectionModule(nn.Module):
    """Projects ``[B, N, C]`` to heads ``[B, H, N, D]``, queries and keys scaled by ``D ** -0.25``.

    Scaling both sides before the product keeps float16 scores in range.

    Raises:
        ADMSValueError: ``dims`` is not a multiple of ``head``, or an unknown ``proj_type``.
    """

    def __init__(
        self, dims: int, head: int, proj_type: ProjectionType = "query", use_bias: bool = True
    ) -> None:
        super().__init__()
        self.head_dim = check_heads(dims, head)
        if proj_type not in ("query", "key", "value"):
            raise ADMSValueError(
                f"proj_type must be 'query', 'key' or 'value', got {proj_type!r}; choose one"
            )
        self.dims = dims
        self.head = head
        self.proj_type = proj_type
        self.scale = 1.0 if proj_type == "value" else self.head_dim**-0.25
        self.proj = Linear(dims, dims, bias=use_bias)
        nn.init.normal_(self.proj.weight, std=0.02)
        if use_bias:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, H, N, D]`` for ``[B, N, C]``."""
        projected: Tensor = self.proj(x) * self.scale
        return projected.unflatten(-1, (self.head, self.head_dim)).transpose(1, 2)


class QueryModule(ProjectionModule):
    """A `ProjectionModule` for queries."""

    def __init__(self, dims: int, heads: int, use_bias: bool = True) -> None:
        super().__init__(dims, heads, "query", use_bias)


class KeyModule(ProjectionModule):
    """A `ProjectionModule` for keys."""

    def __init__(self, dims: int, heads: int, use_bias: bool = True) -> None:
        super().__init__(dims, heads, "key", use_bias)


class ValueModule(ProjectionModule):
    """A `ProjectionModule` for values."""

    def __init__(self, dims: int, heads: int, use_bias: bool = True) -> None:
        super().__init__(dims, heads, "value", use_bias)


class BaseAttention(nn.Module):
    """What the attention modules share: sizes, and the way from heads back to dims.

    Attributes:
        use_sdpa: False makes a module compute with the plain twin and return its weights.
        max_dist: tokens; nothing at this distance or farther is attended.
    """

    use_sdpa: ClassVar[bool] = True

    def __init__(self, dims: int, head: int, max_dist: int = 512) -> None:
        super().__init__()
        self.head_dim = check_heads(dims, head)
        self.dims = dims
        self.head = head
        self.max_dist = check_positive("max_dist", max_dist)
        self.scale = self.head_dim**-0.25

    @property
    def heads(self) -> int:
        """The number of heads; another name of ``head``."""
        return self.head

    def _to_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.head, self.head_dim)).transpose(1, 2)

    def _to_dims(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class AttentionCombiner(BaseAttention):
    """Attends with separately made queries, keys and values, and projects the output."""

    def __init__(self, dims: int, head: int) -> None:
        super().__init__(dims, head)
        self.out = Linear(dims, dims)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """Return ``[B, Q, C]``.

        Args:
            q: ``[B, H, Q, D]``, scaled, or ``[B, Q, C]``, not scaled yet (done here).
            k: ``[B, H, N, D]`` or ``[B, N, C]``, as ``q``.
            v: ``[B, H, N, D]`` or ``[B, N, C]``, as ``q``.
            mask: see the module.
            is_causal: the last query stands at the last key, and nobody looks past itself.
        """
        if q.dim() == 3:
            q, k, v = (self._to_heads(t) for t in (q, k, v))
            q, k = q * self.scale, k * self.scale
        out, _ = calculate_attention(q, k, v, mask, use_sdpa=self.use_sdpa, is_causal=is_causal)
        projected: Tensor = self.out(self._to_dims(out))
        return projected
