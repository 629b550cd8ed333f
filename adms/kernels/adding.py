"""The Triton kernels that add up what tiles of decode attention left (``tiles``).

``projected`` adds up the channels of values that tiles of codes left and projects them once, as if
they were one tile; ``merge`` adds up what is then of one form.

Shapes: ``H`` query heads, ``G`` of each KV head, ``F`` half of the head size, ``D`` head size.
Names with ``row``, ``block`` or ``channel`` at their end are strides.

Source: Dao et al. (2023), Flash-Decoding, for the split over entries; differs in coded entries.
"""

import triton
import triton.language as tl

from adms.kernels.lookup import _factor, _followed, _numbers, _reach


@triton.jit
def projected(
    maxima, sums, sizes, means, offsets, basis, scale, deviation, mean, rows, weight,
    to_maxima, to_sums, to_totals, record_bytes, offset_row, first_group,
    basis_row, basis_block, basis_channel, scale_row, scale_block, deviation_row, deviation_block,
    mean_row, mean_block, rows_row, rows_block, weight_row, weight_block, gain, gain_block,
    channels, count, place, tiles,
    H: tl.constexpr, G: tl.constexpr, F: tl.constexpr, SHARE: tl.constexpr,
    COLUMNS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, CHOSEN: tl.constexpr,
    WEIGHTED: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``COLUMNS`` of one query head's values, from the channels that tiles of codes left.

    Directions are turned into numbers once for all tiles. What it leaves is of the form of a tile.
    """
    piece, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    block = head // G // SHARE
    base = (row * H + head) * count
    e = piece * COLUMNS + tl.arange(0, COLUMNS)
    column = head // G % SHARE * 2 * F + e
    c = tl.arange(0, 8 * GROUPS)
    which = _followed(rows + row * rows_row + block * rows_block, c, channels, CHOSEN)
    factor = _factor(
        scale + row * scale_row + block * scale_block,
        deviation + row * deviation_row + block * deviation_block, c, which, channels,
    )  # fmt: skip
    basis += row * basis_row + block * basis_block
    directions = tl.load(basis + which[:, None] * basis_channel + column[None, :])
    offsets += row * offset_row + first_group + block * (channels // 8)
    used = _reach(offsets, 0, record_bytes, 0, channels // 8, GROUPS)
    t = tl.arange(0, TILES)
    most = tl.full([TILES], float("-inf"), dtype=tl.float32)
    for start in range(0, count, TILES):
        at = maxima + base + start + t
        most = tl.maximum(most, tl.load(at, mask=start + t < count, other=float("-inf")))
    peak = tl.max(most, axis=0)
    least = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.zeros([TILES], dtype=tl.float32)
    summed = tl.zeros([8 * GROUPS], dtype=tl.float32)
    for start in range(0, count, TILES):
        there = start + t < count
        at = base + start + t
        counts = tl.exp(tl.load(maxima + at, mask=there, other=float("-inf")) - least)
        mass += counts * tl.load(sums + at, mask=there, other=0.0)
        own = counts * tl.load(sizes + at, mask=there, other=0.0)
        # Tiles leave nothing of groups behind the last one with a code.
        found = tl.load(
            means + at[:, None] * (8 * GROUPS) + c[None, :],
            mask=there[:, None] & (c < used * 8)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        summed += tl.sum(own[:, None] * found, axis=0)
    summed *= factor
    directions = _numbers(directions, KIND, PACKED, WHOLE).to(tl.float32)
    value = tl.sum(summed[:, None] * directions, axis=0)
    if WEIGHTED:
        value /= tl.load(weight + row * weight_row + block * weight_block + column).to(tl.float32)
    total = tl.sum(mass, axis=0)
    centre = tl.load(mean + row * mean_row + block * mean_block + column).to(tl.float32)
    out = (row * H + head) * tiles + place
    tl.store(to_maxima + out, peak)
    tl.store(to_sums + out, total)
    tl.store(to_totals + out * (2 * F) + e, value + total * centre)


@triton.jit
def merge(
    out, maxima, sums, totals, tiles,
    H: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``COLUMNS`` of one query head's output ``[D]``, from what its tiles left."""
    piece, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    base = row * H + head
    t = tl.arange(0, TILES)
    e = piece * COLUMNS + tl.arange(0, COLUMNS)
    most = tl.full([TILES], float("-inf"), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        at = maxima + base * tiles + start + t
        most = tl.maximum(most, tl.load(at, mask=start + t < tiles, other=float("-inf")))
    peak = tl.max(most, axis=0)
    mass = tl.zeros([TILES], dtype=tl.float32)
    total = tl.zeros([TILES, COLUMNS], dtype=tl.float32)
    for start in range(0, tiles, TILES):
        there = start + t < tiles
        at = base * tiles + start + t
        counts = tl.exp(tl.load(maxima + at, mask=there, other=float("-inf")) - peak)
        mass += counts * tl.load(sums + at, mask=there, other=0.0)
        at = totals + at[:, None] * D + e[None, :]
        total += counts[:, None] * tl.load(at, mask=there[:, None], other=0.0)
    result = tl.sum(total, axis=0) / tl.sum(mass, axis=0)
    tl.store(out + base * D + e, result.to(out.dtype.element_ty))
