"""Spans over the recent tier, learned in a stream: `enable_adms_llm(integrated_attention=...)`.

Each layer reads only the newest tokens of the recent tier, beside sinks and middle. How many, is
decided every ``compression_interval`` tokens: a predictor (`Predictor`) says from what was measured
which share of the tier will be needed, a refiner (`Refiner`, Q-learning) chooses how much of that,
and what is then given up may not be more attention than ``mass_bound`` by the running measurement.

Shapes: ``L`` layers, ``S = SPAN_STEPS`` equal steps of the recent tier from the newest token on,
``F`` features, ``A`` actions.
"""

import copy
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from adms.attention.adaptive_span import Predictor
from adms.attention.refiner import Refiner, StateGrid
from adms.errors import ADMSTypeError, ADMSValueError

# A span is a number of these.
SPAN_STEPS = 16
# Queries of a pass that are measured; each reads the whole recent tier.
SAMPLED_QUERIES = 4
NUM_FEATURES = 4
# Cells of the refiner's grid over the features: five a feature.
REFINER_STATES = 5**NUM_FEATURES
REFINER_ACTIONS = 10
# Weight of the newest measurement in the running one.
NEWEST = 0.1
# The predictor starts at this logit: a share of 0.993, which is rounded up to all.
FIRST_LOGIT = 5.0
# Penalty of a span that gives up more than this many times the bound is not told apart.
WORST_EXCESS = 10.0


@dataclass(frozen=True, kw_only=True)
class IntegratedAttentionConfig:
    """Local attention over an adaptive span of the recent tier, global over sinks and middle.

    Attributes:
        mass_bound: share of its attention, 0 to 1, that a layer may give up by not reading the
            rest of the recent tier; 0 reads everything.
        min_span: least tokens of the recent tier that are read.
        learn: adapt spans while the stream runs; False keeps them as they are, which for a new
            cache is the whole tier.
        learning_rate: of the predictor.
        alpha, gamma, epsilon, seed: of the refiner; see ``Refiner``.

    Raises:
        ADMSTypeError: a field has a type that cannot work.
        ADMSValueError: a field is out of range.
    """

    mass_bound: float = 0.005
    min_span: int = 16
    learn: bool = True
    learning_rate: float = 0.5
    alpha: float = 0.1
    gamma: float = 0.9
    epsilon: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mass_bound", "learning_rate", "alpha", "gamma", "epsilon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ADMSTypeError(f"{name} must be a number, got {value!r}")
        for name in ("min_span", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ADMSTypeError(f"{name} must be an integer, got {value!r}")
        if not isinstance(self.learn, bool):
            raise ADMSTypeError(f"learn must be True or False, got {self.learn!r}")
        if not 0.0 <= self.mass_bound <= 1.0:
            raise ADMSValueError(
                f"mass_bound must lie in 0..1, got {self.mass_bound}; 0.005 is 0.5%"
            )
        if self.min_span < 1:
            raise ADMSValueError(
                f"min_span must be at least 1, got {self.min_span}; a span of 0 reads nothing"
            )
        if not 0.0 < self.learning_rate < math.inf:
            raise ADMSValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        # The refiner checks its own.
        self.refiner()

    def refiner(self) -> Refiner:
        """A refiner that knows nothing."""
        return Refiner(
            REFINER_STATES,
            REFINER_ACTIONS,
            self.alpha,
            self.gamma,
            self.epsilon,
            seed=self.seed,
        )

    def start(self, layers: list[int], recent: int) -> "SpanLearner":
        """Spans of these layers that read all of ``recent`` tokens, to be learned."""
        return SpanLearner(self, layers, recent)

    @property
    def measured_bytes(self) -> int:
        """Bytes of what a layer measures in a pass."""
        return SPAN_STEPS * torch.float32.itemsize

    def to_dict(self) -> dict[str, Any]:
        """Every field by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class SpanLearner:
    """The spans of one cache's layers, and what they are learned from.

    Args:
        config: how they are learned.
        layers: indices of the layers that have a recent tier (``L`` of them).
        recent: tokens of the recent tier.

    Attributes:
        steps: per layer, how many of the ``SPAN_STEPS`` steps are read.
        state: measurements, and what the last decision was made from.
    """

    def __init__(self, config: IntegratedAttentionConfig, layers: list[int], recent: int) -> None:
        self.config = config
        self.layers = layers
        self.recent = recent
        self.least = min(SPAN_STEPS, math.ceil(config.min_span * SPAN_STEPS / recent))
        self.grid = StateGrid(REFINER_STATES, NUM_FEATURES)
        self.refiner = config.refiner()
        self.predictor = Predictor(NUM_FEATURES)
        with torch.no_grad():
            self.predictor.linear.weight.zero_()
            self.predictor.linear.bias.fill_(FIRST_LOGIT)
        self.steps = [SPAN_STEPS] * len(layers)
        full = torch.ones(len(layers))
        self.state: dict[str, Tensor] = {
            # The running mass per step; none was measured yet.
            "mass": torch.zeros(len(layers), SPAN_STEPS),
            "features": full[:, None].repeat(1, NUM_FEATURES),
            "predicted": full,
            "floor": full.clone(),
            # Mass given up, summed over updates; updates; entries read and entries there.
            "lost": torch.zeros(len(layers), dtype=torch.float64),
            "updates": torch.zeros(1, dtype=torch.float64),
            "read": torch.zeros(2, dtype=torch.float64),
        }

    # --- what a pass asks ------------------------------------------------------------------------

    def span(self, layer_idx: int) -> int | None:
        """Tokens of the recent tier that a layer reads, or None for all."""
        steps = self.steps[self.layers.index(layer_idx)]
        return None if steps == SPAN_STEPS else math.ceil(steps * self.recent / SPAN_STEPS)

    def is_due(self, before: list[int], new: list[int], interval: int, ring: int) -> bool:
        """Whether a pass is measured: a new interval begins, and every row's ring is full."""
        if not self.config.learn or min(before) < ring:
            return False
        return max(before) // interval != (max(before) + max(new)) // interval

    # --- learning --------------------------------------------------------------------------------

    def after(self, measured: Tensor | None, columns: int) -> "SpanLearner":
        """The learner after a pass over full rings; this one is left as it is.

        Args:
            measured: ``[L, S]`` share of attention on each step of the recent tier in the pass, or
                None where it was not measured.
            columns: tokens of the pass.
        """
        there = columns * len(self.steps) * SPAN_STEPS
        read = columns * sum(self.steps)
        if measured is not None:
            # The queries that are measured read all.
            sampled = min(SAMPLED_QUERIES, columns)
            read += sampled * (len(self.steps) * SPAN_STEPS - sum(self.steps))
        twin = copy.copy(self)
        entries = torch.tensor([read, there], dtype=torch.float64)
        twin.state = {**self.state, "read": self.state["read"] + entries}
        if measured is not None:
            twin.refiner = copy_refiner(self.refiner, self.config)
            twin.predictor = copy.deepcopy(self.predictor)
            twin._learn(measured.double().cpu())
        return twin

    def _learn(self, measured: Tensor) -> None:
        state = self.state
        steps = torch.tensor(self.steps)
        state["lost"] = state["lost"] + _given_up(measured, steps)
        first = bool(state["updates"] == 0)
        state["updates"] = state["updates"] + 1
        mass = measured.float()
        running = mass if first else torch.lerp(state["mass"], mass, NEWEST)
        needed = self._needed(mass)
        floor = self._needed(running)
        features = torch.stack([floor, needed, mass.sum(1).clamp(0, 1), steps / SPAN_STEPS], dim=1)
        before, now = self.grid.encode(state["features"]), self.grid.encode(features)
        if not first:
            self._teach_predictor(state["features"], needed)
            self._teach_refiner(before, now, mass)
        with torch.no_grad():
            predicted = self.predictor(features)[:, 0]
        action = self.refiner.choose_actions(now)
        chosen = _share_of(predicted, action).maximum(floor)
        self.steps = [min(SPAN_STEPS, max(self.least, step)) for step in _to_steps(chosen)]
        state |= {"mass": running, "features": features, "predicted": predicted, "floor": floor}

    def _needed(self, mass: Tensor) -> Tensor:
        """The least share of the tier ``[L]`` that gives up no more than the bound."""
        steps = torch.arange(SPAN_STEPS + 1).repeat(len(mass), 1)
        lost = torch.stack([_given_up(mass, steps[:, step]) for step in range(SPAN_STEPS + 1)], 1)
        within = lost <= self.config.mass_bound + 1e-9
        return within.float().argmax(1) / SPAN_STEPS

    def _teach_predictor(self, features: Tensor, needed: Tensor) -> None:
        """One step of gradient descent towards what turned out to be needed."""
        linear = self.predictor.linear
        with torch.no_grad():
            # Of the cross-entropy by the logits; written out, since inference mode has no graph.
            error = self.predictor(features) - needed[:, None]
            linear.weight.sub_(self.config.learning_rate * (error * features).mean(0))
            linear.bias.sub_(self.config.learning_rate * error.mean(0))

    def _teach_refiner(self, before: Tensor, now: Tensor, mass: Tensor) -> None:
        """Every action is rewarded, since the measurement says what each would have given up."""
        actions = torch.arange(REFINER_ACTIONS).repeat(len(mass), 1)
        predicted, floor = self.state["predicted"], self.state["floor"]
        share = _share_of(predicted[:, None], actions).maximum(floor[:, None])
        steps = torch.tensor(_to_steps(share.flatten())).view(actions.shape)
        lost = torch.stack([_given_up(mass, own) for own in steps.T], dim=1)
        excess = (lost / max(self.config.mass_bound, 1e-6)).clamp(max=WORST_EXCESS)
        reward = -(steps / SPAN_STEPS) - excess
        self.refiner.update(
            before[:, None].expand_as(actions), actions, reward, now[:, None].expand_as(actions)
        )

    # --- what it holds ---------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What was read and given up so far, as plain values."""
        updates = float(self.state["updates"])
        read, there = self.state["read"].tolist()
        lost = self.state["lost"] / max(updates, 1.0)
        return {
            "recent_entries_read": read / there if there else 1.0,
            "mass_given_up": float(lost.mean()),
            "mass_given_up_worst_layer": float(lost.max()),
            "updates": int(updates),
            "spans": [self.span(layer) or self.recent for layer in self.layers],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, by name; what ``load_tensors`` takes."""
        refiner = self.refiner.state_dict()
        return {
            **self.state,
            "steps": torch.tensor(self.steps),
            "predictor_weight": self.predictor.linear.weight.detach(),
            "predictor_bias": self.predictor.linear.bias.detach(),
            "refiner_table": refiner["table"],
            "refiner_generator": refiner["generator"],
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all of that; the same at every step."""
        return sum(part.numel() * part.element_size() for part in self.tensors().values())

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what ``tensors`` of another learner of the same sizes gave.

        Raises:
            ADMSValueError: a tensor is missing, or of another shape, dtype or range.
        """
        for name, own in self.tensors().items():
            part = tensors.get(name)
            if part is None or part.shape != own.shape or part.dtype != own.dtype:
                raise ADMSValueError(f"the learned spans have no {name} of {tuple(own.shape)}")
            if part.is_floating_point() and not bool(part.isfinite().all()):
                raise ADMSValueError(f"{name} of the learned spans holds NaN or infinity")
        steps = tensors["steps"]
        if int(steps.min()) < 1 or int(steps.max()) > SPAN_STEPS:
            raise ADMSValueError(f"learned spans must be 1..{SPAN_STEPS} steps")
        self.steps = steps.tolist()
        self.state = {name: tensors[name].clone() for name in self.state}
        with torch.no_grad():
            self.predictor.linear.weight.copy_(tensors["predictor_weight"])
            self.predictor.linear.bias.copy_(tensors["predictor_bias"])
        self.refiner.table = tensors["refiner_table"].clone()
        try:
            self.refiner.generator.set_state(tensors["refiner_generator"])
        except RuntimeError as error:
            raise ADMSValueError(f"refiner_generator of the learned spans: {error}") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpanLearner":
        twin = SpanLearner(self.config, self.layers, self.recent)
        twin.load_tensors(self.tensors())
        return twin


def copy_refiner(refiner: Refiner, config: IntegratedAttentionConfig) -> Refiner:
    """A refiner that decides and learns as this one would."""
    twin = config.refiner()
    twin.load_state_dict(refiner.state_dict())
    return twin


def _given_up(mass: Tensor, steps: Tensor) -> Tensor:
    """Mass ``[L]`` beyond the first ``steps [L]`` of ``mass [L, S]``."""
    beyond = torch.arange(mass.shape[1]) >= steps[:, None]
    return (mass * beyond).sum(1)


def _share_of(predicted: Tensor, action: Tensor) -> Tensor:
    """An action's share of what the predictor says; the last action takes all of it."""
    return predicted * (action + 1) / REFINER_ACTIONS


def _to_steps(share: Tensor) -> list[int]:
    """Shares of the tier as whole steps, rounded up."""
    return (share * SPAN_STEPS - 1e-4).ceil().long().tolist()
