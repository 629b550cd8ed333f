"""Positions inside the cache: what each retained entry's place is when attention rotates it.

Retained entries sit in the order of the text at 0, 1, 2, ... The middle may hold more entries than
the trained length leaves room for; its positions are then compressed into that room and become
fractional. No position ever reaches the trained length.

Shapes: ``B`` rows (1 where all rows agree), ``N`` entries of a tier, ``Q`` new tokens.
"""

import functools
import math
from dataclasses import dataclass

import torch

from adms.config import Sizes
from adms.timeline import Timeline, ring_tokens

# An ALiBi model's sinks keep their share of attention among this many entries, and weigh more among
# more; faster than in proportion, since the distance to them grows too (docs/alibi-streams.md).
SINK_ENTRIES = 64
SINK_GROWTH = 1.25


@dataclass(frozen=True)
class MiddleGeometry:
    """What the middle of one kind of layer can hold; layers of equal geometry share positions.

    Attributes:
        raw_tokens: tokens held exactly before coding starts.
        capacity: tokens held once coded (0: the middle stays exact and forgets the oldest).
        whole_records: records of full size among them; the others are older and cut.
        block_tokens: tokens per record.
        entries_per_record: entries a record decodes to.
        landmarks: exactly kept tokens beside the codes.
    """

    raw_tokens: int
    capacity: int
    whole_records: int = 0
    block_tokens: int = 1
    entries_per_record: int = 1
    landmarks: int = 0

    def is_coded(self, tokens: int) -> bool:
        """Whether a row that has sent ``tokens`` tokens to the middle is coded by now."""
        return self.capacity > 0 and tokens > self.raw_tokens

    def held(self, tokens: int) -> int:
        """Tokens of such a row that raw slots or codes still hold."""
        return min(tokens, self.capacity if self.is_coded(tokens) else self.raw_tokens)

    def num_entries(self, tokens: int) -> int:
        """Entries that such a row's raw slots or codes decode to."""
        held = self.held(tokens)
        if not self.is_coded(tokens):
            return held
        return held // self.block_tokens * self.entries_per_record


@dataclass(frozen=True)
class MiddleView:
    """The middle's entries as one forward pass sees them, in memory order.

    Attributes:
        num_entries: entries to read.
        positions: ``[B, N]`` float cache positions.
        tokens: ``[B, N]`` text positions (of an entry for several tokens, their mean).
        valid: ``[B, N]`` booleans, or None where all are.
        landmark_first: ``[B]`` text position before which only landmarks remember anything.
        landmark_span: ``[B]`` width of the positions set aside for those.
        scale: ``[B]`` positions per token, 1 unless the room is too small.
        order: ``[B, N]`` the entries' numbers from the oldest.
    """

    num_entries: int
    positions: torch.Tensor
    tokens: torch.Tensor
    valid: torch.Tensor | None
    landmark_first: torch.Tensor
    landmark_span: torch.Tensor
    scale: torch.Tensor
    order: torch.Tensor


class ForwardView:
    """Positions and validity of everything one forward pass attends to.

    Args:
        timeline: the counts before this pass.
        new: real tokens per row in this pass.
        columns: columns of this pass (``Q``).
        column_valid: ``[B, Q]`` booleans, or None where no column is padding.
        device: where the tensors are wanted.
        text_positions: use positions of the text instead of the cache's.
    """

    def __init__(
        self,
        timeline: Timeline,
        new: list[int],
        columns: int,
        column_valid: torch.Tensor | None,
        device: torch.device,
        text_positions: bool,
        anchor_mode: str,
    ) -> None:
        self.sizes: Sizes = timeline.sizes
        self.timeline = timeline
        self.new = new
        self.columns = columns
        self._columns_valid = column_valid
        self.column_valid = None if column_valid is None else column_valid.to(device)
        self.device = device
        self.text_positions = text_positions
        self.anchor_mode = anchor_mode
        # A single token is written into its ring slot before attention; more are kept aside, and so
        # is a column of padding alone, which must have itself to attend to.
        self.in_ring = columns == 1 and any(new)
        self.is_uniform = timeline.is_uniform and column_valid is None
        rows = 1 if self.is_uniform else timeline.batch_size
        self._counts = [timeline.seen[:rows], timeline.evicted[:rows], new[:rows]]
        self._middles: dict[MiddleGeometry, MiddleView] = {}
        self._spans: dict[MiddleGeometry, torch.Tensor] = {}
        self._exact: tuple[torch.Tensor, torch.Tensor | None] | None = None
        #: whether the pass is one of a ``DecodeStep``, which has buffers of its own
        self.is_step = False
        #: ``[B]`` text position before which a family has the middle forgotten, or None
        self.forgotten: torch.Tensor | None = None
        #: whether the pass measures where in the recent tier attention goes
        self.measures_spans = False
        #: per-pass results that attention shares between layers, by key
        self.shared: dict[object, object] = {}

    @functools.cached_property
    def counts(self) -> torch.Tensor:
        """``[3, B]``: seen, evicted and new; they cross to the device once per pass, if at all."""
        return torch.tensor(self._counts, dtype=torch.long).to(self.device, non_blocking=True)

    @property
    def seen(self) -> torch.Tensor:
        """``[B]`` tokens before this pass."""
        return self.counts[0]

    @property
    def evicted(self) -> torch.Tensor:
        """``[B]`` tokens that have left the recent tier."""
        return self.counts[1]

    @property
    def fresh(self) -> torch.Tensor:
        """``[B]`` real tokens of this pass."""
        return self.counts[2]

    @property
    def rows(self) -> int:
        """Rows of the positions: 1 where all agree."""
        return len(self._counts[0])

    def release(self) -> None:
        """Lets go of every tensor; the counts stay."""
        self._middles.clear()
        self._spans.clear()
        self._exact = None
        self.shared.clear()
        self.__dict__.pop("counts", None)

    def columns_of(self, row: int) -> list[int]:
        """The columns of this pass that hold a row's real tokens."""
        if self._columns_valid is None:
            return list(range(self.columns))
        return self._columns_valid[row].nonzero().flatten().tolist()

    # --- the exact tiers -----------------------------------------------------------------------

    @property
    def exact_slice(self) -> tuple[int, int]:
        """The part of the buffer [sink | ring] that any row uses."""
        held = max(
            seen + (count if self.in_ring else 0)
            for seen, count in zip(self.timeline.seen, self.new, strict=True)
        )
        start = 0 if any(self.timeline.evicted) else self.sizes.sink
        return start, self.sizes.sink + min(held, self.sizes.ring)

    def exact_tokens(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text positions ``[B, N]`` of the exact slots in ``exact_slice`` and their validity."""
        if self._exact is None:
            self._exact = self._make_exact_tokens()
        return self._exact

    def _make_exact_tokens(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        start, stop = self.exact_slice
        sink = self.sizes.sink
        written = self.seen + (self.fresh if self.in_ring else 0)
        ring = ring_tokens(written, self.sizes.ring)
        sinks = torch.arange(sink, device=self.device).expand(self.rows, -1)
        tokens = torch.cat([sinks, ring], dim=1)[:, start:stop]
        valid = torch.cat([sinks < self.evicted[:, None], ring >= self.evicted[:, None]], dim=1)
        # Known on the host: with equal rows and no slot stale, no mask is needed.
        seen, evicted = self.timeline.seen[0], self.timeline.evicted[0]
        held = seen + (self.new[0] if self.in_ring else 0)
        full = self.is_uniform and (
            evicted == 0 or (evicted >= sink and held - evicted == self.sizes.ring)
        )
        return tokens, None if full else valid[:, start:stop]

    @property
    def ring_is_full(self) -> bool:
        """Whether every row's ring was written to the end."""
        return min(self.timeline.seen) >= self.sizes.ring

    def newest_slots(self, span: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The part of the buffer that a span over a full ring reads: sinks, then newest tokens.

        Args:
            span: tokens of the recent tier, those of this pass not counted.

        Returns:
            Slots and text positions ``[1 or B, N]``, and which of them hold something (None: all).
        """
        sink = self.sizes.sink
        count = span + (1 if self.in_ring else 0)
        end = self.seen + (self.fresh if self.in_ring else 0)
        newest = (end - count)[:, None] + torch.arange(count, device=self.device)
        sinks = torch.arange(sink, device=self.device).expand(len(self.seen), -1)
        slots = torch.cat([sinks, sink + newest % self.sizes.ring], dim=1)
        tokens = torch.cat([sinks, newest], dim=1)
        # Known on the host, like the whole buffer's.
        seen, evicted = self.timeline.seen[0], self.timeline.evicted[0]
        if self.is_uniform and sink <= evicted <= seen - span:
            return slots, tokens, None
        evicted_rows = self.evicted[:, None]
        return slots, tokens, torch.cat([sinks < evicted_rows, newest >= evicted_rows], dim=1)

    def exact_positions(
        self, tokens: torch.Tensor, geometry: MiddleGeometry | None
    ) -> torch.Tensor:
        """Cache positions of exact slots with these text positions."""
        if self.text_positions:
            return tokens.clamp(min=0).float()
        recent = tokens - self.evicted[:, None] + self._recent_start(geometry)[:, None]
        in_ring = tokens >= self.evicted[:, None]
        # Slots whose token has left are masked, but a rotary embedding that looks at the farthest
        # position would see theirs.
        sinks = tokens.clamp(max=self.sizes.sink).float()
        return torch.where(in_ring, recent, sinks).clamp(min=0)

    def column_offsets(self) -> torch.Tensor:
        """How many real tokens of the pass come before each new one: ``[B, Q]``."""
        if self.column_valid is None:
            return torch.arange(self.columns, device=self.device)[None]
        return (self.column_valid.long().cumsum(1) - 1).clamp(min=0)

    def query_positions(self, geometry: MiddleGeometry | None) -> torch.Tensor:
        """Cache positions ``[B, Q]`` of the new tokens (padding repeats its neighbour's)."""
        offset = self.column_offsets()
        if self.text_positions:
            return (self.seen[:, None] + offset).float()
        held = self.seen - self.evicted
        return (self._recent_start(geometry) + held)[:, None] + offset

    def _recent_start(self, geometry: MiddleGeometry | None) -> torch.Tensor:
        sinks = self.evicted.clamp(max=self.sizes.sink).float()
        return sinks + (self._span(geometry) if geometry is not None else 0.0)

    def sink_weight(self, geometry: MiddleGeometry | None) -> list[float] | None:
        """Log-weight of a sink in each row; None where all are 0.

        Every token of a stream has the whole window before it; in the texts of training many had
        little, and a model rests its attention on those. Sinks stand in for them once tokens were
        forgotten or coded; as long as all are exact they are tokens like others.
        """
        sink = self.sizes.sink
        weights = []
        for row in range(self.rows):
            total = self.timeline.middle_tokens(row)
            gone, held = total, 0
            if geometry is not None:
                held = geometry.num_entries(total)
                gone = total if geometry.is_coded(total) else total - held
            entries = self.timeline.seen[row] - total + held
            most = (entries / SINK_ENTRIES) ** SINK_GROWTH
            # Tokens that went must be there to stand in for, so the weight starts at 1.
            weights.append(math.log(max(1.0, min(most, 1 + gone / max(sink, 1)))))
        return weights if sink and any(weights) else None

    # --- the middle ------------------------------------------------------------------------------

    def _units(self, geometry: MiddleGeometry, row: int) -> tuple[float, float]:
        """Positions that codes and old landmarks of a row would like to have."""
        tokens = self.timeline.middle_tokens(row)
        held, entries = geometry.held(tokens), geometry.num_entries(tokens)
        match self.anchor_mode:
            case "grid":
                wanted = float(entries)
            case "mean":
                wanted = float(held)
            case _:
                wanted = (entries + held) / 2
        return wanted, float(geometry.landmarks if tokens > held else 0)

    def _span(self, geometry: MiddleGeometry) -> torch.Tensor:
        """Positions ``[B]`` that the whole middle takes."""
        if geometry not in self._spans:
            room = self.sizes.middle_positions
            spans = [sum(self._units(geometry, row)) for row in range(self.rows)]
            if room is not None:
                spans = [min(span, float(room)) for span in spans]
            self._spans[geometry] = torch.tensor(spans).to(self.device, non_blocking=True)
        return self._spans[geometry]

    def middle(self, geometry: MiddleGeometry) -> MiddleView:
        """Positions of the middle's entries for layers of this geometry."""
        if geometry not in self._middles:
            self._middles[geometry] = self._middle(geometry)
        return self._middles[geometry]

    def _middle(self, geometry: MiddleGeometry) -> MiddleView:
        rows = self.rows
        totals = [self.timeline.middle_tokens(row) for row in range(rows)]
        num_entries = max(geometry.num_entries(total) for total in totals)
        parts = [self._middle_row(geometry, row, totals[row], num_entries) for row in range(rows)]
        tokens = torch.stack([part[0] for part in parts])
        positions = torch.stack([part[1] for part in parts])
        valid = torch.stack([part[2] for part in parts])
        complete = all(geometry.num_entries(total) == num_entries for total in totals)
        first = [self.sizes.sink + total - geometry.held(total) for total in totals]
        landmark_spans, scales = [], []
        for row in range(rows):
            wanted, old = self._units(geometry, row)
            span = self._span_of(geometry, wanted + old)
            scales.append(span / max(wanted + old, 1.0))
            landmark_spans.append(old * scales[-1])
        counts = torch.tensor([first, landmark_spans, scales], dtype=torch.float32)
        counts = counts.to(self.device)
        return MiddleView(
            num_entries=num_entries,
            positions=positions,
            tokens=tokens,
            valid=None if complete else valid,
            landmark_first=counts[0],
            landmark_span=counts[1],
            scale=counts[2],
            order=torch.stack([part[3] for part in parts]),
        )

    def _span_of(self, geometry: MiddleGeometry, wanted: float) -> float:
        room = self.sizes.middle_positions
        return wanted if room is None else min(wanted, float(room))

    def _middle_row(
        self, geometry: MiddleGeometry, row: int, total: int, num_entries: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Text and cache positions, validity and order of one row's entries in memory order."""
        sink = self.sizes.sink
        index = torch.arange(num_entries, device=self.device)
        if geometry.is_coded(total):
            block, per_record = geometry.block_tokens, geometry.entries_per_record
        else:
            block, per_record = 1, 1
        held = geometry.held(total)
        records = held // block
        last = total // block - 1
        slot = index // per_record
        whole = min(records, geometry.whole_records) if geometry.is_coded(total) else records
        # Record j lies in slot j % whole of its ring, the cut ones (older) in a ring of their own.
        record = last - (last - slot) % max(whole, 1)
        cut = geometry.capacity // block - geometry.whole_records
        if records > whole:
            oldest_whole = last - whole
            cut_record = oldest_whole - (oldest_whole - (slot - whole)) % min(records - whole, cut)
            record = torch.where(slot < whole, record, cut_record)
        # Entries of one record share its tokens evenly.
        width = block / per_record
        tokens = record * block + (index % per_record + 0.5) * width - 0.5
        order = (record - (last + 1 - records)) * per_record + index % per_record
        wanted, old = self._units(geometry, row)
        scale = self._span_of(geometry, wanted + old) / max(wanted + old, 1.0)
        by_grid = order.float()
        by_mean = tokens - (total - held)
        match self.anchor_mode:
            case "grid":
                place = by_grid
            case "mean":
                place = by_mean
            case _:
                place = (by_grid + by_mean) / 2
        positions = sink + (old + place) * scale
        if self.text_positions:
            positions = sink + tokens.float()
        return sink + tokens, positions.float(), index < records * per_record, order
