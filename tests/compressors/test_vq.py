"""K-means and what ``vq`` and ``summary`` make of clusters, against float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adms.compressors import COMPRESSORS, LayerContext
from adms.compressors.merging import Merged, MergingCoder, query_moments, second_order
from adms.compressors.summary import SummaryCoder
from adms.compressors.vq import VQCoder, assign, kmeans, members
from adms.config import ADMSConfig
from adms.entries import Entries
from adms.errors import ADMSValueError
from tests.compressors.material import SHAPE, attend, some_queries, tokens


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inertia(features: torch.Tensor, index: torch.Tensor, clusters: int) -> torch.Tensor:
    """Squared distances from the clusters' means in float64: ``[P]``."""
    features, member = features.double(), members(index, clusters).double()
    means = member @ features / member.sum(2, keepdim=True).clamp(min=1)
    own = means.gather(1, index[..., None].expand_as(features))
    return (features - own).square().sum((1, 2))


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 30),
    clusters=st.integers(1, 12),
    size=st.integers(1, 10),
)
def test_assigns_to_the_nearest(seed: int, count: int, clusters: int, size: int) -> None:
    features, centroids = random(seed, 3, count, size), random(seed + 1, 3, clusters, size)
    distance = torch.cdist(features.double(), centroids.double())
    chosen = distance.gather(2, assign(features, centroids)[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.amin(2), atol=1e-5, rtol=1e-5)


def test_more_iterations_never_fit_worse() -> None:
    features = random(0, 20, 40, 6)
    before = kmeans(features, 8, iterations=0)
    last = inertia(features, before, 8)
    for iterations in (1, 2, 4, 8, 16):
        fit = inertia(features, kmeans(features, 8, iterations), 8)
        assert (fit <= last + 1e-6).all()
        last = fit
    assert (last < 0.8 * inertia(features, before, 8)).all()


def test_finds_clusters_that_lie_far_apart() -> None:
    topic = torch.arange(24) * 7 % 4
    centres = torch.eye(4) * 100
    features = (centres[topic] + 0.1 * random(1, 24, 4))[None]
    index = kmeans(features, 4, iterations=8)[0]
    pairs = {(int(own), int(found)) for own, found in zip(topic, index, strict=True)}
    assert len(pairs) == 4 and len({found for _, found in pairs}) == 4


def test_as_many_clusters_as_tokens_keep_each() -> None:
    assert kmeans(random(0, 2, 5, 3), 7).tolist() == [[0, 1, 2, 3, 4]] * 2


def vq_coder(block: int, clusters: int) -> VQCoder:
    return VQCoder(LayerContext(SHAPE), 10**6, block, clusters)


def merged(coder: MergingCoder, entries: Entries, queries: torch.Tensor | None) -> Entries:
    """What a coder makes of tokens before storage."""
    extra = coder.fit_extra(entries, queries)
    block = coder.block_tokens
    keys, values = entries.keys.unflatten(2, (-1, block)), entries.values.unflatten(2, (-1, block))
    result: Merged = coder.merge(extra, keys, values, None)
    return Entries(
        result.keys.flatten(2, 3), result.values.flatten(2, 3), result.log_weight.flatten(2)
    )


def test_an_entry_for_three_equal_tokens_is_three_tokens() -> None:
    """log 3 equals three duplicates, whatever the queries are."""
    distinct = tokens(0, 4)
    copies = Entries(distinct.keys.repeat_interleave(3, 2), distinct.values.repeat_interleave(3, 2))
    entries = merged(vq_coder(12, 4), copies, some_queries(0))
    torch.testing.assert_close(entries.log_weight, torch.full((1, 2, 4), math.log(3)))
    for seed in range(5):
        queries = some_queries(seed)
        torch.testing.assert_close(
            attend(queries, entries), attend(queries, copies), atol=1e-5, rtol=1e-5
        )


def test_clusters_without_tokens_weigh_nothing() -> None:
    same = tokens(0, 1)
    entries = Entries(same.keys.expand(-1, -1, 8, -1), same.values.expand(-1, -1, 8, -1))
    found = merged(vq_coder(8, 4), entries, some_queries(0))
    assert found.log_weight is not None
    torch.testing.assert_close(found.log_weight.exp().sum(2), torch.full((1, 2), 8.0))
    queries = some_queries(1)
    torch.testing.assert_close(
        attend(queries, found), attend(queries, entries), atol=1e-5, rtol=1e-5
    )


def test_entries_come_in_the_order_of_the_text() -> None:
    """Topics that follow each other: entry i stands for topic i."""
    centres = random(0, 2, 4, 16) * 20
    keys = centres.repeat_interleave(4, 1)[None] + 0.01 * random(1, 1, 2, 16, 16)
    entries = Entries(keys, random(2, 1, 2, 16, 8))
    found = merged(vq_coder(16, 4), entries, some_queries(0))
    torch.testing.assert_close(found.keys[0], centres, atol=0.05, rtol=0.01)


def test_second_order_term_matches_float64_and_helps() -> None:
    queries = some_queries(3, count=200)
    moments = query_moments(queries, 2)
    oracle = queries.double().unflatten(1, (2, 2)).square().mean((2, 3))
    torch.testing.assert_close(moments.double(), oracle, atol=1e-5, rtol=1e-5)
    keys = 0.7 * random(4, 1, 2, 32, 16)
    variance = keys.var(2, correction=0)[:, :, None, None]
    term = second_order(variance, moments)[..., 0, 0]
    expected = (variance[:, :, 0, 0].double() * oracle).sum(2) / 32
    torch.testing.assert_close(term.double(), expected, atol=1e-5, rtol=1e-5)
    grouped = queries.unflatten(1, (2, 2)).flatten(2, 3)
    exact = (grouped @ keys.transpose(2, 3) / 4).logsumexp(3)
    plain = (grouped @ keys.mean(2, keepdim=True).transpose(2, 3) / 4)[..., 0] + math.log(32)
    assert ((exact - plain - term[..., None]).mean(2).abs() < 0.3 * (exact - plain).mean(2)).all()


def test_padding_is_no_query() -> None:
    queries = some_queries(0)
    padded = torch.cat([torch.zeros_like(queries), queries], dim=2)
    torch.testing.assert_close(query_moments(padded, 2), query_moments(queries, 2))


def test_summary_is_the_mean_of_neighbours() -> None:
    coder = SummaryCoder(LayerContext(SHAPE), 10**6)
    entries = tokens(5, 6 * coder.block_tokens)
    found = merged(coder, entries, None)
    keys = entries.keys.unflatten(2, (6, -1)).mean(3)
    torch.testing.assert_close(found.keys, keys)
    torch.testing.assert_close(found.values, entries.values.unflatten(2, (6, -1)).mean(3))
    count = math.log(coder.block_tokens)
    torch.testing.assert_close(found.log_weight, torch.full((1, 2, 6), count))


def test_num_clusters_decides_the_block() -> None:
    vq = COMPRESSORS.get("vq")
    assert vq.block_tokens(ADMSConfig(compressed_budget=4096)) == 128
    assert vq.block_tokens(ADMSConfig(compressed_budget=128)) == 16
    config = ADMSConfig(compressed_budget=128, num_clusters=30)
    assert vq.block_tokens(config) == 60
    assert vq.bind(LayerContext(SHAPE), 10**5, config).entries_per_record == 30
    with pytest.raises(ADMSValueError, match="num_clusters=64.*use at most 63"):
        vq.block_tokens(ADMSConfig(compressed_budget=128, num_clusters=64))
