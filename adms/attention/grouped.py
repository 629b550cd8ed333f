"""Softmax attention of grouped query heads, by fused kernels where they can.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``Q`` queries, ``N`` entries, ``D``/``E``
head sizes of keys/values.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention


def grouped_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    is_causal: bool,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax attention of ``[B, H, Q, D]`` queries over ``[B, K, N, D]`` keys.

    Args:
        bias: ``[B or 1, 1 or K or H, Q or 1, N]`` added to the scores, or None.
        is_causal: query ``i`` sees keys ``0..i`` only (needs ``Q == N`` and no bias).

    Returns:
        ``[B, Q, H, E]``.
    """
    rows, heads, count, _ = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    if softcap is not None or (bias is not None and bias.dtype != query.dtype):
        return _explicit(query, keys, values, bias, is_causal, scaling, dropout, softcap)
    if group == 1 or is_causal:
        output = scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=bias,
            dropout_p=dropout,
            is_causal=is_causal,
            scale=scaling,
            enable_gqa=group > 1,
        )
        return output.transpose(1, 2)
    # The queries of a group become further rows over their KV head, so keys are never repeated.
    packed = query.unflatten(1, (kv_heads, group)).flatten(2, 3)
    if bias is not None:
        bias = _pack_bias(bias, kv_heads, group, count)
    output = scaled_dot_product_attention(
        packed, keys, values, attn_mask=bias, dropout_p=dropout, scale=scaling
    )
    return output.unflatten(2, (group, count)).flatten(1, 2).transpose(1, 2)


def _pack_bias(bias: torch.Tensor, kv_heads: int, group: int, count: int) -> torch.Tensor:
    """A bias per head or KV head in the order of packed queries."""
    if bias.shape[1] in (1, kv_heads):
        if bias.shape[2] == 1:
            return bias
        return bias.repeat(1, 1, group, 1)
    bias = bias.expand(-1, -1, count, -1)
    return bias.unflatten(1, (kv_heads, group)).flatten(2, 3)


def attention_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    is_causal: bool,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """The weights ``[B, K, H / K, Q, N]`` of ``grouped_attention``, in the query's dtype."""
    kv_heads = keys.shape[1]
    grouped = query.unflatten(1, (kv_heads, -1))
    scores = grouped @ keys[:, :, None].transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        count = query.shape[2]
        future = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    if bias is not None:
        if bias.shape[1] == query.shape[1] and bias.shape[1] != kv_heads:
            scores = scores + bias.unflatten(1, (kv_heads, -1))
        else:
            scores = scores + bias[:, :, None]
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)


def _explicit(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention step by step, for what fused kernels lack.

    That is scores that pass a tanh before bias and softmax, or a bias of another dtype.
    """
    weights = attention_weights(
        query, keys, bias, is_causal=is_causal, scaling=scaling, softcap=softcap
    )
    weights = torch.nn.functional.dropout(weights, p=dropout)
    return (weights @ values[:, :, None]).flatten(1, 2).transpose(1, 2)
