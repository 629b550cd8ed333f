"""Annealing the selection's temperature, and looking at what was learned to be selected.

Shapes: `B` batch, `H` heads, `I` query blocks, `J` key blocks.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adms.attention.block_sparse.module import BlockSparseAdaptive
from adms.errors import ADMSTypeError, ADMSValueError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AdaptiveSparsityTrainer:
    """Anneals the temperature of every `BlockSparseAdaptive` in a model, geometrically.

    `step` sets the temperature, also a learnable one, until `annealing_steps` steps were made;
    after the last it is `final_temperature`, and further steps leave it (and its learning) alone.
    """

    def __init__(
        self,
        model: nn.Module,
        initial_temperature: float = 1.0,
        final_temperature: float = 0.1,
        annealing_steps: int = 10000,
    ) -> None:
        """Sets the initial temperature.

        Raises:
            ADMSValueError: The model has no `BlockSparseAdaptive`, a temperature is below a
                module's `min_temperature`, or `annealing_steps` is below 1.
        """
        self.model = model
        self.layers = [layer for layer in model.modules() if isinstance(layer, BlockSparseAdaptive)]
        if not self.layers:
            raise ADMSValueError(
                f"model must contain a BlockSparseAdaptive, got {type(model).__name__} without"
            )
        least = max(layer.config.min_temperature for layer in self.layers)
        for name, value in (("initial", initial_temperature), ("final", final_temperature)):
            if not value >= least:
                raise ADMSValueError(
                    f"{name}_temperature must be at least the layers' min_temperature {least}, "
                    f"got {value}"
                )
        if annealing_steps < 1:
            raise ADMSValueError(f"annealing_steps must be at least 1, got {annealing_steps}")
        self.initial_temperature = initial_temperature
        self.final_temperature = final_temperature
        self.annealing_steps = annealing_steps
        self.steps = 0
        self._set(initial_temperature)

    def step(self) -> float:
        """Moves on by a step and returns the temperature of the schedule."""
        self.steps += 1
        share = min(1.0, self.steps / self.annealing_steps)
        ratio = self.final_temperature / self.initial_temperature
        temperature = self.initial_temperature * ratio**share
        if self.steps == self.annealing_steps:
            # Not through the power: it ends where asked to the last bit.
            temperature = self.final_temperature
        if self.steps <= self.annealing_steps:
            self._set(temperature)
        return temperature if self.steps <= self.annealing_steps else self.final_temperature

    @torch.no_grad()
    def analyze_patterns(
        self,
        dataloader: Iterable[Any],
        num_samples: int = 100,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> dict[str, list[float]]:
        """Statistics of the hard patterns of the first `num_samples` samples, one each.

        The model runs in evaluation mode and is left in the mode it was in. A batch that is a
        tensor is passed to the model as its argument, a tuple or list as its arguments, a
        mapping as its named arguments; `forward(model, batch)` replaces that.

        Returns:
            "sparsity_ratios": share of allowed pairs not attended, mean over heads and layers.
            "pattern_diversity": mean Jaccard distance of the patterns of a sample's heads, mean
            over layers; 0 with one head.
            "input_diversity": mean Jaccard distance of a head's pattern from that of the sample
            before, where that had as many blocks; one fewer at least.

        Raises:
            ADMSValueError: `num_samples` is below 1 or the dataloader is empty.
        """
        if num_samples < 1:
            raise ADMSValueError(f"num_samples must be at least 1, got {num_samples}")
        result: dict[str, list[float]] = {
            "sparsity_ratios": [],
            "pattern_diversity": [],
            "input_diversity": [],
        }
        before: list[Tensor] = []
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            for batch in dataloader:
                for sample in self._patterns(batch, forward):
                    _add_statistics(result, sample, before)
                    before = [pattern for pattern, _ in sample]
                    if len(result["sparsity_ratios"]) == num_samples:
                        return result
        finally:
            for module, training in modes:
                module.training = training
        if not result["sparsity_ratios"]:
            raise ADMSValueError("dataloader must give at least one batch, got none")
        return result

    def _patterns(
        self, batch: Any, forward: Callable[[nn.Module, Any], Any] | None
    ) -> list[list[tuple[Tensor, float]]]:
        """For each sample and layer: pattern [H, I, J] and sparsity."""
        for layer in self.layers:
            layer.recorded = []
        try:
            if forward is not None:
                forward(self.model, batch)
            elif isinstance(batch, Mapping):
                self.model(**batch)
            elif isinstance(batch, Tensor):
                self.model(batch)
            elif isinstance(batch, tuple | list):
                self.model(*batch)
            else:
                raise ADMSTypeError(
                    f"a batch must be a tensor, tuple, list or mapping, got "
                    f"{type(batch).__name__}; pass forward to say how to use it"
                )
            calls = [call for layer in self.layers for call in layer.recorded or []]
        finally:
            for layer in self.layers:
                layer.recorded = None
        samples = calls[0][0].shape[0] if calls else 0
        return [
            [(pattern[row], float(sparsity[row].mean())) for pattern, sparsity in calls]
            for row in range(samples)
        ]

    def _set(self, temperature: float) -> None:
        for layer in self.layers:
            layer.temperature = temperature


def plot_patterns(
    patterns: list[Tensor], path: str | Path | None = None, sample: int = 0
) -> "Figure":
    """Draws one panel a head of a forward pass's "patterns", and saves it where asked.

    Args:
        patterns: [B, I, J] a head, as `forward(..., return_pattern=True)` gives them.
        path: File to write; None writes none.
        sample: Row of the batch to draw.

    Raises:
        ADMSValueError: There are no patterns.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    if not patterns:
        raise ADMSValueError("patterns must hold at least one head, got none")
    figure = Figure(figsize=(3 * len(patterns), 3.4), layout="constrained")
    panels = figure.subplots(1, len(patterns), squeeze=False)[0]
    for head, (panel, pattern) in enumerate(zip(panels, patterns, strict=True)):
        shown = pattern[sample].float().cpu()
        panel.imshow(shown.numpy(), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        panel.set_title(f"head {head}: {shown.mean():.0%} of pairs", fontsize=9)
        panel.set_xlabel("key block")
    panels[0].set_ylabel("query block")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _add_statistics(
    result: dict[str, list[float]], sample: list[tuple[Tensor, float]], before: list[Tensor]
) -> None:
    result["sparsity_ratios"].append(sum(sparsity for _, sparsity in sample) / len(sample))
    between_heads = []
    for pattern, _ in sample:
        heads = pattern.shape[0]
        pairs = _jaccard_distance(pattern.unsqueeze(0), pattern.unsqueeze(1)).sum()
        between_heads.append(float(pairs) / max(1, heads * (heads - 1)))
    result["pattern_diversity"].append(sum(between_heads) / len(between_heads))
    if [pattern.shape for pattern, _ in sample] == [pattern.shape for pattern in before]:
        moved = [
            float(_jaccard_distance(pattern, earlier).mean())
            for (pattern, _), earlier in zip(sample, before, strict=True)
        ]
        result["input_diversity"].append(sum(moved) / len(moved))


def _jaccard_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - intersection over union of bool [..., I, J]; 0 between two empty ones."""
    union = (first | second).sum((-1, -2))
    return (first ^ second).sum((-1, -2)) / union.clamp(min=1)
