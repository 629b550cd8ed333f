"""Codes as keys and values, in Triton: what a pass of several tokens reads of a middle.

Its plain twin is ``parts.states_of``. One launch for all keys of a layer and one for its values, in
place of some hundred small operations.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` records, ``D``/``E`` head sizes
of keys/values.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from adms.compressors.codebooks import GROUP, codebooks_on
from adms.compressors.tables import CodeTables, Projection
from adms.entries import TokenShape
from adms.kernels.choice import launching
from adms.kernels.decode_attention_triton import _numbers, _row_stride, _tensors
from adms.kernels.lookup import _ahead, _chunk, _factor, _followed, _gain, _reach

# Records of a program, coded channels that are looked up at a time, least extent of a product.
TILE = 32
CHUNK = 32
LEAST = 16


@triton.jit
def coded_states(
    records, offsets, books, basis, scale, deviation, mean, rows, weight, out,
    r_row, r_entry, record_bytes, offset_row, offset_stage,
    basis_row, basis_block, basis_channel, scale_row, scale_block, deviation_row, deviation_block,
    mean_row, mean_block, rows_row, rows_block, weight_row, weight_block, gain_start, gain_block,
    channels, first_group, rows_each, count, o_row, o_head, o_entry,
    TILE: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHOSEN: tl.constexpr,
    WEIGHTED: tl.constexpr, HALF: tl.constexpr, STEPS: tl.constexpr, CODE_KIND: tl.constexpr,
):  # fmt: skip
    """States of a tile of records; a program for the ``SHARE`` KV heads of a block."""
    tile, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tile * TILE + tl.arange(0, TILE)
    held = n < count
    # Behind the last record stands the last one again, which is not written.
    n = tl.minimum(n, count - 1)
    record = records + row * r_row + n * r_entry
    # Rows of several layers lie one layer after the other, each layer with a basis.
    layer = row // rows_each
    basis += layer * basis_row + block * basis_block
    scale += layer * scale_row + block * scale_block
    weight += layer * weight_row + block * weight_block
    deviation += row * deviation_row + block * deviation_block
    rows += row * rows_row + block * rows_block
    groups = channels // 8
    offsets += row * offset_row + first_group + block * groups
    j = tl.arange(0, COLUMNS)
    there = j < SHARE * SIZE
    states = tl.zeros([TILE, COLUMNS], dtype=tl.float32)
    used = _reach(offsets, 0, record_bytes, offset_stage, groups, GROUPS)
    deep, deeper = 0, 0
    if STAGES > 2:
        deep = _reach(offsets, 2, record_bytes, offset_stage, groups, GROUPS)
    if STAGES > 3:
        deeper = _reach(offsets, 3, record_bytes, offset_stage, groups, GROUPS)
    first, second, code_1, code_2 = _ahead(
        record, offsets, 0, groups, record_bytes, offset_stage, CHUNK, STAGES
    )
    for start in range(0, used, CHUNK // 8):
        coming = _ahead(
            record, offsets, start + CHUNK // 8, groups, record_bytes, offset_stage, CHUNK, STAGES
        )
        c = start * 8 + tl.arange(0, CHUNK)
        which = _followed(rows, c, channels, CHOSEN)
        factor = _factor(scale, deviation, c, which, channels)
        at = basis + which[:, None] * basis_channel + j[None, :]
        directions = tl.load(at, mask=there[None, :], other=0)
        coded = _chunk(
            record, offsets, books, start, groups, deep, deeper, record_bytes, offset_stage,
            first, second, code_1, code_2, CHUNK, STAGES, CODE_KIND, False,
        )  # fmt: skip
        coded = (coded.to(tl.float32) * factor[None, :]).to(CODE_KIND)
        states = tl.dot(coded, directions.to(CODE_KIND), states, input_precision="ieee")
        first, second, code_1, code_2 = coming
    gain = _gain(record, gain_start + block * gain_block, HALF, STEPS)
    states *= gain[:, None]
    if WEIGHTED:
        states /= tl.load(weight + j, mask=there, other=1.0).to(tl.float32)[None, :]
    at = mean + row * mean_row + block * mean_block + j
    states += tl.load(at, mask=there, other=0.0).to(tl.float32)[None, :]
    at = row * o_row + (block * SHARE + j // SIZE)[None, :] * o_head + n[:, None] * o_entry
    mask = held[:, None] & there[None, :]
    tl.store(out + at + (j % SIZE)[None, :], states.to(out.dtype.element_ty), mask=mask)


@launching
def fused_states(
    tables: CodeTables,
    records: torch.Tensor,
    shape: TokenShape,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[B, K, N, D]`` and values ``[B, K, N, E]``; see ``states.decode_by_tables``."""
    split = tables.keys.blocks * tables.keys.channels // GROUP
    keys = _states(tables, tables.keys, 0, records, shape.key_dim, shape, dtype)
    return keys, _states(tables, tables.values, split, records, shape.value_dim, shape, dtype)


def _states(
    tables: CodeTables,
    side: Projection,
    first_group: int,
    records: torch.Tensor,
    size: int,
    shape: TokenShape,
    dtype: torch.dtype,
) -> torch.Tensor:
    rows, count = records.shape[:2]
    heads = shape.num_heads
    share = heads // side.blocks
    # Codes are small numbers that float16 holds more finely than bfloat16.
    single = dtype == torch.float32
    books = codebooks_on(records.device, torch.float32 if single else torch.float16)
    out = torch.empty(rows, heads, count, size, dtype=dtype, device=records.device)
    kind: Any = tl.float32 if single else tl.float16
    coded_states[triton.cdiv(count, TILE), side.blocks, rows](
        records, tables.offsets, books, *_tensors(side), out, *records.stride()[:2],
        tables.record_bytes, _row_stride(tables.offsets), tables.offsets.stride(1),
        *_numbers(side), first_group, rows // len(side.basis), count, *out.stride()[:3],
        TILE=TILE, CHUNK=CHUNK, STAGES=tables.offsets.shape[1], SHARE=share, SIZE=size,
        COLUMNS=max(LEAST, triton.next_power_of_2(share * size)),
        GROUPS=triton.next_power_of_2(side.channels // GROUP), CHOSEN=side.rows is not None,
        WEIGHTED=side.weight is not None, HALF=tables.half_gain, STEPS=tables.gain_steps,
        CODE_KIND=kind,
    )  # fmt: skip
    return out
