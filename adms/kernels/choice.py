"""Which form of what is not attention is used while something is under way: fused or plain."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from adms.kernels import Kernel, has_triton

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
