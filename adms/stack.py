"""Layers that are alike lie side by side in memory, so that a commit treats them as one.

Each layer keeps its own tiers; those of layers that are alike are views of one storage, the first
layer's before the second's. Nothing else holds that storage, so whatever becomes of a layer's
tensors (a copy, other rows, another device) needs no bookkeeping: whether layers still lie side by
side is asked of the tensors themselves, and ``lay_together`` brings them back.

Shapes: ``L`` layers, ``B`` rows, ``K`` KV heads, ``Q`` columns of a pass.
"""

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from adms.entries import Entries
from adms.layer import ADMSLayer
from adms.tiers.coding import MiddleStack
from adms.tiers.exact import ExactTier
from adms.tiers.middle import MiddlePlan, MiddleTier, as_one


@dataclass(frozen=True)
class LayerStack:
    """Layers that are alike, as one.

    Attributes:
        layers: one or several.
        tensors: keys, values and the middle's bytes of all of them, ``[L, B, ...]``.
    """

    layers: list[ADMSLayer]
    tensors: list[torch.Tensor]

    def part(self, first: int, stop: int) -> "LayerStack":
        """Some of the layers."""
        return LayerStack(self.layers[first:stop], [part[first:stop] for part in self.tensors])

    @functools.cached_property
    def exact(self) -> ExactTier:
        """The exact tiers."""
        return ExactTier(self.tensors[0], self.tensors[1])

    @functools.cached_property
    def middle(self) -> MiddleStack | None:
        """The middles; None where the budget is 0."""
        plans = [layer.middle.plan for layer in self.layers if layer.middle is not None]
        return MiddleStack(plans, self.tensors[2]) if plans else None

    @functools.cached_property
    def reader(self) -> MiddleTier | None:
        """The middles as one of ``L * B`` rows, to read from; None where the budget is 0."""
        plans = [layer.middle.plan for layer in self.layers if layer.middle is not None]
        if not plans:
            return None
        arena = self.tensors[2].flatten(0, 1)
        return MiddleTier(as_one(plans), arena)

    @functools.cached_property
    def staged(self) -> Entries | None:
        """The pass's tokens ``[L, B, K, Q, ...]``, if they are kept aside."""
        staged = [layer.staged for layer in self.layers if layer.staged is not None]
        if len(staged) < len(self.layers):
            return None
        return Entries(
            _together([part.keys for part in staged]), _together([part.values for part in staged])
        )

    @functools.cached_property
    def queries(self) -> torch.Tensor | None:
        """The pass's queries ``[L, B, H, Q, D]``, if they are kept."""
        queries = [layer.queries for layer in self.layers if layer.queries is not None]
        return _together(queries) if len(queries) == len(self.layers) else None


def lay_together(layers: Sequence[ADMSLayer]) -> list[LayerStack]:
    """Moves the tiers of layers that are alike into one storage each, where they are not yet.

    Args:
        layers: with tiers.

    Returns:
        All layers: those that are alike as one stack, in their order.
    """
    kinds: dict[Hashable, list[ADMSLayer]] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer), []).append(layer)
    return [_laid_together(alike) for alike in kinds.values()]


def run_of(layers: Sequence[ADMSLayer]) -> LayerStack:
    """As many of the layers, from the first on, as are alike and lie side by side already."""
    kind, count = _kind(layers[0]), 1
    while count < len(layers) and _kind(layers[count]) == kind:
        count += 1
    parts = list(zip(*map(tensors_of, layers[:count]), strict=True))
    found = [side_by_side(part) for part in parts]
    together = [part for part in found if part is not None]
    if len(together) < len(found):
        return LayerStack(list(layers[:1]), [part[0][None] for part in parts])
    return LayerStack(list(layers[:count]), together)


def _laid_together(alike: list[ADMSLayer]) -> LayerStack:
    found = []
    for index, parts in enumerate(zip(*map(tensors_of, alike), strict=True)):
        together = side_by_side(parts)
        if together is None:
            together = torch.stack(parts)
            for layer, view in zip(alike, together.unbind(), strict=True):
                _put(layer, index, view)
        found.append(together)
    return LayerStack(alike, found)


def side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Tensors of one shape as one ``[L, ...]``, if they lie one after the other in one storage."""
    first = parts[0]
    if len(parts) == 1:
        return first[None]
    size, start = first.numel(), first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    for index, part in enumerate(parts):
        if (
            part.storage_offset() != start + index * size
            or part.untyped_storage().data_ptr() != storage
            or not part.is_contiguous()
        ):
            return None
    return first.as_strided((len(parts), *first.shape), (size, *first.stride()))


def tensors_of(layer: ADMSLayer) -> list[torch.Tensor]:
    """Keys, values and the middle's bytes of a layer with tiers."""
    if layer.exact is None:
        raise RuntimeError(f"layer {layer.layer_idx} has no tiers yet")
    middle = [] if layer.middle is None else layer.middle.tensors()
    return [*layer.exact.tensors(), *middle]


def _put(layer: ADMSLayer, index: int, tensor: torch.Tensor) -> None:
    """Replaces one of ``tensors_of`` by an equal one."""
    if layer.exact is None:
        raise RuntimeError(f"layer {layer.layer_idx} has no tiers yet")
    if index == 0:
        layer.exact.keys = tensor
    elif index == 1:
        layer.exact.values = tensor
    elif layer.middle is not None:
        layer.middle.arena = tensor


def _kind(layer: ADMSLayer) -> Hashable:
    """What layers must have in common to be treated as one."""
    form = tuple((part.shape, part.dtype, part.device) for part in tensors_of(layer))
    if layer.middle is None:
        return form
    plan = layer.middle.plan
    if plan.coder is not None and not plan.coder.is_stackable:
        return layer.layer_idx
    return form, _layout(plan)


def _layout(plan: MiddlePlan) -> Hashable:
    coder, store = plan.coder, plan.store
    described: list[Hashable] = [plan.shape, plan.dtype, plan.geometry, plan.landmark_offset]
    if coder is not None:
        described += [type(coder), coder.header_bytes, coder.record_bytes, coder.fine_bytes]
        described += [coder.coarse_bytes, coder.num_coarse, coder.num_records]
    if store is not None:
        described += [type(store).__name__, store.nbytes, store.header_bytes]
    return tuple(described)


def _together(parts: list[torch.Tensor]) -> torch.Tensor:
    """``[L, ...]``: a view of a single tensor, a copy of several."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)
