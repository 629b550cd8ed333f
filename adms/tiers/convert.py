"""The middle's bytes from one dtype of the model to another.

Codes and landmarks do not depend on the dtype; tokens that are held exactly, before coding starts,
do. Shapes: ``B`` rows.
"""

import torch

from adms.entries import Entries
from adms.errors import ADMSValueError
from adms.tiers.middle import MiddlePlan, MiddleTier


def convert_arena(
    arena: torch.Tensor, before: MiddlePlan, after: MiddlePlan, totals: list[int]
) -> torch.Tensor:
    """An arena ``[B, bytes]`` as another plan lays it out.

    Args:
        arena: bytes in the layout of ``before``.
        before, after: plans of one layer that differ in dtype at most.
        totals: tokens that have entered the middle, per row.

    Raises:
        ADMSValueError: the plans hold different numbers of codes or landmarks, or a value leaves
            the range of the new dtype.
    """
    if before.dtype == after.dtype:
        return arena
    old = MiddleTier(before, arena)
    new = MiddleTier.empty(after, len(totals), arena.device)
    for row, total in enumerate(totals):
        if not before.geometry.is_coded(total):
            _convert_exact(old, new, row, total)
            continue
        if before.geometry != after.geometry:
            raise ADMSValueError(
                f"in {after.dtype} the same bytes divide into {after.geometry.capacity} codes and "
                f"{after.geometry.landmarks} landmarks instead of {before.geometry.capacity} and "
                f"{before.geometry.landmarks}; load it with the model in {before.dtype}"
            )
        end = min(arena.shape[1], new.arena.shape[1])
        new.arena[row, :end] = arena[row, :end]
    return new.arena


def _convert_exact(old: MiddleTier, new: MiddleTier, row: int, total: int) -> None:
    held = old.plan.geometry.held(total)
    if held == 0:
        return
    before, after = old.plan.raw, new.plan.raw
    records = old.arena[row : row + 1, : held * before.record_bytes]
    entries = before.decode(records[:, :0], records.unflatten(1, (held, before.record_bytes)))
    data = after.encode(records[:, :0], _cast(entries, new.plan.dtype)).flatten(1)
    new.arena[row, : data.shape[1]] = data[0]


def _cast(entries: Entries, dtype: torch.dtype) -> Entries:
    keys, values = entries.keys.to(dtype), entries.values.to(dtype)
    if not (bool(torch.isfinite(keys).all()) and bool(torch.isfinite(values).all())):
        raise ADMSValueError(f"values of the middle leave the range of {dtype}")
    return Entries(keys, values)
