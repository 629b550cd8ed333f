"""The middle tier: tokens between sinks and window, in a fixed number of bytes per layer and row.

A row's bytes (its stretch of the arena) hold its tokens exactly as long as they fit. When they no
longer do, everything is coded at once against a header fitted to those very tokens, and from then
on each token is coded as it arrives; nothing that was decoded is ever coded again. Records lie in a
ring: the oldest is overwritten. Landmarks are tokens that an importance metric keeps exactly; their
codes, while still there, are masked.

This file says how a layer's bytes are laid out and reads them; ``coding`` writes them.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` entries, ``L`` landmarks, ``D``/``E`` head sizes.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adms.compressors.base import Coder, RawCoder
from adms.compressors.tables import CodeTables
from adms.config import ADMSConfig
from adms.entries import Entries, TokenShape
from adms.importance import Metric, needs_queries
from adms.kernels.states import decode_by_tables
from adms.places import MiddleGeometry
from adms.ranks import ALONE, Ranks
from adms.tiers.head_landmarks import HeadLandmarkStore
from adms.tiers.landmarks import LandmarkStore, aligned


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
        ranks: the processes that hold the layer's other heads.
        compares: whether the metric is shown other tokens in this layer.
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
    ranks: Ranks = ALONE
    compares: bool = False

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


class MiddleTier:
    """The middle of one layer: an arena of bytes, and what it holds for attention.

    Args:
        plan: how the bytes are used.
        arena: ``[B, bytes]``.
    """

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

    def read(
        self,
        totals: list[int],
        tables: CodeTables | None = None,
        held: torch.Tensor | None = None,
    ) -> Entries | None:
        """Entries in memory order, rows padded to the longest; None where every row is empty.

        Args:
            totals: tokens that have entered the middle, per row.
            tables: the first of ``tables()``, where every row is coded and a kernel shall decode.
            held: ``[B, 1]`` records of rows that are coded, where ``totals`` do not say it.
        """
        geometry = self.plan.geometry
        width = max(geometry.num_entries(total) for total in totals)
        if width == 0:
            return None
        coded = [geometry.is_coded(total) for total in totals]
        if all(coded) or not any(coded):
            return self._read_rows(slice(None), totals, coded[0], tables, held)
        parts: list[Entries | None] = [None] * len(totals)
        for phase in (False, True):
            rows = [row for row, is_coded in enumerate(coded) if is_coded == phase]
            entries = self._read_rows(rows, [totals[row] for row in rows], phase)
            for index, row in enumerate(rows):
                parts[row] = _take_row(entries, index, width)
        return _stack_rows([part for part in parts if part is not None])

    def _read_rows(
        self,
        rows: list[int] | slice,
        totals: list[int],
        coded: bool,
        tables: CodeTables | None = None,
        held: torch.Tensor | None = None,
    ) -> Entries:
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
        if held is None and min(counts) < most:
            held = torch.tensor(counts, device=whole.device)[:, None]
        whole = _blank(whole, held)
        if tables is not None:
            return decode_by_tables(tables, whole, self.plan.shape, self.plan.dtype)
        parts = [coder.decode(header, whole)]
        if most > coder.num_records:
            cut_records = self._records(data, most - coder.num_records, cut=True)
            older = None if held is None else held - coder.num_records
            parts.append(coder.decode(header, _blank(cut_records, older)))
        return parts[0] if len(parts) == 1 else join_entries(parts)

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

    def landmarks(
        self, totals: list[int], tables: CodeTables | None = None
    ) -> tuple[Entries, torch.Tensor]:
        """Entries of the landmarks ``[B, K, L, ...]`` and their text positions ``[B, L]``.

        Where heads choose their own, ``valid [B, K, L]`` says whose each is.

        Args:
            totals: tokens that have entered the middle, per row; rows not coded yet have none.
            tables: the second of ``tables()``, as for ``read``.
        """
        if tables is not None:
            records, tokens = self.landmark_records(), self.landmark_tokens()
            return decode_by_tables(tables, records, self.plan.shape, self.plan.dtype), tokens
        coded = [self.plan.geometry.is_coded(total) for total in totals]
        data = self.landmark_bytes()
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
        """``[B, bytes]`` of all rows' landmarks, without a copy."""
        if self.plan.store is None:
            raise RuntimeError("a middle without landmarks was asked for their bytes")
        start = self.plan.landmark_offset
        return self.arena[:, start : start + self.plan.store.nbytes]

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
        return fine.cut(coder.record_bytes, coder.log_weight(header, coder.record_bytes)), fine

    def records(self) -> torch.Tensor:
        """All records ``[B, R, bytes]`` of rows that are coded, without a copy."""
        return self._records(self.arena, self._coder.num_records, cut=False)

    @property
    def _store(self) -> LandmarkStore:
        if not isinstance(self.plan.store, LandmarkStore):
            raise RuntimeError("a middle without landmarks of all heads was asked for them")
        return self.plan.store


def as_one(plans: Sequence[MiddlePlan]) -> MiddlePlan:
    """The plan of layers that are alike as one, whose rows lie one layer after the other."""
    coders = [plan.coder for plan in plans if plan.coder is not None]
    if len(plans) == 1 or not coders:
        return plans[0]
    coder, store = coders[0].stacked(coders), plans[0].store
    if isinstance(store, LandmarkStore) and store.own is None:
        # Landmarks are codes of the same coder, each layer's under its own basis.
        store = copy.copy(store)
        store.coder = coder
    return dataclasses.replace(plans[0], coder=coder, store=store)


def _blank(records: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor:
    """Zeros in place of what lies beyond a row's own records ``held [B, 1]``; None: nothing does.

    Those bytes are left over from its exact tokens, and a code may hold anything but NaN.
    """
    if held is None:
        return records
    own = torch.arange(records.shape[1], device=records.device) < held
    return records * own[..., None]


def join_entries(parts: list[Entries]) -> Entries:
    """Exact entries one after the other."""
    return Entries(
        torch.cat([part.keys for part in parts], dim=2),
        torch.cat([part.values for part in parts], dim=2),
        None if parts[0].log_weight is None else torch.cat(_weights(parts), dim=2),
    )


def _weights(parts: list[Entries]) -> list[torch.Tensor]:
    return [
        part.keys.new_zeros(part.keys.shape[:3]) if part.log_weight is None else part.log_weight
        for part in parts
    ]


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
