"""Attention in two parts, each by a fused kernel, merged by their log-sum-exp.

The twin of ``kernels.chunk_attention``, which takes both at once.

Shapes: ``B`` rows, ``R`` rows or 1, ``H`` query heads, ``K`` KV heads, ``G = H / K``, ``Q``
queries, ``N`` entries, ``D``/``E`` head sizes of keys/values.

Source: the merging of partial softmaxes as in Dao et al. (2022), arXiv 2205.14135, section 3.1.
"""

import torch

# PyTorch's own fused kernels, which its public function calls; that one does not say what they sum.
_OPS = torch.ops.aten
# Head sizes that the fused kernels for CUDA take as they are.
_ALIGNED = 8


def attend_in_two(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    causal: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Softmax attention over entries that every query sees, and causally among new tokens.

    Args:
        query: ``[B, H, Q, D]``.
        keys, values: ``[B, K, N, ...]`` of the entries.
        bias: ``[R, K or 1, 1, N]`` added to their scores, or None.
        new_keys, new_values: ``[B, K, Q, ...]``, one of each for every query.
        causal: what ``causal_bias`` made for them.
        scaling: factor of the scores.

    Returns:
        ``[B, Q, H, E]``.
    """
    kv_heads, count = keys.shape[1], query.shape[2]
    group = query.shape[1] // kv_heads
    # The queries of a group become further rows over their KV head, so keys are never repeated.
    packed = query.unflatten(1, (kv_heads, group)).flatten(2, 3)
    old, old_sum = partial(packed, keys, values, bias, scaling)
    new, new_sum = partial(packed, new_keys, new_values, causal, scaling)
    share = torch.sigmoid(old_sum - new_sum)[..., None]
    merged = old.sub_(new).mul_(share).add_(new)
    return merged.unflatten(2, (group, count)).flatten(1, 2).transpose(1, 2)


def causal_bias(count: int, group: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Numbers ``[1, 1, G * Q, Q]`` that hide what comes after each packed query."""
    width = count + -count % _ALIGNED
    hidden = torch.full((count, width), torch.finfo(dtype).min, dtype=dtype, device=device)
    return hidden.triu_(1).repeat(group, 1)[None, None, :, :count]


def partial(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention ``[B, K, Q, E]`` of queries ``[B, K, Q, D]``, and its log-sum-exp ``[B, K, Q]``.

    Args:
        query, keys, values: with as many heads each.
        bias: broadcasts to ``[B, K, Q, N]``; its rows start aligned. None for zeros.
        scaling: factor of the scores.
    """
    rows, heads, count, size = query.shape
    if bias is not None:
        bias = bias.expand(rows, heads, count, -1)
    if query.is_cuda and size % _ALIGNED == 0 and values.shape[3] % _ALIGNED == 0:
        output, total, _, _ = _OPS._scaled_dot_product_efficient_attention(
            query, keys, values, bias, True, scale=scaling
        )
        # Its rows are padded.
        return output, total[..., :count]
    if query.device.type == "cpu" and size == values.shape[3]:
        return _OPS._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=bias, scale=scaling
        )
    return plain_partial(query, keys, values, bias, scaling)


def plain_partial(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of the fused kernels, step by step in float32 (float64 where the query is)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ keys.to(dtype).transpose(2, 3) * scaling
    if bias is not None:
        scores = scores + bias
    total = scores.logsumexp(3)
    output = (scores - total[..., None]).exp() @ values.to(dtype)
    return output.to(query.dtype), total
