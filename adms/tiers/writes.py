"""Where the middle's bytes go, worked out before anything is written.

Records go around rings of slots, whole ones first and what is cut of them after; a header or the
landmarks have one place.

Shapes: ``L`` layers, ``B`` rows, ``R`` records, ``S`` slots, ``N`` places of a row, ``M`` places of
all rows.
"""

from dataclasses import dataclass

import torch

from adms.compressors.base import Coder
from adms.tiers.arrivals import Arrivals, table


@dataclass(frozen=True)
class Write:
    """Bytes to put in place once every layer has worked out its own.

    Attributes:
        slots: ``[L, B, S, bytes]`` a part of the arena, cut into equal slots.
        rows: whose places are written, ``[M]`` or ``[B, 1]``.
        places: their slots, ``[M]`` or ``[B, N]``.
        data: ``[L, M, bytes]`` or ``[L, B, N, bytes]``.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    data: torch.Tensor


class Slots:
    """The bytes of layers that are alike, as slots that are written.

    Args:
        arena: ``[L, B, bytes]``.
    """

    def __init__(self, arena: torch.Tensor) -> None:
        self.arena = arena
        self.device = arena.device

    def record_writes(
        self, coder: Coder, records: torch.Tensor, arrivals: Arrivals, rows: list[int]
    ) -> list[Write]:
        """Where new records ``[L, B, R, bytes]`` go, and whole ones they displace once cut."""
        block, whole, cut = coder.block_tokens, coder.num_records, coder.num_coarse
        records = records[..., : coder.record_bytes]
        writes = [self.ring_write(records, arrivals, rows, coder, coder.header_bytes)]
        if not cut:
            return writes
        displaced, passing = [], []
        for index, row in enumerate(rows):
            before, new = arrivals.totals[row] // block, arrivals.counts[row] // block
            after = before + new
            for record in range(max(0, before - whole, after - whole - cut), after - whole):
                if record < before:
                    displaced.append((row, record % whole, record % cut))
                else:
                    passing.append((row, index, record - before, record % cut))
        held, cut_slots = self._whole_slots(coder), self._cut_slots(coder)
        if displaced:
            row_index, source, place = table(displaced, 3, self.device)
            data = held[:, row_index, source, : coder.coarse_bytes]
            writes.append(Write(cut_slots, row_index, place, data))
        if passing:
            row_index, own, record, place = table(passing, 4, self.device)
            data = records[:, own, record, : coder.coarse_bytes]
            writes.append(Write(cut_slots, row_index, place, data))
        return writes

    def steady_writes(
        self, coder: Coder, records: torch.Tensor, totals: torch.Tensor
    ) -> list[Write]:
        """The same from counts ``[B]`` on the device, for as many new records in every row."""
        whole, cut = coder.num_records, coder.num_coarse
        held = self._whole_slots(coder)
        rows = torch.arange(len(totals), device=self.device)[:, None]
        new = torch.arange(records.shape[2], device=self.device)
        number = (totals // coder.block_tokens)[:, None] + new
        writes = [Write(held, rows, number % whole, records[..., : coder.record_bytes])]
        if cut:
            number, cut_slots = number - whole, self._cut_slots(coder)
            # Before all slots are full nothing is displaced, and what is there is written again.
            data = torch.where(
                (number >= 0)[..., None],
                held[:, rows, number % whole, : coder.coarse_bytes],
                cut_slots[:, rows, number % cut],
            )
            writes.append(Write(cut_slots, rows, number % cut, data))
        return writes

    def ring_write(
        self,
        records: torch.Tensor,
        arrivals: Arrivals,
        rows: list[int],
        coder: Coder,
        start: int,
    ) -> Write:
        """Where each row's new records go; only the last ``num_records`` can stay."""
        block, slots = coder.block_tokens, coder.num_records
        moves = []
        for index, row in enumerate(rows):
            first, new = arrivals.totals[row] // block, arrivals.counts[row] // block
            moves += [
                (row, index, record, (first + record) % slots)
                for record in range(max(0, new - slots), new)
            ]
        row_index, own, record, place = table(moves, 4, self.device)
        held = self._slots(start, slots, coder.record_bytes)
        return Write(held, row_index, place, records[:, own, record])

    def constant_write(self, rows: list[int], start: int, data: torch.Tensor) -> Write:
        """Bytes ``[L, B, bytes]`` that go to the same place in every row."""
        everything = rows == list(range(self.arena.shape[1]))
        if everything:
            index = torch.arange(len(rows), device=self.device)
        else:
            index = table([(row,) for row in rows], 1, self.device)[0]
        return Write(self._slots(start, 1, data.shape[2]), index, torch.zeros_like(index), data)

    def _whole_slots(self, coder: Coder) -> torch.Tensor:
        return self._slots(coder.header_bytes, coder.num_records, coder.record_bytes)

    def _cut_slots(self, coder: Coder) -> torch.Tensor:
        start = coder.header_bytes + coder.num_records * coder.record_bytes
        return self._slots(start, coder.num_coarse, coder.coarse_bytes)

    def _slots(self, start: int, count: int, size: int) -> torch.Tensor:
        """Bytes of the arena as ``[L, B, count, size]``, without a copy."""
        return self.arena[:, :, start : start + count * size].unflatten(2, (count, size))
