"""Layers that are alike lie side by side in memory, so that a commit treats them as one.

Each layer keeps its own tiers; those of layers that are alike are views of one storage, the first
layer's before the second's. Nothing else holds that storage, so whatever becomes of a layer's
tensors (a copy, other rows, another device) needs no bookkeeping: whether layers still lie side by
side is asked of the tensors themselves, and ``lay_together`` brings them back.

Shapes: ``L`` layers, ``B`` rows, ``K`` KV heads, ``Q`` columns of a pass.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from adms.entries import Entries
from adms.layer import ADMSLayer
from adms.tiers.coding import MiddleStack
from adms.tiers.exact import ExactTier
from adms.tiers.middle import MiddlePlan


@dataclass(frozen=True)
class LayerStack:
    """Layers that are alike, as one.

    Attributes:
        layers: one or several.
        exact: their exact tiers, ``[L, B, ...]``.
        middle: their middles; None where the budget is 0.
        staged: the pass's tokens ``[L, B, K, Q, ...]``, if they are kept aside.
        queries: the pass's queries ``[L, B, H, Q, D]``, if they are kept.
    """

    layers: list[ADMSLayer]
    exact: ExactTier
    middle: MiddleStack | None
    staged: Entries | None
    queries: torch.Tensor | None

    @classmethod
    def of(cls, layers: list[ADMSLayer]) -> "LayerStack | None":
        """The stack of layers that are alike; None where they do not lie side by side."""
        tiers = [tensors_of(layer) for layer in layers]
        held = [side_by_side(parts) for parts in zip(*tiers, strict=True)]
        found = [part for part in held if part is not None]
        if len(found) < len(held):
            return None
        plans = [layer.middle.plan for layer in layers if layer.middle is not None]
        staged = [layer.staged for layer in layers if layer.staged is not None]
        queries = [layer.queries for layer in layers if layer.queries is not None]
        return cls(
            layers,
            ExactTier(found[0], found[1]),
            MiddleStack(plans, found[2]) if plans else None,
            _entries(staged) if len(staged) == len(layers) else None,
            _together(queries) if len(queries) == len(layers) else None,
        )


def lay_together(layers: Sequence[ADMSLayer]) -> list[list[ADMSLayer]]:
    """Moves the tiers of layers that are alike into one storage each, where they are not yet.

    Args:
        layers: with tiers.

    Returns:
        The layers that are alike, in their order; a layer that has no like is alone.
    """
    kinds: dict[Hashable, list[ADMSLayer]] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer), []).append(layer)
    for alike in kinds.values():
        for index, parts in enumerate(zip(*map(tensors_of, alike), strict=True)):
            if side_by_side(parts) is None:
                together = torch.stack(parts)
                for layer, view in zip(alike, together.unbind(), strict=True):
                    _put(layer, index, view)
    return list(kinds.values())


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


def _entries(parts: list[Entries]) -> Entries:
    return Entries(
        _together([part.keys for part in parts]), _together([part.values for part in parts])
    )
