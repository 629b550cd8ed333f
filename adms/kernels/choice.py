"""Which form of what is not attention is used while something is under way: fused or plain."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

from adms.kernels import Kernel, has_triton

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

_IN_USE: ContextVar[Kernel] = ContextVar("adms_kernel", default="auto")


@contextlib.contextmanager
def using(kernel: Kernel) -> Iterator[None]:
    """Has ``kernel`` used while the block runs, in this thread."""
    before = _IN_USE.set(kernel)
    try:
        yield
    finally:
        _IN_USE.reset(before)


def fuses(kernel: Kernel, device: torch.device) -> bool:
    """Whether a choice of kernel means Triton's on this device."""
    return device.type == "cuda" and kernel != "torch" and has_triton()


def is_fused(device: torch.device) -> bool:
    """Whether Triton's kernels work on this device's tensors: on CUDA, unless told otherwise."""
    return fuses(_IN_USE.get(), device)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Has what asks for the current CUDA device find this one while the block runs."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launching(host: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Runs a function that launches Triton's kernels on the device of its first tensor.

    Triton launches on the current device, wherever the tensors lie.
    """

    @functools.wraps(host)
    def guarded(*given: _Given.args, **named: _Given.kwargs) -> _Made:
        first = next(one for one in (*given, *named.values()) if isinstance(one, torch.Tensor))
        with on_device(first.device):
            return host(*given, **named)

    return guarded
