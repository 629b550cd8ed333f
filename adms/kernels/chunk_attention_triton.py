"""The Triton kernels of a chunk's attention: one pass over held entries and the chunk's own.

The queries of a group are further rows over their KV head, token by token, so that keys are never
repeated and a block of rows sees few new tokens behind its own. A program works on one block of
rows: first over held entries, then over the new ones up to its last token. Where blocks are fewer
than multiprocessors, entries are split over programs, and ``merge_splits`` adds up what they leave.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``G = H / K``, ``Q`` new tokens, ``N`` held
entries, ``D`` head size, ``M`` packed rows of a program, ``T`` entries of a tile, ``S`` splits.
Names with ``row``, ``head``, ``token`` or ``entry`` at their end are strides.

Source: Dao (2023), arXiv 2307.08691, for the online softmax, and Dao et al. (2023), Flash-Decoding,
for the split over entries; differs in the second, causal range of entries.
"""

import dataclasses
import functools
import math

import torch
import triton
import triton.language as tl

from adms.kernels.choice import launching
from adms.kernels.decode_attention_triton import (
    INTERPRETED,
    _has_own_readers,
    _kind,
    _row_stride,
)
from adms.kernels.tiles import _publish

# Maxima begin here: below every score that counts and above those of entries hidden in bfloat16 or
# by infinity, so that these weigh nothing even where nothing is shown yet. Entries hidden by the
# least float16 may weigh something until then, and nothing beside the first that is shown.
LEAST_SCORE = -1e30
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Form:
    """How programs are cut.

    Attributes:
        rows: packed rows of a program, from 64 on, as many as four warps multiply at once.
        entries: of a tile.
        warps: of a program.
        stages: tiles under way, the one that is worked on among them.
        residents: programs that a multiprocessor holds at a time.
    """

    rows: int
    entries: int
    warps: int
    stages: int
    residents: int = 1


# Wide programs read keys for more rows at once; narrow ones serve few rows.
WIDE, NARROW = Form(128, 64, 8, 3), Form(64, 32, 4, 4, 2)
# Of heads whose sums take twice the registers, and whose tiles twice the shared memory.
WIDE_LARGE, NARROW_LARGE = Form(128, 32, 8, 2), Form(64, 32, 8, 2)
LARGE_HEAD = 256
# A split is not worth less than so many tiles: what a program costs before and behind its tiles.
TILES_ASIDE = 2
MOST_SPLITS = 32
# Elements of a bias that may be read together.
ALIGNED = 8
# Bytes of shared memory for what is neither queries, keys nor values.
SHARED_ASIDE = 2048
# What stands for a device's in the interpreter, and on CUDA where it is not told.
MULTIPROCESSORS = 132
SHARED_BYTES = {"cpu": 232_448, "cuda": 65_536}
# Rows and elements that a program of the merge adds up.
MERGED_ROWS = 4
MERGED_COLUMNS = 128


@triton.jit
def _meet(q, k, v, added, most, total, out, scaling, LOG2E: tl.constexpr, KIND: tl.constexpr):
    """Goes on with the softmax of rows ``q [M, D]`` by a tile ``k, v [T, D]``.

    ``added`` broadcasts to ``[M, T]``. Maxima and sums of weights are ``[M]``. Products are of
    ``KIND``.
    """
    score = tl.dot(q.to(KIND), tl.trans(k.to(KIND))) * scaling + added
    peak = tl.maximum(most, tl.max(score, axis=1))
    weight = tl.exp2(score * LOG2E - (peak * LOG2E)[:, None])
    fade = tl.exp2((most - peak) * LOG2E)
    total = total * fade + tl.sum(weight, axis=1)
    # Weights are rounded as values are, whatever multiplies them.
    weight = weight.to(v.dtype)
    out = tl.dot(weight.to(KIND), v.to(KIND), out * fade[:, None])
    return peak, total, out


@triton.jit
def _held(
    q, keys, values, bias, tile, count, k_entry, v_entry, most, total, out, scaling,
    D: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr, BIASED: tl.constexpr,
    LOG2E: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """``_meet`` with a tile of held entries, all of which there are if ``WHOLE``."""
    n = tile * T + tl.arange(0, T)
    d = tl.arange(0, D)
    k_at = keys + n[:, None] * k_entry + d[None, :]
    v_at = values + n[:, None] * v_entry + d[None, :]
    added = tl.zeros([T], dtype=tl.float32)
    # Without a mask neighbours are read together.
    if WHOLE:
        k, v = tl.load(k_at), tl.load(v_at)
        if BIASED:
            added = tl.load(bias + n).to(tl.float32)
    else:
        inside = n < count
        k = tl.load(k_at, mask=inside[:, None], other=0.0)
        v = tl.load(v_at, mask=inside[:, None], other=0.0)
        if BIASED:
            added = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        added = tl.where(inside, added, float("-inf"))
    return _meet(q, k, v, added[None, :], most, total, out, scaling, LOG2E, KIND)


# Compiled once for all numbers of entries, tokens and splits.
@triton.jit(do_not_specialize=["count", "tokens", "blocks", "splits"])
def chunk_tiles(
    query, keys, values, bias, new_keys, new_values, out, maxima, sums, totals,
    q_row, q_head, q_token, k_row, k_head, k_entry, v_row, v_head, v_entry, b_row, b_head,
    nk_row, nk_head, nk_token, nv_row, nv_head, nv_token, count, tokens, blocks, splits, scaling,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, T: tl.constexpr, BIASED: tl.constexpr,
    STEP: tl.constexpr, SPLIT: tl.constexpr, LEAST: tl.constexpr, LOG2E: tl.constexpr,
    FENCED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Output of a block of packed rows; with ``SPLIT`` what its share of the tiles leaves.

    Strides of the bias count ``STEP`` elements.
    """
    if not SPLIT:
        # What the compiler knows takes no registers.
        splits = 1
    # The last blocks have the most new tokens; they come first.
    block = blocks - 1 - tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    kv, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    packed = block * M + tl.arange(0, M)
    token, g, there = packed // G, packed % G, packed < tokens * G
    query += row * q_row + kv * G * q_head
    at = g * q_head + token * q_token
    q = tl.load(query + at[:, None] + d[None, :], mask=there[:, None], other=0.0)
    most = tl.full([M], LEAST, dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    summed = tl.zeros([M, D], dtype=tl.float32)
    whole, old = count // T, tl.cdiv(count, T)
    last = tl.minimum((block * M + M - 1) // G, tokens - 1)
    tiles = old + last // T + 1
    share = tl.cdiv(tiles, splits)
    begin = split * share
    end = tl.minimum(begin + share, tiles)
    _publish(FENCED)
    keys += row * k_row + kv * k_head
    values += row * v_row + kv * v_head
    bias += row * b_row * STEP + kv * b_head * STEP
    for tile in range(begin, tl.minimum(end, whole)):
        most, total, summed = _held(
            q, keys, values, bias, tile, count, k_entry, v_entry, most, total, summed, scaling,
            D, T, True, BIASED, LOG2E, KIND,
        )  # fmt: skip
    for tile in range(tl.maximum(begin, whole), tl.minimum(end, old)):
        most, total, summed = _held(
            q, keys, values, bias, tile, count, k_entry, v_entry, most, total, summed, scaling,
            D, T, False, BIASED, LOG2E, KIND,
        )  # fmt: skip
    new_keys += row * nk_row + kv * nk_head
    new_values += row * nv_row + kv * nv_head
    for tile in range(tl.maximum(begin, old) - old, end - old):
        n = tile * T + tl.arange(0, T)
        inside = (n < tokens)[:, None]
        k = tl.load(new_keys + n[:, None] * nk_token + d[None, :], mask=inside, other=0.0)
        v = tl.load(new_values + n[:, None] * nv_token + d[None, :], mask=inside, other=0.0)
        added = tl.where(n[None, :] <= token[:, None], 0.0, float("-inf"))
        most, total, summed = _meet(q, k, v, added, most, total, summed, scaling, LOG2E, KIND)
    heads = tl.num_programs(1) * G
    at = token * heads + g
    first = (row * splits + split) * tokens * heads + kv * G
    if SPLIT:
        tl.store(maxima + first + at, most, mask=there)
        tl.store(sums + first + at, total, mask=there)
        totals += first * D
        tl.store(totals + at[:, None] * D + d[None, :], summed, mask=there[:, None])
    else:
        out += first * D
        result = (summed * (1.0 / total)[:, None]).to(out.dtype.element_ty)
        tl.store(out + at[:, None] * D + d[None, :], result, mask=there[:, None])


@triton.jit(do_not_specialize=["splits", "each"])
def merge_splits(
    out, maxima, sums, totals, splits, each,
    D: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    """``COLUMNS`` of ``ROWS`` outputs of the ``each`` of a batch row, from what splits left."""
    row = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    written = place < each
    # Behind the last one stands the last one again, which is not written.
    place = tl.minimum(place, each - 1)
    s = tl.arange(0, SPLITS)
    there = (s < splits)[:, None]
    at = (row * splits + s)[:, None] * each + place[None, :]
    most = tl.load(maxima + at, mask=there, other=float("-inf"))
    counts = tl.exp2((most - tl.max(most, axis=0)[None, :]) * LOG2E)
    mass = tl.sum(counts * tl.load(sums + at, mask=there, other=0.0), axis=0)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = totals + at[:, :, None] * D + e[None, None, :]
    left = tl.load(at, mask=there[:, :, None], other=0.0)
    result = tl.sum(counts[:, :, None] * left, axis=0) * (1.0 / mass)[:, None]
    at = out + (row * each + place)[:, None] * D + e[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=written[:, None])


@launching
def fused_chunk_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    scaling: float,
    form: Form | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """See ``chunk_attention``, which checks what comes here.

    Args:
        form: how programs are cut; None: as shapes say.
        splits: over how many programs entries are split; None: as shapes say.
    """
    rows, heads, tokens, size = query.shape
    kv_heads, count = keys.shape[1:3]
    group = heads // kv_heads
    form = form or fitting(form_of(group * tokens, size), size, _shared_bytes(query.device))
    blocks = triton.cdiv(group * tokens, form.rows)
    if splits is None:
        tiles = triton.cdiv(count, form.entries) + triton.cdiv(tokens, form.entries)
        splits = splits_of(blocks * kv_heads * rows, tiles, _places(query.device) * form.residents)
    out = torch.empty(rows, tokens, heads, size, dtype=query.dtype, device=query.device)
    # Of each split and query: maximum, sum of weights, weighted values.
    maxima = sums = totals = out
    if splits > 1:
        maxima, sums = out.new_empty(2, rows, splits, tokens, heads, dtype=torch.float32)
        totals = out.new_empty(rows, splits, tokens, heads, size, dtype=torch.float32)
    strides = (0, 0)
    if bias is not None:
        strides = _row_stride(bias), 0 if bias.shape[1] == 1 else bias.stride(1)
    # Triton knows by itself of multiples of 16 only; rows of a bias start at multiples of eight.
    step = 1 if any(stride % ALIGNED for stride in strides) else ALIGNED
    chunk_tiles[blocks * splits, kv_heads, rows](
        query, keys, values, keys if bias is None else bias, new_keys, new_values,
        out, maxima, sums, totals, *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        *(stride // step for stride in strides),
        *new_keys.stride()[:3], *new_values.stride()[:3], count, tokens, blocks, splits,
        scaling, G=group, D=size, M=form.rows, T=form.entries, BIASED=bias is not None, STEP=step,
        SPLIT=splits > 1, LEAST=LEAST_SCORE, LOG2E=LOG2E,
        FENCED=not INTERPRETED and torch.version.hip is None and _has_own_readers(query.device),
        # The interpreter would multiply the bits of bfloat16 as they are.
        KIND=tl.float32 if INTERPRETED else _kind(query.dtype),
        num_warps=form.warps, num_stages=form.stages,
    )  # fmt: skip
    if splits > 1:
        each, columns = tokens * heads, min(size, MERGED_COLUMNS)
        merge_splits[triton.cdiv(each, MERGED_ROWS), size // columns, rows](
            out, maxima, sums, totals, splits, each, size, columns,
            triton.next_power_of_2(splits), MERGED_ROWS, LOG2E,
        )  # fmt: skip
    return out


def form_of(packed: int, size: int) -> Form:
    """How programs are cut for so many packed rows of a KV head."""
    if packed <= NARROW.rows:
        return NARROW if size < LARGE_HEAD else NARROW_LARGE
    return WIDE if size < LARGE_HEAD else WIDE_LARGE


def fitting(form: Form, size: int, shared: int) -> Form:
    """The form with as many tiles under way as so many bytes of shared memory hold."""
    # Queries, and keys and values of the tiles, in half precision.
    free = shared - SHARED_ASIDE - 2 * size * form.rows
    stages = free // (4 * size * form.entries)
    return dataclasses.replace(form, stages=max(1, min(form.stages, stages)))


@functools.cache
def splits_of(programs: int, tiles: int, places: int) -> int:
    """Over how many programs entries are split.

    Programs run in rounds of as many as there are ``places`` for; a program takes as long as its
    tiles and something aside. A split has to be worth its merge: the least of the fastest.
    """

    def time(splits: int) -> int:
        aside = TILES_ASIDE * (1 if splits == 1 else 2)
        return -(-programs * splits // places) * (-(-tiles // splits) + aside)

    return min(range(1, max(2, min(tiles, MOST_SPLITS) + 1)), key=time)


def _places(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have."""
    known = SHARED_BYTES.get(device.type, 0)
    if device.type != "cuda":
        return known
    # ROCm does not tell.
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", known))
