"""How the Triton kernels read codes: their bytes, codewords, directions, gains and means.

Shapes: ``TILE`` entries, ``WIDTH`` groups of eight channels, ``CHUNK = 8 * WIDTH``, ``F`` half of
the head size. Names with ``row``, ``stage``, ``block`` or ``channel`` at their end are strides.
"""

import triton
import triton.language as tl


@triton.jit
def _fixed(x, PACKED: tl.constexpr):
    """Numbers as they are: what led to them is worked out once, where they were loaded.

    Without it the compiler works them out again in each warp that gets a copy for a matrix product.
    ``PACKED`` stands for a compiled kernel in two bytes a number, here and below.
    """
    if PACKED:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False,
            pack=32 // x.dtype.primitive_bitwidth,
        )  # fmt: skip
    return x


@triton.jit
def _reach(offsets, stage, record_bytes, offset_stage, groups, MOST: tl.constexpr):
    """How many of a block's groups there are up to the last one with a code in a stage."""
    g = tl.arange(0, MOST)
    found = tl.load(offsets + stage * offset_stage + g, mask=g < groups, other=-1)
    return tl.max(tl.where((found >= 0) & (found < record_bytes), g + 1, 0), axis=0)


@triton.jit
def _offsets(offsets, stage, group, some, record_bytes, offset_stage):
    """Bytes ``[WIDTH]`` that hold the codes of some groups in a stage; negative: there is none."""
    found = tl.load(offsets + stage * offset_stage + group, mask=some, other=-1)
    return tl.where(found < record_bytes, found, -1)


@triton.jit
def _codes(records, at_record, offset):
    """Codes ``[TILE, WIDTH]`` at those bytes."""
    at = at_record[:, None] + offset[None, :]
    return tl.load(records + at, mask=(offset >= 0)[None, :], other=0)


@triton.jit
def _words(books, code, offset, stage):
    """Codewords ``[TILE, WIDTH, 8]`` of a stage, zeros where there is no code."""
    word = ((stage * 256 + code.to(tl.int32)) * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]
    return tl.load(books + word, mask=(offset >= 0)[None, :, None], other=0.0)


@triton.jit
def _channels(
    records, offsets, books, at_record, group, some, deep, deeper, record_bytes, offset_stage,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sums ``[TILE, WIDTH, 8]`` of the codewords of all stages.

    Written in the order in which loads should leave: what does not follow from another load waits
    for memory together. Few groups have more than two stages; ``deep`` and
    ``deeper`` say whether any here has more than two, or three.
    """
    first = _offsets(offsets, 0, group, some, record_bytes, offset_stage)
    if STAGES > 1:
        second = _offsets(offsets, 1, group, some, record_bytes, offset_stage)
        code = _codes(records, at_record, first)
        other = _codes(records, at_record, second)
        total = _words(books, code, first, 0) + _words(books, other, second, 1)
    else:
        total = _words(books, _codes(records, at_record, first), first, 0)
    if STAGES > 2:  # noqa: SIM102, which of the two the compiler decides
        if deep:
            third = _offsets(offsets, 2, group, some, record_bytes, offset_stage)
            total += _words(books, _codes(records, at_record, third), third, 2)
            if STAGES > 3:  # noqa: SIM102
                if deeper:
                    fourth = _offsets(offsets, 3, group, some, record_bytes, offset_stage)
                    code_4 = _codes(records, at_record, fourth)
                    if STAGES > 4:
                        fifth = _offsets(offsets, 4, group, some, record_bytes, offset_stage)
                        code_5 = _codes(records, at_record, fifth)
                    if STAGES > 5:
                        sixth = _offsets(offsets, 5, group, some, record_bytes, offset_stage)
                        code_6 = _codes(records, at_record, sixth)
                    total += _words(books, code_4, fourth, 3)
                    if STAGES > 4:
                        total += _words(books, code_5, fifth, 4)
                    if STAGES > 5:
                        total += _words(books, code_6, sixth, 5)
    return total


@triton.jit
def _numbers(b, KIND: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr):
    """Stored directions as numbers; four int8 at once as float16 where ``PACKED`` and ``WHOLE``.

    With its sign bit turned a byte is the last of a float16 from 1024 on, in steps of one.
    """
    if PACKED and WHOLE:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 turned, bias;
                xor.b32 turned, $2, 0x80808080;
                mov.b32 bias, 0x64806480;
                prmt.b32 $0, turned, 0x64646464, 0x4140;
                prmt.b32 $1, turned, 0x64646464, 0x4342;
                sub.f16x2 $0, $0, bias;
                sub.f16x2 $1, $1, bias;
            }
            """,
            "=&r,=&r,r", [b], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip
    return _fixed(b.to(KIND), PACKED)


@triton.jit
def _chunk(
    records, offsets, books, at_record, start, groups, deep, deeper, record_bytes, offset_stage,
    basis, scale, deviation, rows, column, basis_channel, F: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, TILE: tl.constexpr, CHOSEN: tl.constexpr,
    KIND: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Some channels of a block: of entries ``[TILE, CHUNK]``, scaled; and both halves of their
    directions ``[CHUNK, HEADS * F]``.
    """
    c = start * 8 + tl.arange(0, CHUNK)
    inside = c < groups * 8
    # What lies behind the last group has no codes, and any direction will do.
    which = tl.where(inside, c, 0)
    if CHOSEN:
        which = tl.load(rows + c, mask=inside, other=0).to(tl.int32)
    at = basis + which[:, None] * basis_channel + column[None, :]
    b1 = tl.load(at)
    b2 = tl.load(at + F)
    group = start + tl.arange(0, CHUNK // 8)
    c = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (group < groups)[:, None]
    which = tl.where(inside, c, 0)
    if CHOSEN:
        which = tl.load(rows + c, mask=inside, other=0).to(tl.int32)
    factor = tl.load(deviation + c, mask=inside, other=0.0).to(tl.float32)
    factor *= tl.load(scale + which).to(tl.float32)
    coded = _channels(
        records, offsets, books, at_record, group, group < groups, start < deep,
        start < deeper, record_bytes, offset_stage, STAGES,
    )  # fmt: skip
    coded = _fixed(tl.reshape(coded * factor.to(KIND)[None, :, :], [TILE, CHUNK]), PACKED)
    return coded, _numbers(b1, KIND, PACKED, WHOLE), _numbers(b2, KIND, PACKED, WHOLE)


@triton.jit
def _gain(records, at_record, start, HALF: tl.constexpr, STEPS: tl.constexpr):
    """Gains ``[TILE]``."""
    low = tl.load(records + at_record + start)
    if HALF:
        high = tl.load(records + at_record + start + 1)
        bits = low.to(tl.uint16) | (high.to(tl.uint16) << 8)
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    return tl.exp2((low.to(tl.float32) - 128.0) / STEPS)


@triton.jit
def _inverse(x, PACKED: tl.constexpr):
    """One over numbers that are neither tiny nor huge."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def _centre(
    mean, weight, column, F: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """What both halves ``[HEADS * F]`` of a state are multiplied with, and their means."""
    w1 = tl.full(column.shape, 1.0, dtype=tl.float32)
    w2 = w1
    if WEIGHTED:
        w1 = _inverse(tl.load(weight + column).to(tl.float32), PACKED)
        w2 = _inverse(tl.load(weight + column + F).to(tl.float32), PACKED)
    m1 = tl.load(mean + column).to(tl.float32)
    m2 = tl.load(mean + column + F).to(tl.float32)
    return w1, w2, m1, m2
