"""The fused form of ``decode_attention``, in Triton; ``tiles`` and ``adding`` say how it works.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``S`` slots, ``D`` head size.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from adms.compressors.codebooks import GROUP, codebooks_on
from adms.compressors.tables import Projection
from adms.errors import ADMSValueError
from adms.kernels import adding
from adms.kernels import tiles as kernels
from adms.kernels.choice import launching
from adms.kernels.parts import CodedPart, ExactPart

# As Triton reads it, when its kernels are defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Entries of a tile.
EXACT_TILE = 32
# Elements of a program's heads together.
MOST_COLUMNS = 256
# Tiles and elements that a program of the merge adds up at a time.
MERGED_TILES = 128
MERGED_COLUMNS = 32
# Tiles of codes that are added up at a time before their values are projected, the least elements
# of a program that does so, and programs that are enough for a device: more than these would only
# add up the same again.
PROJECTED_TILES = 32
PROJECTED_COLUMNS = 32
PROJECTING = 128
# Least extents of a matrix product.
LEAST = 16


@launching
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


@launching
def fused_decode_attention(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    exact: Sequence[ExactPart],
    coded: Sequence[CodedPart],
    scaling: float,
) -> torch.Tensor:
    """See ``decode_attention``.

    Raises:
        ADMSValueError: a head size that is no power of two from 16 on, another dtype than
            float16, bfloat16 or float32, or codes with other blocks of keys than of values.
    """
    rows, heads, size = query.shape
    kv_heads = exact[0].keys.shape[1]
    if not fits(size):
        raise ADMSValueError(
            f"the Triton kernels need head sizes that are powers of two from 16 on, got {size}; "
            "use kernel='torch'"
        )
    counts = [triton.cdiv(part.keys.shape[2], EXACT_TILE) for part in exact]
    together = _together(coded)
    # Tiles of codes are added up for themselves.
    tiles = sum(counts) + len(together)

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=query.device)

    # Of each tile and query head: maximum, sum of weights, weighted values.
    partial = (new(rows, heads, tiles), new(rows, heads, tiles), new(rows, heads, tiles, size))
    asked = (query, cos, sin)
    asked_strides = (query.stride(0), query.stride(1), _row_stride(cos))
    shared: dict[str, Any] = {
        "H": heads, "G": heads // kv_heads, "F": size // 2, "KIND": _kind(query.dtype),
        "PACKED": query.dtype != torch.float32 and not INTERPRETED and torch.version.hip is None,
    }  # fmt: skip
    first = 0
    with _Branches(query.device) as branches:
        for part, count in zip(exact, counts, strict=True):
            numbers = (first, tiles, scaling)
            _exact(part, asked, asked_strides, partial, count, numbers, shared)
            first += count
        for parts in together:
            with branches.next():
                numbers = (first, tiles, scaling)
                _coded(parts, asked, asked_strides, partial, kv_heads, numbers, shared)
            first += 1
    out = torch.empty(rows, heads, size, dtype=query.dtype, device=query.device)
    columns = min(size, MERGED_COLUMNS)
    adding.merge[size // columns, heads, rows](
        out, *partial, tiles, heads, size, columns,
        min(MERGED_TILES, triton.next_power_of_2(tiles)),
    )  # fmt: skip
    return out


class _Branches:
    """Launches that do not wait for each other: beside the current stream, joined at the end."""

    def __init__(self, device: torch.device) -> None:
        self.main = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.used: list[torch.cuda.Stream] = []

    def next(self) -> contextlib.AbstractContextManager[Any]:
        """A stream of its own for what is launched inside."""
        if self.main is None:
            return contextlib.nullcontext()
        stream = _stream(self.main.device, len(self.used))
        stream.wait_stream(self.main)
        self.used.append(stream)
        return torch.cuda.stream(stream)

    def __enter__(self) -> "_Branches":
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self.used:
            torch.cuda.current_stream(stream.device).wait_stream(stream)


@functools.cache
def _stream(device: torch.device, index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _exact(
    part: ExactPart,
    asked: tuple[torch.Tensor, ...],
    asked_strides: tuple[int, ...],
    partial: tuple[torch.Tensor, ...],
    tiles: int,
    numbers: tuple[int, int, float],
    shared: dict[str, Any],
) -> None:
    """Runs the tiles of one exact part."""
    bias, half = part.log_weight, shared["F"]
    rows, kv_heads, count = part.keys.shape[:3]
    kernels.exact_tiles[tiles, kv_heads, rows](
        *asked, part.keys, part.values, part.cos, part.sin, part.valid.view(torch.uint8),
        part.keys if bias is None else bias, *partial, *asked_strides,
        *part.keys.stride()[:3], *part.values.stride()[:3], _row_stride(part.cos),
        part.cos.stride(1), _row_stride(part.valid), 0 if bias is None else bias.stride(0),
        0 if bias is None else bias.stride(1), count, *numbers, **shared,
        P=_padded(shared["G"]), TILE=EXACT_TILE, HEADS=max(1, LEAST // half),
        BIASED=bias is not None,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Form:
    """How the programs of codes are cut.

    Attributes:
        tile: entries of a program.
        chunk: channels of keys that are looked up at a time.
        value_chunk: the same of values, which leave more registers.
        warps: of a program.
        registers: of a thread; 0: as many as it takes.
    """

    tile: int
    chunk: int
    value_chunk: int
    warps: int
    registers: int = 0


# Measured in docs/performance.md. Wide tiles turn directions into numbers for many entries at once;
# of few entries narrow ones make more programs, which wait for memory side by side. With 128
# registers two programs share a multiprocessor.
WIDE, NARROW = _Form(128, 32, 64, 8, 128), _Form(32, 32, 64, 8, 128)
SINGLE = _Form(32, 32, 32, 4)
# Entries from which on tiles are wide, and the largest heads whose sums such a program can hold.
WIDE_FROM = 512
WIDEST_HEAD = 256


def _form(parts: Sequence[CodedPart], dtype: torch.dtype, size: int) -> _Form:
    if dtype == torch.float32:
        return SINGLE
    wide = max(part.records.shape[1] for part in parts) >= WIDE_FROM and size <= WIDEST_HEAD
    return WIDE if wide else NARROW


def _together(coded: Sequence[CodedPart]) -> list[Sequence[CodedPart]]:
    """What is read in one launch: records, and with them finer ones of the same tables."""
    return [coded] if len(coded) == 2 and _is_finer(coded[1], coded[0]) else [[p] for p in coded]


def _is_finer(fine: CodedPart, part: CodedPart) -> bool:
    """Whether one is read by the other's tables, which end earlier."""
    same = ("offsets", "keys", "values")
    return (
        all(getattr(fine.tables, name) is getattr(part.tables, name) for name in same)
        and fine.tables.half_gain == part.tables.half_gain
        and fine.tables.gain_steps == part.tables.gain_steps
        and (fine.tables.log_weight is None) == (part.tables.log_weight is None)
        and fine.cos.stride(1) == part.cos.stride(1)
        and fine.tables.record_bytes >= part.tables.record_bytes
    )


def _coded(
    parts: Sequence[CodedPart],
    asked: tuple[torch.Tensor, ...],
    asked_strides: tuple[int, ...],
    partial: tuple[torch.Tensor, ...],
    kv_heads: int,
    numbers: tuple[int, int, float],
    shared: dict[str, Any],
) -> None:
    """Runs the tiles of coded parts that share their tables, the finer part last."""
    form = _form(parts, asked[0].dtype, asked[0].shape[2])
    part, fine = parts[0], parts[-1]
    of_each = [triton.cdiv(one.records.shape[1], form.tile) for one in parts]
    tiles, fine_tiles = sum(of_each), sum(of_each[1:])
    query, half = asked[0], shared["F"]
    tables, keys, values = part.tables, part.tables.keys, part.tables.values
    if keys.blocks != values.blocks:
        raise ADMSValueError(
            f"the Triton kernels need keys and values in the same blocks of heads, got "
            f"{keys.blocks} and {values.blocks} blocks; use kernel='torch'"
        )
    if {len(keys.basis), len(values.basis)} - {1, query.shape[0]}:
        raise RuntimeError("decode attention reads the codes of one layer")
    share = kv_heads // keys.blocks
    heads = min(triton.next_power_of_2(share), max(1, MOST_COLUMNS // (2 * half)))
    heads = max(heads, LEAST // half)
    # Codes are small numbers that float16 holds more finely than bfloat16.
    single = query.dtype == torch.float32
    books = codebooks_on(query.device, torch.float32 if single else torch.float16)
    rows, count = query.shape[:2]
    # What each tile leaves of each query head: maximum, sum of weights, sum of weights times gains,
    # and means of channels.
    left = torch.empty(3, rows, count, tiles, dtype=torch.float32, device=query.device)
    v_groups = max(triton.next_power_of_2(values.channels // 8), form.value_chunk // 8)
    means = left.new_empty(rows, count, tiles, 8 * v_groups, dtype=books.dtype)
    of_values = _tensors(values)
    code_kind = tl.float32 if single else tl.float16
    kinds: dict[str, Any] = {
        "PACKED": shared["PACKED"], "WHOLE": keys.basis.dtype == values.basis.dtype == torch.int8,
    }  # fmt: skip
    directions = _directions(keys, form, rows, books.dtype, {**kinds, "KIND": code_kind})
    kernels.coded_tiles[tiles, keys.blocks * triton.cdiv(share, heads), rows](
        *asked, part.records, tables.offsets, books, directions, keys.mean, *_placed(part),
        fine.records, *_placed(fine), *left, means, *asked_strides,
        *part.records.stride()[:2], tables.record_bytes, *fine.records.stride()[:2],
        fine.tables.record_bytes, _row_stride(tables.offsets), tables.offsets.stride(1),
        directions.stride(0), *_strides(keys.mean), keys.gain_start, keys.gain_stride,
        keys.channels, values.gain_start, values.gain_stride, values.channels,
        _log_row(part), _row_stride(part.cos), part.cos.stride(1), _row_stride(part.valid),
        part.records.shape[1], _log_row(fine), _row_stride(fine.cos), _row_stride(fine.valid),
        fine.records.shape[1], fine_tiles, tiles, keys.blocks, numbers[2],
        H=count, G=shared["G"], F=half, PACKED=shared["PACKED"],
        KEY_KIND=tl.float16 if query.dtype == torch.bfloat16 else tl.float32,
        P=_padded(heads * shared["G"]), TILE=form.tile, CHUNK=form.chunk,
        V_CHUNK=form.value_chunk,
        K_USED=keys.channels // 8, K_GROUPS=triton.next_power_of_2(keys.channels // 8),
        V_GROUPS=v_groups, STAGES=tables.offsets.shape[1], SHARE=share, HEADS=heads,
        BIASED=tables.log_weight is not None, HALF=tables.half_gain, STEPS=tables.gain_steps,
        CODE_KIND=code_kind, FENCED=shared["PACKED"] and _has_own_readers(query.device),
        num_warps=form.warps, num_stages=1,
        **({"maxnreg": form.registers} if form.registers else {}),
    )  # fmt: skip
    columns = 2 * half
    while columns > PROJECTED_COLUMNS and rows * count * (2 * half // columns) < PROJECTING:
        columns //= 2
    adding.projected[2 * half // columns, count, rows](
        *left, means, tables.offsets, *of_values, *partial,
        fine.tables.record_bytes, _row_stride(tables.offsets), keys.blocks * keys.channels // 8,
        *_numbers(values), tiles, *numbers[:2],
        H=count, G=shared["G"], F=half, SHARE=share, COLUMNS=columns,
        TILES=min(PROJECTED_TILES, triton.next_power_of_2(tiles)), GROUPS=v_groups,
        CHOSEN=values.rows is not None, WEIGHTED=values.weight is not None, KIND=code_kind,
        **kinds,
    )  # fmt: skip


def _directions(
    side: Projection, form: _Form, rows: int, dtype: torch.dtype, kinds: dict[str, Any]
) -> torch.Tensor:
    """Directions ``[rows, blocks, channels, J]`` as numbers, channels in whole chunks."""
    columns = side.basis.shape[3]
    channels = triton.cdiv(side.channels, form.chunk) * form.chunk
    out = torch.empty(rows, side.blocks, channels, columns, dtype=dtype, device=side.basis.device)
    parts = (side.scale, side.deviation, side.rows, side.weight)
    basis, scale, deviation, _, chosen, weight = _tensors(side)
    kernels.directions_of_keys[channels // GROUP, side.blocks, rows](
        out, basis, scale, deviation, chosen, weight, _row_stride(side.basis),
        side.basis.stride(1), side.basis.stride(2), *(n for part in parts for n in _strides(part)),
        side.channels, out.stride(0), COLUMNS=columns, CHUNK=GROUP,
        PADDED=triton.next_power_of_2(columns), CHOSEN=side.rows is not None,
        WEIGHTED=side.weight is not None, **kinds,
    )  # fmt: skip
    return out


def _strides(part: torch.Tensor | None) -> tuple[int, int]:
    """Row and block stride of one part of a projection."""
    return (0, 0) if part is None else (_row_stride(part), part.stride(1))


@functools.cache
def _has_own_readers(device: torch.device) -> bool:
    """Whether matrix products read shared memory by themselves: from Hopper on, and in tests."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def _padded(queries: int) -> int:
    """Rows of a matrix product that hold so many queries."""
    return max(LEAST, triton.next_power_of_2(queries))


def fits(size: int) -> bool:
    """Whether the kernels take this head size."""
    return size >= 16 and size & (size - 1) == 0


def _tensors(side: Projection) -> tuple[torch.Tensor, ...]:
    """What a kernel reads of a projection; something for what there is not."""
    parts = (side.basis, side.scale, side.deviation, side.mean, side.rows, side.weight)
    if any(part is not None and part.stride(-1) != 1 for part in parts):
        raise RuntimeError("a projection whose rows do not lie element by element")
    rows = side.basis if side.rows is None else side.rows
    weight = side.basis if side.weight is None else side.weight
    return side.basis, side.scale, side.deviation, side.mean, rows, weight


def _numbers(side: Projection) -> tuple[int, ...]:
    """Row and block strides of the same, with a basis' channel stride; gains and channels."""
    strides = [_row_stride(side.basis), side.basis.stride(1), side.basis.stride(2)]
    for part in (side.scale, side.deviation, side.mean, side.rows, side.weight):
        strides += _strides(part)
    return (*strides, side.gain_start, side.gain_stride, side.channels)


def _placed(part: CodedPart) -> tuple[torch.Tensor, ...]:
    """Weights, positions and validity of a part; something for weights that there are not."""
    weight = part.tables.log_weight
    weight = part.cos if weight is None else weight
    return weight, part.cos, part.sin, part.valid.view(torch.uint8)


def _log_row(part: CodedPart) -> int:
    """Elements from one row's weights to the next."""
    return 0 if part.tables.log_weight is None else _row_stride(part.tables.log_weight)


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
