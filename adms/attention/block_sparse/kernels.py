"""Attention under a pattern of blocks: sparse kernels for hard patterns, dense for soft ones.

Shapes: `B` batch, `H` query heads, `K` KV heads (H a multiple of K), `Q` queries, `N` keys,
`D` key size, `E` value size, `I` query blocks, `J` key blocks, `S` most key blocks in a row. The
queries are the last `Q` of the `N` positions.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from adms.attention.block_sparse.flex import attend_flex, flex_takes, ordered_blocks
from adms.errors import ADMSTypeError, ADMSValueError
from adms.kernels import has_triton

Kernel = Literal["auto", "gathered", "flex", "triton"]

# Bytes of keys and values gathered at a time: around a core's cache, and bounded for any length.
_GATHER_BYTES = 2**22


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """Attention [B, H, Q, E] over the pairs of blocks that `block_mask` selects.

    Equals dense attention masked to those blocks (and causally), up to rounding; with all blocks
    selected it is dense attention. A query that may see no key gets what the kernel gives for it
    (0 or NaN), as in PyTorch. Differentiable in q, k and v (and not in `block_mask`); `key_bias`
    only by the gathered kernel.

    Args:
        q: [B, H, Q, D].
        k: [B, K, N, D].
        v: [B, K, N, E].
        block_mask: bool [B or 1, H or 1, I, J].
        block_size: Tokens in a block; lengths need not be multiples of it.
        is_causal: Whether the query at position p sees only keys up to p, where the queries are
            the last Q positions.
        scale: Factor on scores; None means 1/sqrt(D).
        key_bias: Added to the scores of each key, [B, K, N]: a log-weight, or -inf to hide it.
        kernel: "gathered" (blocks copied together for dense attention), "triton" (flash attention
            over lists of blocks; CUDA, without gradients, float32 or half precision, heads of up
            to 256, block sizes that are powers of two from 16 on), "flex" (compiled
            flex_attention with a BlockMask; such block sizes), or "auto": on CUDA the first of
            triton, flex and gathered that can compute this, gathered elsewhere.

    Raises:
        ADMSTypeError: `block_mask` is not bool.
        ADMSValueError: A shape or the block size does not fit, the kernel is unknown, or cannot
            compute this.
    """
    _check(q, k, v, block_mask, block_size, key_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    block_mask = block_mask.expand(q.shape[0], q.shape[1], -1, -1)
    if kernel == "auto":
        kernel = _fastest(q, k, v, block_size, key_bias)
    match kernel:
        case "triton":
            why = _triton_misfit(q, k, v, block_size, key_bias)
            if why is not None:
                raise ADMSValueError(
                    f"kernel 'triton' needs {why}; use kernel='auto' to have one chosen"
                )
            from adms.attention.block_sparse.triton_kernel import attend_blocks as attend
        case "flex":
            attend = attend_flex
        case "gathered":
            attend = _gathered
        case _:
            raise ADMSValueError(
                f"kernel must be 'auto', 'gathered', 'flex' or 'triton', got {kernel!r}"
            )
    return attend(q, k, v, block_mask, block_size, is_causal, scale, key_bias)


def soft_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    block_size: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention [B, H, Q, E] with every exponential times its block's weight, at dense cost.

    `weights` [B, H, I, J] within 0 and 1 may require gradients, which also reach weights that are
    exactly 0 (straight-through); so do those of q, k and v, for which such blocks are absent.
    Other arguments as in `block_sparse_attention`, with K = H.
    """
    heads_q, heads_k = q.shape[1], k.shape[1]
    if heads_q != heads_k:
        raise ADMSValueError(f"k must have the {heads_q} heads of q, got {heads_k}")
    queries, keys = q.shape[-2], k.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(dtype) * scale
    tokens = weights.to(dtype).repeat_interleave(block_size, -2)[..., :queries, :]
    tokens = tokens.repeat_interleave(block_size, -1)[..., :keys]
    if is_causal:
        scores = scores.masked_fill(~_causal(queries, keys, q.device), -math.inf)
    # The largest term is 1 and the sum at least that. A block of weight 0 may hold larger scores,
    # whose exponentials serve the weight's gradient only and are bounded by e^20.
    top = (scores.detach() + tokens.detach().clamp(min=0.0).log()).amax(-1, keepdim=True)
    terms = (scores - top).clamp(max=20.0).exp() * tokens
    return (terms / terms.sum(-1, keepdim=True)).to(v.dtype) @ v


def _fastest(q: Tensor, k: Tensor, v: Tensor, block_size: int, key_bias: Tensor | None) -> Kernel:
    """The kernel that "auto" stands for."""
    if not q.is_cuda:
        return "gathered"
    if not _triton_misfit(q, k, v, block_size, key_bias):
        return "triton"
    biased = key_bias is not None and key_bias.requires_grad and torch.is_grad_enabled()
    return "flex" if flex_takes(block_size) and not biased else "gathered"


def _triton_misfit(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, key_bias: Tensor | None
) -> str | None:
    """Why the Triton kernel cannot compute this, or None."""
    inputs = [q, k, v] + ([] if key_bias is None else [key_bias])
    if not q.is_cuda:
        return f"CUDA tensors, got q on {q.device}"
    if not has_triton():
        return "the package triton, which is not installed"
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "inputs without gradients; call it under torch.no_grad()"
    from adms.attention.block_sparse.triton_kernel import misfit

    return misfit(q, k, v, block_size)


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int,
    is_causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> Tensor:
    """Copies each query block's key blocks together and attends densely, some rows at a time."""
    batch, heads, queries, size = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    rows_q = _blocks(q, block_size).flatten(0, 2)
    blocks_k, blocks_v = (_blocks(x, block_size).flatten(0, 2) for x in (k, v))
    query_blocks, key_blocks = block_mask.shape[-2:]
    counts, order = ordered_blocks(block_mask)
    most = int(counts.max())
    order = order[..., :most].long()
    first = torch.arange(batch * kv_heads, device=q.device) * key_blocks
    first = first.view(batch, kv_heads, 1).expand(-1, -1, heads // kv_heads).flatten(1)
    index = (order + first[..., None, None]).flatten(0, 2)
    filled = (torch.arange(most, device=q.device) < counts.unsqueeze(-1)).flatten(0, 2)
    order = order.flatten(0, 2)
    padded = keys % block_size != 0
    masked = is_causal or padded or key_bias is not None or not bool(filled.all())
    tokens = torch.arange(block_size, device=q.device)
    starts = keys - queries + block_size * torch.arange(query_blocks, device=q.device)
    starts = starts.repeat(batch * heads)
    bias_blocks = None
    if key_bias is not None:
        bias_blocks = pad(key_bias, (0, -keys % block_size)).reshape(-1, block_size)
    row_bytes = most * block_size * (size + v.shape[-1]) * k.element_size()
    step = max(1, _GATHER_BYTES // max(1, row_bytes))
    outputs = []
    for begin in range(0, index.shape[0], step):
        rows = slice(begin, begin + step)
        flat = index[rows].flatten()
        shape = (-1, 1, most * block_size)
        row_keys = blocks_k.index_select(0, flat).view(*shape, size)
        row_values = blocks_v.index_select(0, flat).view(*shape, v.shape[-1])
        mask = None
        if masked:
            positions = (order[rows].unsqueeze(-1) * block_size + tokens).flatten(1).unsqueeze(1)
            mask = filled[rows].repeat_interleave(block_size, -1).unsqueeze(1) & (positions < keys)
            if is_causal:
                mask = mask & (positions <= (starts[rows].unsqueeze(-1) + tokens).unsqueeze(-1))
            mask = mask.expand(-1, block_size, -1).unsqueeze(1)
            if bias_blocks is not None:
                bias = bias_blocks.index_select(0, flat).view(*shape).unsqueeze(1).to(q.dtype)
                mask = bias.masked_fill(~mask, -math.inf)
        outputs.append(
            scaled_dot_product_attention(
                rows_q[rows].unsqueeze(1), row_keys, row_values, attn_mask=mask, scale=scale
            )
        )
    output = torch.cat(outputs).view(batch, heads, query_blocks * block_size, v.shape[-1])
    return output[:, :, :queries]


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """[B, H, N, D] as [B, H, J, block_size, D], padded with zeros."""
    return pad(x, (0, 0, 0, -x.shape[-2] % block_size)).unflatten(2, (-1, block_size))


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [Q, N]: what each of the last Q of N positions may see."""
    positions = torch.arange(keys, device=device)
    return positions <= positions[keys - queries :].unsqueeze(-1)


def _check(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor, block_size: int, key_bias: Tensor | None
) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        shapes = [list(x.shape) for x in (q, k, v)]
        raise ADMSValueError(f"q, k and v must be [B, heads, tokens, size], got {shapes}")
    batch, heads, queries, size = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if k.shape[0] != batch or heads % kv_heads or k.shape[-1] != size or queries > keys:
        raise ADMSValueError(
            f"k must be [{batch}, K dividing {heads}, N >= {queries}, {size}] for q "
            f"{list(q.shape)}, got {list(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ADMSValueError(f"v must be {[*k.shape[:-1], 'E']}, got {list(v.shape)}")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ADMSValueError(f"block_size must be an int of at least 1, got {block_size!r}")
    if block_mask.dtype != torch.bool:
        raise ADMSTypeError(f"block_mask must be bool, got {block_mask.dtype}")
    expected = [-(-queries // block_size), -(-keys // block_size)]
    outer_fits = (
        block_mask.dim() == 4
        and block_mask.shape[0] in (1, batch)
        and block_mask.shape[1] in (1, heads)
    )
    if not outer_fits or list(block_mask.shape[2:]) != expected:
        raise ADMSValueError(
            f"block_mask must be [{batch} or 1, {heads} or 1, {expected[0]}, {expected[1]}] for "
            f"{queries} queries and {keys} keys in blocks of {block_size}, got "
            f"{list(block_mask.shape)}"
        )
    if key_bias is not None and key_bias.shape != k.shape[:-1]:
        raise ADMSValueError(f"key_bias must be {list(k.shape[:-1])}, got {list(key_bias.shape)}")
