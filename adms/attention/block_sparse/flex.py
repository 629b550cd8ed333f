"""Block-sparse attention by flex_attention with a BlockMask, with gradients on CUDA.

Shapes: as in `kernels.py`.

Source: Dong et al. (2024), Flex Attention, arXiv:2412.05496.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from adms.errors import ADMSValueError


def flex_takes(block_size: int) -> bool:
    """Whether flex_attention has tiles for blocks of this size."""
    return block_size >= 16 and block_size & (block_size - 1) == 0


def flex_block_mask(
    block_mask: Tensor, block_size: int, queries: int, keys: int, is_causal: bool
) -> Any:
    """A flex_attention BlockMask of bool [B, H, I, J], for inputs padded to whole blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    device = block_mask.device
    offset = keys - queries
    first_query = offset + block_size * torch.arange(block_mask.shape[-2], device=device)
    last_key = block_size * (1 + torch.arange(block_mask.shape[-1], device=device)) - 1
    cut = (last_key >= keys).expand(block_mask.shape[-2:])
    if is_causal:
        cut = cut | (last_key > first_query.unsqueeze(-1))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = key < keys
        return inside & (key <= query + offset) if is_causal else inside

    partial, full = ordered_blocks(block_mask & cut), ordered_blocks(block_mask & ~cut)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=block_size, mask_mod=visible)


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int,
    is_causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> Tensor:
    """Attention [B, H, Q, E] by compiled flex_attention; arguments as in `block_sparse_attention`.

    Raises:
        ADMSValueError: The block size is one that flex_attention does not take.
    """
    if not flex_takes(block_size):
        raise ADMSValueError(
            f"kernel 'flex' needs a block_size that is a power of two from 16 on, got "
            f"{block_size}; use kernel='gathered' for others"
        )
    queries, keys = q.shape[2], k.shape[2]
    mask = flex_block_mask(block_mask, block_size, queries, keys, is_causal)
    q = pad(q, (0, 0, 0, -queries % block_size))
    k, v = (pad(x, (0, 0, 0, -keys % block_size)) for x in (k, v))
    score_mod = None
    if key_bias is not None:
        bias = pad(key_bias.detach(), (0, -keys % block_size))
        group = q.shape[1] // k.shape[1]

        def score_mod(
            score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor
        ) -> Tensor:
            return score + bias[batch, head // group, key]

    options = None
    if q.is_cuda and block_size < 128:
        # The kernel's tiles, 128 wide by default, must divide the blocks.
        names = (
            "BLOCK_M",
            "BLOCK_N",
            "bwd_BLOCK_M1",
            "bwd_BLOCK_N1",
            "bwd_BLOCK_M2",
            "bwd_BLOCK_N2",
        )
        options = dict.fromkeys(names, block_size)
    output: Tensor = _compiled_flex()(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        score_mod=score_mod,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
    )
    return output[:, :, :queries]


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """flex_attention is sparse only when compiled; compiling on import would slow everyone."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def ordered_blocks(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts int32 [B, H, I] and, first in each row, the selected blocks int32 [B, H, I, J]."""
    order = block_mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return block_mask.sum(-1).int(), order.int().contiguous()
