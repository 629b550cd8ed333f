"""The refiner: Q-learning against a hand-made table, determinism, saving, the state grid."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adms.attention.refiner import Refiner, StateGrid
from adms.errors import ADMSTypeError, ADMSValueError


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 2), st.floats(-2, 2), st.integers(-1, 4)),
        max_size=30,
    )
)
def test_one_transition_at_a_time_is_textbook_q_learning(transitions):
    refiner = Refiner(states=5, actions=3, alpha=0.3, gamma=0.8)
    table = {}
    for state, action, reward, following in transitions:
        refiner.update(state, action, reward, following)
        best = max(table.get((following, a), 0.0) for a in range(3)) if following >= 0 else 0.0
        old = table.get((state, action), 0.0)
        table[state, action] = old + 0.3 * (reward + 0.8 * best - old)
    for (state, action), value in table.items():
        assert refiner.get_value(state, action) == pytest.approx(value, abs=1e-4)


def test_many_transitions_at_once_move_by_the_mean_error_in_any_order():
    states = torch.tensor([[0, 0], [1, 0]])
    actions = torch.tensor([[1, 1], [0, 2]])
    rewards = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    following = torch.full((2, 2), -1)
    tables = []
    for order in ([0, 1], [1, 0]):
        refiner = Refiner(states=3, actions=3, alpha=0.5)
        refiner.update(*(t[order] for t in (states, actions, rewards, following)))
        tables.append(refiner.table)
    assert torch.equal(tables[0], tables[1])
    assert tables[0].tolist() == [[0.0, 1.0, 3.5], [2.5, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_it_learns_to_pass_through_a_poor_state_for_a_rich_one():
    """A chain in which the greedy first step is the wrong one; gamma makes the difference."""
    learned = {}
    for gamma in (0.0, 0.9):
        refiner = Refiner(states=2, actions=2, alpha=0.2, gamma=gamma, epsilon=0.5, seed=1)
        state = 0
        for _ in range(600):
            action = refiner.choose_action(state)
            if state == 0:
                reward, following = (0.1, -1) if action == 0 else (0.0, 1)
            else:
                reward, following = 1.0, -1
            refiner.update(state, action, reward, following)
            state = max(following, 0)
        learned[gamma] = refiner.choose_action(0, explore=False)
    assert learned == {0.0: 0, 0.9: 1}


def test_ties_go_to_the_largest_action():
    refiner = Refiner(states=2, actions=4, epsilon=0.0)
    assert refiner.choose_action(0) == 3
    refiner.set_value(0, 1, 0.5)
    assert refiner.choose_action(0) == 1
    assert refiner.choose_actions(torch.tensor([[0, 1]])).tolist() == [[1, 3]]


def test_epsilon_is_the_share_of_exploration():
    refiner = Refiner(states=1, actions=10, epsilon=0.3, seed=2)
    chosen = refiner.choose_actions(torch.zeros(20000, dtype=torch.long))
    share = (chosen != 9).float().mean().item()
    assert share == pytest.approx(0.3 * 0.9, abs=0.015)
    calm = refiner.choose_actions(torch.zeros(100, dtype=torch.long), explore=False)
    assert (calm == 9).all()


def test_seeds_decide_and_nothing_else_does():
    def decisions(seed):
        refiner = Refiner(states=4, actions=10, epsilon=0.5, seed=seed)
        return [refiner.choose_action(i % 4) for i in range(40)]

    torch.manual_seed(1)
    first = decisions(7)
    before = torch.get_rng_state()
    assert decisions(7) == first != decisions(8)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_refiner_continues_the_same_way():
    refiner = Refiner(states=6, actions=4, alpha=0.2, gamma=0.5, epsilon=0.5, seed=3)
    for i in range(50):
        refiner.update(i % 6, refiner.choose_action(i % 6), float(i % 5), (i + 1) % 6)
    file = io.BytesIO()
    torch.save(refiner.state_dict(), file)
    file.seek(0)
    loaded = Refiner(states=6, actions=4, seed=99)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.table, refiner.table)
    assert (loaded.alpha, loaded.gamma, loaded.epsilon) == (0.2, 0.5, 0.5)
    follow = [(refiner.choose_action(i % 6), loaded.choose_action(i % 6)) for i in range(50)]
    assert all(a == b for a, b in follow)
    refiner.set_value(0, 0, 123.0)
    assert loaded.get_value(0, 0) != 123.0


@pytest.mark.parametrize(("states", "features", "bins"), [(10000, 4, 10), (81, 4, 3), (100, 2, 10)])
def test_every_cell_has_a_number_of_its_own(states, features, bins):
    grid = StateGrid(states, features)
    assert grid.bins == bins
    axis = (torch.arange(bins) + 0.5) / bins
    cells = torch.cartesian_prod(*[axis] * features)
    numbers = grid.encode(cells)
    assert len(numbers.unique()) == bins**features
    assert set(numbers.tolist()) <= set(range(states))
    assert torch.equal(grid.encode((grid.decode(numbers) + 0.5) / bins), numbers)


def test_values_at_and_beyond_the_bounds_fall_in_the_outer_cells():
    grid = StateGrid(16, 2)
    assert grid.decode(grid.encode(torch.tensor([[-5.0, 9.0], [0.0, 1.0]]))).tolist() == [
        [0, 3],
        [0, 3],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"states": 0}, "states must be at least 1"),
        ({"actions": 0}, "actions must be at least 1"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"alpha": 1.5}, "alpha must be above 0"),
        ({"gamma": 1.0}, "gamma must be at least 0 and below 1"),
        ({"epsilon": -0.1}, "epsilon must be within 0..1"),
    ],
)
def test_bad_settings_raise(arguments, message):
    with pytest.raises(ADMSValueError, match=message):
        Refiner(**arguments)


def test_bad_transitions_and_states_raise():
    refiner = Refiner(states=5, actions=3)
    with pytest.raises(ADMSValueError, match="state must be within 0..4"):
        refiner.choose_action(5)
    with pytest.raises(ADMSValueError, match="action must be within 0..2"):
        refiner.update(0, 3, 0.0, 0)
    with pytest.raises(ADMSValueError, match="reward must be finite"):
        refiner.update(0, 0, float("nan"), 0)
    with pytest.raises(ADMSValueError, match="of one size"):
        refiner.update(torch.tensor([0, 1]), torch.tensor([0]), 0.0, None)
    with pytest.raises(ADMSTypeError, match="state must be integers"):
        refiner.choose_actions(torch.tensor([0.5]))
    with pytest.raises(ADMSTypeError, match="must have the keys"):
        refiner.load_state_dict({"table": refiner.table})
    with pytest.raises(ADMSValueError, match=r"must be \[5, 3\]"):
        refiner.load_state_dict(Refiner(states=4, actions=3).state_dict())
    assert refiner.table.abs().max() == 0
    with pytest.raises(ADMSValueError, match="states must be at least"):
        StateGrid(15, 4)
    with pytest.raises(ADMSValueError, match="features must be finite"):
        StateGrid(16, 2).encode(torch.tensor([0.1, float("nan")]))
    with pytest.raises(ADMSValueError, match="must end in 2"):
        StateGrid(16, 2).encode(torch.zeros(3))
