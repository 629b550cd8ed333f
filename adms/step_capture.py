"""What the capture of a static pass needs beside compiled layers."""

import contextlib
import functools
from typing import Any

import torch


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Where passes are captured; PyTorch's own choice is of the device that captured first."""
    return torch.cuda.Stream(device)


def capturing(
    graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None
) -> contextlib.AbstractContextManager[None]:
    """Captures what the block does on ``device``; other threads may use the device meanwhile.

    Args:
        graph: that takes it.
        device: the current one.
        pool: of another graph, which never runs at the same time; its memory is used too.
    """
    stream = capture_stream(device)
    return torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")


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
