"""The choice of blocks in Triton: scores and the top-k of each row.

What `ImportanceScorer` and `hard_topk` do in some fifty launches, the pairs' hidden layer written
out between them, one launch does without writing any of it. Those are the plain twin: the same up
to rounding, which may decide between scores that are equal but for it. Forward only.

Shapes: `B` batch, `D` head size, `I` query blocks, `J` key blocks, `P` patterns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adms.attention.block_sparse.scorer import ImportanceScorer
from adms.kernels.choice import launching

# A row's scores stay in registers.
_MOST_KEY_BLOCKS = 2048
# Of features of a row's key blocks at a time.
_TILE_ELEMENTS = 8192
_MOST_STEP = 32
_MAPPED_ROWS = 16


def scores_fit(scorer: ImportanceScorer, key_blocks: int) -> bool:
    """Whether `choose_blocks` can compute this scorer's choice."""
    of_float32 = scorer.gain.dtype == torch.float32
    return of_float32 and len(scorer.layers) == 1 and key_blocks <= _MOST_KEY_BLOCKS


@launching
def choose_blocks(
    scorer: ImportanceScorer,
    of_queries: Tensor,
    of_keys: Tensor,
    wanted: Tensor,
    candidates: Tensor,
    local: Tensor,
    pairs: float,
) -> tuple[Tensor, Tensor]:
    """The pattern, bool [B, P, I, J], and each row's share of the allowed pairs, [B, P, I].

    Args:
        scorer: has two layers.
        of_queries: summaries [B, P, I, D], float32 or half precision.
        of_keys: summaries [B, P, J, D], the same.
        wanted: how many blocks a row chooses, [B, P, I] or what expands to it; rounded half to
            even, and as many as there are candidates where it is more.
        candidates: what may be chosen, bool [I, J].
        local: what is in the pattern anyway, bool [I, J].
        pairs: how many pairs are allowed in all.
    """
    batch, patterns, rows, size = of_queries.shape
    columns = of_keys.shape[2]
    last = scorer.layers[0].get_parameter("weight")
    hidden = last.shape[1]
    mapped = [
        of_queries.new_empty(batch, patterns, count, features, dtype=torch.float32)
        for count in (rows, columns)
        for features in (size, hidden)
    ]
    _map[(-(-max(rows, columns) // _MAPPED_ROWS), batch * patterns, 4)](
        of_queries,
        of_keys,
        scorer.query_map,
        scorer.key_map,
        scorer.query_layer.weight,
        scorer.key_layer.weight,
        *mapped,
        *of_queries.stride(),
        *of_keys.stride(),
        patterns,
        rows,
        columns,
        size,
        hidden,
        ROWS=_MAPPED_ROWS,
        STEP=32,
        COLUMNS=64,
        num_warps=4,
    )
    q_match, q_hidden, k_match, k_hidden = mapped
    wanted = wanted.expand(batch, patterns, rows)
    chosen = torch.empty(batch, patterns, rows, columns, dtype=torch.bool, device=of_queries.device)
    shares = of_queries.new_empty(batch, patterns, rows, dtype=torch.float32)
    width = max(16, triton.next_power_of_2(columns))
    _choose[(rows, batch * patterns)](
        q_match,
        k_match,
        q_hidden,
        k_hidden,
        scorer.query_layer.bias,
        last,
        scorer.gain,
        wanted,
        candidates,
        local,
        chosen,
        shares,
        *wanted.stride(),
        patterns,
        rows,
        columns,
        size,
        hidden,
        pairs,
        WIDTH=width,
        STEP=min(_MOST_STEP, _TILE_ELEMENTS // width),
        num_warps=min(8, max(1, width // 32)),
    )
    return chosen, shares


@triton.jit
def _map(
    queries,
    keys,
    query_map,
    key_map,
    query_layer,
    key_layer,
    q_match,
    q_hidden,
    k_match,
    k_hidden,
    q_b,
    q_p,
    q_n,
    q_d,
    k_b,
    k_p,
    k_n,
    k_d,
    patterns,
    rows,
    columns,
    size,
    hidden,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program maps some summaries of one pattern by one of the scorer's four maps."""
    tile = tl.program_id(0)
    outer = tl.program_id(1).to(tl.int64)
    batch = outer // patterns
    pattern = outer % patterns
    which = tl.program_id(2)
    q_start = queries + batch * q_b + pattern * q_p
    k_start = keys + batch * k_b + pattern * k_p
    matched = pattern * size * size
    deep = pattern * size * hidden
    if which == 0:
        out = q_match + outer * rows * size
        _product(
            q_start, q_n, q_d, query_map + matched, out, tile, rows, size, size, ROWS, STEP, COLUMNS
        )
    elif which == 1:
        out = q_hidden + outer * rows * hidden
        _product(
            q_start,
            q_n,
            q_d,
            query_layer + deep,
            out,
            tile,
            rows,
            size,
            hidden,
            ROWS,
            STEP,
            COLUMNS,
        )
    elif which == 2:
        out = k_match + outer * columns * size
        _product(
            k_start,
            k_n,
            k_d,
            key_map + matched,
            out,
            tile,
            columns,
            size,
            size,
            ROWS,
            STEP,
            COLUMNS,
        )
    else:
        out = k_hidden + outer * columns * hidden
        _product(
            k_start,
            k_n,
            k_d,
            key_layer + deep,
            out,
            tile,
            columns,
            size,
            hidden,
            ROWS,
            STEP,
            COLUMNS,
        )


@triton.jit
def _product(
    x,
    stride_n,
    stride_d,
    weight,
    out,
    tile,
    rows,
    size,
    features,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows of x [rows, size] times weight [size, features]."""
    row = tile * ROWS + tl.arange(0, ROWS)
    for start in range(0, features, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, size, STEP):
            inner = first + tl.arange(0, STEP)
            left = tl.load(
                x + row[:, None] * stride_n + inner[None, :] * stride_d,
                mask=(row < rows)[:, None] & (inner < size)[None, :],
                other=0.0,
            ).to(tl.float32)
            right = tl.load(
                weight + inner[:, None] * features + column[None, :],
                mask=(inner < size)[:, None] & (column < features)[None, :],
                other=0.0,
            )
            # What is chosen hangs on small differences: no rounding to TF32.
            total = tl.dot(left, right, total, input_precision="ieee")
        tl.store(
            out + row[:, None] * features + column[None, :],
            total,
            mask=(row < rows)[:, None] & (column < features)[None, :],
        )


@triton.jit
def _gelu(x):
    """x times the normal distribution function, to 1.5e-7.

    Source: Abramowitz and Stegun (1964), 7.1.26, for the error function; a third of the work of
    the library's.
    """
    size = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * size)
    part = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    part = t * (0.254829592 + t * (-0.284496736 + t * part))
    # Half of what the error function lacks to 1: the share beyond |x|.
    tail = 0.5 * part * tl.exp(-size * size)
    return x * tl.where(x >= 0.0, 1.0 - tail, tail)


@triton.jit
def _choose(
    q_match,
    k_match,
    q_hidden,
    k_hidden,
    bias,
    weight,
    gain,
    wanted,
    candidates,
    local,
    chosen,
    shares,
    wanted_b,
    wanted_p,
    wanted_i,
    patterns,
    rows,
    columns,
    size,
    hidden,
    pairs,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program scores all key blocks for one query block and chooses of them."""
    row = tl.program_id(0)
    outer = tl.program_id(1).to(tl.int64)
    pattern = outer % patterns
    column = tl.arange(0, WIDTH)
    inside = column < columns
    place = row * columns + column
    candidate = tl.load(candidates + place, mask=inside, other=0).to(tl.int32) != 0
    query = outer * rows + row
    key = (outer * columns + column)[:, None]
    products = tl.zeros([WIDTH, STEP], tl.float32)
    for first in range(0, size, STEP):
        inner = first + tl.arange(0, STEP)
        within = inner < size
        left = tl.load(q_match + query * size + inner, mask=within, other=0.0)
        right = tl.load(
            k_match + key * size + inner[None, :],
            mask=inside[:, None] & within[None, :],
            other=0.0,
        )
        products += left[None, :] * right
    match = tl.sum(products, 1)
    held = tl.where(candidate, match, 0.0)
    available = tl.sum(candidate.to(tl.int32), 0)
    count = tl.maximum(available, 1).to(tl.float32)
    centred = match - tl.sum(held, 0) / count
    spread = tl.where(candidate, centred, 0.0)
    variance = tl.sum(spread * spread, 0) / count
    floor = 1e-6 * tl.sum(held * held, 0) / count + 1e-12
    score = tl.load(gain + pattern) * centred / tl.sqrt(variance + floor)
    products = tl.zeros([WIDTH, STEP], tl.float32)
    for first in range(0, hidden, STEP):
        inner = first + tl.arange(0, STEP)
        within = inner < hidden
        left = tl.load(q_hidden + query * hidden + inner, mask=within, other=0.0)
        left += tl.load(bias + pattern * hidden + inner, mask=within, other=0.0)
        right = tl.load(
            k_hidden + key * hidden + inner[None, :],
            mask=inside[:, None] & within[None, :],
            other=0.0,
        )
        unit = _gelu(left[None, :] + right)
        factor = tl.load(weight + pattern * hidden + inner, mask=within, other=0.0)
        products += unit * factor[None, :]
    score += tl.sum(products, 1)
    # Half to even, as the twin rounds.
    asked = tl.load(wanted + (outer // patterns) * wanted_b + pattern * wanted_p + row * wanted_i)
    asked = tl.minimum(asked, available.to(tl.float32))
    whole = tl.floor(asked + 0.5)
    odd = whole - 2.0 * tl.floor(whole / 2.0)
    most = (whole - tl.where((whole - asked == 0.5) & (odd == 1.0), 1.0, 0.0)).to(tl.int32)
    # A float's bits order as an integer once those of negative ones are turned. 0 is below all.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    bits = tl.where(candidate, bits, -1)
    # Bit by bit, the highest threshold that at least as many reach as are asked for.
    threshold = tl.zeros([], tl.int64)
    one = threshold + 1
    for step in range(0, 32):
        trial = threshold | (one << (31 - step))
        reach = tl.sum((bits >= trial).to(tl.int32), 0)
        threshold = tl.where(reach >= most, trial, threshold)
    above = bits > threshold
    level = bits == threshold
    left_over = most - tl.sum(above.to(tl.int32), 0)
    first_ones = level & (tl.cumsum(level.to(tl.int32), 0) <= left_over)
    own = tl.load(local + place, mask=inside, other=0).to(tl.int32) != 0
    taken = above | first_ones | own
    tl.store(chosen + query * columns + column, taken, mask=inside)
    tl.store(shares + query, tl.sum(taken.to(tl.float32), 0) / pairs)
