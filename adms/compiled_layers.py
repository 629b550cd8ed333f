"""A decoder's layers compiled for a capture: once for all that are alike.

A compiled layer must not know which one it is, or each would be compiled anew. So what attention
is given does not say, and the one attention of the layer that runs is found outside of what the
compiler sees.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# What compiles the layers of a pass that is captured; None captures them as they are.
BACKEND: str | None = "inductor"
# Compiled forms of one kind of layer, over all captures of a process: one for each shape of the
# input, and one for each layer that is like no other.
MOST_FORMS = 2**16


class _Running(threading.local):
    """The attention of the compiled layer that runs in this thread."""

    attend: Callable[..., torch.Tensor] | None = None


_RUNNING = _Running()


@torch.library.custom_op("adms::step_attention", mutates_args=())
def step_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of the compiled layer that runs, for the token in flight.

    What it changes, the slot in flight, nothing else in the pass reads.

    Args:
        query: ``[B, H, 1, D]`` before positions.
        key, value: ``[B, K, 1, D]`` of the token in flight.
        scaling: factor of the scores.

    Returns:
        ``[B, 1, H, D]``.
    """
    if _RUNNING.attend is None:
        raise RuntimeError("attention of a step outside of a compiled layer")
    return _RUNNING.attend(query, key, value, scaling)


@step_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    rows, heads, count, size = query.shape
    return query.new_empty(rows, count, heads, size)


@contextlib.contextmanager
def compiled_layers(decoder: Any, attend: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Has every layer of a decoder run compiled while the block runs.

    Args:
        decoder: with ``layers``; None does nothing.
        attend: a layer's attention, which gets its number before what ``step_attention`` gets.
    """
    backend = BACKEND
    if backend is None or decoder is None:
        yield
        return
    before = [layer.__dict__.get("forward") for layer in decoder.layers]
    try:
        for index, layer in enumerate(decoder.layers):
            layer.forward = _compiled(layer, backend, functools.partial(attend, index))
        with torch._dynamo.config.patch(
            recompile_limit=MOST_FORMS, accumulated_recompile_limit=MOST_FORMS
        ):
            yield
    finally:
        for layer, own in zip(decoder.layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _compiled(
    layer: nn.Module, backend: str, attend: Callable[..., torch.Tensor]
) -> Callable[..., Any]:
    """A layer's forward, compiled; all layers of a class share what was compiled."""
    compiled = torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        _RUNNING.attend = attend
        try:
            return compiled(*args, **kwargs)
        finally:
            _RUNNING.attend = None

    return forward
