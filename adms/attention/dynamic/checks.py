"""What `DynamicAttention` checks of its arguments, and what it says where they do not fit.

Shapes: `...` leading dimensions, `Q` queries, `N` entries, `P` changed entries, `D` key size,
`E` value size, `R` rows asked for.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adms.errors import ADMSTypeError, ADMSValueError


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q [..., Q, D], k [..., N, D], v [..., N, E] fit together and are finite."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
        if tensor.dim() < 2:
            raise ADMSValueError(
                f"{name} must be [..., rows, size], got shape {list(tensor.shape)}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ADMSValueError(
                f"{name} must have the dtype and device of q ({q.dtype}, {q.device}), "
                f"got ({tensor.dtype}, {tensor.device}); convert it first"
            )
    lead = q.shape[:-2]
    if k.shape[:-2] != lead or k.shape[-1] != q.shape[-1] or k.shape[-2] < 1:
        raise ADMSValueError(
            f"k must be {[*lead, 'N >= 1', q.shape[-1]]} for q {list(q.shape)}, got {list(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ADMSValueError(f"v must be {[*k.shape[:-1], 'E']}, got {list(v.shape)}")
    check_finite("q", q)
    check_finite("k", k)
    check_finite("v", v)


def check_accumulator(dtype: torch.dtype) -> None:
    """Raises unless sums can be held in `dtype`."""
    if dtype not in (torch.float32, torch.float64):
        raise ADMSValueError(
            f"accumulator_dtype must be torch.float32 or torch.float64, got {dtype}"
        )


def checked_scale(scale: float | None, size: int) -> float:
    """The factor on the scores; None means 1/sqrt(size)."""
    if scale is None:
        return 1.0 / math.sqrt(size)
    if not math.isfinite(scale):
        raise ADMSValueError(f"scale must be finite, got {scale}; None means 1/sqrt(D)")
    return float(scale)


def check_rows(name: str, rows: Tensor, buffer: Tensor, count: int | None) -> None:
    """Raises unless `rows` fits one slot of `buffer`, or `count` of them."""
    check_floating(name, rows)
    middle = [] if count is None else [count]
    expected = [*buffer.shape[:-2], *middle, buffer.shape[-1]]
    if list(rows.shape) != expected:
        raise ADMSValueError(f"{name} must be {expected}, got {list(rows.shape)}")
    if rows.dtype != buffer.dtype or rows.device != buffer.device:
        raise ADMSValueError(
            f"{name} must have dtype {buffer.dtype} on {buffer.device}, got {rows.dtype} on "
            f"{rows.device}; convert it first"
        )
    check_finite(name, rows)


def row_index(rows: Sequence[int] | Tensor, q: Tensor) -> Tensor:
    """Rows of q [..., Q, D] as an index [R]."""
    index = torch.as_tensor(rows, device=q.device)
    total = q.shape[-2]
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ADMSValueError(
            f"rows must be a list of row numbers, got shape {list(index.shape)} of "
            f"{index.dtype}; use rows=[0] for one row and None for all"
        )
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < total):
        raise ADMSValueError(f"rows must be within 0 to {total - 1}, got {index.tolist()}")
    return index.long()


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises unless `tensor` is a floating-point tensor."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ADMSTypeError(f"{name} must be a floating-point tensor, got {kind}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises where `tensor` holds NaN or infinity."""
    # A NaN or infinity would stay in the sums after its entry has gone.
    if not bool(torch.isfinite(tensor.detach()).all()):
        raise ADMSValueError(f"{name} must be finite, got NaN or infinity; clean it first")


def checked_int(name: str, value: int, least: int) -> int:
    """`value`, if it is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ADMSTypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ADMSValueError(f"{name} must be at least {least}, got {value}")
    return value
