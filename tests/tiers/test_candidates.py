"""Which tokens become landmarks, settled over all layers."""

import torch

from adms.config import ADMSConfig
from adms.tiers.candidates import NEIGHBOURS, PASSAGE, Candidates, settle, smoothed

CONFIG = ADMSConfig(coverage_priority=0.0)


def arriving(scores: list[float], layer: int) -> Candidates:
    count = len(scores)
    records = torch.full((1, count, 3), layer, dtype=torch.uint8)
    records[0, :, 0] = torch.arange(count)
    return Candidates([0], records, torch.arange(count)[None], torch.tensor([scores]), None)


def test_a_token_counts_as_much_as_the_best_mean_around_it() -> None:
    scores = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    present = torch.ones(2, 40, dtype=torch.bool)
    present[1, 33:] = False
    found = smoothed(scores, present)
    for row, count in enumerate((40, 33)):
        own = scores[row, :count]
        reach = NEIGHBOURS // 2
        means = [own[max(0, at - reach) : at + reach + 1].mean() for at in range(count)]
        reach = PASSAGE // 2
        expected = [max(means[max(0, at - reach) : at + reach + 1]) for at in range(count)]
        torch.testing.assert_close(found[row, :count], torch.stack(expected))
    assert (found[1, 33:] == 0).all()


def test_a_passage_stays_whole() -> None:
    """Also those of its tokens that are nothing out of the ordinary, among louder single ones."""
    scores = [0.5] * 200
    scores[60:84] = [3.0, 0.5, 2.0] * 8
    for alone in range(100, 200, 20):
        scores[alone] = 5.0
    candidates = arriving(scores, 1)
    settle([[candidates]], [32], CONFIG)
    assert candidates.present is not None
    assert set(range(60, 84)) <= set(candidates.present.tokens[0].tolist())


def test_the_mean_over_layers_decides_for_all() -> None:
    # Each layer alone would choose another run of tokens; together the middle one wins.
    low, middle, high = [0.0] * 30, [2.0] * 30, [3.0] * 30
    first = arriving(high + middle + low, 1)
    second = arriving(low + middle + high, 2)
    settle([[first], [second]], [9, 9], CONFIG)
    for layer, candidates in ((1, first), (2, second)):
        assert candidates.present is not None
        chosen = candidates.present.tokens[0]
        assert ((chosen >= 30) & (chosen < 60)).all()
        # The records are the layer's own, those of the chosen tokens.
        assert (candidates.present.records[0, :, 1] == layer).all()
        assert torch.equal(candidates.present.records[0, :, 0].long(), chosen)


def test_what_is_there_stays_unless_better_comes() -> None:
    first = arriving([5.0] * 30 + [1.0] * 30, 1)
    settle([[first]], [20], CONFIG)
    before = first.present
    for score, stays in ((2.0, True), (9.0, False)):
        later = arriving([score] * 30, 1)
        later.tokens = later.tokens + 60
        later.present = before
        settle([[later]], [20], CONFIG)
        assert later.present is not None
        assert (later.present.tokens < 30).all() == stays
        assert (later.present.tokens >= 60).all() == (not stays)


def test_room_for_more_than_there_is_stays_empty() -> None:
    candidates = arriving([1.0, 2.0], 1)
    settle([[candidates]], [4], CONFIG)
    assert candidates.present is not None
    assert sorted(candidates.present.tokens[0].tolist()) == [-1, -1, 0, 1]
