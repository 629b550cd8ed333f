"""Layers that are alike as one layer with the rows of all of them.

What a commit does to one layer it does to every other in the same way. A coder works on rows, so
32 layers are coded by the calls that one takes.

Shapes: ``L`` layers, ``B`` rows; row ``b`` of layer ``l`` is row ``l * B + b`` of the stack.
"""

from collections.abc import Callable, Sequence

import torch

from adms.layer import ADMSLayer
from adms.tiers.exact import ExactTier
from adms.tiers.middle import MiddleTier

# Most rows that are worked on together, which bounds the memory for it.
MOST_ROWS = 256


def alike(layers: Sequence[ADMSLayer]) -> list[list[ADMSLayer]]:
    """Layers grouped by plan, shapes, dtype and device, in order."""
    groups: dict[object, list[ADMSLayer]] = {}
    for layer in layers:
        if layer.exact is None:
            raise RuntimeError("a layer without tiers was asked for its likes")
        keys, values = layer.exact.keys, layer.exact.values
        plan = None if layer.middle is None else layer.middle.plan
        kind = (id(plan), keys.shape, values.shape, keys.dtype, keys.device)
        groups.setdefault(kind, []).append(layer)
    return list(groups.values())


def stack(layers: Sequence[ADMSLayer]) -> ADMSLayer:
    """Layers that are alike as one; their tiers then share its storage."""
    first = layers[0]
    if len(layers) == 1:
        return first
    joined = ADMSLayer(first.cache, first.layer_idx)
    joined.dtype, joined.device, joined.is_initialized = first.dtype, first.device, True
    exact = [layer.exact for layer in layers if layer.exact is not None]
    joined.exact = ExactTier(
        _share([tier.keys for tier in exact], [_keys_of(tier) for tier in exact]),
        _share([tier.values for tier in exact], [_values_of(tier) for tier in exact]),
    )
    middles = [layer.middle for layer in layers if layer.middle is not None]
    if middles:
        arena = _share([tier.arena for tier in middles], [_arena_of(tier) for tier in middles])
        joined.middle = MiddleTier(middles[0].plan, arena)
    queries = [layer.queries for layer in layers if layer.queries is not None]
    if queries:
        joined.queries = torch.cat(queries)
    return joined


def part(joined: ADMSLayer, start: int, stop: int) -> ADMSLayer:
    """Some rows of a stack."""
    if joined.exact is None or (start == 0 and stop >= joined.exact.keys.shape[0]):
        return joined
    own = ADMSLayer(joined.cache, joined.layer_idx)
    own.dtype, own.device, own.is_initialized = joined.dtype, joined.device, True
    own.exact = ExactTier(joined.exact.keys[start:stop], joined.exact.values[start:stop])
    if joined.middle is not None:
        own.middle = MiddleTier(joined.middle.plan, joined.middle.arena[start:stop])
    own.queries = None if joined.queries is None else joined.queries[start:stop]
    return own


def _share(
    tensors: list[torch.Tensor], assign: list[Callable[[torch.Tensor], None]]
) -> torch.Tensor:
    """Tensors ``[B, ...]`` as one ``[L * B, ...]`` of which they are views from now on."""
    first = tensors[0]
    joined = torch.Size((len(tensors) * first.shape[0], *first.shape[1:]))
    size = first.numel()
    if all(
        tensor.is_contiguous()
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and tensor.storage_offset() == first.storage_offset() + index * size
        for index, tensor in enumerate(tensors)
    ):
        return first.as_strided(joined, first.stride())
    shared = torch.cat(tensors)
    for view, put in zip(shared.split(first.shape[0]), assign, strict=True):
        put(view)
    return shared


def _keys_of(tier: ExactTier) -> Callable[[torch.Tensor], None]:
    return lambda view: setattr(tier, "keys", view)


def _values_of(tier: ExactTier) -> Callable[[torch.Tensor], None]:
    return lambda view: setattr(tier, "values", view)


def _arena_of(tier: MiddleTier) -> Callable[[torch.Tensor], None]:
    return lambda view: setattr(tier, "arena", view)
