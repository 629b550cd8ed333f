"""Which tokens enter the middle, and what of them is coded in one go.

Shapes: ``L`` layers, ``B`` rows, ``K`` KV heads, ``N`` arriving tokens, ``M`` numbers of a column,
``H`` query heads, ``Q`` queries, ``D`` head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adms.entries import Entries


@dataclass(frozen=True)
class Arrivals:
    """Which tokens enter the middle in a commit; the same for every layer.

    Attributes:
        starts: per row, the first of the leaving tokens that enters.
        counts: per row, how many do.
        totals: tokens that have entered before, per row.
        sink: number of sinks (turns middle token numbers into text positions).
    """

    starts: list[int]
    counts: list[int]
    totals: list[int]
    sink: int


@dataclass(frozen=True)
class Group:
    """Rows that are coded in one go, and their tokens.

    Attributes:
        rows: their numbers.
        index: the same on the device, or a slice where they are all rows.
        tokens: ``[B, N]`` text positions, -1 where a row has fewer tokens than another.
        entries: ``[L * B, K, N, ...]``.
        queries: ``[L * B, H, Q, D]`` or None.
    """

    rows: list[int]
    index: torch.Tensor | slice
    tokens: torch.Tensor
    entries: Entries
    queries: torch.Tensor | None


def gather(
    leaving: Entries, arrivals: Arrivals, rows: list[int], queries: torch.Tensor | None
) -> Group:
    """Rows and what arrives in them, padded to the longest with what comes after.

    Args:
        leaving: tokens that leave the recent tier ``[L, B, K, N, ...]``.
        arrivals: which of them enter.
        rows: those asked for.
        queries: ``[L, B, H, Q, D]`` or None.
    """
    device = leaving.keys.device
    starts = [arrivals.starts[row] for row in rows]
    counts = [arrivals.counts[row] for row in rows]
    width = max(counts)
    number, first, start, count = table(
        [
            (row, arrivals.sink + arrivals.totals[row], arrivals.starts[row], own)
            for row, own in zip(rows, counts, strict=True)
        ],
        4,
        device,
    )
    everything = rows == list(range(leaving.keys.shape[1]))
    index = slice(None) if everything else number
    span = torch.arange(width, device=device)
    tokens = first[:, None] + span
    if min(counts) < width:
        tokens = torch.where(span < count[:, None], tokens, -1)
    if len(set(starts)) == 1:
        columns = slice(starts[0], starts[0] + width)
        keys, values = (part[:, index, :, columns] for part in (leaving.keys, leaving.values))
    else:
        place = (start[:, None] + span).clamp(max=leaving.keys.shape[3] - 1)
        # [B, N, L, K, D], since indices that stand apart come first.
        keys, values = (
            part[:, number[:, None], :, place].permute(2, 0, 3, 1, 4)
            for part in (leaving.keys, leaving.values)
        )
    entries = Entries(keys.flatten(0, 1), values.flatten(0, 1))
    own_queries = None if queries is None else queries[:, index].flatten(0, 1)
    return Group(rows, index, tokens, entries, own_queries)


def table(moves: Sequence[tuple[int, ...]], width: int, device: torch.device) -> torch.Tensor:
    """Columns ``[width, M]`` of numbers that the host knows, sent without waiting."""
    numbers = torch.tensor(moves, dtype=torch.long).reshape(-1, width).T.contiguous()
    return numbers.to(device, non_blocking=True)
