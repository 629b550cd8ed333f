"""The search for codewords, and the log-weight of coded keys."""

import itertools

import pytest
import torch

from adms.calibration import LayerCalibration
from adms.compressors import LayerContext
from adms.compressors.codebooks import STARTS, assign, codebooks_on, nearest, shipped
from adms.compressors.low_rank import MOST_WEIGHT, LowRank, LowRankCoder
from adms.config import ADMSConfig
from adms.entries import Entries, TokenShape
from adms.kernels.parts import CodedPart, decode
from adms.moments import Moments
from tests.compressors.material import SHAPE, some_queries, tokens

CPU = torch.device("cpu")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(vectors: torch.Tensor, words: list[torch.Tensor]) -> torch.Tensor:
    books = codebooks_on(CPU).double()
    said = sum(books[stage][index.long()] for stage, index in enumerate(words))
    return (vectors.double() - said).square().sum(-1)


def test_nearest_is_the_nearest_up_to_the_bits_it_gives_away() -> None:
    vectors, book = 3 * gaussian(2000, 8), codebooks_on(CPU)[0]
    found = nearest(vectors, book)
    distance = (vectors.double()[:, None] - book.double()).square().sum(-1)
    least = distance.min(1).values
    chosen = distance.gather(1, found[:, None])[:, 0]
    assert (chosen - least <= 2e-3 * (1 + vectors.double().square().sum(-1))).all()
    assert (found == distance.argmin(1)).float().mean() > 0.99
    # Also where there is nothing, and far out.
    assert torch.equal(nearest(torch.zeros(1, 8), book), book.square().sum(1).argmin()[None])
    far = 1e4 * vectors[:50]
    assert (nearest(far, book) == (far @ book.T).argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_first_word_is_the_best_of_those_tried(depth: int) -> None:
    vectors = gaussian(1, 1, 200, 8, seed=depth)
    kept = torch.full((1, 1), depth)
    codes = assign(vectors, kept, kept)
    assert codes.shape == (1, len(codebooks_on(CPU)), 1, 200) and codes.dtype == torch.uint8
    assert not codes[:, depth:].any()
    found = error(vectors[0, 0], list(codes[0, :depth, 0]))
    books = codebooks_on(CPU)
    flat = vectors[0, 0]
    nearest_first = (flat[:, None] - books[0]).square().sum(-1).argsort(1)[:, :STARTS]
    tried = []
    for start in range(STARTS):
        words = [nearest_first[:, start]]
        left = flat - books[0][words[0]]
        for stage in range(1, depth):
            words.append((left[:, None] - books[stage]).square().sum(-1).argmin(1))
            left = left - books[stage][words[-1]]
        tried.append(error(flat, words))
    best = torch.stack(tried).min(0).values
    # Ties of words that are as near within the lost bits of a score.
    assert (found <= best + 2e-2).all()
    assert found.mean() <= 1.001 * best.mean()
    assert depth == 1 or found.mean() < 0.93 * tried[0].mean()


def test_groups_and_rows_ask_for_stages_of_their_own() -> None:
    vectors = gaussian(2, 3, 20, 8)
    kept = torch.tensor([[0, 1, 2], [3, 2, 1]])
    most = torch.tensor([[2, 4, 2], [6, 3, 1]])
    codes = assign(vectors, kept, most)
    for row, group in itertools.product(range(2), range(3)):
        alone = assign(
            vectors[row : row + 1, group : group + 1],
            kept[row : row + 1, group : group + 1],
            most[row : row + 1, group : group + 1],
        )
        assert torch.equal(codes[row, :, group], alone[0, :, 0])


def test_the_shipped_errors_are_those_of_the_search() -> None:
    vectors, errors = gaussian(1, 1, 20_000, 8, seed=9), shipped()[1]
    for depth in (1, 2, 3):
        kept = torch.full((1, 1), depth)
        codes = assign(vectors, kept, kept)
        found = error(vectors[0, 0], list(codes[0, :depth, 0])).mean() / 8
        assert found == pytest.approx(errors[depth], rel=0.04)


def calibrated(queries: torch.Tensor) -> LowRankCoder:
    moments = Moments(SHAPE, 2)
    material = tokens(5, 400)
    moments.add(material.keys, material.values)
    moments.add_queries(queries)
    calibration = LayerCalibration(2, moments.fit(1))
    context = LayerContext(SHAPE, torch.float32, 0, calibration=calibration)
    coder = LowRank().bind(context, 20_000, ADMSConfig())
    assert isinstance(coder, LowRankCoder)
    return coder


def test_log_weight_is_half_the_variance_of_what_codes_leave_out() -> None:
    queries = 0.7 * some_queries(2, 300)
    coder, entries = calibrated(queries), tokens(1, 300)
    header = coder.fit(entries)
    records = coder.encode(header, entries)
    power = queries.double().square().mean((0, 2)).view(2, 2, 16).mean(1)
    # So that no weight is zero, the calibration adds a hundredth of the mean.
    power = power + 0.01 * power.mean()
    for size in (coder.coarse_bytes, coder.record_bytes, coder.fine_bytes):
        found = coder.decode(header, records[..., :size])
        left_out = (entries.keys - found.keys).double()[0]
        expected = 0.5 * (left_out.square() * power[:, None]).sum(2).mean(1) / 16
        assert found.log_weight is not None
        assert found.log_weight.shape == found.keys.shape[:3]
        wanted = expected.clamp(max=MOST_WEIGHT).float()[None, :, None].expand(-1, -1, 300)
        torch.testing.assert_close(found.log_weight, wanted, rtol=5e-3, atol=1e-4)
        weights = coder.log_weight(header, size)
        assert torch.equal(weights[..., None].expand(-1, -1, 300).float(), found.log_weight)


def test_log_weight_brings_the_mass_of_coded_keys_nearer_to_the_truth() -> None:
    queries = 0.7 * gaussian(1, 4, 300, 16, seed=3)
    coder, entries = calibrated(queries), tokens(1, 300)
    header = coder.fit(entries)
    found = coder.decode(header, coder.encode(header, entries)[..., : coder.record_bytes])
    assert found.log_weight is not None
    asked = queries.view(1, 2, 2, 300, 16)

    def mass(keys: torch.Tensor) -> torch.Tensor:
        scores = asked.double() @ keys.double()[:, :, None].transpose(3, 4) / 4
        return scores.logsumexp(4)

    truth, plain = mass(entries.keys), mass(found.keys)
    weighted = plain + found.log_weight[:, :, :1, None].double()
    assert (plain - truth).mean() < 0
    assert abs((weighted - truth).mean()) < 0.5 * abs((plain - truth).mean())


@pytest.mark.parametrize("blocks", [2, 4])
def test_a_block_of_heads_is_coded_as_if_there_were_no_others(blocks: int) -> None:
    """As ranks of a tensor-parallel model do, which have some of the blocks each."""
    shape = TokenShape(4, 16, 8)
    material, entries = tokens(5, 400, shape), tokens(1, 300, shape)
    moments = Moments(shape, 4 // blocks)
    moments.add(material.keys, material.values)
    moments.add_queries(gaussian(1, 8, 100, 16, seed=2))
    fitted = moments.fit(blocks)

    def bound(heads: int, part: slice) -> LowRankCoder:
        tensors = {name: tensor[part] for name, tensor in fitted.items()}
        own = LayerCalibration(4 // blocks, tensors)
        context = LayerContext(TokenShape(heads, 16, 8), calibration=own)
        coder = LowRank().bind(context, 10_000 * heads, ADMSConfig())
        assert isinstance(coder, LowRankCoder)
        return coder

    whole = bound(4, slice(None))
    header = whole.fit(entries)
    records = whole.encode(header, entries)
    for first in (0, 2):
        heads = slice(first, first + 2)
        own = Entries(entries.keys[:, heads], entries.values[:, heads])
        coder = bound(2, slice(first * blocks // 4, (first + 2) * blocks // 4))
        assert (coder.num_records, 2 * coder.fine_bytes) == (whole.num_records, whole.fine_bytes)
        own_header = coder.fit(own)
        own_records = coder.encode(own_header, own)
        for form in ("coarse_bytes", "record_bytes", "fine_bytes"):
            mine = coder.decode(own_header, own_records[..., : getattr(coder, form)])
            theirs = whole.decode(header, records[..., : getattr(whole, form)])
            assert mine.log_weight is not None and theirs.log_weight is not None
            for part, other in (
                (mine.keys, theirs.keys),
                (mine.values, theirs.values),
                (mine.log_weight, theirs.log_weight),
            ):
                torch.testing.assert_close(part, other[:, heads], atol=1e-5, rtol=1e-5)


def test_rounding_changes_few_codes() -> None:
    """What ranks, devices and threads sum up in another order is coded alike but for few bytes.

    Of channels that vary alike, which is the worst case: any order of them is as good.
    """
    shape = TokenShape(2, 64, 64)
    material, entries = (
        Entries(gaussian(1, 2, count, 64, seed=count), gaussian(1, 2, count, 64, seed=count + 1))
        for count in (600, 300)
    )

    def coded(factor: float) -> torch.Tensor:
        own = [
            Entries(
                *(part * (1 + factor * gaussian(*part.shape)) for part in (one.keys, one.values))
            )
            for one in (material, entries)
        ]
        moments = Moments(shape, 2)
        moments.add(own[0].keys, own[0].values)
        context = LayerContext(shape, calibration=LayerCalibration(2, moments.fit(1)))
        coder = LowRank().bind(context, 60_000, ADMSConfig())
        return coder.encode(coder.fit(own[1]), own[1])[..., : coder.record_bytes]

    assert (coded(0.0) == coded(1e-6)).float().mean() > 0.98


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_blocks_as_tables_say(blocks: int) -> None:
    shape, entries = TokenShape(4, 16, 16), tokens(1, 200, TokenShape(4, 16, 16))
    moments = Moments(shape, 4 // blocks)
    moments.add(entries.keys, entries.values)
    context = LayerContext(shape, calibration=LayerCalibration(4 // blocks, moments.fit(blocks)))
    coder = LowRank().bind(context, 60_000, ADMSConfig())
    header = coder.fit(entries)
    for size in (coder.record_bytes, coder.fine_bytes):
        records = coder.encode(header, entries)[..., :size].contiguous()
        tables = coder.tables(header, size)
        assert tables is not None
        ones = torch.ones(1, 200, 16)
        part = CodedPart(records, tables, ones, ones, torch.ones(1, 200, dtype=torch.bool))
        expected = coder.decode(header, records)
        for found, wanted in zip(decode(part, 4), (expected.keys, expected.values), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_without_a_calibration_nothing_is_added() -> None:
    context = LayerContext(SHAPE, torch.float32, 0)
    coder, entries = LowRank().bind(context, 40_000, ADMSConfig()), tokens(1, 300)
    header = coder.fit(entries)
    records = coder.encode(header, entries)[..., : coder.record_bytes]
    weight = coder.decode(header, records).log_weight
    assert weight is not None and not weight.any()
