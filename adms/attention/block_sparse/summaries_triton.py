"""Block summaries in Triton: means of blocks of tokens, and their mean squares, in one pass.

The plain twins are `summarize_blocks` and `block_mean_squares`. Forward only.

Shapes: `B` batch, `H` heads, `N` tokens, `D` head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adms.kernels.choice import launching

_MOST_SIZE = 1024
# Of a tile of tokens at a time.
_TILE_ELEMENTS = 8192


def summaries_fit(x: Tensor) -> bool:
    """Whether `block_summaries` can compute those of x [B, H, N, D]."""
    halves = (torch.float16, torch.bfloat16, torch.float32)
    return x.dtype in halves and x.shape[-1] <= _MOST_SIZE


@launching
def block_summaries(x: Tensor, block_size: int, squares: bool) -> tuple[Tensor, Tensor]:
    """As `summarize_blocks` and, with `squares`, `block_mean_squares`: one pass over x."""
    batch, heads, tokens, size = x.shape
    blocks = -(-tokens // block_size)
    means = torch.empty(batch, heads, blocks, size, dtype=torch.float32, device=x.device)
    of_squares = means.new_empty(batch, heads, blocks if squares else 0, 1)
    width = triton.next_power_of_2(size)
    rows = min(triton.next_power_of_2(block_size), max(1, _TILE_ELEMENTS // width))
    _summarize[(blocks, batch * heads)](
        x,
        means,
        of_squares,
        *x.stride(),
        heads,
        tokens,
        blocks,
        size,
        BLOCK=block_size,
        ROWS=rows,
        WIDTH=width,
        SQUARES=squares,
        num_warps=4,
    )
    return means, of_squares


@triton.jit
def _summarize(
    x,
    means,
    squares,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    heads,
    tokens,
    blocks,
    size,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """One program means one block of one head."""
    block = tl.program_id(0)
    outer = tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, WIDTH)
    start = x + (outer // heads) * stride_b + (outer % heads) * stride_h
    end = tl.minimum(block * BLOCK + BLOCK, tokens)
    total = tl.zeros([WIDTH], tl.float32)
    square = tl.zeros([WIDTH], tl.float32)
    for first in range(0, BLOCK, ROWS):
        rows = block * BLOCK + first + tl.arange(0, ROWS)
        part = tl.load(
            start + rows[:, None].to(tl.int64) * stride_n + inner[None, :] * stride_d,
            mask=(rows < end)[:, None] & (inner < size)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(part, 0)
        if SQUARES:
            square += tl.sum(part * part, 0)
    count = (end - block * BLOCK).to(tl.float32)
    out = outer * blocks + block
    tl.store(means + out * size + inner, total / count, mask=inner < size)
    if SQUARES:
        tl.store(squares + out, tl.sum(square, 0) / (count * size))
