"""Reading a long prompt: pass and commit of a chunk as the same operations every time.

Once all rows are coded, a chunk brings in as many tokens as leave (if these are whole blocks, and
no fewer than leave together), and all that differs from one chunk to the next follows from counts
on the device. So a call that has many chunks left captures one in two CUDA graphs and replays them:
the first is the pass and all that its commit works out, the second puts it in place, so that an
error between them changes nothing. They live for the one call, whose workspace they hold; a CPU
would only do more work.

Shapes: ``L`` layers, ``B`` rows, ``R`` rows or 1 where all rows agree, ``Q`` tokens of the chunk.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from adms.cache import ADMSKVCache
from adms.entries import Entries
from adms.kernels.choice import using
from adms.layer import ADMSLayer
from adms.places import MiddleGeometry
from adms.positions import ForwardView
from adms.steady import SteadyCommit
from adms.step_buffers import FULL
from adms.step_capture import Output, capturing, first_cause, rehearsing
from adms.timeline import Timeline

logger = logging.getLogger("adms")

# Where chunks are replayed.
DEVICES = ("cuda",)
# A capture takes as long as some two chunks read one by one.
WORTH = 6


class FixedView(ForwardView):
    """A view for a capture: its counts lie in a buffer, and it reads whole tiers under masks.

    Args:
        view: of the pass under way, without padding.
        counts: ``[3, R]`` int64, as in ``ForwardView``.
    """

    def __init__(self, view: ForwardView, counts: torch.Tensor) -> None:
        super().__init__(
            view.timeline,
            view.new,
            view.columns,
            None,
            view.device,
            view.text_positions,
            view.anchor_mode,
        )
        self.__dict__["counts"] = counts

    @property
    def exact_slice(self) -> tuple[int, int]:
        """The whole buffer."""
        return 0, self.sizes.sink + self.sizes.ring

    @property
    def middle_totals(self) -> list[int]:
        """A middle that is full, whatever it holds yet."""
        return [FULL] * self.timeline.batch_size

    def records_held(self, geometry: MiddleGeometry) -> torch.Tensor:
        """``[R, 1]`` records that a row holds."""
        return self.places(geometry).records

    @property
    def _holds_everything(self) -> bool:
        """The counts are no business of the host."""
        return False

    def middle_valid(self, geometry: MiddleGeometry) -> torch.Tensor:
        """``[R, N]``, which are there."""
        return self.middle(geometry).valid

    def _entries(self, geometry: MiddleGeometry) -> list[int]:
        return [geometry.num_entries(FULL)] * self.rows


class ChunkStep:
    """The static chunk of one cache and one call.

    Args:
        cache: a cache whose layers are alike and coded, with the pass of a chunk under way.
        decoder_forward: the decoder's own forward.
    """

    def __init__(self, cache: ADMSKVCache, decoder_forward: Callable[..., Any]) -> None:
        view = cache.require_view()
        # The graph reads the places of what it finds.
        cache.lay_together()
        self.cache = cache
        self.forward = decoder_forward
        self.layers: list[ADMSLayer] = list(cache.layers)
        self.batch = view.timeline.batch_size
        self.device = view.device
        #: ``[3, R]`` int64 as in ``ForwardView``, counted on by the commit
        self.counts = view.counts.clone()
        #: what the counts are, as the host knows them; None after an error
        self.known: tuple[list[int], list[int]] | None = None
        self.commit = _ChunkCommit(self, view.columns)
        self.inputs: torch.Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.staged: list[Entries | None] = []
        self.output: Output | None = None

    @property
    def evicted(self) -> torch.Tensor:
        """``[R]`` int64, tokens that have left the recent tier."""
        return self.counts[1]

    @property
    def seen(self) -> torch.Tensor:
        """``[R]`` int64, tokens that were written to the ring, those of the pass left out."""
        return self.counts[0]

    def count_on(self, count: int) -> None:
        """Once ``count`` tokens have come and gone."""
        self.counts[:2] += count

    def outdate(self) -> None:
        """After an error: the counts on the device may be anything."""
        self.known = None

    def fits(self, view: ForwardView) -> bool:
        """Whether it was made for as many rows of counts."""
        return self.counts.shape[1] == view.rows

    def run(self, arguments: dict[str, Any]) -> Any:
        """The decoder's output for the chunk under way, whose commit is worked out too."""
        view = self.cache.require_view()
        name = "input_ids" if arguments.get("inputs_embeds") is None else "inputs_embeds"
        given = arguments[name]
        if self.inputs is None:
            self.inputs = torch.empty_like(given, memory_format=torch.contiguous_format)
            # The graph reads their places.
            self.arguments = {**arguments, name: self.inputs}
        self.inputs.copy_(given)
        timeline = view.timeline
        if self.known != (timeline.seen, timeline.evicted):
            self.counts.copy_(view.counts)
        self.known = None
        if self.device.type != "cuda":
            self._pass(view)
        elif self.commit.graphs is None:
            self._capture(view)
        if self.commit.graphs is not None:
            self.commit.graphs[0].replay()
        for layer, staged in zip(self.layers, self.staged, strict=True):
            layer.staged = staged
        view.commit = self.commit
        self.known = self._after(timeline)
        if self.output is None:
            raise RuntimeError("a chunk without an output")
        return self.output()

    def _after(self, timeline: Timeline) -> tuple[list[int], list[int]]:
        count = self.commit.count
        return [own + count for own in timeline.seen], [own + count for own in timeline.evicted]

    def _pass(self, view: ForwardView) -> None:
        """The pass, and what its commit works out; changes nothing that lasts."""
        self.cache.view = FixedView(view, self.counts)
        try:
            result = self.forward(**self.arguments)
        finally:
            self.cache.view = view
        with using(self.cache.binding_for_use.kernel):
            self.commit.work_out()
        self.staged = [layer.staged for layer in self.layers]
        self.output = Output(result)

    def _capture(self, view: ForwardView) -> None:
        """Captures both halves; changes nothing."""
        rehearsed = self.cache.binding_for_use.rehearsed
        shape = (self.batch, view.rows, view.columns, self.cache.sizes)
        form = (self.device, self.layers[0].dtype, shape)
        is_ready = form in rehearsed
        if is_ready:
            try:
                self._capture_rehearsed(view)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # Something is new all the same; if that was not all, it shows below.
                logger.debug("a chunk is rehearsed again: %s", first_cause(error))
                is_ready = False
        if not is_ready:
            with rehearsing(self.device):
                self._pass(view)
            self._capture_rehearsed(view)
            rehearsed.add(form)

    def _capture_rehearsed(self, view: ForwardView) -> None:
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with capturing(graphs[0], self.device):
            self._pass(view)
        with capturing(graphs[1], self.device, graphs[0].pool()):
            self.commit.put_in_place()
        self.commit.graphs = graphs


class _ChunkCommit(SteadyCommit):
    """A chunk's: tokens leave the ring as others enter it."""

    outdates_step = True

    def __init__(self, owner: ChunkStep, count: int) -> None:
        super().__init__(owner, count)
        #: of each stack of layers: places in its ring, and keys and values that go there
        self.arriving: list[tuple[Any, tuple[torch.Tensor, torch.Tensor]]] = []

    def prepare(self) -> None:
        """Was done with the pass."""

    def work_out(self) -> None:
        """What ``put_in_place`` writes, and what it overwrites."""
        super().work_out()
        owner = self.owner
        if not isinstance(owner, ChunkStep):
            raise RuntimeError("a chunk's commit beside another pass")
        sizes, seen = owner.cache.sizes, owner.counts[0].expand(owner.batch)
        coming = seen[:, None] + torch.arange(self.count, device=owner.device)
        rows = torch.arange(owner.batch, device=owner.device)[:, None]
        # Indices that stand apart come first: [B, Q, L, K, D].
        place = slice(None), rows, slice(None), sizes.sink + coming % sizes.ring
        self.arriving = []
        for work in self.works:
            staged = work.stack.staged
            if staged is None:
                raise RuntimeError("a layer received no tokens in this pass")
            keys, values = (part.permute(1, 3, 0, 2, 4) for part in (staged.keys, staged.values))
            self.arriving.append((place, (keys, values)))
            for part in work.stack.exact.tensors():
                self.undo.keep(part, *place)

    def put_in_place(self) -> None:
        """Codes, then the chunk's tokens in their slots."""
        for work, (place, fresh) in zip(self.works, self.arriving, strict=True):
            for part, new in zip(work.stack.exact.tensors(), fresh, strict=True):
                part[place] = new
        super().put_in_place()
