"""The fused form of ``decode_attention``, in Triton; ``tiles`` says how it works.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``S`` slots, ``D`` head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from adms.compressors.codebooks import GROUP, codebooks_on
from adms.compressors.tables import Projection
from adms.errors import ADMSValueError
from adms.kernels import tiles as kernels
from adms.kernels.parts import CodedPart, ExactPart

# Entries of a tile, and channels that are decoded at a time.
TILE = 64
CHUNK = 32
# Least rows of a matrix product.
LEAST_ROWS = 16


def fused_write_token(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    flag: torch.Tensor,
) -> None:
    """Writes ``key`` and ``value`` ``[B, K, 1, D]`` into slot ``slots [R]`` of the ring.

    Args:
        keys, values: ``[B, K, S, D]``.
        flag: ``[1]`` uint8, set to 1 where a number is not finite.
    """
    rows, heads, _, size = key.shape
    kernels.write_token[heads, rows](
        key, value, keys, values, slots, flag, key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), *keys.stride()[:3], *values.stride()[:3], _row_stride(slots), size,
        num_warps=1,
    )  # fmt: skip


def fused_decode_attention(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    exact: Sequence[ExactPart],
    coded: Sequence[CodedPart],
    scaling: float,
) -> torch.Tensor:
    """See ``decode_attention``; at most two coded parts.

    Raises:
        ADMSValueError: a head size that is no power of two from 16 on, or too many parts.
    """
    rows, heads, size = query.shape
    kv_heads = exact[0].keys.shape[1]
    if not fits(size) or len(coded) > 2:
        raise ADMSValueError(
            f"the Triton kernel needs head sizes that are powers of two from 16 on and at most two "
            f"coded parts, got {size} and {len(coded)}; use kernel='torch'"
        )
    group = heads // kv_heads
    half = size // 2
    padded = max(LEAST_ROWS, triton.next_power_of_2(group))
    kind = _kind(query.dtype)
    tiles = sum(triton.cdiv(part.keys.shape[2], TILE) for part in exact)
    partial = _Partial(query, heads, tiles, size)
    shared: dict[str, Any] = {
        "HEADS": heads, "G": group, "P": padded, "F": half, "TILE": TILE, "KIND": kind,
    }  # fmt: skip
    asked = (query, cos, sin)
    asked_strides = (query.stride(0), query.stride(1), _row_stride(cos))
    first = 0
    for part in exact:
        count = part.keys.shape[2]
        own = triton.cdiv(count, TILE)
        bias = part.log_weight
        kernels.exact_tiles[own, kv_heads, rows](
            *asked, part.keys, part.values, part.cos, part.sin, part.valid.view(torch.uint8),
            part.keys if bias is None else bias, *partial.tensors, *asked_strides,
            *part.keys.stride()[:3], *part.values.stride()[:3], _row_stride(part.cos),
            part.cos.stride(1), _row_stride(part.valid), 0 if bias is None else bias.stride(0),
            0 if bias is None else bias.stride(1), count, first, tiles, scaling, **shared,
            BIASED=bias is not None,
        )  # fmt: skip
        first += own
    arguments: list[Any] = []
    numbers: list[int] = []
    for coded_part in coded:
        own_partial = _coded(coded_part, query, asked, asked_strides, kv_heads, scaling, shared)
        side = coded_part.tables.values
        arguments += [
            *own_partial.tensors, side.basis, side.factor, side.mean, own_partial.tiles,
            *_strides(side), side.channels,
        ]  # fmt: skip
        numbers += [triton.next_power_of_2(own_partial.tiles), kv_heads // side.blocks]
    for _ in range(2 - len(coded)):
        arguments += [query] * 6 + [0] * 9
        numbers += [0, 1]
    out = torch.empty(rows, heads, size, dtype=query.dtype, device=query.device)
    kernels.merge[heads, rows](
        out, *partial.tensors, tiles, *arguments, heads, group, half,
        triton.next_power_of_2(tiles), *numbers, CHUNK,
    )  # fmt: skip
    return out


class _Partial:
    """Maxima, sums and weighted values of every tile of a part, for every query head."""

    def __init__(self, query: torch.Tensor, heads: int, tiles: int, width: int) -> None:
        rows = query.shape[0]
        self.tiles = tiles

        def new(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=query.device)

        self.tensors = (
            new(rows, heads, tiles),
            new(rows, heads, tiles),
            new(rows, heads, tiles, width),
        )


def _coded(
    part: CodedPart,
    query: torch.Tensor,
    asked: tuple[torch.Tensor, ...],
    asked_strides: tuple[int, ...],
    kv_heads: int,
    scaling: float,
    shared: dict[str, Any],
) -> _Partial:
    """Runs the tiles of one coded part."""
    tables, count = part.tables, part.records.shape[1]
    tiles = triton.cdiv(count, TILE)
    partial = _Partial(query, query.shape[1], tiles, tables.values.channels)
    order, hidden = part.order, part.hidden
    marked = order is not None and hidden is not None
    keys, values = tables.keys, tables.values
    # Codes are small numbers that float16 holds more finely than bfloat16.
    code_kind = tl.float32 if query.dtype == torch.float32 else tl.float16
    kernels.coded_tiles[tiles, kv_heads, query.shape[0]](
        *asked, part.records, tables.offsets, codebooks_on(query.device), keys.basis, keys.factor,
        keys.mean, part.cos, part.sin, part.valid.view(torch.uint8),
        order if marked else tables.offsets, hidden if marked else tables.offsets,
        *partial.tensors, *asked_strides, *part.records.stride()[:2], _row_stride(tables.offsets),
        tables.offsets.stride(1), *_strides(keys), _row_stride(part.cos), part.cos.stride(1),
        _row_stride(part.valid), _row_stride(order) if order is not None else 0,
        _row_stride(hidden) if hidden is not None else 0, count, tiles, scaling, keys.channels,
        values.channels, keys.blocks * keys.channels // GROUP, keys.gain_start, keys.gain_stride,
        values.gain_start, values.gain_stride, hidden.shape[1] if hidden is not None else 0,
        **shared, CHUNK=CHUNK, STAGES=tables.offsets.shape[1], SHARE=kv_heads // keys.blocks,
        VALUE_SHARE=kv_heads // values.blocks, HALF=tables.half_gain, STEPS=tables.gain_steps,
        HIDDEN=triton.next_power_of_2(hidden.shape[1]) if marked and hidden is not None else 0,
        CODE_KIND=code_kind,
    )  # fmt: skip
    return partial


def fits(size: int) -> bool:
    """Whether the kernels take this head size."""
    return size >= 16 and size & (size - 1) == 0


def _strides(side: Projection) -> tuple[int, ...]:
    """Row, block and channel strides of a basis, row and block strides of factor and mean."""
    return (
        _row_stride(side.basis), side.basis.stride(1), side.basis.stride(2),
        _row_stride(side.factor), side.factor.stride(1), _row_stride(side.mean),
        side.mean.stride(1),
    )  # fmt: skip


def _row_stride(tensor: torch.Tensor) -> int:
    """Elements from one row to the next; 0 where one row stands for all."""
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)


def _kind(dtype: torch.dtype) -> Any:
    match dtype:
        case torch.float16:
            return tl.float16
        case torch.bfloat16:
            return tl.bfloat16
        case torch.float32:
            return tl.float32
    raise ADMSValueError(
        f"the Triton kernel works in float16, bfloat16 or float32, got {dtype}; use kernel='torch'"
    )
