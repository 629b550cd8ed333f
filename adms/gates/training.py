"""Training of gates by distillation: the model with folded tokens learns from itself without.

The model is frozen. Its own logits are the target; the loss is their divergence from the logits of
a pass in which old tokens are folded. First that says how many tokens each layer can do without,
then gates learn which.

Shapes: ``B`` rows, ``N`` tokens, ``V`` words, ``L`` layers.
"""

import dataclasses
import hashlib
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div

from adms.binding import Binding
from adms.enable import disable_adms, enable_adms_llm, is_enabled
from adms.errors import ADMSValueError, UnsupportedModelError
from adms.fingerprint import describe_model
from adms.gates.config import AdaptiveUpdateConfig, check_admission, check_block
from adms.gates.learned import UpdateGates
from adms.gates.shares import SHARES, water_fill
from adms.gates.training_pass import FoldingSizes, folded_logits
from adms.outputs import ready_file, replaced


@dataclass(frozen=True, kw_only=True)
class GateTraining:
    """How gates are trained.

    Attributes:
        admission: share of the tokens that keep an entry of their own, below 1: the mean over
            layers.
        block_tokens: tokens that are decided on together.
        sink: first tokens of each excerpt, never folded.
        recent: tokens that a query sees exactly.
        length: tokens of an excerpt.
        rows: excerpts a step.
        measured: excerpts on which the layers' shares are measured.
        steps: steps of the optimiser; 0 leaves the choice of tokens to their similarity.
        learning_rate: at the start; it falls to zero along a cosine.
        checkpoint_every: steps between two checkpoints.
        seed: of the choice of excerpts.

    Raises:
        ADMSTypeError, ADMSValueError: a value that cannot work.
    """

    admission: float = 0.6
    block_tokens: int = 64
    sink: int = 4
    recent: int = 256
    length: int = 1024
    rows: int = 1
    measured: int = 4
    steps: int = 100
    learning_rate: float = 0.01
    checkpoint_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if check_admission(self.admission) == 1.0:
            raise ADMSValueError("admission 1 leaves nothing to learn; give less")
        check_block(self.block_tokens)
        for name in ("sink", "recent", "length", "rows", "measured", "steps", "checkpoint_every"):
            value, low = getattr(self, name), 0 if name in ("sink", "steps") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ADMSValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        if not 0.0 < self.learning_rate < math.inf:
            raise ADMSValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.length < self.sink + self.recent + self.block_tokens:
            raise ADMSValueError(
                f"length {self.length} leaves no block to fold beside sink {self.sink} and recent "
                f"{self.recent}; raise length or lower recent"
            )

    def sizes(self, share: float) -> FoldingSizes:
        """What a layer folds that admits this share."""
        admitted = AdaptiveUpdateConfig(admission=share, block_tokens=self.block_tokens)
        return FoldingSizes(self.sink, self.recent, *admitted.block_sizes(1, 0))


def train_gates(
    model: nn.Module,
    ids: torch.Tensor,
    training: GateTraining | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: Callable[[int, float], object] | None = None,
    on_measure: Callable[[int, int], object] | None = None,
) -> UpdateGates:
    """Trains gates of a model on a text.

    Args:
        model: a model of a supported family; it is frozen, and as it was afterwards.
        ids: ``[N]`` token ids of the text.
        training: how; the defaults if None.
        checkpoint: file to keep the state in, and to go on from if it is there.
        on_step: called with the number of finished steps and the last loss.
        on_measure: called with the number of measurements that were made, and of those that will
            be: one for each layer and ``rows`` excerpts.

    Raises:
        ADMSValueError: the text is too short, or the checkpoint is damaged, of another training or
            cannot be written.
        UnsupportedModelError: no layer of the model can be trained.
    """
    settings = GateTraining() if training is None else training
    if ids.dim() != 1 or len(ids) < settings.length + 1:
        raise ADMSValueError(
            f"ids must be one row of more than length = {settings.length} tokens, got "
            f"{list(ids.shape)}; give a longer text or a smaller length"
        )
    gates = UpdateGates.untrained(model, settings.block_tokens)
    device = next(model.parameters()).device
    weights = [weight.to(device).requires_grad_() for weight in gates.weights]
    optimiser = torch.optim.Adam(weights, lr=settings.learning_rate)
    about = {
        "training": asdict(settings),
        "samples": gates.samples,
        "text": hashlib.sha256(ids.cpu().long().numpy().tobytes()).hexdigest(),
    }
    if checkpoint is not None:
        ready_file(checkpoint)
    done, shares = _resume(checkpoint, about, weights, optimiser)
    with _frozen(model) as binding:
        if shares is None:
            generator = torch.Generator().manual_seed(settings.seed)
            text = excerpts(ids, settings, generator, settings.measured).to(device)
            shares = measure_shares(model, binding, text, settings, weights, on_measure)
            if checkpoint is not None:
                _keep(checkpoint, about, weights, optimiser, 0, shares)
        sizes = [settings.sizes(share) for share in shares]
        for step in range(done, settings.steps):
            for group in optimiser.param_groups:
                share = step / settings.steps
                group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            text = excerpts(ids, settings, generator, settings.rows).to(device)
            loss = distillation_loss(model, binding, text, weights, sizes, generator)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if checkpoint is not None and (step + 1) % settings.checkpoint_every == 0:
                _keep(checkpoint, about, weights, optimiser, step + 1, shares)
            if on_step is not None:
                on_step(step + 1, loss.item())
    trained = tuple(weight.detach().cpu() for weight in weights)
    return dataclasses.replace(gates, weights=trained, admissions=shares)


def measure_shares(
    model: nn.Module,
    binding: Binding,
    ids: torch.Tensor,
    training: GateTraining,
    weights: list[torch.Tensor],
    on_measure: Callable[[int, int], object] | None = None,
) -> tuple[float, ...]:
    """The share of tokens that each layer admits, by what folding in it alone costs.

    Layers without a middle are given 1 and are no part of the mean.

    Args:
        model: frozen and enabled.
        binding: any of a cache of it.
        ids: ``[B, N]`` excerpts, of which ``rows`` are read at a time.
        training: the mean share, and what is folded.
        weights: per layer ``[F]``.
        on_measure: see ``train_gates``.
    """
    own = [index for index in range(len(weights)) if binding.is_adms_layer(index)]
    losses = torch.zeros(len(own), len(SHARES), dtype=torch.float64)
    batches = ids.split(training.rows)
    for at, text in enumerate(batches):
        target = whole_logits(model, text, training.sizes(1.0))
        for done, layer in enumerate(own):
            sizes = [training.sizes(1.0)] * len(weights)
            for step, share in enumerate(SHARES):
                sizes[layer] = training.sizes(share)
                with torch.no_grad():
                    loss = distillation_loss(model, binding, text, weights, sizes, target=target)
                losses[done, step] += loss.item() * len(text) / len(ids)
            if on_measure is not None:
                on_measure(at * len(own) + done + 1, len(batches) * len(own))
    found = [1.0] * len(weights)
    filled = water_fill(losses.tolist(), SHARES, training.admission)
    for layer, share in zip(own, filled, strict=True):
        found[layer] = share
    return tuple(found)


def excerpts(
    ids: torch.Tensor, training: GateTraining, generator: torch.Generator, count: int
) -> torch.Tensor:
    """So many parts of a text, ``[B, N]``."""
    starts = torch.randint(len(ids) - training.length, (count,), generator=generator)
    return torch.stack([ids[start : start + training.length] for start in starts.tolist()])


@torch.no_grad()
def whole_logits(model: nn.Module, ids: torch.Tensor, sizes: FoldingSizes) -> torch.Tensor:
    """Log-probabilities ``[B, N - first, V]`` without folding, where folded tokens would be seen.

    Args:
        model: frozen and enabled.
        ids: ``[B, N]``.
        sizes: what is folded in any layer.
    """
    whole: Any = model(input_ids=ids, use_cache=False)
    return whole.logits[:, sizes.first_reader :].float().log_softmax(-1)


def distillation_loss(
    model: nn.Module,
    binding: Binding,
    ids: torch.Tensor,
    weights: list[torch.Tensor],
    sizes: Sequence[FoldingSizes],
    generator: torch.Generator | None = None,
    target: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean divergence, in nats, of the logits with folded tokens from those without.

    Over the tokens that see folded ones.

    Args:
        model: frozen and enabled.
        binding: any of a cache of it.
        ids: ``[B, N]``.
        weights: per layer ``[F]``.
        sizes: per layer, what is folded.
        generator: of training; None for the loss of the gates as they are.
        target: from ``whole_logits``; None works it out.
    """
    if target is None:
        target = whole_logits(model, ids, sizes[0])
    folded = folded_logits(model, binding, ids, weights, sizes, generator)
    student = folded[:, sizes[0].first_reader :].float().log_softmax(-1)
    divergence = kl_div(student, target, reduction="sum", log_target=True)
    return divergence / target[..., 0].numel()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[Binding]:
    """The model enabled, in evaluation and without gradients; afterwards as it was."""
    was_enabled, was_training = is_enabled(model), model.training
    asked = [value.requires_grad for value in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        # The sizes mean nothing here, but small ones fit every model.
        cache = enable_adms_llm(
            model, start_size=1, recent_size=1, compressed_budget=1, prefill_chunk_size=1
        )
        binding = cache.binding_for_use
        attentions = len(describe_model(model)["layers"])
        own = [binding.is_adms_layer(index) for index in range(attentions)]
        if not any(own) or binding.num_layers > attentions:
            raise UnsupportedModelError(
                "gates can be trained where attention has no window and positions do not enter at "
                f"the embedding, which is not so in this {type(model).__name__}; use "
                'policy="similarity"'
            )
        yield binding
    finally:
        for value, wanted in zip(model.parameters(), asked, strict=True):
            value.requires_grad_(wanted)
        model.train(was_training)
        if not was_enabled:
            disable_adms(model)


def _keep(
    checkpoint: str | os.PathLike[str],
    about: dict[str, Any],
    weights: list[torch.Tensor],
    optimiser: torch.optim.Optimizer,
    steps: int,
    shares: tuple[float, ...],
) -> None:
    state = {
        **about,
        "weights": [weight.detach() for weight in weights],
        "optimiser": optimiser.state_dict(),
        "steps": steps,
        "shares": list(shares),
    }
    with replaced(checkpoint) as partial:
        torch.save(state, partial)


def _resume(
    checkpoint: str | os.PathLike[str] | None,
    about: dict[str, Any],
    weights: list[torch.Tensor],
    optimiser: torch.optim.Optimizer,
) -> tuple[int, tuple[float, ...] | None]:
    """Steps and layers' shares of a checkpoint, whose state is taken over; 0, None without one."""
    if checkpoint is None or not Path(checkpoint).is_file():
        return 0, None
    again = "remove it to start afresh"
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        differing = [name for name in about if state[name] != about[name]]
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, pickle.PickleError) as error:
        raise ADMSValueError(f"{checkpoint} cannot be read as a checkpoint; {again}") from error
    if differing == ["text"]:
        raise ADMSValueError(
            f"{checkpoint} is of a training on another text; {again}, or give the same text"
        )
    if differing:
        raise ADMSValueError(
            f"{checkpoint} is of a training with other settings or of another model; {again}, or "
            "give the same settings"
        )
    with torch.no_grad():
        for weight, kept in zip(weights, state["weights"], strict=True):
            weight.copy_(kept)
    optimiser.load_state_dict(state["optimiser"])
    return int(state["steps"]), tuple(state["shares"])
