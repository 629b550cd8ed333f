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
def _codes(record, offset):
    """Codes ``[WIDTH, TILE]`` at those bytes; any where there is none.

    Groups come first: they lie side by side in a warp then, and the bytes of few records are read
    at once.
    """
    return tl.load(record[None, :] + tl.maximum(offset, 0)[:, None])


@triton.jit
def _words(books, code, offset, stage):
    """Codewords ``[WIDTH, TILE, 8]`` of a stage, the first one where there is no code."""
    known = code.to(tl.int32) & tl.where(offset >= 0, 255, 0)[:, None]
    word = (known * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]
    return tl.load(books + stage * (256 * 8) + word)


@triton.jit
def _there(offset, KIND: tl.constexpr):
    """What codewords count ``[WIDTH, 1, 1]``: one, or nothing where there is no code.

    Cheaper than loads under masks, which take a predicate and zeros each.
    """
    return tl.where(offset >= 0, 1.0, 0.0).to(KIND)[:, None, None]


@triton.jit
def _deeper(
    record, offsets, books, stage, start, groups, record_bytes, offset_stage,
    CHUNK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Codewords ``[WIDTH, TILE, 8]`` of a stage that few groups have, zeros for the others."""
    group = start + tl.arange(0, CHUNK // 8)
    offset = _offsets(offsets, stage, group, group < groups, record_bytes, offset_stage)
    return _words(books, _codes(record, offset), offset, stage) * _there(offset, KIND)


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
def _ahead(
    record, offsets, start, groups, record_bytes, offset_stage, CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Where the codes of a chunk's first stages lie ``[WIDTH]``, and they ``[WIDTH, TILE]``.

    Read while the chunk before is worked on: no codeword waits for them then.
    """
    group = start + tl.arange(0, CHUNK // 8)
    first = _offsets(offsets, 0, group, group < groups, record_bytes, offset_stage)
    second = first
    if STAGES > 1:
        second = _offsets(offsets, 1, group, group < groups, record_bytes, offset_stage)
    code_1 = _codes(record, first)
    code_2 = code_1
    if STAGES > 1:
        code_2 = _codes(record, second)
    return first, second, code_1, code_2


@triton.jit
def _rest(
    record, offsets, books, start, groups, deeper, record_bytes, offset_stage,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Sums ``[WIDTH, TILE, 8]`` of the codewords of stages behind the second."""
    total = _deeper(
        record, offsets, books, 2, start, groups, record_bytes, offset_stage, CHUNK, KIND
    )
    if STAGES > 3:  # noqa: SIM102, which of the two the compiler decides
        if start < deeper:
            for stage in tl.static_range(3, STAGES):
                total += _deeper(
                    record, offsets, books, stage, start, groups, record_bytes, offset_stage,
                    CHUNK, KIND,
                )  # fmt: skip
    return total


@triton.jit
def _laid(total, PACKED: tl.constexpr):
    """``[TILE, CHUNK]`` of ``[WIDTH, TILE, 8]``."""
    WIDTH: tl.constexpr = total.shape[0]
    TILE: tl.constexpr = total.shape[1]
    return _fixed(tl.reshape(tl.permute(total, (1, 0, 2)), [TILE, WIDTH * 8]), PACKED)


@triton.jit
def _chunk(
    record, offsets, books, start, groups, deep, deeper, record_bytes, offset_stage,
    first, second, code_1, code_2, CHUNK: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Sums ``[TILE, CHUNK]`` of the codewords of all stages, for some channels of a block.

    Few groups have more than two stages; ``deep`` and ``deeper`` say up to where any has more than
    two, or three. What they add comes first: a sum that ends in a branch has the compiler change
    its layout in the branch, once for each product that reads it.
    """
    word_1 = _words(books, code_1, first, 0)
    word_2 = word_1
    if STAGES > 1:
        word_2 = _words(books, code_2, second, 1)
    total = tl.zeros(word_1.shape, dtype=KIND)
    if STAGES > 2:  # noqa: SIM102, which of the two the compiler decides
        if start < deep:
            total = _rest(
                record, offsets, books, start, groups, deeper, record_bytes, offset_stage, CHUNK,
                STAGES, KIND,
            )  # fmt: skip
    total += word_1 * _there(first, KIND)
    if STAGES > 1:
        total += word_2 * _there(second, KIND)
    return _laid(total, PACKED)


@triton.jit
def _followed(rows, c, channels, CHOSEN: tl.constexpr):
    """Which directions channels follow; any behind the last one, which has no codes."""
    which = tl.where(c < channels, c, 0)
    if CHOSEN:
        which = tl.load(rows + which).to(tl.int32)
    return which


@triton.jit
def _factor(scale, deviation, c, which, channels):
    """What a direction is multiplied with for each channel."""
    factor = tl.load(deviation + tl.where(c < channels, c, 0)).to(tl.float32)
    return factor * tl.load(scale + which).to(tl.float32)


@triton.jit
def _gain(record, start, HALF: tl.constexpr, STEPS: tl.constexpr):
    """Gains ``[TILE]``."""
    low = tl.load(record + start)
    if HALF:
        high = tl.load(record + start + 1)
        bits = low.to(tl.uint16) | (high.to(tl.uint16) << 8)
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    return tl.exp2((low.to(tl.float32) - 128.0) / STEPS)


@triton.jit
def _means(mean, column, F: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr):
    """Means of both halves ``[HEADS * F]`` of a state."""
    first, second = tl.load(mean + column), tl.load(mean + column + F)
    return _fixed(first.to(KIND), PACKED), _fixed(second.to(KIND), PACKED)
