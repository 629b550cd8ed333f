"""Every metric against what it says, in float64."""

import pytest
import torch

from adms.entries import Entries
from adms.errors import ADMSValueError
from adms.importance import METRICS, Evidence, needs_queries
from adms.importance.expected_attention import query_statistics
from adms.importance.representatives import representatives

K, H, N, Q, D, E = 2, 4, 12, 10, 6, 5
NAMES = sorted(METRICS)
EVERY = pytest.mark.parametrize("name", NAMES)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entries_of(seed: int = 0, rows: int = 2) -> Entries:
    return Entries(random(seed, rows, K, N, D), random(seed + 1, rows, K, N, E))


def evidence_of(entries: Entries, queries: torch.Tensor | None = None) -> Evidence:
    rows = entries.keys.shape[0]
    if queries is None:
        queries = random(9, rows, H, Q, D)
    decoded = Entries(entries.keys * 0.9, entries.values * 0.9)
    return Evidence(queries, lambda: decoded, torch.full((rows,), 12.0), torch.full((rows,), 10.0))


def test_the_metrics_of_the_design_are_there() -> None:
    wanted = {"value_norm", "key_norm", "mixed", "attention", "key_diff", "expected_attention"}
    assert wanted | {"snap", "coding_error"} <= set(NAMES)


@EVERY
def test_scores_are_one_finite_number_a_token(name: str) -> None:
    entries = entries_of()
    scores = METRICS.get(name)(entries, evidence_of(entries))
    assert scores.shape == (2, N) and scores.isfinite().all()


@EVERY
def test_finite_on_degenerate_tokens(name: str) -> None:
    keys, values = torch.zeros(2, K, N, D), torch.zeros(2, K, N, E)
    keys[1] = 1e4
    values[1] = 1e4
    entries = Entries(keys, values)
    evidence = Evidence(random(0, 2, H, Q, D), lambda: entries, torch.zeros(2), torch.zeros(2))
    assert METRICS.get(name)(entries, evidence).isfinite().all()


@EVERY
def test_rows_are_scored_apart(name: str) -> None:
    entries, queries = entries_of(), random(9, 2, H, Q, D)
    both = METRICS.get(name)(entries, evidence_of(entries, queries))
    for row in range(2):
        alone = Entries(entries.keys[row : row + 1], entries.values[row : row + 1])
        scores = METRICS.get(name)(alone, evidence_of(alone, queries[row : row + 1]))
        torch.testing.assert_close(scores[0], both[row], atol=1e-5, rtol=1e-5)


# snap looks at neighbours on purpose.
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"snap"}))
def test_order_of_tokens_does_not_matter(name: str) -> None:
    entries, order = entries_of(), torch.randperm(N, generator=torch.Generator().manual_seed(0))
    mixed = Entries(entries.keys[:, :, order], entries.values[:, :, order])
    metric = METRICS.get(name)
    before, after = metric(entries, evidence_of(entries)), metric(mixed, evidence_of(mixed))
    torch.testing.assert_close(after, before[:, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["attention", "snap", "expected_attention"])
def test_metrics_of_queries_ask_for_them_and_skip_padding(name: str) -> None:
    metric, entries = METRICS.get(name), entries_of()
    assert needs_queries(metric)
    queries = random(9, 2, H, Q, D)
    padded = torch.cat([torch.zeros(2, H, 3, D), queries], dim=2)
    torch.testing.assert_close(
        metric(entries, evidence_of(entries, padded)),
        metric(entries, evidence_of(entries, queries)),
        atol=1e-5,
        rtol=1e-5,
    )
    none = Evidence(None, lambda: entries, torch.ones(2), torch.ones(2))
    with pytest.raises(ADMSValueError, match=f"'{name}' looks at queries, and none were kept"):
        metric(entries, none)


def oracle_attention(entries: Entries, queries: torch.Tensor) -> torch.Tensor:
    """``[B, H, Q, N]`` in float64."""
    keys = entries.keys.double().repeat_interleave(H // K, 1)
    return (queries.double() @ keys.transpose(2, 3) / D**0.5).softmax(-1)


def test_attention_is_the_mean_share() -> None:
    entries, queries = entries_of(), random(9, 2, H, Q, D)
    expected = oracle_attention(entries, queries).mean((1, 2)) * N
    actual = METRICS.get("attention")(entries, evidence_of(entries, queries))
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.mean(1), torch.ones(2))


def test_snap_takes_the_best_of_the_neighbours() -> None:
    entries, queries = entries_of(), random(9, 2, H, Q, D)
    shares = oracle_attention(entries, queries).mean(2) * N
    expected = torch.stack(
        [shares[:, :, max(0, token - 3) : token + 4].amax(2).mean(1) for token in range(N)], dim=1
    )
    actual = METRICS.get("snap")(entries, evidence_of(entries, queries))
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


def test_expected_attention_is_what_gaussian_queries_pay() -> None:
    """The closed form against many queries drawn from the same Gaussian."""
    generator = torch.Generator().manual_seed(3)
    spread = 0.3 * torch.randn(D, D, generator=generator)
    mean = torch.randn(D, generator=generator)
    queries = torch.randn(1, 1, 100_000, D, generator=generator) @ spread.T + mean
    entries = Entries(random(5, 1, 1, N, D), random(6, 1, 1, N, E))
    evidence = Evidence(queries, lambda: entries, torch.ones(1), torch.ones(1))
    actual = METRICS.get("expected_attention")(entries, evidence)[0]
    scores = queries[0, 0].double() @ entries.keys[0, 0].double().T / D**0.5
    expected = scores.exp().mean(0) / scores.exp().mean(0).sum()
    expected = expected * entries.values[0, 0].double().norm(dim=1) * N
    torch.testing.assert_close(actual.double(), expected, atol=0.02, rtol=0.02)


def test_query_statistics_match_float64() -> None:
    queries = random(9, 2, H, Q, D)
    mean, covariance = query_statistics(queries)
    exact = queries.double()
    torch.testing.assert_close(mean.double(), exact.mean(2), atol=1e-5, rtol=1e-5)
    for head in range(H):
        expected = torch.cov(exact[1, head].T, correction=0)
        torch.testing.assert_close(covariance[1, head].double(), expected, atol=1e-5, rtol=1e-5)


def test_norms_and_key_diff() -> None:
    entries = entries_of()
    evidence = evidence_of(entries)
    keys, values = entries.keys.double(), entries.values.double()
    key = keys.transpose(1, 2).flatten(2).norm(dim=2)
    value = values.transpose(1, 2).flatten(2).norm(dim=2)
    direction = torch.nn.functional.normalize(keys, dim=3).mean(2, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(keys, direction, dim=3).mean(1)
    expected = {
        "key_norm": key,
        "value_norm": value,
        "mixed": (key * value).sqrt(),
        "key_diff": -cosine,
    }
    for name, scores in expected.items():
        actual = METRICS.get(name)(entries, evidence)
        torch.testing.assert_close(actual.double(), scores, atol=1e-5, rtol=1e-5)


def test_a_token_stands_for_itself_where_none_are_folded() -> None:
    entries = entries_of()
    found = representatives(entries, entries, 3)
    assert torch.equal(found.keys, entries.keys) and torch.equal(found.values, entries.values)


def test_the_nearest_entry_of_its_block_stands_for_a_folded_token() -> None:
    entries = entries_of()
    weight = torch.tensor([0.0, 0, -1e4] * 2).expand(2, K, 6)
    decoded = Entries(random(7, 2, K, 6, D), random(8, 2, K, 6, E), weight)
    found = representatives(entries, decoded, 6)
    for row in range(2):
        for head in range(K):
            for token in range(N):
                first = token // 6 * 3
                # The third entry of each block stands for nothing.
                keys = decoded.keys[row, head, first : first + 2]
                nearest = int((keys - entries.keys[row, head, token]).norm(dim=1).argmin()) + first
                assert torch.equal(found.keys[row, head, token], decoded.keys[row, head, nearest])
                assert torch.equal(
                    found.values[row, head, token], decoded.values[row, head, nearest]
                )
