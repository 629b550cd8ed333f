"""The Triton kernels of decode attention.

Entries are split into tiles; a program scores one tile for the queries of one KV head and writes
its maximum, its sum and its weighted values (flash-decoding). Codes are looked up, projected and
rotated in registers. Values of codes are summed as channels and projected once, by the program that
merges the tiles of a query head.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``G = H / K``, ``P`` queries of a KV head
padded for a matrix product, ``F`` half of the head size. Names with ``row``, ``head``, ``entry``,
``block`` or ``channel`` at their end are strides.

Source: Dao et al. (2023), Flash-Decoding, for the split over entries; differs in coded entries.
"""

import triton
import triton.language as tl


@triton.jit
def _rotated_query(
    query,
    cos,
    sin,
    row,
    kv,
    q_row,
    q_head,
    t_row,
    G: tl.constexpr,
    P: tl.constexpr,
    F: tl.constexpr,
):
    """Both halves ``[P, F]`` of the queries of one KV head, at their position."""
    g = tl.arange(0, P)
    d = tl.arange(0, F)
    at = query + row * q_row + (kv * G + g)[:, None] * q_head + d[None, :]
    own = (g < G)[:, None]
    first = tl.load(at, mask=own, other=0.0).to(tl.float32)
    second = tl.load(at + F, mask=own, other=0.0).to(tl.float32)
    c = tl.load(cos + row * t_row + d).to(tl.float32)[None, :]
    s = tl.load(sin + row * t_row + d).to(tl.float32)[None, :]
    return first * c - second * s, second * c + first * s


@triton.jit
def _scores(
    q1,
    q2,
    k1,
    k2,
    cos,
    sin,
    n,
    held,
    row,
    t_row,
    t_entry,
    scaling,
    F: tl.constexpr,
    KIND: tl.constexpr,
):
    """Scores ``[P, TILE]`` of rotated queries and keys ``[TILE, F]`` that are rotated here."""
    d = tl.arange(0, F)
    at = row * t_row + n[:, None] * t_entry + d[None, :]
    c = tl.load(cos + at, mask=held[:, None], other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=held[:, None], other=0.0).to(tl.float32)
    r1 = k1 * c - k2 * s
    r2 = k2 * c + k1 * s
    score = tl.dot(q1.to(KIND), tl.trans(r1.to(KIND)), input_precision="ieee")
    score += tl.dot(q2.to(KIND), tl.trans(r2.to(KIND)), input_precision="ieee")
    return score * scaling


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
    HEADS: tl.constexpr, G: tl.constexpr, P: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr,
    KIND: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    tile, kv, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q1, q2 = _rotated_query(query, q_cos, q_sin, row, kv, q_row, q_head, qt_row, G, P, F)
    n = tile * TILE + tl.arange(0, TILE)
    held = n < count
    d = tl.arange(0, F)
    at = keys + row * k_row + kv * k_head + n[:, None] * k_entry + d[None, :]
    k1 = tl.load(at, mask=held[:, None], other=0.0).to(tl.float32)
    k2 = tl.load(at + F, mask=held[:, None], other=0.0).to(tl.float32)
    score = _scores(q1, q2, k1, k2, cos, sin, n, held, row, t_row, t_entry, scaling, F, KIND)
    if BIASED:
        score += tl.load(bias + row * b_row + kv * b_head + n, mask=held, other=0.0).to(tl.float32)[
            None, :
        ]
    shown = held & (tl.load(valid + row * valid_row + n, mask=held, other=0) != 0)
    most, total, weight = _weights(score, shown)
    e = tl.arange(0, 2 * F)
    at = values + row * v_row + kv * v_head + n[:, None] * v_entry + e[None, :]
    value = tl.load(at, mask=held[:, None], other=0.0)
    # What is not read may be anything, and nothing times NaN is NaN.
    value = tl.where(shown[:, None], value, 0.0)
    summed = tl.dot(weight.to(KIND), value.to(KIND), input_precision="ieee")
    g = tl.arange(0, P)
    own = g < G
    out = (row * HEADS + kv * G + g) * tiles + first_tile + tile
    tl.store(maxima + out, most, mask=own)
    tl.store(sums + out, total, mask=own)
    tl.store(totals + out[:, None] * (2 * F) + e[None, :], summed, mask=own[:, None])


@triton.jit
def _words(
    records, offsets, books, at_record, held, groups, some, offset_stage,
    STAGES: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Channels ``[TILE, 8 * WIDTH]`` of ``WIDTH`` groups: the sum of their stages' codewords."""
    c = tl.arange(0, 8)
    total = tl.zeros([TILE, WIDTH, 8], dtype=tl.float32)
    for stage in tl.static_range(STAGES):
        offset = tl.load(offsets + stage * offset_stage + groups, mask=some, other=-1)
        # Neighbours in variance have about as many stages, most of them few.
        if tl.max(offset, axis=0) >= 0:
            coded = held[:, None] & (offset >= 0)[None, :]
            code = tl.load(records + at_record[:, None] + offset[None, :], mask=coded, other=0)
            word = ((stage * 256 + code.to(tl.int32)) * 8)[:, :, None] + c[None, None, :]
            total += tl.where(coded[:, :, None], tl.load(books + word).to(tl.float32), 0.0)
    return tl.reshape(total, [TILE, 8 * WIDTH])


@triton.jit
def _gain(records, at_record, held, start, HALF: tl.constexpr, STEPS: tl.constexpr):
    """Gains ``[TILE]``."""
    low = tl.load(records + at_record + start, mask=held, other=0)
    if HALF:
        high = tl.load(records + at_record + start + 1, mask=held, other=0)
        bits = low.to(tl.uint16) | (high.to(tl.uint16) << 8)
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    return tl.exp2((low.to(tl.float32) - 128.0) / STEPS)


@triton.jit
def coded_tiles(
    query, q_cos, q_sin, records, offsets, books, basis, factor, mean, cos, sin, valid, order,
    hidden, maxima, sums, totals,
    q_row, q_head, qt_row, r_row, r_entry, offset_row, offset_stage, basis_row, basis_block,
    basis_channel, factor_row, factor_block, mean_row, mean_block, t_row, t_entry, valid_row,
    order_row, hidden_row, count, tiles, scaling, channels, value_channels, value_group,
    gain_start, gain_stride, value_gain_start, value_gain_stride, num_hidden,
    HEADS: tl.constexpr, G: tl.constexpr, P: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr, VALUE_SHARE: tl.constexpr,
    HALF: tl.constexpr, STEPS: tl.constexpr, HIDDEN: tl.constexpr, KIND: tl.constexpr,
    CODE_KIND: tl.constexpr,
):  # fmt: skip
    tile, kv, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q1, q2 = _rotated_query(query, q_cos, q_sin, row, kv, q_row, q_head, qt_row, G, P, F)
    n = tile * TILE + tl.arange(0, TILE)
    held = n < count
    at_record = row * r_row + n * r_entry
    d = tl.arange(0, F)
    width: tl.constexpr = CHUNK // 8
    # SHARE heads share a block; this head's columns of its basis start at `column`.
    block = kv // SHARE
    column = (kv % SHARE) * 2 * F
    k1 = tl.zeros([TILE, F], dtype=tl.float32)
    k2 = tl.zeros([TILE, F], dtype=tl.float32)
    for start in range(0, channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        group = start // 8 + tl.arange(0, width)
        some = group * 8 < channels
        chosen = block * (channels // 8) + group
        coded = _words(
            records, offsets + row * offset_row, books, at_record, held, chosen, some,
            offset_stage, STAGES, TILE, width,
        )  # fmt: skip
        scale = tl.load(
            factor + row * factor_row + block * factor_block + c, mask=c < channels, other=0.0
        )
        coded = (coded * scale[None, :]).to(CODE_KIND)
        at_basis = (
            basis + row * basis_row + block * basis_block + c[:, None] * basis_channel + column
        )
        inside = (c < channels)[:, None]
        b1 = tl.load(at_basis + d[None, :], mask=inside, other=0).to(CODE_KIND)
        b2 = tl.load(at_basis + F + d[None, :], mask=inside, other=0).to(CODE_KIND)
        k1 += tl.dot(coded, b1, input_precision="ieee")
        k2 += tl.dot(coded, b2, input_precision="ieee")
    gain = _gain(records, at_record, held, gain_start + block * gain_stride, HALF, STEPS)
    at_mean = mean + row * mean_row + block * mean_block + column + d
    k1 = k1 * gain[:, None] + tl.load(at_mean).to(tl.float32)[None, :]
    k2 = k2 * gain[:, None] + tl.load(at_mean + F).to(tl.float32)[None, :]
    score = _scores(q1, q2, k1, k2, cos, sin, n, held, row, t_row, t_entry, scaling, F, KIND)
    shown = held & (tl.load(valid + row * valid_row + n, mask=held, other=0) != 0)
    if HIDDEN:
        own_order = tl.load(order + row * order_row + n, mask=held, other=-1)
        mark = tl.arange(0, HIDDEN)
        marks = tl.load(hidden + row * hidden_row + mark, mask=mark < num_hidden, other=-2)
        same = (own_order[:, None] == marks[None, :]).to(tl.int32)
        shown = shown & (tl.sum(same, axis=1) == 0)
    most, total, weight = _weights(score, shown)
    g = tl.arange(0, P)
    own = g < G
    out = (row * HEADS + kv * G + g) * tiles + tile
    tl.store(maxima + out, most, mask=own)
    tl.store(sums + out, total, mask=own)
    block = kv // VALUE_SHARE
    at_gain = value_gain_start + block * value_gain_stride
    gain = _gain(records, at_record, held, at_gain, HALF, STEPS)
    # What is not read may decode to anything, and nothing times NaN is NaN.
    weight = tl.where(shown[None, :], weight * gain[None, :], 0.0).to(CODE_KIND)
    for start in range(0, value_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        group = start // 8 + tl.arange(0, width)
        some = group * 8 < value_channels
        chosen = value_group + block * (value_channels // 8) + group
        coded = _words(
            records, offsets + row * offset_row, books, at_record, held, chosen, some,
            offset_stage, STAGES, TILE, width,
        )  # fmt: skip
        summed = tl.dot(weight, coded.to(CODE_KIND), input_precision="ieee")
        tl.store(
            totals + out[:, None] * value_channels + c[None, :],
            summed,
            mask=own[:, None] & (c < value_channels)[None, :],
        )


@triton.jit
def _tile_weights(maxima, base, tiles, peak, TILES: tl.constexpr):
    """How much each tile counts once all are measured against one maximum."""
    t = tl.arange(0, TILES)
    most = tl.load(maxima + base * tiles + t, mask=t < tiles, other=float("-inf"))
    return tl.exp(most - peak)


@triton.jit
def _peak(maxima, base, tiles, TILES: tl.constexpr):
    t = tl.arange(0, TILES)
    return tl.max(tl.load(maxima + base * tiles + t, mask=t < tiles, other=float("-inf")), axis=0)


@triton.jit
def _mass(sums, base, tiles, counts, TILES: tl.constexpr):
    t = tl.arange(0, TILES)
    return tl.sum(tl.load(sums + base * tiles + t, mask=t < tiles, other=0.0) * counts, axis=0)


@triton.jit
def _projected(
    totals, basis, factor, mean, counts, mass, base, row, kv, tiles, basis_row, basis_block,
    basis_channel, factor_row, factor_block, mean_row, mean_block, channels,
    F: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Values ``[2F]`` of one query head from the channels that its tiles summed."""
    t = tl.arange(0, TILES)
    e = tl.arange(0, 2 * F)
    block = kv // SHARE
    column = (kv % SHARE) * 2 * F
    at_mean = mean + row * mean_row + block * mean_block + column + e
    out = tl.load(at_mean).to(tl.float32) * mass
    for start in range(0, channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        inside = c < channels
        at_sum = totals + (base * tiles + t)[:, None] * channels + c[None, :]
        parts = tl.load(at_sum, mask=(t < tiles)[:, None] & inside[None, :], other=0.0)
        summed = tl.sum(parts * counts[:, None], axis=0)
        scale = tl.load(
            factor + row * factor_row + block * factor_block + c, mask=inside, other=0.0
        )
        at_basis = basis + row * basis_row + block * basis_block + c[:, None] * basis_channel
        rows = tl.load(at_basis + column + e[None, :], mask=inside[:, None], other=0).to(tl.float32)
        out += tl.sum((summed * scale)[:, None] * rows, axis=0)
    return out


@triton.jit
def merge(
    out, maxima, sums, totals, tiles,
    a_maxima, a_sums, a_totals, a_basis, a_factor, a_mean, a_tiles, a_basis_row, a_basis_block,
    a_basis_channel, a_factor_row, a_factor_block, a_mean_row, a_mean_block, a_channels,
    b_maxima, b_sums, b_totals, b_basis, b_factor, b_mean, b_tiles, b_basis_row, b_basis_block,
    b_basis_channel, b_factor_row, b_factor_block, b_mean_row, b_mean_block, b_channels,
    HEADS: tl.constexpr, G: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr,
    A_TILES: tl.constexpr, A_SHARE: tl.constexpr, B_TILES: tl.constexpr, B_SHARE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One query head's output from its tiles; ``A_TILES`` or ``B_TILES`` of 0: no such part."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv = head // G
    base = row * HEADS + head
    e = tl.arange(0, 2 * F)
    t = tl.arange(0, TILES)
    peak = _peak(maxima, base, tiles, TILES)
    if A_TILES:
        peak = tl.maximum(peak, _peak(a_maxima, base, a_tiles, A_TILES))
    if B_TILES:
        peak = tl.maximum(peak, _peak(b_maxima, base, b_tiles, B_TILES))
    counts = _tile_weights(maxima, base, tiles, peak, TILES)
    mass = _mass(sums, base, tiles, counts, TILES)
    at = totals + (base * tiles + t)[:, None] * (2 * F) + e[None, :]
    total = tl.sum(tl.load(at, mask=(t < tiles)[:, None], other=0.0) * counts[:, None], axis=0)
    if A_TILES:
        counts = _tile_weights(a_maxima, base, a_tiles, peak, A_TILES)
        own = _mass(a_sums, base, a_tiles, counts, A_TILES)
        mass += own
        total += _projected(
            a_totals, a_basis, a_factor, a_mean, counts, own, base, row, kv, a_tiles, a_basis_row,
            a_basis_block, a_basis_channel, a_factor_row, a_factor_block, a_mean_row, a_mean_block,
            a_channels, F, A_TILES, CHUNK, A_SHARE,
        )  # fmt: skip
    if B_TILES:
        counts = _tile_weights(b_maxima, base, b_tiles, peak, B_TILES)
        own = _mass(b_sums, base, b_tiles, counts, B_TILES)
        mass += own
        total += _projected(
            b_totals, b_basis, b_factor, b_mean, counts, own, base, row, kv, b_tiles, b_basis_row,
            b_basis_block, b_basis_channel, b_factor_row, b_factor_block, b_mean_row, b_mean_block,
            b_channels, F, B_TILES, CHUNK, B_SHARE,
        )  # fmt: skip
    tl.store(out + base * (2 * F) + e, (total / mass).to(out.dtype.element_ty))


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
