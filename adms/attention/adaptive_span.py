"""Attention over a span that is learned: how far back (and ahead) a query looks.

Letters: ``B`` batch, ``H`` heads, ``Q`` queries, ``N`` keys, ``D`` head size, ``C = H * D`` dims.
A span scale is the share, 0..1, of the longest span; spans and distances are in tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adms.attention.projections import (
    BaseAttention,
    KeyModule,
    Linear,
    QueryModule,
    ValueModule,
    add_mask,
    calculate_attention,
    check_mask,
    check_positive,
    check_states,
)
from adms.errors import ADMSValueError


def soft_span_share(distance: Tensor, span: Tensor, ramp: int) -> Tensor:
    """Return the share, 0..1, that a key at ``distance`` keeps: 1 within ``span``, then a ramp.

    ``distance`` (tokens, at least 0) and ``span`` (tokens) broadcast; keys at ``span + ramp`` or
    farther keep nothing.

    Source: Sukhbaatar et al. (2019), arXiv 1905.07799, equation 5.
    """
    return ((ramp + span - distance) / ramp).clamp(0.0, 1.0)


def soft_span_bias(distance: Tensor, span: Tensor, ramp: int) -> Tensor:
    """Return the log of `soft_span_share`, to be added to scores; -inf where nothing is kept.

    Added before a softmax it is the renormalised product of the source's equation 6. Gradients
    reach ``span`` through keys on the ramp, and are 0 elsewhere.
    """
    share = soft_span_share(distance, span, ramp)
    kept = share > 0
    # The log sees 1 where the share is 0: the gradient there would be 0 * inf = NaN.
    return share.masked_fill(~kept, 1.0).log().masked_fill(~kept, float("-inf"))


class Predictor(nn.Module):
    """Predicts a span scale, 0..1, from features.

    Args:
        dims: features ``C``.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        check_positive("dims", dims)
        self.linear = Linear(dims, 1)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, global_out: Tensor, *, pool: bool = True) -> Tensor:
        """Return ``[B, 1]`` for ``[B, C]``, or for ``[B, N, C]`` pooled by its mean over tokens.

        With ``pool=False`` every token gets its own: ``[B, N, 1]``.
        """
        if pool and global_out.dim() > 2:
            global_out = global_out.mean(dim=1)
        scale: Tensor = self.linear(global_out)
        return scale.sigmoid()


class AdaptiveSpan(BaseAttention):
    """Attention in which each query sees the keys within a span, with a soft edge.

    The temperature follows the span scale s. With ``sharpen`` it is ``1 + temp_scale * (1 - s)``:
    the longer the span, the sharper, against weights that thin out over many keys. Without, it is
    ``0.5 + temp_scale * s``: sharp for short spans, and flatter the longer they get.

    Args:
        dims: features ``C``.
        head: number of heads ``H``.
        max_dist: tokens; keys this far or farther are never attended.
        sharpen: which of the two temperatures.
        temp_scale: how strongly the temperature follows the span, at least 0.
        ramp: tokens over which the edge falls from 1 to 0.

    Attributes:
        span_scale: the learned scale, used where a call gives none; clamped to 0..1.

    Raises:
        ADMSValueError: ``dims`` no multiple of ``head``, a size below 1, ``temp_scale`` below 0.

    Source: Sukhbaatar et al. (2019), arXiv 1905.07799, sections 2.2 and 2.3; differs in a scale per
    row or per query instead of per head, in that spans may reach ahead, and in the temperature.
    """

    def __init__(
        self,
        dims: int,
        head: int,
        max_dist: int = 512,
        sharpen: bool = True,
        temp_scale: float = 0.01,
        *,
        ramp: int = 32,
    ) -> None:
        super().__init__(dims, head, max_dist)
        if not temp_scale >= 0:
            raise ADMSValueError(f"temp_scale must be at least 0, got {temp_scale}; 0.01 is usual")
        self.sharpen = sharpen
        self.temp_scale = float(temp_scale)
        self.ramp = check_positive("ramp", ramp)
        self.span_scale = nn.Parameter(torch.tensor(1.0))
        self.query_module = QueryModule(dims, head)
        self.key_module = KeyModule(dims, head)
        self.value_module = ValueModule(dims, head)

    def temperature(self, span_scale: Tensor) -> Tensor:
        """Return the temperature for span scales, of the same shape."""
        if self.sharpen:
            return 1.0 + self.temp_scale * (1.0 - span_scale)
        return 0.5 + self.temp_scale * span_scale

    def edge_bias(self, distance: Tensor, span: Tensor, max_dist: int, is_causal: bool) -> Tensor:
        """Return what is added to the scores of keys at a signed ``distance`` (query - key)."""
        bias = soft_span_bias(distance.abs().to(span.dtype), span, self.ramp)
        outside = distance.abs() >= max_dist
        if is_causal:
            outside = outside | (distance < 0)
        return bias.masked_fill(outside, float("-inf"))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        max_dist: int | None = None,
        max_span: int | None = None,
        span_scale: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query to the keys within its span; the last query is at the last key.

        Args:
            query: ``[B, Q, C]``.
            key: ``[B, N, C]``, ``N >= Q``.
            value: ``[B, N, C]``.
            max_dist: tokens; the layer's where None.
            max_span: tokens, the span of scale 1; ``N`` where None.
            span_scale: a scalar, ``[B]``, ``[B, 1]`` or ``[B, Q]``; the learned one where None.
            mask: boolean (True = attend) or added to the scores, see `projections`.
            is_causal: nobody looks ahead.

        Returns:
            The output ``[B, Q, C]`` and the weights ``[B, H, Q, N]``, None while ``use_sdpa``.

        Raises:
            ADMSTypeError: an input that is not floating point.
            ADMSValueError: shapes that don't fit, a size below 1, or more queries than keys.
        """
        for name, states in (("query", query), ("key", key), ("value", value)):
            check_states(name, states, self.dims)
        batch, queries, num_keys = query.shape[0], query.shape[1], key.shape[1]
        if value.shape != key.shape or key.shape[0] != batch or num_keys < queries:
            raise ADMSValueError(
                f"key and value must be [{batch}, at least {queries}, {self.dims}] and alike, got "
                f"{list(key.shape)} and {list(value.shape)}; give each query its own token too"
            )
        reach = self.max_dist if max_dist is None else check_positive("max_dist", max_dist)
        longest = num_keys if max_span is None else check_positive("max_span", max_span)
        scale = self.per_query(span_scale, query)

        query_at = torch.arange(queries, device=query.device) + (num_keys - queries)
        distance = query_at[:, None] - torch.arange(num_keys, device=query.device)
        span = (scale * longest)[:, None, :, None]
        bias = self.edge_bias(distance, span, reach, is_causal).to(query.dtype)
        if mask is not None:
            mask = check_mask(mask, batch, self.head, queries, num_keys)
        out, weights = calculate_attention(
            self.query_module(query),
            self.key_module(key),
            self.value_module(value),
            bias if mask is None else add_mask(bias, mask),
            self.temperature(scale).to(query.dtype)[:, None, :, None],
            self.use_sdpa,
        )
        return self._to_dims(out), weights

    def per_query(self, span_scale: Tensor | None, query: Tensor) -> Tensor:
        """Return span scales clamped to 0..1 as ``[B, Q]``, in at least float32.

        Sixteen bits can't tell tokens apart in a long span, so spans are never computed in them.
        """
        batch, queries = query.shape[:2]
        scale = self.span_scale if span_scale is None else span_scale
        shape = list(scale.shape)
        scale = scale.to(torch.promote_types(query.dtype, torch.float32)).clamp(0.0, 1.0)
        if shape in ([], [1], [1, 1]):
            return scale.reshape(1, 1).expand(batch, queries)
        if shape in ([batch], [batch, 1]):
            return scale.reshape(batch, 1).expand(batch, queries)
        if shape != [batch, queries]:
            raise ADMSValueError(
                f"span_scale must be a scalar, [{batch}], [{batch}, 1] or [{batch}, {queries}], "
                f"got {shape}; give one scale per row or per query"
            )
        return scale
