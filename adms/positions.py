"""What one forward pass attends to: positions and validity (``places``), from the counts before it.

Shapes: ``B`` rows (1 where all rows agree), ``N`` entries of a tier, ``Q`` new tokens.
"""

import functools
import math
from typing import TYPE_CHECKING

import torch

from adms.config import Sizes
from adms.places import MiddleGeometry, MiddleView, Places
from adms.timeline import Timeline, ring_tokens

if TYPE_CHECKING:
    from adms.steady import SteadyCommit

# An ALiBi model's sinks keep their share of attention among this many entries, and weigh more among
# more; faster than in proportion, since the distance to them grows too (docs/alibi-streams.md).
SINK_ENTRIES = 64
SINK_GROWTH = 1.25


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
        self._exact: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._places: dict[MiddleGeometry | None, Places] = {}
        #: whether the pass is one of a ``DecodeStep``, which has buffers of its own
        self.is_step = False
        #: what puts a static pass in place, if its commit was worked out with it
        self.commit: SteadyCommit | None = None
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
        self._exact = None
        self._places.clear()
        self.shared.clear()
        self.__dict__.pop("counts", None)

    def columns_of(self, row: int) -> list[int]:
        """The columns of this pass that hold a row's real tokens."""
        if self._columns_valid is None:
            return list(range(self.columns))
        return self._columns_valid[row].nonzero().flatten().tolist()

    @property
    def middle_totals(self) -> list[int]:
        """Tokens that have entered the middle, as far as they decide what is read, per row."""
        return self.timeline.middle_totals

    def records_held(self, geometry: MiddleGeometry) -> torch.Tensor | None:
        """``[R, 1]`` records of a coded middle; None where ``middle_totals`` says it."""
        return None

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
        return tokens, None if self._holds_everything else valid[:, start:stop]

    @property
    def _holds_everything(self) -> bool:
        """Known on the host: with equal rows and no exact slot stale, no mask is needed."""
        seen, evicted = self.timeline.seen[0], self.timeline.evicted[0]
        held = seen + (self.new[0] if self.in_ring else 0)
        sink, ring = self.sizes.sink, self.sizes.ring
        return self.is_uniform and (evicted == 0 or (evicted >= sink and held - evicted == ring))

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
        return self.places(geometry).exact(tokens)

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
        held = (self.seen - self.evicted)[:, None]
        return self.places(geometry).recent_start + held + offset

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

    def places(self, geometry: MiddleGeometry | None) -> Places:
        """Where everything is in layers of this geometry."""
        if geometry not in self._places:
            self._places[geometry] = Places(
                self.sizes,
                geometry,
                self.evicted,
                text_positions=self.text_positions,
                anchor_mode=self.anchor_mode,
            )
        return self._places[geometry]

    def middle(self, geometry: MiddleGeometry) -> MiddleView:
        """The middle's entries for layers of this geometry."""
        if geometry not in self._middles:
            width = max(self._entries(geometry))
            self._middles[geometry] = self.places(geometry).middle(width)
        return self._middles[geometry]

    def middle_valid(self, geometry: MiddleGeometry) -> torch.Tensor | None:
        """Which of them are there ``[B, N]``; None: all, which the host knows."""
        entries = self._entries(geometry)
        return None if min(entries) == max(entries) else self.middle(geometry).valid

    def _entries(self, geometry: MiddleGeometry) -> list[int]:
        totals = [self.timeline.middle_tokens(row) for row in range(self.rows)]
        return [geometry.num_entries(total) for total in totals]
