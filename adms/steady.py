"""The commit of steady decoding: the same operations every time, captured beside the step.

Once all rows are coded, every ``compression_interval`` tokens as many leave in each, and what is
done with them follows from counts on the device. So it can be captured in CUDA graphs and replayed
at any length of the stream, and brings what the step holds up to date on the way.

Two graphs stand for the two halves of a commit: the first works everything out and keeps what the
second overwrites, so that an error or an interrupt anywhere leaves the cache as it was.

Shapes: ``L`` layers, ``B`` rows, ``K`` KV heads, ``N`` tokens that leave.
"""

from typing import TYPE_CHECKING, Any

import torch

from adms.commit import Work, settle_landmarks, stacks_of
from adms.entries import Entries
from adms.step_capture import rehearsal_stream
from adms.tiers.exact import at_slots
from adms.tiers.undo import Undo
from adms.timeline import Timeline

if TYPE_CHECKING:
    from adms.step import DecodeStep

# Rehearsals before a capture, in which kernels are compiled and libraries set themselves up.
REHEARSALS = 2


class SteadyCommit:
    """The commit of a stream whose rows are all coded and lose ``count`` tokens each.

    Args:
        step: the step beside which it works.
        count: tokens that leave, at most as many as the middle has places for.
    """

    #: whether tokens change their place
    moves_tokens = True
    #: whether what a static step holds must be worked out anew
    outdates_step = False

    def __init__(self, step: "DecodeStep", count: int) -> None:
        self.step = step
        self.count = count
        self.works: list[Work] = []
        self.undo = Undo()
        self.graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    @classmethod
    def of(cls, step: "DecodeStep", timeline: Timeline) -> "SteadyCommit | None":
        """The one that a stream settles to; None where its tokens do not fit their places."""
        middle = step.layers[0].middle
        if middle is None or middle.plan.coder is None:
            return None
        coder, count = middle.plan.coder, timeline.sizes.interval
        records, rest = divmod(count, coder.block_tokens)
        room = min(coder.num_records, coder.num_coarse or coder.num_records)
        return None if rest or records > room else cls(step, count)

    def makes(self, before: list[int], after: list[int]) -> bool:
        """Whether this is the commit by which ``evicted`` of all rows changes so."""
        left = {new - old for old, new in zip(before, after, strict=True)}
        return left == {self.count} and (self.graphs is not None or not self.step.captures)

    # --- a commit --------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Works out everything and keeps what will be overwritten, without changing anything."""
        if self.graphs is not None:
            self.graphs[0].replay()
        else:
            self._prepare()

    def keep_overwritten(self) -> None:
        """Was done already."""

    def apply(self) -> None:
        """Puts everything in place."""
        if self.graphs is not None:
            self.graphs[1].replay()
        else:
            self._apply()

    def take_back(self) -> None:
        """Puts back what was overwritten."""
        self.step.stale = True
        self.undo.restore()

    def _prepare(self) -> None:
        step, held = self.step, self.step.held
        if held is None:
            raise RuntimeError("a commit before the step has its buffers")
        sizes = step.layers[0].cache.sizes
        evicted = held.evicted.expand(step.batch)
        leaving = evicted[:, None] + torch.arange(self.count, device=step.device)
        slots = sizes.sink + leaving % sizes.ring
        self.works, self.undo = [], Undo()
        for stack in stacks_of(step.layers, step.batch * self.count):
            if stack.middle is None:
                raise RuntimeError("a layer without a middle was to code tokens")
            work = Work(stack)
            entries = Entries(
                at_slots(stack.exact.keys, slots), at_slots(stack.exact.values, slots)
            )
            work.writes, work.candidates = stack.middle.prepare_steady(
                entries, evicted - sizes.sink, sizes.sink
            )
            self.works.append(work)
        settle_landmarks(self.works)
        for work in self.works:
            # What is not written need not stay.
            work.candidates = []
            if work.stack.middle is not None:
                work.stack.middle.keep_overwritten(work.writes, self.undo)

    def _apply(self) -> None:
        for work in self.works:
            if work.stack.middle is not None:
                work.stack.middle.apply(work.writes)
        if self.step.held is None:
            raise RuntimeError("a commit before the step has its buffers")
        self.step.held.evicted += self.count
        self.step.renew()

    # --- its capture -----------------------------------------------------------------------------

    def capture(self, pool: Any) -> None:
        """Captures both halves; changes nothing.

        Args:
            pool: the memory of the step's graph, which never runs at the same time.
        """
        side = rehearsal_stream(self.step.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(REHEARSALS):
                self._prepare()
        torch.cuda.current_stream().wait_stream(side)
        graphs = (torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph())
        for graph, half in zip(graphs, (self._prepare, self._apply), strict=True):
            with torch.cuda.graph(graph, pool=pool):
                half()
        self.graphs = graphs
