"""Which tokens are kept: by score, with a share spread over the text."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adms.budget import select_landmarks


def choose(
    scores: list[float], tokens: list[int], count: int, segments: int = 4, priority: float = 0.0
) -> list[int]:
    chosen = select_landmarks(
        torch.tensor([scores]), torch.tensor([tokens]), count, segments=segments, priority=priority
    )
    return chosen[0].tolist()


def test_the_best_scores_win_without_coverage() -> None:
    assert choose([0.1, 0.9, 0.5, 0.7], [0, 1, 2, 3], 2) == [1, 3]


def test_absent_candidates_are_chosen_last() -> None:
    assert choose([0.1, 0.9, 0.5, 0.7], [0, -1, 2, -1], 3)[:2] == [2, 0]


def test_coverage_gives_every_segment_its_share() -> None:
    scores = [float(token) for token in range(40)]
    chosen = choose(scores, list(range(40)), 8, segments=4, priority=0.5)
    # One place for the best of each quarter, four for the best of the rest.
    assert sorted(chosen) == [9, 19, 29, 35, 36, 37, 38, 39]


def test_ties_go_to_the_earlier_token() -> None:
    assert choose([1.0] * 5, list(range(5)), 2) == [0, 1]


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    candidates=st.integers(1, 40),
    count=st.integers(1, 40),
    segments=st.integers(1, 6),
    priority=st.floats(0, 1),
)
def test_choices_are_distinct_and_keep_the_best(
    seed: int, candidates: int, count: int, segments: int, priority: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, candidates, generator=generator)
    tokens = torch.arange(candidates).expand(2, -1).clone()
    tokens[torch.rand(2, candidates, generator=generator) < 0.2] = -1
    count = min(count, candidates)
    chosen = select_landmarks(scores, tokens, count, segments=segments, priority=priority)
    for row in range(2):
        picked = chosen[row].tolist()
        present = [index for index in range(candidates) if tokens[row, index] >= 0]
        assert len(set(picked)) == count
        assert len(set(picked) & set(present)) == min(count, len(present))
        # What coverage does not deal out goes to the best: these are always kept.
        free = count - int(count * priority) // segments * segments
        best = sorted(present, key=lambda index: -float(scores[row, index]))[:free]
        assert set(best) <= set(picked)
