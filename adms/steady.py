"""The commit of steady decoding: the same operations every time, captured beside the step.

Once all rows are coded, every ``compression_interval`` tokens as many leave in each, and what is
done with them follows from counts on the device. So it can be captured in CUDA graphs and replayed
at any length of the stream, and brings what the step holds up to date on the way.

Two graphs stand for the two halves of a commit: the first works everything out and keeps what the
second overwrites, so that an error or an interrupt anywhere leaves the cache as it was.

Shapes: ``L`` layers, ``B`` rows, ``K`` KV heads, ``N`` tokens that leave.
"""

import weakref
from functools import partial
from typing import Any, Protocol, Self

import torch

from adms.commit import Work, settle_landmarks, stacks_of
from adms.entries import Entries
from adms.layer import ADMSLayer
from adms.step_capture import capturing, rehearsing
from adms.tiers.exact import at_slots, ring_window
from adms.tiers.undo import Undo

# Rehearsals before a capture, in which kernels are compiled and libraries set themselves up.
REHEARSALS = 2


class StaticPass(Protocol):
    """The pass that a static commit belongs to.

    Attributes:
        layers: that are alike and coded.
        batch: rows.
        device: of all of them.
    """

    layers: list[ADMSLayer]
    batch: int
    device: torch.device

    @property
    def evicted(self) -> torch.Tensor:
        """``[R]`` int64, tokens that have left the recent tier."""

    @property
    def seen(self) -> torch.Tensor:
        """``[R]`` int64, tokens that were written to the ring."""

    def count_on(self, count: int) -> None:
        """Brings what lies on the device up to date once ``count`` tokens have left."""

    def outdate(self) -> None:
        """Says that what lies on the device may be anything."""


class SteadyCommit:
    """The commit of a stream whose rows are all coded and lose ``count`` tokens each.

    Args:
        owner: the pass beside which it works.
        count: tokens that leave, at most as many as the middle has places for.
    """

    #: whether tokens change their place
    moves_tokens = True
    #: whether what a static step holds must be worked out anew
    outdates_step = False

    def __init__(self, owner: StaticPass, count: int) -> None:
        # Weakly, since the owner holds it: graphs go as soon as their owner does.
        self._owner = weakref.ref(owner)
        self.count = count
        self.works: list[Work] = []
        self.undo = Undo()
        self.graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    @property
    def owner(self) -> StaticPass:
        """The pass beside which it works."""
        owner = self._owner()
        if owner is None:
            raise RuntimeError("a static commit outlived its pass")
        return owner

    @classmethod
    def of(cls, owner: StaticPass, count: int) -> Self | None:
        """The one by which ``count`` tokens leave; None where they do not fit their places."""
        return cls(owner, count) if has_places(owner.layers[0], count) else None

    def makes(self, before: list[int], after: list[int]) -> bool:
        """Whether this is the commit by which ``evicted`` of all rows changes so."""
        left = {new - old for old, new in zip(before, after, strict=True)}
        return left == {self.count} and (
            self.graphs is not None or self.owner.device.type != "cuda"
        )

    # --- a commit --------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Works out everything and keeps what will be overwritten, without changing anything."""
        if self.graphs is not None:
            self.graphs[0].replay()
        else:
            self.work_out()

    def keep_overwritten(self) -> None:
        """Was done already."""

    def apply(self) -> None:
        """Puts everything in place."""
        if self.graphs is not None:
            self.graphs[1].replay()
        else:
            self.put_in_place()

    def take_back(self) -> None:
        """Puts back what was overwritten."""
        self.owner.outdate()
        self.undo.restore()

    def work_out(self) -> None:
        """What ``prepare`` does, on the current stream."""
        owner = self.owner
        sizes = owner.layers[0].cache.sizes
        evicted = owner.evicted.expand(owner.batch)
        leaving = evicted[:, None] + torch.arange(self.count, device=owner.device)
        slots = sizes.sink + leaving % sizes.ring
        self.works, self.undo = [], Undo()
        for stack in stacks_of(owner.layers, owner.batch * self.count):
            if stack.middle is None:
                raise RuntimeError("a layer without a middle was to code tokens")
            work = Work(stack)
            entries = Entries(
                at_slots(stack.exact.keys, slots), at_slots(stack.exact.values, slots)
            )
            work.writes, work.candidates = stack.middle.prepare_steady(
                entries,
                evicted - sizes.sink,
                sizes.sink,
                partial(ring_window, stack.exact, owner.seen.expand(owner.batch), evicted, sizes),
            )
            self.works.append(work)
        settle_landmarks(self.works)
        for work in self.works:
            # What is not written need not stay.
            work.candidates = []
            if work.stack.middle is not None:
                work.stack.middle.keep_overwritten(work.writes, self.undo)

    def put_in_place(self) -> None:
        """What ``apply`` does, on the current stream."""
        for work in self.works:
            if work.stack.middle is not None:
                work.stack.middle.apply(work.writes)
        self.owner.count_on(self.count)

    # --- its capture -----------------------------------------------------------------------------

    def capture(self, pool: Any) -> None:
        """Captures both halves; changes nothing.

        Args:
            pool: the memory of the step's graph, which never runs at the same time.
        """
        with rehearsing(self.owner.device):
            for _ in range(REHEARSALS):
                self.work_out()
        graphs = (torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph())
        for graph, half in zip(graphs, (self.work_out, self.put_in_place), strict=True):
            with capturing(graph, self.owner.device, pool):
                half()
        self.graphs = graphs


def has_places(layer: ADMSLayer, count: int) -> bool:
    """Whether ``count`` tokens at once are whole records, and no more than there are slots."""
    if layer.middle is None or layer.middle.plan.coder is None:
        return False
    coder = layer.middle.plan.coder
    records, rest = divmod(count, coder.block_tokens)
    return not rest and records <= min(coder.num_records, coder.num_coarse or coder.num_records)
