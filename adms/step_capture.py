"""What the capture of a static pass needs: layers compiled one by one, and outputs made anew."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

# Compiled forms of one kind of layer, over all captures of a process.
MOST_CAPTURED_LAYERS = 2**16


@functools.cache
def rehearsal_stream(device: torch.device) -> torch.cuda.Stream:
    """Where passes run before they are captured: one for all, as cuBLAS keeps 32 MiB for each."""
    return torch.cuda.Stream(device)


class Output:
    """Makes the decoder's output anew for every pass, from the place where it is written."""

    def __init__(self, result: Any) -> None:
        self.made = type(result)
        self.is_tuple = isinstance(result, tuple)
        self.hidden: torch.Tensor = result[0]
        self.cache = None if self.is_tuple else result.get("past_key_values")
        self.rest = result[1:] if self.is_tuple else ()

    def __call__(self) -> Any:
        # A caller may keep it beyond the next pass.
        hidden = self.hidden.clone()
        if self.is_tuple:
            return (hidden, *self.rest)
        return self.made(last_hidden_state=hidden, past_key_values=self.cache)


@contextlib.contextmanager
def compiled_layers(decoder: Any, backend: str | None) -> Iterator[None]:
    """Has every layer of a decoder compiled on its own while the block runs.

    Compiled together they take as many times longer as there are layers; apart, the compiler finds
    the code of the first one in its cache again.
    """
    if backend is None or decoder is None:
        yield
        return
    before = [layer.__dict__.get("forward") for layer in decoder.layers]
    try:
        for layer in decoder.layers:
            layer.forward = torch.compile(
                layer.forward, backend=backend, fullgraph=True, dynamic=False
            )
        # The layers of all models of a kind share one function, and each capture of each layer has
        # its own entry there, which is used once.
        with torch._dynamo.config.patch(
            recompile_limit=MOST_CAPTURED_LAYERS, accumulated_recompile_limit=MOST_CAPTURED_LAYERS
        ):
            yield
    finally:
        for layer, own in zip(decoder.layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own
