"""The Triton kernel that searches codewords: all stages of a vector's code in one program.

A vector stays in registers while it meets every word of every stage, so that neither scores nor
residuals are ever written to memory. Shapes: ``VECTORS`` vectors of a program.
"""

import triton
import triton.language as tl


@triton.jit
def _nearest(
    x, words, halves, stage, below, behind,
    WORDS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """Indices of a stage's nearest words, which have the highest scores, and these: ``[VECTORS]``.

    With ``NEXT`` those after the word ``behind`` of score ``below``: by score, then by index.
    """
    # Each lane keeps the best of its own words; they are compared once, after all.
    best = tl.full((below.shape[0], CHUNK), float("-inf"), tl.float32)
    index = tl.zeros((below.shape[0], CHUNK), tl.int32)
    for start in range(0, WORDS, CHUNK):
        word = start + tl.arange(0, CHUNK)
        score = tl.load(halves + stage * WORDS + word)[None, :]
        for d in tl.static_range(GROUP):
            at = words + (stage * GROUP + d) * WORDS + word
            score = score + x[d][:, None] * tl.load(at)[None, :]
        better = score > best
        if NEXT:
            later = (score == below[:, None]) & (word[None, :] > behind[:, None])
            better = better & ((score < below[:, None]) | later)
        best = tl.where(better, score, best)
        index = tl.where(better, word[None, :], index)
    most = tl.max(best, axis=1)
    return tl.min(tl.where(best == most[:, None], index, WORDS), axis=1), most


@triton.jit
def _less(x, index, words, stage, WORDS: tl.constexpr, GROUP: tl.constexpr):
    """What a stage's words leave of vectors."""
    at = words + stage * GROUP * WORDS + index
    return (
        x[0] - tl.load(at),
        x[1] - tl.load(at + WORDS),
        x[2] - tl.load(at + 2 * WORDS),
        x[3] - tl.load(at + 3 * WORDS),
        x[4] - tl.load(at + 4 * WORDS),
        x[5] - tl.load(at + 5 * WORDS),
        x[6] - tl.load(at + 6 * WORDS),
        x[7] - tl.load(at + 7 * WORDS),
    )


@triton.jit
def _square(x, GROUP: tl.constexpr):
    """Squared lengths ``[VECTORS]``."""
    total = x[0] * x[0]
    for d in tl.static_range(1, GROUP):
        total += x[d] * x[d]
    return total


@triton.jit
def assign_codes(
    vectors, kept, most, words, halves, codes, total, groups, count, v_row, v_group, v_token,
    STAGES: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, STARTS: tl.constexpr,
    JOINT: tl.constexpr, VECTORS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Codes of ``VECTORS`` vectors."""
    number = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    inside = number < total
    token = number % count
    place = number // count
    row, group = place // groups, place % groups
    counted = tl.load(kept + place, mask=inside, other=0)
    asked = tl.load(most + place, mask=inside, other=0)
    at = vectors + row.to(tl.int64) * v_row + group * v_group + token * v_token
    x = (
        tl.load(at, mask=inside, other=0.0),
        tl.load(at + 1, mask=inside, other=0.0),
        tl.load(at + 2, mask=inside, other=0.0),
        tl.load(at + 3, mask=inside, other=0.0),
        tl.load(at + 4, mask=inside, other=0.0),
        tl.load(at + 5, mask=inside, other=0.0),
        tl.load(at + 6, mask=inside, other=0.0),
        tl.load(at + 7, mask=inside, other=0.0),
    )
    # Vectors of one group come side by side, so that most programs ask for what one group does.
    judged, wanted = tl.max(counted, axis=0), tl.max(asked, axis=0)
    # Nothing is passed over where the very nearest word is looked for.
    any_score = tl.full((VECTORS,), float("inf"), tl.float32)
    any_word = tl.full((VECTORS,), -1, tl.int32)
    # The paths from the nearest first words; the first of the best wins.
    first = tl.zeros((VECTORS,), tl.int32)
    second = tl.zeros((VECTORS,), tl.int32)
    third = tl.zeros((VECTORS,), tl.int32)
    error = any_score
    score = any_score
    start = any_word
    # Where one stage counts alone, the nearest word is the best.
    tried = tl.where(judged > 1, STARTS, 1)
    for _ in range(tried):
        start, score = _nearest(x, words, halves, 0, score, start, WORDS, GROUP, CHUNK, True)
        path = _less(x, start, words, 0, WORDS, GROUP)
        one = any_word
        two = any_word
        after = any_score
        if judged > 1:
            one, _s = _nearest(
                path, words, halves, 1, any_score, any_word, WORDS, GROUP, CHUNK, False
            )
            path = _less(path, one, words, 1, WORDS, GROUP)
            after = _square(path, GROUP)
        if judged > 2:
            two, _t = _nearest(
                path, words, halves, 2, any_score, any_word, WORDS, GROUP, CHUNK, False
            )
            path = _less(path, two, words, 2, WORDS, GROUP)
            after = tl.where(counted > 2, _square(path, GROUP), after)
        better = (after < error) & ((counted > 1) | (error == float("inf")))
        better |= judged < 2
        error = tl.where(better, after, error)
        first = tl.where(better, start, first)
        second = tl.where(better, one, second)
        third = tl.where(better, two, third)
    left = _less(x, first, words, 0, WORDS, GROUP)
    size = groups * count
    out = codes + row.to(tl.int64) * (STAGES * size) + number % size
    tl.store(out, tl.where(asked > 0, first, 0).to(tl.uint8), mask=inside)
    for stage in tl.static_range(1, STAGES):
        index = any_word
        if stage < wanted:
            # What was tried together is known; all else follows greedily.
            known = (stage < JOINT) & (judged > stage)
            if known:
                index = second if stage == 1 else third
            else:
                index, _u = _nearest(
                    left, words, halves, stage, any_score, any_word, WORDS, GROUP, CHUNK, False
                )
            left = _less(left, index, words, stage, WORDS, GROUP)
        index = tl.where(asked > stage, index, 0)
        tl.store(out + stage * size, index.to(tl.uint8), mask=inside)
