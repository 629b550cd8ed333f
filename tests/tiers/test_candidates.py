"""Which tokens become landmarks, settled over all layers."""

import torch

from adms.config import ADMSConfig
from adms.tiers.candidates import Candidates, settle, smoothed

CONFIG = ADMSConfig(coverage_priority=0.0)


def arriving(scores: list[float], layer: int) -> Candidates:
    count = len(scores)
    records = torch.full((1, count, 3), layer, dtype=torch.uint8)
    records[0, :, 0] = torch.arange(count)
    return Candidates([0], records, torch.arange(count)[None], torch.tensor([scores]), None)


def test_smoothing_is_a_mean_over_what_is_there() -> None:
    scores = torch.tensor([[1.0, 2.0, 4.0, 8.0, 100.0]])
    present = torch.tensor([[True, True, True, True, False]])
    expected = torch.tensor([[7 / 3, 15 / 4, 15 / 4, 14 / 3]])
    torch.testing.assert_close(smoothed(scores, present)[:, :4], expected)


def test_the_mean_over_layers_decides_for_all() -> None:
    # Each layer alone would choose another run of tokens; together the middle one wins.
    low, high = [0.0] * 5, [3.0] * 5
    first = arriving(high + [2.0] * 5 + low, 1)
    second = arriving(low + [2.0] * 5 + high, 2)
    settle([[first], [second]], [5, 5], CONFIG)
    for layer, candidates in ((1, first), (2, second)):
        assert candidates.present is not None
        chosen = candidates.present.tokens[0].sort().values
        assert chosen.tolist() == [5, 6, 7, 8, 9]
        # The records are the layer's own, those of the chosen tokens.
        assert (candidates.present.records[0, :, 1] == layer).all()
        assert torch.equal(candidates.present.records[0, :, 0].long(), candidates.present.tokens[0])


def test_what_is_there_stays_unless_better_comes() -> None:
    first = arriving([5.0, 5.0, 5.0, 1.0, 1.0, 1.0], 1)
    settle([[first]], [4], CONFIG)
    later = arriving([2.0, 2.0, 9.0, 9.0, 9.0, 9.0], 1)
    later.tokens = later.tokens + 6
    later.present = first.present
    settle([[later]], [4], CONFIG)
    assert later.present is not None
    assert set(later.present.tokens[0].tolist()) == {8, 9, 10, 11}


def test_room_for_more_than_there_is_stays_empty() -> None:
    candidates = arriving([1.0, 2.0], 1)
    settle([[candidates]], [4], CONFIG)
    assert candidates.present is not None
    assert sorted(candidates.present.tokens[0].tolist()) == [-1, -1, 0, 1]
