"""Attention of a chunk by one kernel, on a GPU or in the interpreter, against a float64 oracle."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from adms.attention.merged import attend_in_two, causal_bias
from adms.errors import ADMSValueError
from adms.kernels import chunk_attention as choice
from adms.kernels import has_triton
from adms.kernels.chunk_attention import attends_at_once, chunk_attention, fits
from tests.kernels.material import DEVICE, RUNS_TRITON, draw, moved

# The interpreter's numbers are NumPy's, which speaks of hidden scores that become infinite.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
runs = pytest.mark.skipif(not RUNS_TRITON, reason="needs a GPU or TRITON_INTERPRET=1")
HALVES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SCALING = 0.3


@dataclasses.dataclass
class Case:
    """Shapes of a chunk, and what its bias is for: None, or rows and heads that differ in it."""

    rows: int = 1
    kv_heads: int = 2
    group: int = 2
    tokens: int = 21
    entries: int = 70
    size: int = 16
    bias: tuple[int, int] | None = (1, 2)

    def make(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """Queries, held keys, values and bias, new keys and values; some entries are hidden."""

        def states(heads: int, count: int, seed: int) -> torch.Tensor:
            return draw(self.rows, heads, count, self.size, seed=seed).to(dtype)

        heads = self.kv_heads
        keys, values = states(heads, self.entries, 1), states(heads, self.entries, 2)
        bias = None
        if self.bias is not None:
            bias = draw(*self.bias, 1, self.entries, seed=3).to(dtype)
            hidden = draw(self.bias[0], 1, 1, self.entries, seed=4) < -1
            # Whole tiles too, in the middle and first of all.
            hidden[..., :33] = hidden[..., 40:57] = True
            bias = bias.masked_fill(hidden, torch.finfo(dtype).min)
            garbage = hidden.transpose(2, 3).expand(self.rows, heads, -1, self.size)
            keys, values = keys.masked_fill(garbage, 50.0), values.masked_fill(garbage, -3000.0)
        query = states(heads * self.group, self.tokens, 0)
        new = states(heads, self.tokens, 5), states(heads, self.tokens, 6)
        return [query, keys, values, bias, *new]


def oracle(given: list[torch.Tensor | None]) -> torch.Tensor:
    """One softmax over what each query sees, head by head, in float64: ``[B, Q, H, D]``."""
    query, keys, values, bias, new_keys, new_values = (
        None if part is None else part.double().cpu() for part in given
    )
    rows, heads, tokens = query.shape[:3]
    group = heads // keys.shape[1]
    out = torch.zeros(rows, tokens, heads, query.shape[3], dtype=torch.float64)
    least = torch.finfo(given[0].dtype).min
    for row in range(rows):
        for head in range(heads):
            kv = head // group
            shown = torch.ones(keys.shape[2], dtype=torch.bool)
            weight = torch.zeros(keys.shape[2], dtype=torch.float64)
            if bias is not None:
                weight = bias[row % bias.shape[0], kv % bias.shape[1], 0]
                shown = weight > least
            old = keys[row, kv][shown], values[row, kv][shown]
            for token in range(tokens):
                seen = slice(0, token + 1)
                asked = query[row, head, token] * SCALING
                score = torch.cat([old[0] @ asked + weight[shown], new_keys[row, kv, seen] @ asked])
                every = torch.cat([old[1], new_values[row, kv, seen]])
                out[row, token, head] = score.softmax(0) @ every
    return out


def attend(given: list[torch.Tensor | None], form: tuple[int, ...], splits: int) -> torch.Tensor:
    from adms.kernels.chunk_attention_triton import Form, fused_chunk_attention

    found = fused_chunk_attention(*moved(given, DEVICE), SCALING, Form(*form), splits)
    assert found.is_contiguous() and found.dtype == given[0].dtype
    return found.cpu().double()


CASES = {
    "grouped": Case(),
    "alone": Case(group=1, bias=(1, 1)),
    "groups of four": Case(group=4, tokens=37, entries=64, size=32),
    "groups of three": Case(kv_heads=1, group=3, tokens=50),
    "no bias": Case(rows=2, bias=None),
    "a bias for all heads": Case(rows=2, bias=(1, 1)),
    "a bias for each row": Case(rows=2, bias=(2, 2)),
    "a bias of rows for all heads": Case(rows=2, bias=(2, 1), tokens=3),
    "one token": Case(tokens=1),
    "fewer entries than a tile": Case(entries=5, tokens=2, bias=None),
    "nothing held": Case(entries=0, bias=None),
    "whole tiles": Case(tokens=32, entries=96),
}


@runs
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_it_is_one_softmax(name: str, splits: int) -> None:
    for dtype, atol in HALVES.items():
        given = CASES[name].make(dtype)
        expected = oracle(given)
        assert_close(attend(given, (64, 32, 4, 2), splits), expected, atol=atol, rtol=atol)


@runs
def test_more_splits_than_tiles_and_other_forms() -> None:
    given = Case(tokens=50, group=4).make(torch.float16)
    expected = oracle(given)
    for form, splits in (((64, 64, 4, 1), 9), ((128, 16, 8, 3), 3), ((128, 128, 8, 2), 1)):
        assert_close(attend(given, form, splits), expected, atol=2e-3, rtol=2e-3)


@runs
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_of_which_nothing_held_is_shown(splits: int) -> None:
    for dtype, atol in HALVES.items():
        given = Case(rows=2, bias=(2, 1)).make(dtype)
        given[3][1] = torch.finfo(dtype).min
        found = attend(given, (64, 32, 4, 2), splits)
        assert_close(found, oracle(given), atol=atol, rtol=atol)
        # Infinite bias hides as well.
        given[3] = given[3].masked_fill(given[3] == torch.finfo(dtype).min, -torch.inf)
        assert torch.equal(attend(given, (64, 32, 4, 2), splits), found)


@runs
@pytest.mark.parametrize("padded", [0, 2])
def test_views_are_read_where_they_lie(padded: int) -> None:
    """Heads of a larger tensor, a bias whose rows start aligned or not, tokens before heads."""
    given = Case(rows=2, bias=(2, 2)).make(torch.float16)
    query, keys, values, bias, new_keys, new_values = given
    wide = torch.full((2, 4, *keys.shape[2:]), torch.nan, dtype=keys.dtype)
    wide[:, 1:3] = keys
    beside = torch.cat([query, new_keys], dim=1)
    long = torch.zeros(2, 2, 1, bias.shape[3] + padded, dtype=bias.dtype)
    long[..., : bias.shape[3]] = bias
    views = [
        beside[:, :4],
        wide[:, 1:3],
        values.transpose(1, 2).contiguous().transpose(1, 2),
        long[..., : bias.shape[3]],
        beside[:, 4:],
        new_values.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    for splits in (1, 2):
        found = attend(views, (64, 32, 4, 2), splits)
        assert torch.equal(found, attend(given, (64, 32, 4, 2), splits))


@runs
@pytest.mark.parametrize("dtype", HALVES)
def test_it_is_what_the_two_parts_are(dtype: torch.dtype) -> None:
    """As it is chosen by shapes, its form and its splits too."""
    case = Case(rows=2, group=4, tokens=40, entries=300, size=64)
    given = moved(case.make(dtype), DEVICE)
    # Rows of a bias start aligned for the twin's kernels.
    given[3] = torch.nn.functional.pad(given[3], (0, 4))[..., :300]
    found = chunk_attention(*given, SCALING)
    causal = causal_bias(40, 4, DEVICE, dtype)
    twin = attend_in_two(*given, causal, SCALING)
    assert found.shape == twin.shape == (2, 40, 8, 64)
    assert_close(found.float(), twin.float(), atol=2 * HALVES[dtype], rtol=2 * HALVES[dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_can_be_captured() -> None:
    given = moved(Case(tokens=64, entries=900, size=64).make(torch.bfloat16), DEVICE)
    given[3] = torch.nn.functional.pad(given[3], (0, 4))[..., :900]
    expected = chunk_attention(*given, SCALING)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chunk_attention(*given, SCALING)
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_splits_follow_from_shapes() -> None:
    from adms.kernels.chunk_attention_triton import MOST_SPLITS, splits_of

    # Enough programs are not split; few are split over what there is room for, but not further
    # than there are tiles.
    assert splits_of(132, 50, 132) == splits_of(1000, 50, 132) == 1
    assert splits_of(16, 47, 132) == 8
    assert splits_of(1, 3, 132) <= 3
    assert splits_of(1, 0, 132) == 1
    assert splits_of(1, 10_000, 1000) == MOST_SPLITS


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_tiles_under_way_follow_from_shared_memory() -> None:
    from adms.kernels.chunk_attention_triton import WIDE, WIDE_LARGE, fitting

    # Hopper's, Ada's, and less than any tile needs.
    assert fitting(WIDE, 128, 232_448) == WIDE and fitting(WIDE_LARGE, 256, 232_448) == WIDE_LARGE
    assert fitting(WIDE, 128, 101_376).stages == 2
    assert fitting(WIDE, 64, 101_376) == WIDE
    assert fitting(WIDE_LARGE, 256, 65_536).stages == 1


def test_when_it_is_chosen() -> None:
    half = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
    assert not attends_at_once("auto", half, half)
    if has_triton():
        on_gpu = half.to("meta")

        class OnGPU:
            dtype, shape, device = on_gpu.dtype, on_gpu.shape, torch.device("cuda")

        assert attends_at_once("auto", OnGPU, half) and attends_at_once("triton", OnGPU, half)
        assert not attends_at_once("torch", OnGPU, half)
        assert not attends_at_once("auto", OnGPU, half[..., :32])
    assert fits(torch.float16, 16, 16) and fits(torch.bfloat16, 256, 256)
    assert not fits(torch.float32, 64, 64)
    assert not any(fits(torch.float16, size, size) for size in (8, 80, 96, 512))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda part: part.float(), "float16 or bfloat16 throughout"),
        (1, lambda part: part[..., :8], "do not go with queries"),
        (2, lambda part: part[:, :, 1:], "do not go with queries"),
        (3, lambda part: part[..., 1:], "a bias"),
        (4, lambda part: part[:, :1], "do not go with queries"),
        (5, lambda part: part.mT.contiguous().mT, "last dimension is contiguous"),
    ],
)
def test_what_does_not_go_together_is_refused(
    place: int, change: Callable[[Any], Any], message: str
) -> None:
    given = Case().make(torch.float16)
    given[place] = change(given[place])
    with pytest.raises(ADMSValueError, match=message):
        chunk_attention(*given, SCALING)


def test_other_head_sizes_are_refused() -> None:
    with pytest.raises(ADMSValueError, match=f"from {choice.LEAST_HEAD} to"):
        chunk_attention(*Case(size=24).make(torch.float16), SCALING)
