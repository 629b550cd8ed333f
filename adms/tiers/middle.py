"""The middle tier: tokens between sinks and window, in a fixed number of bytes per layer and row.

A row's bytes (its stretch of the arena) hold its tokens exactly as long as they fit. When they no
longer do, everything is coded at once against a header fitted to those very tokens, and from then
on each token is coded as it arrives; nothing that was decoded is ever coded again. Records lie in a
ring: the oldest is overwritten. Landmarks are tokens that an importance metric keeps exactly; their
codes, while still there, are masked.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` entries, ``L`` landmarks, ``D``/``E`` head sizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adms.compressors.base import Coder, RawCoder
from adms.compressors.tables import CodeTables
from adms.config import ADMSConfig
from adms.entries import Entries, TokenShape
from adms.importance import Evidence, Metric, needs_queries
from adms.positions import MiddleGeometry
from adms.tiers.candidates import Candidates
from adms.tiers.head_landmarks import Arriving, HeadLandmarkStore
from adms.tiers.landmarks import LandmarkStore, aligned
from adms.tiers.undo import Undo


@dataclass(frozen=True)
class MiddlePlan:
    """How the bytes of one kind of layer are used; shared by all layers of that kind.

    Attributes:
        shape: keys and values of one token.
        dtype: the model's dtype.
        raw: holds tokens exactly.
        coder: holds them coded; None where coding would not hold more than the exact tokens.
        store: holds landmarks; None where there are none.
        geometry: what positions need to know.
        arena_bytes: bytes per row, for either use.
        metric: scores tokens for landmarks.
        config: parameters of the landmarks' choice.
    """

    shape: TokenShape
    dtype: torch.dtype
    raw: RawCoder
    coder: Coder | None
    store: LandmarkStore | HeadLandmarkStore | None
    geometry: MiddleGeometry
    arena_bytes: int
    metric: Metric
    config: ADMSConfig

    def __deepcopy__(self, memo: dict[int, Any]) -> "MiddlePlan":
        # It belongs to the binding, which copies of a cache share, and so does what it leads to.
        return self

    @property
    def needs_queries(self) -> bool:
        """Whether a commit makes use of the pass's queries."""
        metric_asks = bool(self.geometry.landmarks) and needs_queries(self.metric)
        return metric_asks or (self.coder is not None and self.coder.uses_queries)

    @property
    def landmark_offset(self) -> int:
        """Where the landmarks start in a coded row's bytes."""
        if self.coder is None:
            return 0
        return aligned(self.coder.nbytes)


@dataclass(frozen=True)
class Write:
    """Bytes to put in place once every layer has worked out its own.

    Attributes:
        rows: ``[M]`` rows.
        start: ``[M]`` first byte in the row's stretch.
        data: ``[M, bytes]``.
    """

    rows: torch.Tensor
    start: torch.Tensor
    data: torch.Tensor


class MiddleTier:
    """The middle of one layer: an arena of bytes and the functions over it."""

    def __init__(self, plan: MiddlePlan, arena: torch.Tensor) -> None:
        self.plan = plan
        self.arena = arena

    @classmethod
    def empty(cls, plan: MiddlePlan, rows: int, device: torch.device) -> "MiddleTier":
        """A middle without tokens."""
        arena = torch.zeros(rows, plan.arena_bytes, dtype=torch.uint8, device=device)
        return cls(plan, arena)

    def tensors(self) -> list[torch.Tensor]:
        """Everything this tier stores."""
        return [self.arena]

    # --- reading -----------------------------------------------------------------------------

    def read(self, totals: list[int]) -> Entries | None:
        """Entries in memory order, rows padded to the longest; None where every row is empty.

        Args:
            totals: tokens that have entered the middle, per row.
        """
        geometry = self.plan.geometry
        width = max(geometry.num_entries(total) for total in totals)
        if width == 0:
            return None
        coded = [geometry.is_coded(total) for total in totals]
        if all(coded) or not any(coded):
            return self._read_rows(slice(None), totals, coded[0])
        parts: list[Entries | None] = [None] * len(totals)
        for phase in (False, True):
            rows = [row for row, is_coded in enumerate(coded) if is_coded == phase]
            entries = self._read_rows(rows, [totals[row] for row in rows], phase)
            for index, row in enumerate(rows):
                parts[row] = _take_row(entries, index, width)
        return _stack_rows([part for part in parts if part is not None])

    def _read_rows(self, rows: list[int] | slice, totals: list[int], coded: bool) -> Entries:
        data = self.arena[rows]
        geometry = self.plan.geometry
        if not coded:
            count = max(geometry.num_entries(total) for total in totals)
            size = self.plan.raw.record_bytes
            records = data[:, : count * size].unflatten(1, (count, size))
            return self.plan.raw.decode(data[:, :0], records)
        coder = self._coder
        counts = [geometry.held(total) // coder.block_tokens for total in totals]
        most, header = max(counts), data[:, : coder.header_bytes]
        whole = self._records(data, min(most, coder.num_records), cut=False)
        parts = [coder.decode(header, _blank(whole, counts))]
        if most > coder.num_records:
            cut_records = self._records(data, most - coder.num_records, cut=True)
            cut_counts = [count - coder.num_records for count in counts]
            parts.append(coder.decode(header, _blank(cut_records, cut_counts)))
        return parts[0] if len(parts) == 1 else _join(parts)

    def _records(self, data: torch.Tensor, count: int, *, cut: bool) -> torch.Tensor:
        """The first ``count`` whole or cut records in the bytes of some rows."""
        coder = self._coder
        start, size = coder.header_bytes, coder.record_bytes
        if cut:
            start, size = start + coder.num_records * size, coder.coarse_bytes
        return data[:, start : start + count * size].unflatten(1, (count, size))

    @property
    def _coder(self) -> Coder:
        if self.plan.coder is None:
            raise RuntimeError("a middle without a coder was read as coded")
        return self.plan.coder

    def members(self, totals: list[int]) -> torch.Tensor | None:
        """Which entry of its record each token is part of: ``[B, R, block_tokens]``.

        Args:
            totals: tokens that have entered the middle, per row; rows not coded yet have none that
                mean anything.

        Returns:
            Records in memory order; None where the coder does not know.
        """
        geometry, coder = self.plan.geometry, self._coder
        most = max(
            geometry.held(total) // coder.block_tokens if geometry.is_coded(total) else 0
            for total in totals
        )
        found = coder.members(self._records(self.arena, min(most, coder.num_records), cut=False))
        if found is None or most <= coder.num_records:
            return found
        cut = coder.members(self._records(self.arena, most - coder.num_records, cut=True))
        return found if cut is None else torch.cat([found, cut], dim=1)

    def landmarks(self, totals: list[int]) -> tuple[Entries, torch.Tensor]:
        """Entries of the landmarks ``[B, K, L, ...]`` and their text positions ``[B, L]``.

        Where heads choose their own, ``valid [B, K, L]`` says whose each is.

        Args:
            totals: tokens that have entered the middle, per row; rows not coded yet have none.
        """
        coded = [self.plan.geometry.is_coded(total) for total in totals]
        data = self._landmark_bytes(slice(None))
        codes = self.arena[:, : self._coder.header_bytes]
        if not all(coded):
            # Their bytes there are tokens; read as landmarks they need not even be finite, and a
            # masked entry is still multiplied by zero.
            held = torch.tensor(coded, device=data.device)[:, None]
            data, codes = data * held, codes * held
        store = self.plan.store
        if isinstance(store, HeadLandmarkStore):
            return store.decode(data)
        return self._store.decode(data, codes)

    def landmark_bytes(self) -> torch.Tensor:
        """``[B, bytes]`` of all rows' landmarks."""
        return self._landmark_bytes(slice(None))

    def landmark_records(self) -> torch.Tensor:
        """Codes of all rows' landmarks ``[B, L, bytes]``, without a copy."""
        return self._store.records(self.landmark_bytes())

    def landmark_tokens(self) -> torch.Tensor:
        """Text positions ``[B, L]`` of all rows' landmarks, -1 where a slot is empty."""
        return self._store.read(self.landmark_bytes()).tokens

    def tables(self) -> tuple[CodeTables | None, CodeTables | None]:
        """How kernels read ``records`` and ``landmark_records``; None where they cannot."""
        coder, store = self._coder, self.plan.store
        if isinstance(store, HeadLandmarkStore):
            return None, None
        header = self.arena[:, : coder.header_bytes]
        if store is None or store.own is not None:
            whole = None if coder.num_coarse else coder.tables(header, coder.record_bytes)
            return whole, None if store is None else store.tables(self.landmark_bytes())
        fine = coder.tables(header, store.record_bytes)
        if coder.num_coarse or fine is None:
            return None, fine
        # A record is the start of a landmark's.
        return fine.cut(coder.record_bytes), fine

    def records(self) -> torch.Tensor:
        """All records ``[B, R, bytes]`` of rows that are coded, without a copy."""
        return self._records(self.arena, self._coder.num_records, cut=False)

    @property
    def _store(self) -> LandmarkStore:
        if not isinstance(self.plan.store, LandmarkStore):
            raise RuntimeError("a middle without landmarks of all heads was asked for them")
        return self.plan.store

    def _landmark_bytes(self, rows: list[int] | slice) -> torch.Tensor:
        if self.plan.store is None:
            raise RuntimeError("a middle without landmarks was asked for their bytes")
        start = self.plan.landmark_offset
        return self._bytes(rows, start, start + self.plan.store.nbytes)

    def _bytes(self, rows: list[int] | slice, start: int, stop: int) -> torch.Tensor:
        """Some bytes of some rows; a view where it can be one."""
        part = self.arena[:, start:stop]
        if rows == slice(None) or rows == list(range(len(part))):
            return part
        return part[rows]

    # --- writing -----------------------------------------------------------------------------

    def prepare(
        self,
        leaving: Entries,
        starts: list[int],
        counts: list[int],
        totals: list[int],
        sink: int,
        recent: Callable[[int], Entries],
        queries: torch.Tensor | None,
    ) -> tuple[list[Write], list[Candidates]]:
        """Works out what arriving tokens change, without changing anything.

        The landmarks are settled over all layers before ``landmark_writes``.

        Args:
            leaving: tokens that leave the recent tier, rows padded to the longest.
            starts: per row, the first of them that enters the middle.
            counts: per row, how many do.
            totals: tokens that have entered the middle before, per row.
            sink: number of sinks (turns middle token numbers into text positions).
            recent: gives a row's exact tokens of the window in order, more material for a fit.
            queries: ``[B, H, Q, D]`` the pass's queries before positions, or None.
        """
        geometry = self.plan.geometry
        after = [total + count for total, count in zip(totals, counts, strict=True)]
        stay_raw, stay_coded, turn = [], [], []
        for row, count in enumerate(counts):
            if count == 0:
                continue
            if not geometry.is_coded(after[row]):
                stay_raw.append(row)
            elif geometry.is_coded(totals[row]):
                stay_coded.append(row)
            else:
                turn.append(row)
        writes: list[Write] = []
        candidates: list[Candidates] = []
        if stay_raw:
            entries = _window(leaving, stay_raw, starts, counts)
            records = self.plan.raw.encode(self._bytes(stay_raw, 0, 0), entries)
            writes.append(self._ring_write(records, stay_raw, totals, counts, self.plan.raw, 0))
        if stay_coded:
            writes += self._append(
                leaving, stay_coded, starts, counts, totals, sink, queries, candidates
            )
        # Happens once in a row's life, so a loop over rows costs nothing that matters.
        for row in turn:
            writes += self._turn(
                leaving, row, starts, counts, totals, sink, recent(row), queries, candidates
            )
        return writes, candidates

    def apply(self, writes: list[Write]) -> None:
        """Puts prepared bytes in place."""
        for write in writes:
            self.arena[self._place(write)] = write.data

    def keep_overwritten(self, writes: list[Write], undo: Undo) -> None:
        """Keeps what ``apply`` with the same writes overwrites."""
        for write in writes:
            undo.keep(self.arena, *self._place(write))

    def _place(self, write: Write) -> tuple[torch.Tensor, torch.Tensor]:
        span = torch.arange(write.data.shape[1], device=self.arena.device)
        return write.rows[:, None], write.start[:, None] + span

    def _append(
        self,
        leaving: Entries,
        rows: list[int],
        starts: list[int],
        counts: list[int],
        totals: list[int],
        sink: int,
        queries: torch.Tensor | None,
        candidates: list[Candidates],
    ) -> list[Write]:
        coder = self._coder
        entries = _window(leaving, rows, starts, counts)
        header = self._bytes(rows, 0, coder.header_bytes)
        own_queries = None if queries is None else queries[rows]
        records = coder.encode(header, entries, own_queries)
        writes = self._record_writes(records, rows, totals, counts)
        if self.plan.store is not None:
            first = torch.tensor([sink + totals[row] for row in rows], device=self.arena.device)
            span = torch.arange(entries.num_entries, device=self.arena.device)
            count = torch.tensor([counts[row] for row in rows], device=self.arena.device)
            tokens = torch.where(span < count[:, None], first[:, None] + span, -1)
            present = self._landmark_bytes(rows)
            landmark_header = present[:, : self.plan.store.header_bytes]
            if isinstance(self.plan.store, HeadLandmarkStore):
                arriving = self._arriving(header, records, entries, tokens, own_queries)
                return [*writes, self._head_write(rows, landmark_header, present, arriving)]
            evidence = self._evidence(header, records, landmark_header, own_queries)
            arrived = self._candidates(
                rows, entries, header, records, tokens, landmark_header, evidence
            )
            arrived.present = self._store.read(present)
            candidates.append(arrived)
        return writes

    def _turn(
        self,
        leaving: Entries,
        row: int,
        starts: list[int],
        counts: list[int],
        totals: list[int],
        sink: int,
        recent: Entries,
        queries: torch.Tensor | None,
        candidates: list[Candidates],
    ) -> list[Write]:
        """One row's step from exact to coded."""
        coder, total = self._coder, totals[row]
        arriving = _window(leaving, [row], starts, counts)
        parts = [arriving]
        if total:
            held = self._read_rows([row], [total], False)
            parts.insert(0, held)
        entries = _join(parts)
        own_queries = None if queries is None else queries[row : row + 1]
        header = coder.fit(_join([*parts, recent]), own_queries)
        records = coder.encode(header, entries, own_queries)
        index = torch.tensor([row], device=self.arena.device)
        size = entries.num_entries
        writes = [
            Write(index, torch.zeros_like(index), header),
            *self._record_writes(records, [row], [0] * (row + 1), [size] * (row + 1)),
        ]
        if self.plan.store is not None:
            tokens = sink + torch.arange(size, device=self.arena.device)[None]
            if isinstance(self.plan.store, HeadLandmarkStore):
                arrived = self._arriving(header, records, entries, tokens, own_queries)
                landmark_header = self.plan.store.fit(arrived)
                start = torch.full_like(index, self.plan.landmark_offset)
                writes.append(Write(index, start, landmark_header))
                return [*writes, self._head_write([row], landmark_header, None, arrived)]
            landmark_header = self._store.fit(entries)
            evidence = self._evidence(header, records, landmark_header, own_queries)
            landmark_header = self._store.with_scale(
                landmark_header, self.plan.metric(entries, evidence)
            )
            writes.append(
                Write(index, torch.full_like(index, self.plan.landmark_offset), landmark_header)
            )
            candidates.append(
                self._candidates([row], entries, header, records, tokens, landmark_header, evidence)
            )
        return writes

    def _evidence(
        self,
        header: torch.Tensor,
        records: torch.Tensor,
        landmark_header: torch.Tensor,
        queries: torch.Tensor | None,
    ) -> Evidence:
        coder = self._coder

        def decode() -> Entries:
            return coder.decode(header, records[..., : coder.record_bytes])

        return self._store.evidence(landmark_header, queries, decode, coder.block_tokens)

    def _candidates(
        self,
        rows: list[int],
        entries: Entries,
        codes: torch.Tensor,
        records: torch.Tensor,
        tokens: torch.Tensor,
        header: torch.Tensor,
        evidence: Evidence,
    ) -> Candidates:
        """Arriving tokens with their scores, before it is settled who stays."""
        store = self._store
        scores = store.scaled(header, self.plan.metric(entries, evidence).float())
        return Candidates(rows, store.encode(header, entries, codes, records), tokens, scores, None)

    def _arriving(
        self,
        header: torch.Tensor,
        records: torch.Tensor,
        entries: Entries,
        tokens: torch.Tensor,
        queries: torch.Tensor | None,
    ) -> Arriving:
        coder = self._coder
        decoded = coder.decode(header, records[..., : coder.record_bytes])
        return Arriving(entries, tokens, decoded, coder.block_tokens, queries)

    def _head_write(
        self,
        rows: list[int],
        header: torch.Tensor,
        present: torch.Tensor | None,
        arriving: Arriving,
    ) -> Write:
        """Landmarks that each head chooses by itself, as bytes to put in place."""
        store = self.plan.store
        if not isinstance(store, HeadLandmarkStore):
            raise RuntimeError("landmarks of all heads are settled over the layers")
        data = store.update(header, present, arriving, self.plan.metric, self.plan.config)
        index = torch.tensor(rows, device=self.arena.device)
        start = torch.full_like(index, self.plan.landmark_offset + store.header_bytes)
        return Write(index, start, data)

    def landmark_writes(self, candidates: list[Candidates]) -> list[Write]:
        """Settled landmarks as bytes to put in place."""
        writes = []
        for settled in candidates:
            if settled.present is None:
                raise RuntimeError("landmarks were written before they were settled")
            index = torch.tensor(settled.rows, device=self.arena.device)
            start = torch.full_like(index, self.plan.landmark_offset + self._store.header_bytes)
            writes.append(Write(index, start, self._store.slots(settled.present)))
        return writes

    def _record_writes(
        self, records: torch.Tensor, rows: list[int], totals: list[int], counts: list[int]
    ) -> list[Write]:
        """Where new records go, and where the whole ones they displace go once cut."""
        coder = self._coder
        block, whole, cut = coder.block_tokens, coder.num_records, coder.num_coarse
        records = records[..., : coder.record_bytes]
        writes = [self._ring_write(records, rows, totals, counts, coder, coder.header_bytes)]
        if not cut:
            return writes
        cut_start = coder.header_bytes + whole * coder.record_bytes
        displaced, passing = [], []
        for index, row in enumerate(rows):
            before, new = totals[row] // block, counts[row] // block
            after = before + new
            for record in range(max(0, before - whole, after - whole - cut), after - whole):
                start = cut_start + record % cut * coder.coarse_bytes
                if record < before:
                    source = coder.header_bytes + record % whole * coder.record_bytes
                    displaced.append((row, source, start))
                else:
                    passing.append((row, index, record - before, start))
        if displaced:
            row_index, source, start = self._table(displaced, 3)
            span = torch.arange(coder.coarse_bytes, device=self.arena.device)
            data = self.arena[row_index[:, None], source[:, None] + span]
            writes.append(Write(row_index, start, data))
        if passing:
            row_index, own, record, start = self._table(passing, 4)
            writes.append(Write(row_index, start, records[own, record, : coder.coarse_bytes]))
        return writes

    def _ring_write(
        self,
        records: torch.Tensor,
        rows: list[int],
        totals: list[int],
        counts: list[int],
        coder: Coder,
        offset: int,
    ) -> Write:
        """Where each row's new records go; only the last ``num_records`` can stay."""
        block, slots = coder.block_tokens, coder.num_records
        moves = []
        for index, row in enumerate(rows):
            first, new = totals[row] // block, counts[row] // block
            moves += [
                (row, index, record, offset + (first + record) % slots * coder.record_bytes)
                for record in range(max(0, new - slots), new)
            ]
        row_index, own, record, start = self._table(moves, 4)
        return Write(row_index, start, records[own, record])

    def _table(self, moves: Sequence[tuple[int, ...]], width: int) -> torch.Tensor:
        return torch.tensor(moves, dtype=torch.long).reshape(-1, width).T.to(self.arena.device)


def _window(entries: Entries, rows: list[int], starts: list[int], counts: list[int]) -> Entries:
    """Each row's entries ``start .. start + count``, padded to the longest with its last."""
    width = max(counts[row] for row in rows)
    if len({starts[row] for row in rows}) == 1:
        begin = starts[rows[0]]
        return Entries(
            entries.keys[rows, :, begin : begin + width],
            entries.values[rows, :, begin : begin + width],
        )
    device = entries.keys.device
    start = torch.tensor([starts[row] for row in rows], device=device)
    index = start[:, None] + torch.arange(width, device=device)
    index = index.clamp(max=entries.num_entries - 1)
    own = torch.tensor(rows, device=device)[:, None]
    return Entries(
        entries.keys[own, :, index].transpose(1, 2), entries.values[own, :, index].transpose(1, 2)
    )


def _blank(records: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Zeros in place of what lies beyond a row's own records.

    Those bytes are left over from its exact tokens, and a code may hold anything but NaN.
    """
    if min(counts) >= records.shape[1]:
        return records
    own = torch.tensor(counts, device=records.device)[:, None]
    held = torch.arange(records.shape[1], device=records.device) < own
    return records * held[..., None]


def _join(parts: list[Entries]) -> Entries:
    return Entries(
        torch.cat([part.keys for part in parts], dim=2),
        torch.cat([part.values for part in parts], dim=2),
    )


def _take_row(entries: Entries, index: int, width: int) -> Entries:
    missing = width - entries.num_entries

    def pad(part: torch.Tensor | None, dims: int) -> torch.Tensor | None:
        if part is None:
            return None
        row = part[index : index + 1]
        return torch.nn.functional.pad(row, (0, 0) * (dims - 1) + (0, missing))

    keys, values = pad(entries.keys, 2), pad(entries.values, 2)
    if keys is None or values is None:
        raise RuntimeError("entries without keys or values")
    log_weight = entries.log_weight
    if log_weight is None:
        log_weight = entries.keys.new_zeros(entries.keys.shape[:3])
    return Entries(keys, values, pad(log_weight, 1))


def _stack_rows(parts: list[Entries]) -> Entries:
    weights = [part.log_weight for part in parts if part.log_weight is not None]
    return Entries(
        torch.cat([part.keys for part in parts]),
        torch.cat([part.values for part in parts]),
        torch.cat(weights) if len(weights) == len(parts) else None,
    )
