"""The exact tiers: sinks and the ring of recent tokens, one buffer ``[sink | ring]`` per layer.

Shapes: ``L`` layers, ``B`` rows, ``K`` KV heads, ``S`` sink slots, ``C`` ring slots, ``D``/``E``
head sizes, ``M`` moves (one per token that changes its place).
"""

from dataclasses import dataclass

import torch

from adms.config import Sizes
from adms.entries import Entries
from adms.tiers.comparing import Window
from adms.tiers.undo import Undo
from adms.timeline import Timeline, ring_tokens


class ExactTier:
    """Keys (before positions) and values of sinks and recent tokens, allocated once.

    Attributes:
        keys: ``[B, K, S + C, D]``; a commit looks at those of several layers, ``[L, B, ...]``.
        values: ``[B, K, S + C, E]``, likewise.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values

    @classmethod
    def empty(cls, sizes: Sizes, keys: torch.Tensor, values: torch.Tensor) -> "ExactTier":
        """A tier without tokens, for tokens such as ``[B, K, N, D]`` and ``[B, K, N, E]``."""
        rows, heads = keys.shape[:2]
        slots = sizes.sink + sizes.ring
        # Zeros, not garbage: a masked slot is still multiplied by its weight of zero.
        return cls(
            keys.new_zeros(rows, heads, slots, keys.shape[3]),
            values.new_zeros(rows, heads, slots, values.shape[3]),
        )

    def write_in_flight(
        self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Puts single tokens ``[B, K, 1, D]`` of ``rows`` into their free ring slots."""
        self.keys[rows, :, slots] = keys[rows, :, 0]
        self.values[rows, :, slots] = values[rows, :, 0]

    def tensors(self) -> list[torch.Tensor]:
        """Everything this tier stores."""
        return [self.keys, self.values]


@dataclass(frozen=True)
class Moves:
    """Where tokens go when a forward pass is committed; the same for every layer.

    Attributes:
        num_leaving: most tokens that leave the recent tier in any row.
        ring_slots: ``[B, num_leaving]`` buffer slot of each leaving token, where it is in the ring.
        columns: ``[B, num_leaving]`` its column in this pass, where it is not.
        from_ring: ``[B, num_leaving]`` which of the two.
        sink_rows, sink_index, sink_slots: ``[M]`` leaving tokens that become sinks.
        middle_start: per row, leaving tokens before this one become sinks.
        middle_count: per row, leaving tokens that enter the middle.
        stay_rows, stay_columns, stay_slots: ``[M]`` tokens of this pass that enter the ring.
    """

    num_leaving: int
    ring_slots: torch.Tensor
    columns: torch.Tensor
    from_ring: torch.Tensor
    sink_rows: torch.Tensor
    sink_index: torch.Tensor
    sink_slots: torch.Tensor
    middle_start: list[int]
    middle_count: list[int]
    stay_rows: torch.Tensor
    stay_columns: torch.Tensor
    stay_slots: torch.Tensor


def plan_moves(
    timeline: Timeline,
    new: list[int],
    columns: list[list[int]],
    in_ring: bool,
    evicted_after: list[int],
    device: torch.device,
) -> Moves:
    """Works out all moves on the host.

    Args:
        timeline: counts before the pass.
        new: real tokens per row in the pass.
        columns: per row, the columns of those tokens.
        in_ring: the pass's single token lies in its ring slot already.
        evicted_after: per row, what ``evicted`` becomes.
        device: where the index tensors are wanted.
    """
    sizes = timeline.sizes
    leaving = [
        after - before for after, before in zip(evicted_after, timeline.evicted, strict=True)
    ]
    most = max(leaving)
    slots, cols, in_rings = [], [], []
    sinks: list[tuple[int, int, int]] = []
    stays: list[tuple[int, int, int]] = []
    middle_start, middle_count = [], []
    for row, count in enumerate(leaving):
        first, seen = timeline.evicted[row], timeline.seen[row]
        held = seen + (new[row] if in_ring else 0)
        tokens = range(first, first + most)
        in_rings.append([token < held for token in tokens])
        slots.append([sizes.sink + token % sizes.ring for token in tokens])
        own = columns[row]
        cols.append([own[token - seen] if 0 <= token - seen < len(own) else 0 for token in tokens])
        to_sink = min(max(sizes.sink - first, 0), count)
        sinks += [(row, index, first + index) for index in range(to_sink)]
        middle_start.append(to_sink)
        middle_count.append(count - to_sink)
        if not in_ring:
            begin = max(evicted_after[row], seen)
            stays += [
                (row, own[token - seen], sizes.sink + token % sizes.ring)
                for token in range(begin, seen + new[row])
            ]

    def indices(rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True)

    def triples(moves: list[tuple[int, int, int]]) -> torch.Tensor:
        table = torch.tensor(moves, dtype=torch.long).reshape(-1, 3).T
        return table.to(device, non_blocking=True)

    sink_rows, sink_index, sink_slots = triples(sinks)
    stay_rows, stay_columns, stay_slots = triples(stays)
    return Moves(
        num_leaving=most,
        ring_slots=indices(slots),
        columns=indices(cols),
        from_ring=torch.tensor(in_rings, dtype=torch.bool).to(device, non_blocking=True),
        sink_rows=sink_rows,
        sink_index=sink_index,
        sink_slots=sink_slots,
        middle_start=middle_start,
        middle_count=middle_count,
        stay_rows=stay_rows,
        stay_columns=stay_columns,
        stay_slots=stay_slots,
    )


def at_slots(states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """``[L, B, K, S, D]`` at the slots ``[B, N]`` of each row: ``[L, B, K, N, D]``."""
    rows = torch.arange(states.shape[1], device=states.device)[:, None]
    # [B, N, L, K, D], since indices that stand apart come first.
    return states[:, rows, :, slots].permute(2, 0, 3, 1, 4)


def ring_window(
    tier: ExactTier, written: torch.Tensor, evicted: torch.Tensor, sizes: Sizes
) -> Window:
    """What a metric is shown of the ring of all layers, ``[L, B, ...]``.

    Args:
        tier: of all layers.
        written: ``[B]`` tokens so far that belong in it.
        evicted: ``[B]`` those of them that have left it.
        sizes: of the cache.
    """
    tokens = ring_tokens(written, sizes.ring)
    # The slot of one that has left may hold anything: a long pass skips it, a failed one writes.
    tokens = torch.where(tokens >= evicted[:, None], tokens, -1)
    return Window(tier.keys[:, :, :, sizes.sink :], tokens)


def leaving_entries(tier: ExactTier, staged: Entries | None, moves: Moves) -> Entries:
    """Exact keys and values ``[L, B, K, num_leaving, ...]`` of the tokens that leave.

    Args:
        tier: of all layers, ``[L, B, ...]``.
        staged: the pass's tokens ``[L, B, ...]``, if they are kept aside.
        moves: where tokens go.
    """

    def gather(ring: torch.Tensor, fresh: torch.Tensor | None) -> torch.Tensor:
        held = at_slots(ring, moves.ring_slots)
        if fresh is None:
            return held
        from_ring = moves.from_ring[:, None, :, None]
        return torch.where(from_ring, held, at_slots(fresh, moves.columns))

    return Entries(
        gather(tier.keys, None if staged is None else staged.keys),
        gather(tier.values, None if staged is None else staged.values),
    )


def write_moves(
    tier: ExactTier, leaving: Entries | None, staged: Entries | None, moves: Moves
) -> None:
    """Writes new sinks and the pass's remaining tokens into the buffers ``[L, B, ...]``."""
    if leaving is not None and len(moves.sink_rows):
        rows, index, slots = moves.sink_rows, moves.sink_index, moves.sink_slots
        tier.keys[:, rows, :, slots] = leaving.keys[:, rows, :, index]
        tier.values[:, rows, :, slots] = leaving.values[:, rows, :, index]
    if staged is not None and len(moves.stay_rows):
        rows, columns, slots = moves.stay_rows, moves.stay_columns, moves.stay_slots
        tier.keys[:, rows, :, slots] = staged.keys[:, rows, :, columns]
        tier.values[:, rows, :, slots] = staged.values[:, rows, :, columns]


def keep_overwritten(
    tier: ExactTier, leaving: Entries | None, staged: Entries | None, moves: Moves, undo: Undo
) -> None:
    """Keeps what ``write_moves`` with the same arguments overwrites."""
    for part in tier.tensors():
        if leaving is not None and len(moves.sink_rows):
            undo.keep(part, slice(None), moves.sink_rows, slice(None), moves.sink_slots)
        if staged is not None and len(moves.stay_rows):
            undo.keep(part, slice(None), moves.stay_rows, slice(None), moves.stay_slots)
