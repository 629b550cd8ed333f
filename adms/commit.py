"""What a pass changes for good, in all layers: worked out first, then put in place.

``prepare`` changes nothing; ``keep_overwritten`` keeps what ``apply`` will overwrite; so an error
anywhere leaves every layer as it was, or as it is to be. Layers that are alike are worked on
together (``stack``): what takes a few thousand small operations layer by layer takes a hundred.

Shapes: ``L`` layers, ``B`` rows, ``K`` KV heads, ``Q`` columns of the pass, ``N`` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from adms.entries import Entries
from adms.layer import ADMSLayer
from adms.positions import ForwardView
from adms.stack import LayerStack, lay_together
from adms.tiers.arrivals import Arrivals
from adms.tiers.candidates import Candidates, settle
from adms.tiers.comparing import Window
from adms.tiers.exact import (
    Moves,
    keep_overwritten,
    leaving_entries,
    plan_moves,
    ring_window,
    write_moves,
)
from adms.tiers.undo import Undo
from adms.tiers.window import WindowLayer
from adms.tiers.writes import Write
from adms.timeline import Timeline

# Tokens of all layers that are worked on at once. Coding one takes some 200 KB for a moment in a
# model of eight heads of 128.
TOKENS_TOGETHER = 2048


@dataclass
class Work:
    """What a commit does to some layers that are alike."""

    stack: LayerStack
    leaving: Entries | None = None
    writes: list[Write] = field(default_factory=list)
    candidates: list[Candidates] = field(default_factory=list)


def stacks_of(layers: Sequence[ADMSLayer], tokens: int) -> list[LayerStack]:
    """Layers that are worked on together, if each has ``tokens`` tokens of all rows."""
    together = max(1, TOKENS_TOGETHER // tokens)
    return [
        alike.part(first, first + together)
        for alike in lay_together(layers)
        for first in range(0, len(alike.layers), together)
    ]


def settle_landmarks(works: Sequence[Work]) -> None:
    """Chooses the landmarks of all layers together and adds the bytes that hold them."""
    asked = [
        (work, work.stack.middle)
        for work in works
        if work.stack.middle is not None and work.candidates
    ]
    if not asked:
        return
    counts = [middle.plan.geometry.landmarks for _, middle in asked]
    settle([work.candidates for work, _ in asked], counts, asked[0][1].plan.config)
    for work, middle in asked:
        work.writes += middle.landmark_writes(work.candidates)


class Commit:
    """A pass on its way into the memory.

    Args:
        timeline: the counts before the pass.
        view: the pass.
        evicted_after: per row, what ``evicted`` becomes.
        layers: the layers that ADMS holds.
        windows: those with a window of their own.
    """

    def __init__(
        self,
        timeline: Timeline,
        view: ForwardView,
        evicted_after: list[int],
        layers: Sequence[ADMSLayer],
        windows: Sequence[WindowLayer],
    ) -> None:
        self.timeline = timeline
        self.view = view
        self.evicted_after = evicted_after
        self.layers = layers
        self.windows = windows
        self.works: list[Work] = []
        self.plans: dict[torch.device, Moves] = {}
        self.undo = Undo()
        self.columns = [view.columns_of(row) for row in range(timeline.batch_size)]
        #: whether tokens change their place: a single one that only joins the ring is there already
        self.moves_tokens = not view.in_ring or evicted_after != timeline.evicted
        #: whether what a static step holds must be worked out anew
        self.outdates_step = self.moves_tokens or not view.is_step

    def prepare(self) -> None:
        """Works out everything without changing anything."""
        if not self.moves_tokens:
            return
        # Codes are searched and fitted in float32, whatever the model's own products are cast to.
        with torch.autocast(self.view.device.type, enabled=False):
            self._prepare()

    def _prepare(self) -> None:
        leaving = map(int.__sub__, self.evicted_after, self.timeline.evicted)
        tokens = self.timeline.batch_size * max(self.view.columns, *leaving)
        self.works = [self._work(stack) for stack in stacks_of(self.layers, tokens)]
        settle_landmarks(self.works)

    def _moves(self, stack: LayerStack) -> Moves:
        device = stack.exact.keys.device
        if device not in self.plans:
            self.plans[device] = plan_moves(
                self.timeline,
                self.view.new,
                self.columns,
                self.view.in_ring,
                self.evicted_after,
                device,
            )
        return self.plans[device]

    def _work(self, stack: LayerStack) -> Work:
        work, moves = Work(stack), self._moves(stack)
        if not moves.num_leaving:
            return work
        work.leaving = leaving_entries(stack.exact, stack.staged, moves)
        if stack.middle is not None and any(moves.middle_count):
            timeline = self.timeline
            totals = timeline.middle_totals
            arrivals = Arrivals(moves.middle_start, moves.middle_count, totals, timeline.sizes.sink)
            work.writes, work.candidates = stack.middle.prepare(
                work.leaving,
                arrivals,
                lambda layer, row: self._staying(stack.layers[layer], row),
                stack.queries,
                lambda: self._window(stack),
            )
        return work

    def _window(self, stack: LayerStack) -> Window:
        """The recent tokens before this commit, those that leave among them."""
        timeline = self.timeline
        written = [self._written(row) for row in range(timeline.batch_size)]
        counts = torch.tensor([written, timeline.evicted])
        counts = counts.to(stack.exact.keys.device, non_blocking=True)
        return ring_window(stack.exact, counts[0], counts[1], timeline.sizes)

    def _written(self, row: int) -> int:
        """Tokens of a row that lie in the ring or have, before this commit."""
        return self.timeline.seen[row] + (self.view.new[row] if self.view.in_ring else 0)

    def _staying(self, layer: ADMSLayer, row: int) -> Entries:
        """One row's exact tokens after those that leave, in order ``[1, K, N, ...]``.

        Those of the ring, then those of the pass: further material for a fit.
        """
        if layer.exact is None:
            raise RuntimeError("a layer without tiers was asked for its window")
        sizes, device = self.timeline.sizes, layer.exact.keys.device
        written = self._written(row)
        # A pass longer than the window may push out tokens of its own: none of the ring stays.
        first = min(self.evicted_after[row], written)
        slots = sizes.sink + torch.arange(first, written, device=device) % sizes.ring
        keys = layer.exact.keys[row : row + 1, :, slots]
        values = layer.exact.values[row : row + 1, :, slots]
        if layer.staged is not None:
            first = max(0, self.evicted_after[row] - self.timeline.seen[row])
            columns = torch.tensor(self.columns[row][first:], device=device)
            keys = torch.cat([keys, layer.staged.keys[row : row + 1, :, columns]], dim=2)
            values = torch.cat([values, layer.staged.values[row : row + 1, :, columns]], dim=2)
        return Entries(keys, values)

    def keep_overwritten(self) -> None:
        """Keeps what ``apply`` will overwrite."""
        for work in self.works:
            stack = work.stack
            moves = self._moves(stack)
            keep_overwritten(stack.exact, work.leaving, stack.staged, moves, self.undo)
            if stack.middle is not None:
                stack.middle.keep_overwritten(work.writes, self.undo)
        for window in self.windows:
            window.keep_overwritten(self.timeline, self.view, self.undo)

    def apply(self) -> None:
        """Puts everything in place."""
        for work in self.works:
            stack = work.stack
            write_moves(stack.exact, work.leaving, stack.staged, self._moves(stack))
            if stack.middle is not None:
                stack.middle.apply(work.writes)
        for window in self.windows:
            window.commit(self.timeline, self.view)

    def take_back(self) -> None:
        """Puts back what was overwritten."""
        self.undo.restore()
