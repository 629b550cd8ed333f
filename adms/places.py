"""Where retained entries sit in the cache, by formulas over counts that lie on the device.

Retained entries sit in the order of the text at 0, 1, 2, ... (anchor mode "near" is the exception:
landmarks that outlived their codes stand behind all codes). The middle may hold more entries than
the trained length leaves room for; its positions are then compressed into that room and become
fractional. No position ever reaches the trained length.

Nothing here asks the host for a count, so that a captured graph can work places out anew.

Shapes: ``R`` rows (1 where all rows agree), ``B`` rows, ``N`` entries of a tier, ``M`` landmarks.
"""

import functools
from dataclasses import dataclass

import torch

from adms.budget import ranks
from adms.config import Sizes


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
        positions: ``[R, N]`` float cache positions.
        tokens: ``[R, N]`` text positions (of an entry for several tokens, their mean), counted from
            ``Places.first``, so that they are exact however long the stream.
        valid: ``[R, N]`` which entries are there.
        order: ``[R, N]`` the entries' numbers from the oldest.
    """

    num_entries: int
    positions: torch.Tensor
    tokens: torch.Tensor
    valid: torch.Tensor
    order: torch.Tensor

    def hidden(self, marks: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Which valid entries ``[B, N]`` landmarks hold too, so that they would count twice.

        For entries of one token each. What it says of other entries means nothing. Numbers stay
        exact however long the stream, and take no ``[B, N, M]``.

        Args:
            marks: ``[B, M]`` text positions of landmarks, -1 where a slot is empty.
            first: as of ``Places``.
        """
        count = self.num_entries
        # One number more than entries have, for landmarks without a code.
        numbers = torch.where(marks >= first, marks - first, count).clamp(max=count).long()
        marked = torch.zeros(len(marks), count + 1, dtype=torch.bool, device=marks.device)
        marked.scatter_(1, numbers, True)
        return marked.gather(1, self.order.long().clamp(0, count).expand(len(marks), -1))


class Places:
    """Cache positions of everything that layers of one geometry retain.

    Args:
        sizes: of the cache.
        geometry: of the middle; None where there is none.
        evicted: ``[R]`` int64, tokens that have left the recent tier.
        text_positions: use positions of the text instead of the cache's.
        anchor_mode: where landmarks without a code and entries for several tokens sit; see
            ``ADMSConfig``.

    Attributes:
        evicted: as a column ``[R, 1]``, like every count here.
    """

    def __init__(
        self,
        sizes: Sizes,
        geometry: MiddleGeometry | None,
        evicted: torch.Tensor,
        *,
        text_positions: bool,
        anchor_mode: str,
    ) -> None:
        self.sizes = sizes
        self.geometry = geometry
        self.evicted = evicted[:, None]
        self.text_positions = text_positions
        self.anchor_mode = anchor_mode

    # --- the exact tiers -------------------------------------------------------------------------

    @functools.cached_property
    def _sinks_end(self) -> torch.Tensor:
        """``[R, 1]`` float, where the sinks end; the middle begins there."""
        return self.evicted.clamp(max=self.sizes.sink).float()

    @functools.cached_property
    def recent_start(self) -> torch.Tensor:
        """``[R, 1]`` float, where the recent tier begins."""
        return self._sinks_end if self.geometry is None else self._sinks_end + self._span

    def exact(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions ``[R, N]`` of exact slots with these text positions."""
        if self.text_positions:
            return tokens.clamp(min=0).float()
        recent = tokens - self.evicted + self.recent_start
        in_ring = tokens >= self.evicted
        # Slots whose token has left are masked, but a rotary embedding that looks at the farthest
        # position would see theirs.
        sinks = tokens.clamp(max=self.sizes.sink).float()
        return torch.where(in_ring, recent, sinks).clamp(min=0)

    # --- the middle ------------------------------------------------------------------------------

    @property
    def _middle(self) -> MiddleGeometry:
        if self.geometry is None:
            raise RuntimeError("places in a middle were asked for where there is none")
        return self.geometry

    @functools.cached_property
    def total(self) -> torch.Tensor:
        """``[R, 1]`` tokens that have entered the middle."""
        return (self.evicted - self.sizes.sink).clamp(min=0)

    @functools.cached_property
    def _is_coded(self) -> torch.Tensor:
        geometry = self._middle
        return (self.total > geometry.raw_tokens) & (geometry.capacity > 0)

    def _where_coded(self, value: int, other: int | torch.Tensor) -> torch.Tensor:
        return torch.where(self._is_coded, value, other)

    @functools.cached_property
    def held(self) -> torch.Tensor:
        """``[R, 1]`` of those, the ones that are still there."""
        most = self._where_coded(self._middle.capacity, self._middle.raw_tokens)
        return torch.minimum(self.total, most)

    @functools.cached_property
    def first(self) -> torch.Tensor:
        """``[R, 1]`` text position before which only landmarks remember anything."""
        return self.sizes.sink + self.total - self.held

    @functools.cached_property
    def _block(self) -> torch.Tensor:
        """Tokens of a record ``[R, 1]``."""
        return self._where_coded(self._middle.block_tokens, 1)

    @functools.cached_property
    def _per_record(self) -> torch.Tensor:
        """Entries of a record ``[R, 1]``."""
        return self._where_coded(self._middle.entries_per_record, 1)

    @functools.cached_property
    def records(self) -> torch.Tensor:
        """Records ``[R, 1]`` that a row holds; a token is one before it is coded."""
        return self.held // self._block

    @functools.cached_property
    def _old(self) -> torch.Tensor:
        """Positions ``[R, 1]`` that landmarks without a code would like to have."""
        return (self.total > self.held).float() * self._middle.landmarks

    @functools.cached_property
    def _wanted(self) -> torch.Tensor:
        """Positions ``[R, 1]`` that the whole middle would like to have."""
        entries = self.records * self._per_record
        match self.anchor_mode:
            case "grid":
                return entries + self._old
            case "mean" | "near":
                return self.held + self._old
            case _:
                return (entries + self.held).float() / 2 + self._old

    @functools.cached_property
    def _span(self) -> torch.Tensor:
        """Positions ``[R, 1]`` that it takes."""
        room = self.sizes.middle_positions
        return self._wanted if room is None else self._wanted.clamp(max=room)

    @functools.cached_property
    def _scale(self) -> torch.Tensor:
        """Positions per token ``[R, 1]``, 1 unless the room is too small."""
        return self._span / self._wanted.clamp(min=1)

    @functools.cached_property
    def _old_span(self) -> torch.Tensor:
        """Positions ``[R, 1]`` that landmarks without a code take."""
        return self._old * self._scale

    @functools.cached_property
    def _old_start(self) -> torch.Tensor:
        """``[R, 1]``, where those begin: before all codes, or behind them."""
        near = self.anchor_mode == "near"
        return self.recent_start - self._old_span if near else self._sinks_end

    @functools.cached_property
    def _codes_start(self) -> torch.Tensor:
        """``[R, 1]``, where codes begin."""
        near = self.anchor_mode == "near"
        return self._sinks_end if near else self._sinks_end + self._old_span

    def middle(self, width: int) -> MiddleView:
        """The first ``width`` entries in memory order, at least as many as any row holds."""
        geometry = self._middle
        block, per_record, records = self._block, self._per_record, self.records
        index = torch.arange(width, device=self.evicted.device)
        last = self.total // block - 1
        slot = index // per_record
        # Record j lies in slot j % whole of its ring, the cut ones (older) in a ring of their own.
        whole = torch.minimum(records, self._where_coded(geometry.whole_records, records))
        record = last - (last - slot) % whole.clamp(min=1)
        cut = geometry.capacity // geometry.block_tokens - geometry.whole_records
        if cut > 0:
            newest = last - whole
            rest = (records - whole).clamp(min=1, max=cut)
            cut_record = newest - (newest - (slot - whole)) % rest
            record = torch.where((slot < whole) | (records == whole), record, cut_record)
        # From the oldest record, in integers: what counts from the stream's beginning may be more
        # than a float can tell apart.
        oldest = last + 1 - records
        within, rank = index % per_record, record - oldest
        order = rank * per_record + within
        # Entries of one record share its tokens evenly.
        share = (within.float() + 0.5) * (block.float() / per_record.float()) - 0.5
        tokens = (rank * block + oldest * block - (self.total - self.held)).float() + share
        match self.anchor_mode:
            case "grid":
                place = order.float()
            case "mean" | "near":
                place = tokens
            case _:
                place = (order.float() + tokens) / 2
        positions = self._codes_start + place * self._scale
        if self.text_positions:
            positions = self.first.float() + tokens
        valid = index < records * per_record
        return MiddleView(width, positions.float(), tokens, valid, order)

    def landmarks(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cache positions ``[B, M]`` of landmarks at text positions ``tokens``.

        One whose code is still held takes the code's place. Older ones share the span set aside
        between sinks and codes: evenly ("grid"), in proportion to the text ("mean"), or halfway;
        or, in proportion to the text, one between codes and recent tokens ("near").
        """
        if self.text_positions:
            return tokens.clamp(min=0).float()
        device, sink = tokens.device, self.sizes.sink
        scale, first = self._scale.to(device), self.first.to(device)
        among_codes = self._codes_start.to(device) + (tokens - first).float() * scale
        is_old = (tokens >= 0) & (tokens < first)
        rank = ranks(torch.where(is_old, tokens, 2**40).argsort(1)).float()
        count = is_old.sum(1, keepdim=True).clamp(min=1)
        by_grid = (rank + 0.5) / count
        by_mean = ((tokens - sink).float() + 0.5) / (first - sink).clamp(min=1).float()
        match self.anchor_mode:
            case "grid":
                place = by_grid
            case "mean" | "near":
                place = by_mean
            case _:
                place = (by_grid + by_mean) / 2
        span = self._old_span.to(device)
        old = self._old_start.to(device) + place * span - 0.5 * (span > 0)
        return torch.where(is_old, old, among_codes).clamp(min=0).float()
