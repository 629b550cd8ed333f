"""Landmarks of single heads: bytes, quotas, whose they are, and streams with them."""

from pathlib import Path

import pytest
import torch

from adms import ADMSKVCache, disable_adms, enable_adms_llm
from adms.config import ADMSConfig
from adms.entries import Entries, TokenShape
from adms.importance import METRICS
from adms.tiers.head_landmarks import Arriving, HeadLandmarkStore
from adms.tiers.landmarks import LandmarkStore
from tests.compressors.test_streams import held
from tests.compressors.tiny import feed, random_ids, tiny_llama
from tests.streams import check_padded_row

SHAPE = TokenShape(3, 16, 8)
SIZES = {"start_size": 4, "recent_size": 64, "compressed_budget": 160, "use_adaptive_budget": True}


def arriving(rows: int, count: int, first: int, errors: list[float], seed: int = 0) -> Arriving:
    """Random tokens whose codes miss those of head h by errors[h]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> torch.Tensor:
        return torch.randn(rows, 3, count, size, generator=generator)

    keys, values = draw(16), draw(8)
    miss = torch.tensor(errors)[:, None, None].sqrt()
    decoded = Entries(keys + miss * draw(16), values + miss * draw(8))
    tokens = (first + torch.arange(count)).expand(rows, -1)
    return Arriving(Entries(keys, values), tokens, decoded, 1, None)


def score(entries: Entries, evidence: object) -> torch.Tensor:
    """Size of the keys, heads pooled."""
    return entries.keys.square().sum((1, 3))


@pytest.mark.parametrize("nbytes", [0, 200, 900, 5000, 40_000])
def test_bytes_are_those_given(nbytes: int) -> None:
    store = HeadLandmarkStore.within(SHAPE, torch.float32, nbytes)
    joint = LandmarkStore.within(SHAPE, torch.float32, nbytes)
    assert store.nbytes <= nbytes
    assert store.count >= 0.8 * joint.count - 1
    larger = HeadLandmarkStore(SHAPE, torch.float32, store.count + 1)
    assert larger.nbytes > nbytes


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([0.1, 0.1, 0.1], [10, 10, 10]),
        # Half of 10 each, and half of 30 by error: 1 to 1 to 3.
        ([0.1, 0.1, 0.3], [8, 8, 14]),
        ([0.0, 0.0, 0.5], [5, 5, 20]),
        ([0.0, 0.0, 0.0], [10, 10, 10]),
    ],
)
def test_quotas_follow_the_error_within_the_total(errors: list, expected: list) -> None:
    store = HeadLandmarkStore(SHAPE, torch.float32, 10)
    # Exact shares: the errors themselves instead of those of random codes.
    assert store._quotas(torch.tensor([errors, errors])).tolist() == [expected] * 2
    header = store.fit(arriving(2, 400, 0, [error + 1e-6 for error in errors]))
    assert header.shape == (2, store.header_bytes)
    for row in store.quotas(header).tolist():
        assert sum(row) <= 30
        assert row == pytest.approx(expected, abs=1)


def test_quotas_never_leave_their_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    for heads in (1, 2, 5, 8, 32):
        for count in (1, 2, 7, 30):
            store = HeadLandmarkStore(TokenShape(heads, 8, 8), torch.float32, count)
            errors = torch.rand(20, heads, generator=generator) ** 8
            quotas = store._quotas(errors)
            assert int(quotas.sum(1).max()) <= heads * count
            assert int(quotas.sum(1).min()) >= heads * count - heads // 2
            assert int(quotas.min()) >= -(-count // 2) and int(quotas.max()) <= max(store.most, 1)


def test_each_head_keeps_its_best_over_time() -> None:
    """Against a choice in Python, from tokens that came in two parts; rows are independent."""
    store = HeadLandmarkStore(SHAPE, torch.float32, 6)
    config = ADMSConfig(coverage_priority=0.0)
    first = arriving(2, 40, 10, [0.1, 0.2, 0.6])
    second = arriving(2, 9, 50, [0.1, 0.2, 0.6], seed=1)
    header = store.fit(first)
    data = torch.cat([header, store.update(header, None, first, score, config)], dim=1)
    data = torch.cat([header, store.update(header, data, second, score, config)], dim=1)
    assert data.shape == (2, store.nbytes)
    entries, tokens = store.decode(data)
    assert entries.valid is not None
    assert entries.keys.shape == (2, 3, 18, 16) and entries.valid.shape == (2, 3, 18)
    keys = torch.cat([first.entries.keys, second.entries.keys], dim=2)
    values = torch.cat([first.entries.values, second.entries.values], dim=2)
    for row in range(2):
        quotas = store.quotas(header)[row].tolist()
        assert len(set(quotas)) > 1
        for head in range(3):
            best = keys[row, head].square().sum(1).argsort(descending=True)[: quotas[head]]
            mine = entries.valid[row, head]
            assert sorted(tokens[row, mine].tolist()) == sorted((best + 10).tolist())
            assert not entries.valid[row, [h for h in range(3) if h != head]][:, mine].any()
            place = tokens[row, mine] - 10
            for found, exact in ((entries.keys, keys), (entries.values, values)):
                error = (found[row, head, mine] - exact[row, head, place]).square().mean()
                assert error < 0.02 * exact[row, head, place].square().mean()
    alone = store.fit(_row(first, 1))
    torch.testing.assert_close(alone, header[1:], rtol=0, atol=0)


def _row(tokens: Arriving, row: int) -> Arriving:
    rows = slice(row, row + 1)

    def cut(entries: Entries) -> Entries:
        return Entries(entries.keys[rows], entries.values[rows])

    return Arriving(
        cut(tokens.entries), tokens.tokens[rows], cut(tokens.decoded), 1, tokens.queries
    )


def test_slots_without_a_token_are_invalid() -> None:
    store = HeadLandmarkStore(SHAPE, torch.float32, 6)
    few = arriving(1, 2, 0, [0.1, 0.1, 0.1])
    header = store.fit(few)
    data = torch.cat([header, store.update(header, None, few, score, ADMSConfig())], dim=1)
    entries, tokens = store.decode(data)
    assert entries.valid is not None
    assert (tokens >= 0).sum() == 6
    assert (entries.valid & (tokens >= 0)[:, None]).sum(2).tolist() == [[2, 2, 2]]


@pytest.mark.parametrize("metric", list(METRICS))
def test_a_padded_row_is_the_row_alone(metric: str) -> None:
    model = tiny_llama()
    total = 704
    together = enable_adms_llm(model, **SIZES, importance_metric=metric)
    alone = enable_adms_llm(model, **SIZES, importance_metric=metric)
    check_padded_row(model, together, alone, total=total)
    assert held(together) <= together.nbytes
    middle = together.layers[1].middle
    assert isinstance(middle.plan.store, HeadLandmarkStore)
    entries, tokens = middle.landmarks([total - 68 - 24, total - 68])
    first, second = ({*tokens[1, entries.valid[1, head]].tolist()} for head in range(2))
    assert first != second, "heads chose the same tokens"


def test_the_bytes_are_those_of_the_layers_landmarks_and_all_that_fits_is_exact() -> None:
    model = tiny_llama()
    shared = enable_adms_llm(model, **{**SIZES, "use_adaptive_budget": False})
    cache = enable_adms_llm(model, **SIZES)
    ids = random_ids(1, 120)
    for given in (shared, cache):
        feed(model, ids, given)
    assert cache.max_nbytes == shared.max_nbytes
    expected = model(ids).logits
    again = feed(model, ids[:, :1], enable_adms_llm(model, **SIZES))
    torch.testing.assert_close(again, expected[:, :1], atol=1e-5, rtol=1e-5)
    whole = feed(model, ids, enable_adms_llm(model, **SIZES))
    torch.testing.assert_close(whole, expected.detach(), atol=1e-5, rtol=1e-5)


def test_a_saved_stream_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    model = tiny_llama()
    cache = enable_adms_llm(model, **SIZES)
    feed(model, random_ids(2, 700), cache)
    cache.save(tmp_path / "stream.adms")
    more = random_ids(2, 50, seed=1)
    expected = feed(model, more, cache)
    disable_adms(model)
    loaded = ADMSKVCache.load(tmp_path / "stream.adms", model=model)
    torch.testing.assert_close(feed(model, more, loaded), expected, rtol=0, atol=0)
