"""Which tokens become landmarks, settled over all layers."""

import torch

from adms.config import ADMSConfig
from adms.entries import TokenShape
from adms.tiers.candidates import NEIGHBOURS, PASSAGE, Candidates, settle, smoothed
from adms.tiers.landmarks import CONTEXT, LandmarkStore

CONFIG = ADMSConfig(coverage_priority=0.0)


def arriving(scores: list[float], layer: int) -> Candidates:
    count = len(scores)
    records = torch.full((1, count, 3), layer, dtype=torch.uint8)
    records[0, :, 0] = torch.arange(count)
    return Candidates([0], records, torch.arange(count)[None], torch.tensor([[scores]]), None)


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


def test_a_passage_that_arrives_in_two_parts() -> None:
    """Its second half counts as it would have together, with the rows' padding between."""
    assert CONTEXT == NEIGHBOURS // 2 + PASSAGE // 2
    scores = torch.rand(2, 90, generator=torch.Generator().manual_seed(0))
    whole = smoothed(scores, torch.ones(2, 90, dtype=torch.bool))
    # The first row's first part ends ten tokens earlier than the second row's.
    cuts, before = (40, 50), None
    for part in range(2):
        own = [row[:cut] if part == 0 else row[cut:] for row, cut in zip(scores, cuts, strict=True)]
        tokens = torch.full((2, 50), -1)
        padded = torch.zeros(2, 2, 50)
        for row, found in enumerate(own):
            tokens[row, : len(found)] = torch.arange(len(found)) + part * cuts[row]
            # Layers whose mean it is.
            padded[:, row, : len(found)] = torch.stack([found - 1, found + 1])
        records = torch.zeros(2, 2, 50, 3, dtype=torch.uint8)
        candidates = Candidates([0, 1], records, tokens, padded, None, before)
        settle([[candidates]], [50], CONFIG)
        before = candidates.before
        assert before is not None and candidates.present is not None
    for row, cut in enumerate(cuts):
        held = candidates.present.tokens[row]
        held, order = held[held >= 0].sort()
        assert held.tolist() == list(range(cut, 90))
        found = candidates.present.scores[row][candidates.present.tokens[row] >= 0][order]
        torch.testing.assert_close(found, whole[row, cut:])
        torch.testing.assert_close(before[row], scores[row, -CONTEXT:])


def test_the_last_scores_lie_in_bytes_of_their_own() -> None:
    store = LandmarkStore(TokenShape(2, 8, 8), torch.float32, 5)
    last = torch.linspace(-3, 9e9, CONTEXT)[None].repeat(2, 1)
    last[1, :7] = -torch.inf
    data = torch.zeros(2, store.nbytes, dtype=torch.uint8)
    data[:, store.slots_end :] = store.context(last)
    found = store.read_context(data)
    assert (found[1, :7] == -torch.inf).all() and found[0].isfinite().all()
    torch.testing.assert_close(found[:, :1], torch.tensor([[-3.0], [-torch.inf]]))
    assert (store.read(data).tokens == -1).all()


def test_the_mean_over_layers_decides_for_all() -> None:
    # Each layer alone would choose another run of tokens; together the middle one wins.
    low, middle, high = [0.0] * 30, [2.0] * 30, [3.0] * 30
    first = arriving(high + middle + low, 1)
    second = arriving(low + middle + high, 2)
    settle([[first], [second]], [9, 9], CONFIG)
    for layer, candidates in ((1, first), (2, second)):
        assert candidates.present is not None
        chosen = candidates.present.tokens[0]
        # And the newest token, of which nobody knows yet what follows.
        assert (((chosen >= 30) & (chosen < 60)) | (chosen == 89)).all()
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
        found = later.present.tokens
        newest = found >= 88
        assert newest.sum() == 2
        assert ((found < 30) | newest).all() == stays
        assert (found >= 60).all() == (not stays)


def test_a_sentence_that_arrives_a_few_tokens_at_a_time_stays_whole() -> None:
    """Its first tokens are nothing out of the ordinary until its end is there."""
    loud = set(range(116, 124))
    kept: Candidates | None = None
    for start in range(0, 400, 8):
        part = range(start, start + 8)
        later = arriving([6.0 if token in loud else 0.1 * (token % 7) for token in part], 1)
        later.tokens = later.tokens + start
        if kept is not None:
            later.present, later.before = kept.present, kept.before
        settle([[later]], [64], CONFIG)
        kept = later
    assert kept is not None and kept.present is not None
    assert set(range(108, 128)) <= set(kept.present.tokens[0].tolist())


def test_room_for_more_than_there_is_stays_empty() -> None:
    candidates = arriving([1.0, 2.0], 1)
    settle([[candidates]], [4], CONFIG)
    assert candidates.present is not None
    assert sorted(candidates.present.tokens[0].tolist()) == [-1, -1, 0, 1]
