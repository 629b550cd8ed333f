"""The hard block-sparse kernel in Triton: flash attention over the selected blocks alone.

Two launches and no wait for the device: one lists each row's selected blocks, one attends. The
gathered kernel in ``kernels.py`` is the same in plain PyTorch. Forward only.

Shapes: as in ``kernels.py``.

Source: Dao (2023), FlashAttention-2, arXiv:2307.08691, for the online softmax; differs in the loop,
which runs over a list of key blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adms.kernels.choice import launching

_LOG2_E = 1.4426950408889634
_MOST_SIZE = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def misfit(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> str | None:
    """What of the inputs `attend_blocks` cannot take, said as what it needs, or None."""
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"float16, bfloat16 or float32 throughout, got {q.dtype}, {k.dtype}, {v.dtype}"
    if max(q.shape[-1], v.shape[-1]) > _MOST_SIZE:
        return f"heads of at most {_MOST_SIZE}, got {q.shape[-1]} and {v.shape[-1]}"
    if block_size < 16 or block_size & (block_size - 1):
        return f"a block_size that is a power of two from 16 on, got {block_size}"
    return None


@launching
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int,
    is_causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> Tensor:
    """Attention [B, H, Q, E], arguments as in `block_sparse_attention`; a row without keys is 0.

    float32 is computed on tensor cores in three TF32 products, to float32's precision nearly.
    """
    batch, heads, queries, size = q.shape
    kv_heads, keys, value_size = k.shape[1], k.shape[2], v.shape[-1]
    query_blocks, key_blocks = block_mask.shape[-2:]
    counts = torch.empty(batch, heads, query_blocks, dtype=torch.int32, device=q.device)
    order = torch.empty(batch, heads, query_blocks, key_blocks, dtype=torch.int32, device=q.device)
    _list_blocks[(query_blocks, batch * heads)](
        block_mask,
        counts,
        order,
        *block_mask.stride(),
        heads,
        query_blocks,
        key_blocks,
        WIDTH=triton.next_power_of_2(key_blocks),
        num_warps=1,
    )
    output = torch.empty(batch, heads, queries, value_size, dtype=v.dtype, device=q.device)
    tile, columns, warps, stages = _tiles(block_size, max(size, value_size), q.dtype)
    bias = key_bias if key_bias is not None else counts
    _attend[(query_blocks * block_size // tile, batch * heads)](
        q,
        k,
        v,
        bias,
        counts,
        order,
        output,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *(key_bias.stride() if key_bias is not None else (0, 0, 0)),
        *output.stride(),
        scale * _LOG2_E,
        heads,
        heads // kv_heads,
        queries,
        keys,
        key_blocks,
        size,
        value_size,
        BLOCK=block_size,
        ROWS=tile,
        COLUMNS=columns,
        SIZE=max(16, triton.next_power_of_2(size)),
        VALUE_SIZE=max(16, triton.next_power_of_2(value_size)),
        CAUSAL=is_causal,
        BIASED=key_bias is not None,
        # Whether a dimension needs a mask is known per shape.
        WHOLE_SIZES=size == triton.next_power_of_2(size) >= 16
        and value_size == triton.next_power_of_2(value_size) >= 16,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
    )
    return output


def _tiles(block_size: int, size: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, and stages of the pipeline that loads keys."""
    # The fastest of those tried on an H100.
    rows = min(block_size, 128)
    if size > 128:
        return min(block_size, 64), min(block_size, 16 if dtype == torch.float32 else 32), 4, 2
    warps = 8 if rows == 128 else 4
    if dtype == torch.float32:
        return rows, min(block_size, 64 if size <= 64 else 32), warps, 2
    return rows, min(block_size, 64), *((warps, 3) if size <= 64 else (4, 2))


@triton.jit
def _list_blocks(
    mask,
    counts,
    order,
    stride_b,
    stride_h,
    stride_i,
    stride_j,
    heads,
    query_blocks,
    key_blocks,
    WIDTH: tl.constexpr,
):
    """Writes how many blocks a row of the mask selects, and which, in rising order."""
    row = tl.program_id(0)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    columns = tl.arange(0, WIDTH)
    start = mask + batch.to(tl.int64) * stride_b + head * stride_h + row * stride_i
    chosen = tl.load(start + columns * stride_j, mask=columns < key_blocks, other=0).to(tl.int32)
    place = tl.cumsum(chosen, 0) - 1
    out = tl.program_id(1).to(tl.int64) * query_blocks + row
    tl.store(order + out * key_blocks + place, columns, mask=chosen > 0)
    tl.store(counts + out, tl.sum(chosen, 0))


@triton.jit
def _attend(
    q,
    k,
    v,
    bias,
    counts,
    order,
    output,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    bias_b,
    bias_h,
    bias_n,
    o_b,
    o_h,
    o_n,
    o_d,
    scale,
    heads,
    group,
    queries,
    keys,
    key_blocks,
    size,
    value_size,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BIASED: tl.constexpr,
    WHOLE_SIZES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program attends from ROWS queries to their block's list, COLUMNS keys at a time."""
    PARTS: tl.constexpr = BLOCK // COLUMNS
    # The last rows first: with causality they have most to do.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, SIZE)
    outer = tl.arange(0, VALUE_SIZE)
    q_start = q + batch * q_b + head * q_h
    k_start = k + batch * k_b + (head // group) * k_h + inner[:, None] * k_d
    v_start = v + batch * v_b + (head // group) * v_h + outer[None, :] * v_d
    in_rows = rows[:, None] < queries
    if not WHOLE_SIZES:
        in_rows = in_rows & (inner[None, :] < size)
    query = tl.load(
        q_start + rows[:, None].to(tl.int64) * q_n + inner[None, :] * q_d, mask=in_rows, other=0.0
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, VALUE_SIZE], tl.float32)
    row_block = tl.program_id(1).to(tl.int64) * (tl.cdiv(queries, BLOCK)) + tile // (BLOCK // ROWS)
    count = tl.load(counts + row_block)
    listed = order + row_block * key_blocks
    position = rows + (keys - queries)
    for step in range(0, count * PARTS):
        block = tl.load(listed + step // PARTS)
        key = block * BLOCK + (step % PARTS) * COLUMNS + columns
        inside = key < keys
        key_mask = inside[None, :]
        value_mask = inside[:, None]
        if not WHOLE_SIZES:
            key_mask = key_mask & (inner[:, None] < size)
            value_mask = value_mask & (outer[None, :] < value_size)
        places = key.to(tl.int64)
        part = tl.load(k_start + places[None, :] * k_n, mask=key_mask, other=0.0)
        score = tl.dot(query, part, input_precision=PRECISION) * scale
        if BIASED:
            added = tl.load(
                bias + batch * bias_b + (head // group) * bias_h + places * bias_n,
                mask=inside,
                other=0.0,
            )
            score += added.to(tl.float32)[None, :] * 1.4426950408889634
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= position[:, None])
        score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        # Rows that have seen nothing yet have no largest score to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        terms = tl.exp2(score - base[:, None])
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(terms, 1)
        value = tl.load(v_start + places[:, None] * v_n, mask=value_mask, other=0.0)
        result = result * shrunk[:, None]
        result = tl.dot(terms.to(value.dtype), value, result, input_precision=PRECISION)
        top = higher
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    out_mask = rows[:, None] < queries
    if not WHOLE_SIZES:
        out_mask = out_mask & (outer[None, :] < value_size)
    out = output + batch * o_b + head * o_h
    tl.store(
        out + rows[:, None].to(tl.int64) * o_n + outer[None, :] * o_d,
        result.to(output.dtype.element_ty),
        mask=out_mask,
    )
