"""What spans are learned from, without a model."""

import copy

import pytest
import torch

from adms.attention import IntegratedAttentionConfig
from adms.attention.span_learner import SPAN_STEPS, SpanLearner
from adms.errors import ADMSTypeError, ADMSValueError

RECENT = 64


def near(layers: int, steps: int) -> torch.Tensor:
    """Mass that lies on the first steps alone, ``[L, S]``."""
    mass = torch.zeros(layers, SPAN_STEPS)
    mass[:, :steps] = 0.8 / steps
    return mass


def learned(learner: SpanLearner, mass: torch.Tensor, updates: int = 60) -> SpanLearner:
    for _ in range(updates):
        learner = learner.after(mass, 64)
    return learner


def test_a_new_learner_reads_everything() -> None:
    learner = SpanLearner(IntegratedAttentionConfig(), [0, 2], RECENT)
    assert [learner.span(0), learner.span(2)] == [None, None]
    assert learner.after(None, 1).steps == learner.steps


def test_spans_follow_where_attention_goes() -> None:
    mass = near(3, 4)
    mass[1] = 0.8 / SPAN_STEPS
    mass[2] = near(1, 8)[0]
    learner = learned(SpanLearner(IntegratedAttentionConfig(epsilon=0.0), [0, 1, 2], RECENT), mass)
    assert learner.span(0) == RECENT // 4
    assert learner.span(1) is None, "every step is needed"
    assert learner.span(2) == RECENT // 2
    report = learner.report()
    assert report["recent_entries_read"] < 0.8
    # Attention moves farther back: the next decision follows.
    far = learned(learner, near(3, 12))
    assert far.span(0) == RECENT * 3 // 4


def test_what_is_given_up_stays_within_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    config = IntegratedAttentionConfig(mass_bound=0.03)
    learner = SpanLearner(config, list(range(4)), RECENT)
    for _ in range(200):
        decay = 0.4 + 0.4 * torch.rand(4, 1, generator=generator)
        mass = 0.8 * (1 - decay) * decay ** torch.arange(SPAN_STEPS)
        learner = learner.after(mass, 64)
    report = learner.report()
    assert 0 < report["mass_given_up"] <= report["mass_given_up_worst_layer"] <= 0.03
    assert report["recent_entries_read"] < 0.9


def test_the_predictor_learns_by_gradient_and_the_refiner_by_reward() -> None:
    learner = SpanLearner(IntegratedAttentionConfig(), [0], RECENT)
    after = learned(learner, near(1, 4), updates=3)
    assert not torch.equal(after.predictor.linear.weight, learner.predictor.linear.weight)
    assert bool((after.refiner.table != 0).any())
    assert not bool((learner.refiner.table != 0).any()), "the learner before is left as it is"
    with torch.no_grad():
        share = learned(learner, near(1, 4)).predictor(torch.tensor([[0.25, 0.25, 0.8, 0.25]]))
    assert 0.2 < float(share) < 0.45


def test_a_bound_of_zero_changes_nothing() -> None:
    learner = SpanLearner(IntegratedAttentionConfig(mass_bound=0.0), [0], RECENT)
    assert learned(learner, torch.full((1, SPAN_STEPS), 0.01)).span(0) is None


def test_seeds_give_the_same_decisions_twice() -> None:
    def decisions(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(7)
        config = IntegratedAttentionConfig(seed=seed, epsilon=0.5, mass_bound=1.0, min_span=1)
        learner, found = SpanLearner(config, [0, 1, 2, 3], RECENT), []
        for _ in range(30):
            learner = learner.after(torch.rand(4, SPAN_STEPS, generator=generator) / 20, 1)
            found.append(learner.steps)
        return found

    assert decisions(0) == decisions(0)
    assert decisions(0) != decisions(1)


def test_a_copy_and_its_tensors_go_on_alike() -> None:
    learner = learned(
        SpanLearner(IntegratedAttentionConfig(epsilon=0.5), [0, 1], RECENT), near(2, 4), 9
    )
    twin = copy.deepcopy(learner)
    other = SpanLearner(IntegratedAttentionConfig(epsilon=0.5), [0, 1], RECENT)
    other.load_tensors(learner.tensors())
    expected = learned(learner, near(2, 9), 9)
    for again in (twin, other):
        found = learned(again, near(2, 9), 9)
        assert found.steps == expected.steps
        for name, part in expected.tensors().items():
            assert torch.equal(found.tensors()[name], part), name
    assert expected.nbytes == learner.nbytes
    broken = learner.tensors() | {"mass": torch.zeros(3)}
    with pytest.raises(ADMSValueError, match="no mass of"):
        other.load_tensors(broken)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"min_span": 0}, ADMSValueError, "a span of 0 reads nothing"),
        ({"mass_bound": 1.5}, ADMSValueError, r"mass_bound must lie in 0\.\.1, got 1\.5"),
        ({"mass_bound": "0.1"}, ADMSTypeError, "mass_bound must be a number"),
        ({"epsilon": 2.0}, ADMSValueError, "epsilon must be within"),
        ({"learning_rate": 0.0}, ADMSValueError, "learning_rate must be above 0"),
        ({"learn": 1}, ADMSTypeError, "learn must be True or False"),
    ],
)
def test_a_bad_configuration_is_refused(
    given: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        IntegratedAttentionConfig(**given)
