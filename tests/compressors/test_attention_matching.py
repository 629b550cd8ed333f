"""``attention_matching``: fitted to queries, judged on others, or else plain eviction."""

import pytest
import torch

from adms.compressors import COMPRESSORS, LayerContext
from adms.compressors import attention_matching as module
from adms.compressors.attention_matching import AttentionMatchingCoder
from adms.entries import Entries
from adms.errors import ADMSValueError
from tests.compressors.material import SHAPE, attend, some_queries, tokens

BLOCK = 32
KEPT = BLOCK // module.TOKENS_PER_ENTRY


def coder_of(context: LayerContext | None = None) -> AttentionMatchingCoder:
    return AttentionMatchingCoder(context or LayerContext(SHAPE), 10**6, BLOCK)


def merged(entries: Entries, queries: torch.Tensor, coder: AttentionMatchingCoder) -> Entries:
    """Entries of one block before storage."""
    extra = coder.fit_extra(entries, queries)
    found = coder.merge(extra, entries.keys[:, :, None], entries.values[:, :, None], queries)
    return Entries(found.keys[:, :, 0], found.values[:, :, 0], found.log_weight[:, :, 0])


def contribution(queries: torch.Tensor, entries: Entries) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-mass ``[B, H, Q]`` and output of entries, in float64."""
    keys = entries.keys.double().repeat_interleave(2, 1)
    scores = queries.double() @ keys.transpose(2, 3) / 4
    if entries.log_weight is not None:
        scores = scores + entries.log_weight.double().repeat_interleave(2, 1)[:, :, None]
    return scores.logsumexp(3), attend(queries, entries)


def test_keeps_keys_of_most_attention_as_they_are_in_text_order() -> None:
    entries, queries = tokens(0, BLOCK), some_queries(0, count=40)
    found = merged(entries, queries, coder_of())
    index = torch.cdist(found.keys, entries.keys).argmin(3)
    for head in range(2):
        own = index[0, head]
        assert (own[1:] > own[:-1]).all()
        assert torch.equal(found.keys[0, head], entries.keys[0, head, own])
        scores = queries[0, 2 * head : 2 * head + 2].flatten(0, 1) @ entries.keys[0, head].T / 4
        seen = scores.softmax(1).square().sum(0)
        # Also the few queries of the header count, so the order is nearly that of these alone.
        best = set(seen.argsort(descending=True)[: KEPT + 2].tolist())
        assert len(best & set(own.tolist())) >= KEPT - 1


def test_fits_mass_and_output_better_than_eviction_on_new_queries() -> None:
    fitted_error, evicted_error = [], []
    for seed in range(10):
        entries, queries = tokens(seed, BLOCK), some_queries(seed, count=80)
        found = merged(entries, queries[:, :, :40], coder_of())
        index = torch.cdist(found.keys, entries.keys).argmin(3)[..., None]
        values = entries.values.gather(2, index.expand(-1, -1, -1, 8))
        later = queries[:, :, 40:]
        mass, output = contribution(later, entries)
        for part, errors in ((found, fitted_error), (Entries(found.keys, values), evicted_error)):
            new_mass, new_output = contribution(later, part)
            ratio = (new_mass - mass).exp()
            errors.append(((ratio[..., None] * new_output - output) ** 2).mean())
    assert sum(fitted_error) < 0.3 * sum(evicted_error)


def test_plain_eviction_where_held_out_error_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the queries say one thing, the held-out half another that eviction serves better."""
    entries, queries = tokens(1, BLOCK), some_queries(1, count=40)
    original = module._fit

    def spoilt(choice: module.Choice, output: torch.Tensor, there: torch.Tensor):  # type: ignore[no-untyped-def]
        log_weight, values = original(choice, output, there)
        # The fit of head 0 is ruined, that of head 1 left alone.
        values[:, :, 0] += 100.0
        return log_weight, values

    monkeypatch.setattr(module, "_fit", spoilt)
    found = merged(entries, queries, coder_of())
    index = torch.cdist(found.keys, entries.keys).argmin(3)[..., None]
    own = entries.values.gather(2, index.expand(-1, -1, -1, 8))
    assert found.log_weight is not None
    assert (found.log_weight[:, 0] == 0).all() and (found.log_weight[:, 1] != 0).any()
    assert torch.equal(found.values[:, 0], own[:, 0])
    assert not torch.equal(found.values[:, 1], own[:, 1])


def test_identical_tokens_become_entries_that_count_all() -> None:
    one = tokens(0, 1)
    entries = Entries(one.keys.expand(-1, -1, BLOCK, -1), one.values.expand(-1, -1, BLOCK, -1))
    found = merged(entries, some_queries(0), coder_of())
    assert found.log_weight is not None
    total = found.log_weight.exp().sum(2)
    torch.testing.assert_close(total, torch.full((1, 2), float(BLOCK)), atol=0.05, rtol=0)


def test_padding_among_the_queries_changes_nothing() -> None:
    entries, queries = tokens(2, BLOCK), some_queries(2, count=20)
    coder = coder_of()
    extra = coder.fit_extra(entries, queries)
    padded = torch.cat([queries, torch.zeros(1, 4, 1, 16)], dim=2)
    results = [
        coder.merge(extra, entries.keys[:, :, None], entries.values[:, :, None], given)
        for given in (queries, padded)
    ]
    # The held-out half is another, so only what is fitted on all must agree.
    torch.testing.assert_close(results[0].keys, results[1].keys)
    fits = [part.log_weight for part in results]
    both = (fits[0] != 0) & (fits[1] != 0)
    assert both.any()
    torch.testing.assert_close(fits[0][both], fits[1][both], atol=1e-3, rtol=1e-3)


def test_scores_are_taken_at_the_distances_to_come() -> None:
    asked: list[torch.Tensor] = []

    def rotate(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        asked.append(positions)
        angle = positions[:, None, :, None] / 7
        first, second = states.chunk(2, dim=3)
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ],
            dim=3,
        )

    entries, queries = tokens(3, BLOCK), some_queries(3)
    rotated = coder_of(LayerContext(SHAPE, rotate=rotate, distance=64))
    found = merged(entries, queries, rotated)
    keys, places = asked
    assert keys.tolist() == [list(range(BLOCK))]
    assert places.min() >= BLOCK + 64
    assert places.max() <= BLOCK + 64 + rotated.capacity
    # What is stored is not rotated: attention does that.
    distance = torch.cdist(found.keys, entries.keys).amin(3)
    torch.testing.assert_close(distance, torch.zeros_like(distance), atol=0.01, rtol=0)
    plain = merged(entries, queries, coder_of())
    assert not torch.equal(found.log_weight, plain.log_weight)  # type: ignore[arg-type]


def test_without_queries_it_says_so() -> None:
    compressor = COMPRESSORS.get("attention_matching")
    with pytest.raises(ADMSValueError, match="fits what it keeps to queries, and none were given"):
        coder_of().fit(tokens(0, BLOCK), None)
    assert compressor.needs_rotation
