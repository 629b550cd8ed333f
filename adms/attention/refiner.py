"""Tabular Q-learning that refines attention spans, and a state grid without collisions.

Letters: ``S`` states, ``A`` actions, ``F`` features of a state; ``...`` any shape of decisions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adms.attention.projections import check_positive
from adms.errors import ADMSTypeError, ADMSValueError


class StateGrid:
    """Numbers the cells of a grid over features in 0..1, one number per cell.

    A cell's number is its digits read in base ``bins``, so two cells never share one. Of ``states``
    numbers as many are used as fit: ``bins`` is the largest with ``bins ** features <= states``.

    Raises:
        ADMSValueError: fewer than ``2 ** features`` states, which can't tell any feature apart.
    """

    def __init__(self, states: int, features: int) -> None:
        check_positive("states", states)
        check_positive("features", features)
        if states < 2**features:
            raise ADMSValueError(
                f"states must be at least 2 ** features = {2**features}, got {states}; "
                "use more states"
            )
        # Counted in integers: 10000 ** (1 / 4) is a hair off 10 on some machines.
        bins = 2
        while (bins + 1) ** features <= states:
            bins += 1
        self.bins = bins
        self.features = features

    def encode(self, features: Tensor) -> Tensor:
        """Return the numbers ``[...]`` (int64, CPU) of the cells that ``[..., F]`` fall in.

        Values outside 0..1 count as the nearest bound.

        Raises:
            ADMSValueError: another number of features, or one that isn't finite.
        """
        if features.shape[-1] != self.features:
            raise ADMSValueError(
                f"features must end in {self.features}, got {list(features.shape)}; "
                "pass the features the grid was made for"
            )
        features = features.detach().to("cpu", torch.float64)
        if not bool(features.isfinite().all()):
            raise ADMSValueError(
                "features must be finite, got NaN or infinity; look for it in the layer's input"
            )
        digits = (features * self.bins).floor().clamp(0, self.bins - 1).long()
        return (digits * self._weights()).sum(dim=-1)

    def decode(self, states: Tensor) -> Tensor:
        """Return the digits ``[..., F]`` of the numbers ``[...]``; the inverse of `encode`."""
        return states.cpu()[..., None] // self._weights() % self.bins

    def _weights(self) -> Tensor:
        return self.bins ** torch.arange(self.features)


class Refiner:
    """Q-learning with an epsilon-greedy policy over numbered states and actions.

    Of equal values the action with the highest number wins. `IntegratedAttention` reads an action
    as a share of the predictor's span, so a refiner that knows nothing leaves the span as it is.

    The table lives on the CPU: decisions are a few integers a forward, not one per token.

    Args:
        states: number of states ``S``.
        actions: number of actions ``A``.
        alpha: learning rate, above 0 and at most 1.
        gamma: discount of the next state's value, 0..1 without 1.
        epsilon: share of explored actions, 0..1.
        seed: of the refiner's own random generator.

    Attributes:
        table: the values Q, float32 ``[S, A]``.

    Raises:
        ADMSTypeError, ADMSValueError: an argument outside its range.

    Source: Watkins and Dayan (1992), Machine Learning 8, 279-292, equation 1.
    """

    def __init__(
        self,
        states: int = 10000,
        actions: int = 10,
        alpha: float = 0.1,
        gamma: float = 0.9,
        epsilon: float = 0.1,
        *,
        seed: int = 0,
    ) -> None:
        self.states = check_positive("states", states)
        self.actions = check_positive("actions", actions)
        if not 0.0 < alpha <= 1.0:
            raise ADMSValueError(f"alpha must be above 0 and at most 1, got {alpha}; use e.g. 0.1")
        if not 0.0 <= gamma < 1.0:
            raise ADMSValueError(f"gamma must be at least 0 and below 1, got {gamma}; use e.g. 0.9")
        if not 0.0 <= epsilon <= 1.0:
            raise ADMSValueError(f"epsilon must be within 0..1, got {epsilon}; 0 never explores")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ADMSTypeError(f"seed must be an int, got {type(seed).__name__}; pass a number")
        if not -(2**63) <= seed < 2**64:
            raise ADMSValueError(f"seed must be of 64 bits, got {seed}; use a smaller number")
        self.alpha = float(alpha)
        self.gamma = float(gamma)
        self.epsilon = float(epsilon)
        self.table = torch.zeros(states, actions)
        self.generator = torch.Generator().manual_seed(seed)

    def get_value(self, state: int, action: int) -> float:
        """Return Q(state, action); 0 before it was ever updated."""
        self._check(torch.tensor([state]), "state", self.states)
        self._check(torch.tensor([action]), "action", self.actions)
        return float(self.table[state, action])

    def set_value(self, state: int, action: int, value: float) -> None:
        """Set Q(state, action)."""
        self._check(torch.tensor([state]), "state", self.states)
        self._check(torch.tensor([action]), "action", self.actions)
        self.table[state, action] = value

    def choose_action(self, state: int, *, explore: bool = True) -> int:
        """Return an action for one state; with ``explore=False`` always the best one."""
        return int(self.choose_actions(torch.tensor([state]), explore=explore))

    def choose_actions(self, states: Tensor, *, explore: bool = True) -> Tensor:
        """Return actions ``[...]`` (int64) for states ``[...]``, each explored on its own."""
        states = states.cpu()
        self._check(states, "state", self.states)
        # argmax takes the first of equals, and the highest number is wanted.
        best = self.actions - 1 - self.table[states].flip(-1).argmax(dim=-1)
        if not explore or self.epsilon == 0.0:
            return best
        dice = torch.rand(states.shape, generator=self.generator)
        wild = torch.randint(self.actions, states.shape, generator=self.generator)
        return torch.where(dice < self.epsilon, wild, best)

    def update(
        self,
        state: int | Tensor,
        action: int | Tensor,
        reward: float | Tensor,
        next_state: int | Tensor | None,
    ) -> None:
        """Learn from one transition, or from many of the same shape at once.

        All targets are taken from the table before the call, and transitions of the same state and
        action move its value by the mean of their errors, so their order doesn't matter.

        Args:
            state: where the action was chosen; int or ``[...]``.
            action: what was chosen; int or ``[...]``.
            reward: what it gave; float or ``[...]``.
            next_state: where it led; -1 (or None, for all) where nothing follows.

        Raises:
            ADMSValueError: a number out of range, shapes that differ, or a reward not finite.
        """
        states = torch.as_tensor(state).cpu().flatten()
        actions = torch.as_tensor(action).cpu().flatten()
        rewards = torch.as_tensor(reward, dtype=torch.float32).detach().cpu().flatten()
        if next_state is None:
            following = torch.full_like(states, -1)
        else:
            following = torch.as_tensor(next_state).cpu().flatten()
        sizes = [len(t) for t in (states, actions, rewards, following)]
        if len(set(sizes)) > 1:
            raise ADMSValueError(
                f"state, action, reward and next_state must be of one size, got {sizes}; "
                "give each transition all four"
            )
        self._check(states, "state", self.states)
        self._check(actions, "action", self.actions)
        self._check(following, "next_state", self.states, lowest=-1)
        if not bool(rewards.isfinite().all()):
            raise ADMSValueError("reward must be finite, got NaN or infinity; look at its source")
        best_next = self.table[following.clamp(min=0)].amax(dim=-1).masked_fill(following < 0, 0.0)
        errors = rewards + self.gamma * best_next - self.table[states, actions]
        cells, inverse, counts = (states * self.actions + actions).unique(
            return_inverse=True, return_counts=True
        )
        mean_errors = errors.new_zeros(len(cells)).index_add(0, inverse, errors) / counts
        self.table.view(-1)[cells] += self.alpha * mean_errors

    def state_dict(self) -> dict[str, Any]:
        """Return table, settings and generator as tensors and numbers, safe for ``torch.save``."""
        return {
            "table": self.table.clone(),
            "alpha": self.alpha,
            "gamma": self.gamma,
            "epsilon": self.epsilon,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned: the same decisions follow.

        Raises:
            ADMSTypeError: not a refiner's state.
            ADMSValueError: a table of another shape.
        """
        wanted = {"table", "alpha", "gamma", "epsilon", "generator"}
        if not isinstance(state, dict) or set(state) != wanted:
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ADMSTypeError(
                f"a refiner's state must have the keys {sorted(wanted)}, got {got}; "
                "pass what Refiner.state_dict() returned"
            )
        if tuple(state["table"].shape) != (self.states, self.actions):
            raise ADMSValueError(
                f"the saved table must be [{self.states}, {self.actions}], "
                f"got {list(state['table'].shape)}; build the refiner with the saved sizes"
            )
        self.table = state["table"].to("cpu", torch.float32, copy=True)
        self.alpha, self.gamma, self.epsilon = (
            float(state[name]) for name in ("alpha", "gamma", "epsilon")
        )
        self.generator.set_state(state["generator"].cpu())

    @staticmethod
    def _check(numbers: Tensor, name: str, limit: int, lowest: int = 0) -> None:
        if numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise ADMSTypeError(f"{name} must be integers, got {numbers.dtype}; use .long()")
        if numbers.numel() and (int(numbers.min()) < lowest or int(numbers.max()) >= limit):
            raise ADMSValueError(
                f"{name} must be within {lowest}..{limit - 1}, got values from "
                f"{int(numbers.min())} to {int(numbers.max())}; check how they are numbered"
            )
