"""The search for codewords, on a GPU or in the interpreter, against its twin and float64."""

import pytest
import torch

from adms.compressors.codebooks import GROUP, assign, plain_assign, shipped
from adms.kernels import has_triton
from adms.kernels.choice import is_fused, using
from tests.kernels.material import DEVICE, RUNS_TRITON, draw

runs = pytest.mark.skipif(not RUNS_TRITON, reason="needs a GPU or TRITON_INTERPRET=1")


def vectors_to_code(rows: int, groups: int, count: int) -> tuple[torch.Tensor, ...]:
    """Vectors ``[B, G, N, 8]`` as ``low_rank`` hands them over, and stages of every number."""
    vectors = draw(rows, count, groups, GROUP, seed=0).transpose(1, 2)
    kept = torch.arange(rows * groups).view(rows, groups) % 7
    return vectors, kept, (kept + torch.arange(groups) % 3).clamp(max=6)


@runs
@pytest.mark.parametrize(("rows", "groups", "count"), [(2, 7, 3), (1, 3, 1)])
def test_codes_are_those_of_the_twin(rows: int, groups: int, count: int) -> None:
    from adms.kernels.codewords_triton import fused_assign

    vectors, kept, most = vectors_to_code(rows, groups, count)
    expected = plain_assign(vectors, kept, most)
    found = fused_assign(*(part.to(DEVICE) for part in (vectors, kept, most))).cpu()
    assert found.shape == expected.shape and found.dtype == expected.dtype
    # The twin on a CPU drops the last bits of a score: where two words are as near, either is one.
    assert (found != expected).float().mean() < 0.01


@runs
def test_every_word_is_the_nearest_in_float64() -> None:
    from adms.kernels.codewords_triton import fused_assign

    vectors, kept, most = vectors_to_code(2, 7, 3)
    codes = fused_assign(*(part.to(DEVICE) for part in (vectors, kept, most))).cpu().long()
    left, books = vectors.double(), shipped()[0].double()
    for stage, book in enumerate(books):
        asked = most > stage
        distances = (left[..., None, :] - book).square().sum(-1)
        taken = distances.gather(3, codes[:, stage, ..., None])[..., 0]
        if stage:
            excess = (taken - distances.amin(3))[asked]
        else:
            # One of the four nearest; the very nearest where only one stage counts.
            excess = (taken - distances.sort(3).values[..., 3])[asked]
            alone = asked & (kept <= 1)
            assert (taken - distances.amin(3))[alone].max() < 1e-5
        assert excess.max() < 1e-5
        assert not codes[:, stage][~asked].any()
        left = left - book[codes[:, stage]]


@runs
def test_the_first_word_is_the_one_that_leaves_the_least() -> None:
    from adms.kernels.codewords_triton import fused_assign

    vectors, _, most = vectors_to_code(1, 3, 8)
    books = shipped()[0].double()
    for counted in (2, 3):
        kept = torch.full_like(most, counted)
        most = torch.full_like(most, counted)
        codes = fused_assign(*(part.to(DEVICE) for part in (vectors, kept, most))).cpu().long()
        exact = vectors.double()
        starts = (exact[..., None, :] - books[0]).square().sum(-1).topk(4, largest=False).indices
        left = exact[..., None, :] - books[0][starts]
        for book in books[1:counted]:
            left = left - book[(left[..., None, :] - book).square().sum(-1).argmin(-1)]
        least = left.square().sum(-1).amin(-1)
        found = exact - sum(books[stage][codes[:, stage]] for stage in range(counted))
        assert (found.square().sum(-1) - least).abs().max() < 1e-5


def test_the_plain_form_is_kept_where_asked_for() -> None:
    device = torch.device("cuda")
    assert not is_fused(torch.device("cpu"))
    with using("torch"):
        assert not is_fused(device)
        with using("auto"):
            assert is_fused(device) == has_triton()
        assert not is_fused(device)
    vectors, kept, most = vectors_to_code(1, 3, 2)
    assert torch.equal(assign(vectors, kept, most), plain_assign(vectors, kept, most))
