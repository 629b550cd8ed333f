"""Attention of a chunk by one fused kernel; ``attention.merged`` is its plain twin.

One softmax runs over what is held, which every query of the chunk sees, and over the chunk's own
tokens, which are causal; so nothing is merged that no split over entries has parted.

Shapes: ``B`` rows, ``R`` rows or 1, ``H`` query heads, ``K`` KV heads, ``Q`` queries, ``N`` held
entries, ``D`` head size.
"""

import torch

from adms.errors import ADMSValueError
from adms.kernels import Kernel
from adms.kernels.choice import fuses

# In float32 there is nothing to win: its products are not those of tensor cores.
DTYPES = (torch.float16, torch.bfloat16)
# Head sizes, which are powers of two.
LEAST_HEAD, LARGEST_HEAD = 16, 256


def attends_at_once(kernel: Kernel, query: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the fused kernel attends for queries ``[B, H, Q, D]`` to values ``[B, K, N, E]``."""
    return fuses(kernel, query.device) and fits(query.dtype, query.shape[3], values.shape[3])


def fits(dtype: torch.dtype, key_size: int, value_size: int) -> bool:
    """Whether the kernel takes this dtype and these head sizes."""
    is_power = key_size & (key_size - 1) == 0
    in_range = LEAST_HEAD <= key_size <= LARGEST_HEAD
    return dtype in DTYPES and key_size == value_size and is_power and in_range


def chunk_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Softmax attention over entries that every query sees, and causally among new tokens.

    Elements of a head lie side by side in all tensors.

    Args:
        query: ``[B, H, Q, D]`` at their positions.
        keys, values: ``[B, K, N, D]`` of the entries; finite, also where they are hidden.
        bias: ``[R, K or 1, 1, N]`` added to their scores, or None; hides where it is the least
            finite number of its dtype.
        new_keys, new_values: ``[B, K, Q, D]``, one of each for every query.
        scaling: factor of the scores.

    Returns:
        ``[B, Q, H, D]``.

    Raises:
        ADMSValueError: a dtype or head size that the kernel does not take, or shapes that do not
            go together.
    """
    _check(query, keys, values, bias, new_keys, new_values)
    # Triton is imported when it is first asked for.
    from adms.kernels.chunk_attention_triton import fused_chunk_attention

    return fused_chunk_attention(query, keys, values, bias, new_keys, new_values, scaling)


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
) -> None:
    states = (query, keys, values, new_keys, new_values)
    rows, heads, count, size = query.shape
    if any(one.dtype != query.dtype for one in states) or not fits(query.dtype, size, size):
        raise ADMSValueError(
            "the Triton kernel needs float16 or bfloat16 throughout and a head size that is a "
            f"power of two from {LEAST_HEAD} to {LARGEST_HEAD}, got "
            f"{', '.join(sorted({str(one.dtype) for one in states}))} and {size}; "
            "use kernel='torch'"
        )
    kv_heads, entries = keys.shape[1:3]
    held, new = (rows, kv_heads, entries, size), (rows, kv_heads, count, size)
    shapes = [tuple(one.shape) for one in states[1:]]
    if shapes != [held, held, new, new] or heads % kv_heads:
        raise ADMSValueError(
            f"keys and values {shapes} do not go with queries {tuple(query.shape)}"
        )
    if bias is not None and (
        bias.shape[0] not in (1, rows)
        or bias.shape[1] not in (1, kv_heads)
        or tuple(bias.shape[2:]) != (1, entries)
    ):
        raise ADMSValueError(f"a bias {tuple(bias.shape)} does not go with keys {held}")
    beside = [one for one in (*states, bias) if one is not None and one.shape[-1] > 1]
    if any(one.stride(-1) != 1 for one in beside):
        raise ADMSValueError("the Triton kernel needs tensors whose last dimension is contiguous")
