"""The Triton kernels of decode attention.

Entries are split into tiles; a program works on one tile for the query heads of one KV head, or of
one block of KV heads that share a code, and writes its maximum, its sum and its weighted values
(flash-decoding). Codes are looked up once for all heads of a block, keys projected and rotated in
registers, in float16 for a model in bfloat16, which would round them eight times as coarsely.
Values of codes are summed as channels. What tiles leave is added up in ``adding``.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``G = H / K``, ``P`` queries of a program
padded for a matrix product, ``F`` half of the head size, ``T`` tiles of all parts. Names with
``row``, ``head``, ``entry``, ``block`` or ``channel`` at their end are strides.

Source: Dao et al. (2023), Flash-Decoding, for the split over entries; differs in coded entries.
"""

import triton
import triton.language as tl

from adms.kernels.lookup import (
    _ahead,
    _chunk,
    _factor,
    _fixed,
    _followed,
    _gain,
    _means,
    _numbers,
    _reach,
)


@triton.jit
def _publish(FENCED: tl.constexpr):
    """Lets products that read shared memory by themselves see what all threads have written there.

    Triton's own fence comes behind its barrier where the other operand passes through shared
    memory, and a fence is for what its own thread has written (seen with 3.6 and 3.9).
    """
    if FENCED:
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, $1;", "=r,r", [tl.arange(0, 32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _queries(
    query, cos, sin, row, kv, count, q_row, q_head, t_row,
    G: tl.constexpr, P: tl.constexpr, F: tl.constexpr, HEADS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Both halves ``[P, HEADS * F]`` of the queries of ``count`` KV heads, at their position.

    Each query stands in the columns of its own KV head; the others are zeros.
    """
    g = tl.arange(0, P)
    j = tl.arange(0, HEADS * F)
    own = (g[:, None] // G == j[None, :] // F) & (g < count * G)[:, None]
    d = j % F
    at = query + row * q_row + (kv * G + g)[:, None] * q_head + d[None, :]
    first = tl.load(at, mask=own, other=0.0).to(tl.float32)
    second = tl.load(at + F, mask=own, other=0.0).to(tl.float32)
    c = tl.load(cos + row * t_row + d).to(tl.float32)[None, :]
    s = tl.load(sin + row * t_row + d).to(tl.float32)[None, :]
    return _fixed(first * c - second * s, PACKED), _fixed(second * c + first * s, PACKED)


@triton.jit
def _rotated(
    k1, k2, cos, sin, n, t_entry, F: tl.constexpr, HEADS: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Both halves of keys ``[TILE, HEADS * F]`` at their positions, worked out as keys are held."""
    TILE: tl.constexpr = k1.shape[0]
    at = n[:, None] * t_entry + tl.arange(0, F)[None, :]
    # All heads turn alike.
    c = tl.load(cos + at).to(k1.dtype)[:, None, :]
    s = tl.load(sin + at).to(k1.dtype)[:, None, :]
    k1 = tl.reshape(k1, [TILE, HEADS, F])
    k2 = tl.reshape(k2, [TILE, HEADS, F])
    r1 = tl.reshape((k1 * c - k2 * s).to(KIND), [TILE, HEADS * F])
    r2 = tl.reshape((k2 * c + k1 * s).to(KIND), [TILE, HEADS * F])
    return r1, r2


@triton.jit
def _weights(score, shown):
    """Maximum and sum ``[P]`` of a tile, and its weights ``[P, TILE]``."""
    score = tl.where(shown[None, :], score, float("-inf"))
    most = tl.max(score, axis=1)
    base = tl.where(most == float("-inf"), 0.0, most)
    weight = tl.exp(score - base[:, None])
    return most, tl.sum(weight, axis=1), weight


@triton.jit
def exact_tiles(
    query, q_cos, q_sin, keys, values, cos, sin, valid, bias, maxima, sums, totals,
    q_row, q_head, qt_row, k_row, k_head, k_entry, v_row, v_head, v_entry, t_row, t_entry,
    valid_row, b_row, b_head, count, first_tile, tiles, scaling,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr,
    HEADS: tl.constexpr, KIND: tl.constexpr, BIASED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Tiles of entries as they are; a program for each KV head, the first of ``HEADS`` places."""
    tile, kv, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q1, q2 = _queries(
        query, q_cos, q_sin, row, kv, 1, q_row, q_head, qt_row, G, P, F, HEADS, PACKED
    )
    n = tile * TILE + tl.arange(0, TILE)
    held = n < count
    # Behind the last entry stands the last one again, which is not shown.
    n = tl.minimum(n, count - 1)
    j = tl.arange(0, HEADS * F)
    inside = held[:, None] & (j < F)[None, :]
    at = keys + row * k_row + kv * k_head + n[:, None] * k_entry + j[None, :]
    k1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    k2 = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    e = tl.arange(0, 2 * F)
    at = values + row * v_row + kv * v_head + n[:, None] * v_entry + e[None, :]
    value = tl.load(at, mask=held[:, None], other=0.0)
    r1, r2 = _rotated(k1, k2, cos + row * t_row, sin + row * t_row, n, t_entry, F, HEADS, KIND)
    score = tl.dot(q1.to(KIND), tl.trans(_fixed(r1, PACKED)), input_precision="ieee")
    score = tl.dot(q2.to(KIND), tl.trans(_fixed(r2, PACKED)), score, input_precision="ieee")
    score *= scaling
    if BIASED:
        at = bias + row * b_row + kv * b_head + n
        score += tl.load(at, mask=held, other=0.0).to(tl.float32)[None, :]
    shown = held & (tl.load(valid + row * valid_row + n, mask=held, other=0) != 0)
    most, total, weight = _weights(score, shown)
    # What is not read may be anything, and nothing times NaN is NaN.
    value = tl.where(shown[:, None], value, 0.0)
    summed = tl.dot(weight.to(KIND), value.to(KIND), input_precision="ieee")
    g = tl.arange(0, P)
    own = g < G
    out = (row * H + kv * G + g) * tiles + first_tile + tile
    tl.store(maxima + out, most, mask=own)
    tl.store(sums + out, total, mask=own)
    tl.store(totals + out[:, None] * (2 * F) + e[None, :], summed, mask=own[:, None])


@triton.jit
def directions_of_keys(
    out, basis, scale, deviation, rows, weight, basis_row, basis_block, basis_channel, scale_row,
    scale_block, deviation_row, deviation_block, rows_row, rows_block, weight_row, weight_block,
    channels, out_row,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PADDED: tl.constexpr, CHOSEN: tl.constexpr,
    WEIGHTED: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Directions ``[CHUNK, COLUMNS]`` of channels of a block, with what multiplies each.

    Turned into numbers once for all tiles, which read them one after the other. Weights are taken
    out here: what tiles add up in float16 is then no larger than keys are.
    """
    piece, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = piece * CHUNK + tl.arange(0, CHUNK)
    j = tl.arange(0, PADDED)
    which = _followed(rows + row * rows_row + block * rows_block, c, channels, CHOSEN)
    factor = _factor(
        scale + row * scale_row + block * scale_block,
        deviation + row * deviation_row + block * deviation_block, c, which, channels,
    )  # fmt: skip
    basis += row * basis_row + block * basis_block
    column = tl.minimum(j, COLUMNS - 1)
    found = tl.load(basis + which[:, None] * basis_channel + column[None, :])
    found = _numbers(found, KIND, PACKED, WHOLE).to(tl.float32) * factor[:, None]
    if WEIGHTED:
        weight += row * weight_row + block * weight_block
        found /= tl.load(weight + column).to(tl.float32)[None, :]
    at = out + row * out_row + (block * tl.num_programs(0) * CHUNK + c)[:, None] * COLUMNS
    tl.store(at + j[None, :], found.to(KIND), mask=(j < COLUMNS)[None, :])


@triton.jit
def coded_tiles(
    query, q_cos, q_sin, records, offsets, books, directions, k_mean, log_weight, cos,
    sin, valid, f_records, f_log_weight, f_cos, f_sin, f_valid, maxima, sums, sizes, means,
    q_row, q_head, qt_row, r_row, r_entry, record_bytes, f_row, f_entry, f_bytes,
    offset_row, offset_stage,
    d_row, k_mean_row, k_mean_block, k_gain, k_gain_block,
    k_channels, v_gain, v_gain_block, v_channels, log_row, t_row, t_entry, valid_row, count,
    f_log_row, ft_row, f_valid_row, f_count, f_tiles, tiles, blocks, scaling,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, V_CHUNK: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr,
    HEADS: tl.constexpr, K_GROUPS: tl.constexpr, K_USED: tl.constexpr, V_GROUPS: tl.constexpr,
    BIASED: tl.constexpr, HALF: tl.constexpr, STEPS: tl.constexpr, KEY_KIND: tl.constexpr,
    CODE_KIND: tl.constexpr, PACKED: tl.constexpr, FENCED: tl.constexpr,
):  # fmt: skip
    """Tiles of codes; a program for ``HEADS`` of the ``SHARE`` KV heads of a block.

    The first ``f_tiles`` are of finer records, which go on where the others end.

    Of values it leaves the weighted means of channels before scaling, and ``sizes``, the sums of
    their weights.
    """
    tile, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    place = tile
    # What a tile leaves of values goes as far as any goes.
    most_bytes = tl.maximum(record_bytes, f_bytes)
    fine = tile < f_tiles
    if fine:
        records, log_weight, valid, cos, sin = f_records, f_log_weight, f_valid, f_cos, f_sin
    # Selected each, for some may be known when the kernel is compiled and others not.
    tile = tl.where(fine, tile, tile - f_tiles)
    r_row, r_entry = tl.where(fine, f_row, r_row), tl.where(fine, f_entry, r_entry)
    record_bytes, count = tl.where(fine, f_bytes, record_bytes), tl.where(fine, f_count, count)
    log_row, valid_row = tl.where(fine, f_log_row, log_row), tl.where(fine, f_valid_row, valid_row)
    t_row = tl.where(fine, ft_row, t_row)
    pieces: tl.constexpr = (SHARE + HEADS - 1) // HEADS
    block = tl.program_id(1) // pieces
    head = tl.program_id(1) % pieces * HEADS
    own_heads = tl.minimum(SHARE - head, HEADS)
    kv = block * SHARE + head
    n = tile * TILE + tl.arange(0, TILE)
    held = n < count
    # Behind the last entry stands the last one again, which is not shown.
    n = tl.minimum(n, count - 1)
    record = records + row * r_row + n * r_entry
    k_offsets = offsets + row * offset_row + block * (k_channels // 8)
    v_offsets = offsets + row * offset_row + (blocks * k_channels + block * v_channels) // 8
    # Columns of the basis: the first half of every head of the program; the second lies F behind.
    j = tl.arange(0, HEADS * F)
    column = tl.minimum(head + j // F, SHARE - 1) * 2 * F + j % F
    k1 = tl.zeros([TILE, HEADS * F], dtype=KEY_KIND)
    k2 = tl.zeros([TILE, HEADS * F], dtype=KEY_KIND)
    deep, deeper = 0, 0
    if STAGES > 2:
        deep = _reach(k_offsets, 2, record_bytes, offset_stage, k_channels // 8, K_GROUPS)
    if STAGES > 3:
        deeper = _reach(k_offsets, 3, record_bytes, offset_stage, k_channels // 8, K_GROUPS)
    c = tl.arange(0, CHUNK)
    # A block's directions follow one another, in whole chunks.
    chunks: tl.constexpr = (K_USED * 8 + CHUNK - 1) // CHUNK
    at = directions + row * d_row + (block * chunks * CHUNK + c)[:, None] * (SHARE * 2 * F)
    at += column[None, :]
    first, second, code_1, code_2 = _ahead(
        record, k_offsets, 0, k_channels // 8, record_bytes, offset_stage, CHUNK, STAGES
    )
    # Unrolled, for sums in float16 are taken apart and put together at the ends of a loop.
    for start in tl.static_range(0, K_USED, CHUNK // 8):
        b1 = tl.load(at + start * 8 * (SHARE * 2 * F))
        b2 = tl.load(at + start * 8 * (SHARE * 2 * F) + F)
        coming = _ahead(
            record, k_offsets, start + CHUNK // 8, k_channels // 8, record_bytes, offset_stage,
            CHUNK, STAGES,
        )  # fmt: skip
        coded = _chunk(
            record, k_offsets, books, start, k_channels // 8, deep, deeper, record_bytes,
            offset_stage, first, second, code_1, code_2, CHUNK, STAGES, CODE_KIND, PACKED,
        )  # fmt: skip
        _publish(FENCED)
        k1 = tl.dot(coded, b1, k1, input_precision="ieee", out_dtype=KEY_KIND)
        k2 = tl.dot(coded, b2, k2, input_precision="ieee", out_dtype=KEY_KIND)
        first, second, code_1, code_2 = coming
    m1, m2 = _means(k_mean + row * k_mean_row + block * k_mean_block, column, F, KEY_KIND, PACKED)
    gain = _gain(record, k_gain + block * k_gain_block, HALF, STEPS).to(KEY_KIND)[:, None]
    k1 = k1 * gain + m1[None, :]
    k2 = k2 * gain + m2[None, :]
    q1, q2 = _queries(
        query, q_cos, q_sin, row, kv, own_heads, q_row, q_head, qt_row, G, P, F, HEADS, PACKED
    )
    q1, q2 = _fixed(q1.to(CODE_KIND), PACKED), _fixed(q2.to(CODE_KIND), PACKED)
    r1, r2 = _rotated(k1, k2, cos + row * t_row, sin + row * t_row, n, t_entry, F, HEADS, CODE_KIND)
    # Keys come first: what a product leaves is what the next one takes as its first operand, where
    # it lies.
    _publish(FENCED)
    score = tl.dot(r1, tl.trans(q1), input_precision="ieee")
    score = tl.dot(r2, tl.trans(q2), score, input_precision="ieee")
    score = tl.trans(score) * scaling
    g = tl.arange(0, P)
    own = g < own_heads * G
    if BIASED:
        at = log_weight + row * log_row + kv + g // G
        score += tl.load(at, mask=own, other=0.0).to(tl.float32)[:, None]
    shown = held & (tl.load(valid + row * valid_row + n) != 0)
    most, total, weight = _weights(score, shown)
    gain = _gain(record, v_gain + block * v_gain_block, HALF, STEPS)
    # What is not read may decode to anything, and nothing times NaN is NaN.
    weight = tl.where(shown[None, :], weight * gain[None, :], 0.0)
    # Means of channels are as small as channels are, which sums need not be.
    size = tl.sum(weight, axis=1)
    out = (row * H + kv * G + g) * tiles + place
    tl.store(maxima + out, most, mask=own)
    tl.store(sums + out, total, mask=own)
    tl.store(sizes + out, size, mask=own)
    weight = (weight / tl.where(size > 0, size, 1.0)[:, None]).to(CODE_KIND)
    used = _reach(v_offsets, 0, most_bytes, offset_stage, v_channels // 8, V_GROUPS)
    if STAGES > 2:
        deep = _reach(v_offsets, 2, record_bytes, offset_stage, v_channels // 8, V_GROUPS)
    if STAGES > 3:
        deeper = _reach(v_offsets, 3, record_bytes, offset_stage, v_channels // 8, V_GROUPS)
    first, second, code_1, code_2 = _ahead(
        record, v_offsets, 0, v_channels // 8, record_bytes, offset_stage, V_CHUNK, STAGES
    )
    for start in range(0, used, V_CHUNK // 8):
        after = _ahead(
            record, v_offsets, start + V_CHUNK // 8, v_channels // 8, record_bytes, offset_stage,
            V_CHUNK, STAGES,
        )  # fmt: skip
        summed = _chunk(
            record, v_offsets, books, start, v_channels // 8, deep, deeper, record_bytes,
            offset_stage, first, second, code_1, code_2, V_CHUNK, STAGES, CODE_KIND,
            PACKED,
        )  # fmt: skip
        mean = tl.dot(weight, summed, input_precision="ieee").to(CODE_KIND)
        channel = start * 8 + tl.arange(0, V_CHUNK)
        into = means + out[:, None] * (8 * V_GROUPS) + channel[None, :]
        tl.store(into, mean, mask=own[:, None])
        first, second, code_1, code_2 = after


@triton.jit
def write_token(
    key, value, keys, values, slots, flag, k_row, k_head, v_row, v_head, ring_row, ring_head,
    ring_slot, vring_row, vring_head, vring_slot, slot_row, D: tl.constexpr,
):  # fmt: skip
    """Puts one head's new key and value into their slot; sets the flag if they are not finite."""
    kv, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    slot = tl.load(slots + row * slot_row)
    k = tl.load(key + row * k_row + kv * k_head + d)
    v = tl.load(value + row * v_row + kv * v_head + d)
    tl.store(keys + row * ring_row + kv * ring_head + slot * ring_slot + d, k)
    tl.store(values + row * vring_row + kv * vring_head + slot * vring_slot + d, v)
    most = tl.abs(k.to(tl.float32)) + tl.abs(v.to(tl.float32))
    # Neither infinity nor NaN is below infinity.
    finite = tl.min((most < float("inf")).to(tl.int32), axis=0)
    tl.store(flag, 1, mask=finite == 0)
