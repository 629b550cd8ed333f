"""Fused kernels, each beside a plain-PyTorch twin that is its oracle; and which of them is used."""

import functools
import importlib.util
from typing import Literal

from adms.errors import ADMSValueError

Kernel = Literal["auto", "torch", "triton"]
KERNELS: tuple[Kernel, ...] = ("auto", "torch", "triton")


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def check_kernel(kernel: object) -> Kernel:
    """The name of a kernel.

    Raises:
        ADMSValueError: it is none, or Triton is asked for and not installed.
    """
    for known in KERNELS:
        if kernel == known:
            if known == "triton" and not has_triton():
                raise ADMSValueError(
                    "kernel='triton' needs the package triton, which is not installed; install it "
                    "or use kernel='auto'"
                )
            return known
    raise ADMSValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
