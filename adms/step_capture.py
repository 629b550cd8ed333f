"""What the capture of a static pass needs beside compiled layers."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Where passes are captured; PyTorch's own choice is of the device that captured first."""
    return torch.cuda.Stream(device)


# One at a time in a process: a capture begins with waiting for the device, which another forbids.
_CAPTURES = threading.RLock()


@contextlib.contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None
) -> Iterator[None]:
    """Captures what the block does on ``device``; other threads may run passes meanwhile.

    Args:
        graph: that takes it.
        device: the current one.
        pool: of another graph, which never runs at the same time; its memory is used too.
    """
    before, stream = torch.cuda.current_stream(device), capture_stream(device)
    with _CAPTURES:
        try:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            # A capture that could not be ended leaves its stream the current one.
            torch.cuda.set_stream(before)
            raise


def first_cause(error: BaseException) -> str:
    """What went wrong in a capture: ending it then fails too, and says less."""
    while error.__context__ is not None:
        error = error.__context__
    first = str(error).strip().split("\n")[0]
    return f"its capture failed ({type(error).__name__}: {first})"


@functools.cache
def _rehearsal_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all, as cuBLAS keeps 32 MiB for each."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def rehearsing(device: torch.device) -> Iterator[None]:
    """Runs what is to be captured aside: kernels are compiled and libraries set themselves up."""
    side = _rehearsal_stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


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
