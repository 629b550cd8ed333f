"""The static pass of one token: the same sequence of kernels for every token, replayed as a graph.

Between two commits nothing changes but the token in flight. What follows from the counts of the
commit (positions, validity, which codes landmarks hide) is worked out once after it; the step
itself reads whole buffers under masks and derives its slot and its mask from a counter on the
device. Compression stays outside; once it is the same every time, it is as static (``steady``).

Shapes: ``L`` layers, ``B`` rows, ``R`` rows or 1 where all rows agree, ``H`` query heads, ``K`` KV
heads, ``S`` exact slots, ``N`` entries of the middle, ``M`` landmarks, ``D`` head size.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adms.cache import ADMSKVCache
from adms.compiled_layers import compiled_layers
from adms.compressors.tables import CodeTables
from adms.kernels.decode_attention import decode_attention, write_token
from adms.kernels.parts import CodedPart, ExactPart
from adms.layer import ADMSLayer
from adms.places import Places
from adms.positions import ForwardView
from adms.stack import tensors_of
from adms.steady import SteadyCommit
from adms.step_buffers import FULL, Held, Shared, hold
from adms.step_capture import Output, capturing, rehearsing
from adms.tiers.middle import MiddleTier

# Passes before a capture, in which kernels are compiled and libraries set themselves up.
WARMUP_PASSES = 2
# Where the commit of steady decoding is static too. A CPU would only do more work.
STEADY_DEVICES = ("cuda",)
Tables = tuple[CodeTables | None, CodeTables | None]


class DecodeStep:
    """The static one-token pass of one cache.

    Args:
        cache: a cache whose layers are alike and hold tokens.
        decoder: the decoder, whose layers are compiled.
    """

    def __init__(self, cache: ADMSKVCache, decoder: nn.Module) -> None:
        self.decoder = weakref.ref(decoder)
        self.weights = [weakref.ref(weight) for weight in decoder.parameters()]
        self.lie_at = self._weights_lie_at()
        self.layers: list[ADMSLayer] = list(cache.layers)
        if self.layers[0].exact is None or cache.timeline is None:
            raise RuntimeError("a step was made for a cache without tokens")
        self.batch = cache.timeline.batch_size
        self.device = self.layers[0].exact.keys.device
        self.fused = self.device.type == "cuda"
        self.kernel = cache.binding_for_use.kernel
        self.text_positions = not cache.config.enable_pos_shift
        self.anchor_mode = cache.config.anchor_mode
        self.scheme = cache.binding_for_use.kinds[0].scheme
        embedding = getattr(self.scheme, "embedding", None)
        if embedding is not None:
            # Copied when the model was enabled, which may have moved since.
            embedding.to(self.device)
        # What is given up elsewhere is not held here.
        self.tiers = [weakref.ref(part) for part in _tiers(self.layers)]
        self.flags = torch.zeros(len(self.layers), dtype=torch.uint8, device=self.device)
        pinned = self.device.type == "cuda"
        self.flags_host = torch.zeros(len(self.layers), dtype=torch.uint8, pin_memory=pinned)
        self.copied = torch.cuda.Event() if pinned else None
        #: whether a commit or another pass has changed what ``held`` follows from
        self.stale = True
        self.key: object = None
        self.phase = "empty"
        self.held: Held | None = None
        #: how each layer's codes and landmarks are read, once they are coded
        self.tables: list[Tables] = []
        #: whether rows have changed, and with them what the tables follow from
        self.moved = False
        self.shared: Shared | None = None
        self.inputs: torch.Tensor | None = None
        self.graph: Any = None
        self.arguments: dict[str, Any] = {}
        self.output: Any = None
        #: the commit of steady decoding, as static as the pass
        self.steady: SteadyCommit | None = None

    def fits(self, cache: ADMSKVCache, decoder: nn.Module) -> bool:
        """Whether the tiers and the weights are still where they were."""
        found = _tiers(cache.layers)
        same = all(own() is part for own, part in zip(self.tiers, found, strict=False))
        same = same and len(found) == len(self.tiers)
        return same and self.decoder() is decoder and self.lie_at == self._weights_lie_at()

    def _weights_lie_at(self) -> list[int]:
        """Address of each weight: a graph would go on reading what ``model.to`` has left."""
        own = [weight() for weight in self.weights]
        return [0 if weight is None else weight.data_ptr() for weight in own]

    def tensors(self) -> list[torch.Tensor]:
        """Everything that is kept between passes."""
        held = [] if self.held is None else self.held.tensors()
        # Codes and landmarks may be read by the same.
        found = [part for tables in self.tables for one in tables if one for part in one.tensors()]
        held += list({id(part): part for part in found}.values())
        own = [self.flags, self.flags_host, self.inputs, getattr(self.output, "hidden", None)]
        return held + [part for part in own if part is not None]

    @property
    def captures(self) -> bool:
        """Whether a graph reads the buffers, which then stay where they are."""
        return self.device.type == "cuda"

    # --- a pass ----------------------------------------------------------------------------------

    def run(self, forward: Callable[..., Any], arguments: dict[str, Any], view: ForwardView) -> Any:
        """The decoder's output for the token in flight."""
        view.is_step = True
        name = "input_ids" if arguments.get("inputs_embeds") is None else "inputs_embeds"
        given = arguments[name]
        middle = self.layers[0].middle
        phase = phase_of(middle, view.timeline.middle_tokens(0))
        key = (view.rows, phase, name, given.dtype)
        if key != self.key:
            self.graph = self.output = self.held = None
            self.tables = []
            self.key, self.phase, self.stale = key, phase, True
            self.steady = None
            if phase == "coded" and self.device.type in STEADY_DEVICES:
                self.steady = SteadyCommit.of(self, view.timeline.sizes.interval)
            self.inputs = torch.empty_like(given, memory_format=torch.contiguous_format)
        if self.inputs is None:
            raise RuntimeError("a step without a place for its input")
        self.inputs.copy_(given)
        if self.stale:
            found = self._held(view)
            if self.held is None or not self.fused:
                self.held = found
            else:
                self.held.take(found)
            self._hold_tables()
            self.stale = False
        if self.graph is None:
            self._prepare(forward, {**arguments, name: self.inputs}, view)
        if self.graph is not None:
            self.graph.replay()
        self.flags_host.copy_(self.flags, non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        return self.output()

    def bad_layer(self) -> int | None:
        """A layer whose last token was not finite; waits for the pass to end."""
        if self.copied is not None:
            self.copied.synchronize()
        bad = self.flags_host.nonzero()
        return self.layers[int(bad[0])].layer_idx if len(bad) else None

    def _prepare(
        self, forward: Callable[..., Any], arguments: dict[str, Any], view: ForwardView
    ) -> None:
        """Captures the pass; where nothing can be captured, runs it."""
        if self.device.type != "cuda":
            self.output = Output(self._pass(forward, arguments))
            return
        if self.held is None:
            raise RuntimeError("a capture before its buffers")
        seen = self.held.seen.clone()
        graph = torch.cuda.CUDAGraph()
        with compiled_layers(self.decoder(), self.attend):
            with rehearsing(self.device):
                for _ in range(WARMUP_PASSES):
                    # The next slot may hold a token that is still read.
                    self.held.seen.copy_(seen)
                    self._pass(forward, arguments)
                self.held.seen.copy_(seen)
            with capturing(graph, self.device):
                result = self._pass(forward, arguments)
        # The passes before were rehearsals: they wrote what this one will write again.
        self.held.seen.copy_(seen)
        # The graph reads their places.
        self.arguments = arguments
        self.graph, self.output = graph, Output(result)
        if self.steady is not None:
            self.steady.capture(graph.pool())

    def _pass(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        self.shared = self._shared()
        try:
            result = forward(**arguments)
        finally:
            self.shared = None
        if self.held is not None:
            self.held.seen += 1
        return result

    # --- the commit of steady decoding -----------------------------------------------------------

    def commit_of(self, before: list[int], after: list[int]) -> SteadyCommit | None:
        """The static commit by which ``evicted`` of all rows turns from ``before`` to ``after``."""
        steady = self.steady
        return steady if steady is not None and steady.makes(before, after) else None

    # --- what all layers share -------------------------------------------------------------------

    def _held(self, view: ForwardView) -> Held:
        """From the host's counts."""
        middle, width = self.layers[0].middle, 0
        if middle is not None and self.phase != "empty":
            geometry = middle.plan.geometry
            totals = [view.timeline.middle_tokens(row) for row in range(view.rows)]
            if self.fused or self.steady is not None:
                # What is captured reads as many for every token.
                totals = [FULL if self.phase == "coded" else geometry.raw_tokens]
            width = max(geometry.num_entries(total) for total in totals)
        places = view.places(None if middle is None else middle.plan.geometry)
        return hold(places, view.seen.clone(), view.evicted.clone(), width, self._marks)

    @property
    def evicted(self) -> torch.Tensor:
        """``[R]`` int64, tokens that have left the recent tier."""
        if self.held is None:
            raise RuntimeError("a commit before the step has its buffers")
        return self.held.evicted

    @property
    def seen(self) -> torch.Tensor:
        """``[R]`` int64, tokens that were written to the ring, that of the pass among them."""
        if self.held is None:
            raise RuntimeError("a commit before the step has its buffers")
        return self.held.seen

    def outdate(self) -> None:
        """Has what is held worked out anew before the next pass."""
        self.stale = True

    def count_on(self, count: int) -> None:
        """Once ``count`` tokens have left: what is held follows from the counts."""
        held, middle = self.held, self.layers[0].middle
        if held is None or held.valid is None or middle is None:
            raise RuntimeError("a step without a middle was to be brought up to date")
        held.evicted += count
        places = Places(
            self.layers[0].cache.sizes,
            middle.plan.geometry,
            held.evicted,
            text_positions=self.text_positions,
            anchor_mode=self.anchor_mode,
        )
        held.take(hold(places, held.seen, held.evicted, held.valid.shape[1], self._marks))

    @property
    def _marks(self) -> torch.Tensor | None:
        """Text positions ``[B, M]`` of landmarks, the same in all layers."""
        middle = self.layers[0].middle
        if middle is None or self.phase != "coded" or not middle.plan.geometry.landmarks:
            return None
        return middle.landmark_tokens()

    def _hold_tables(self) -> None:
        """How codes are read, which follows from headers alone: once, and when rows change."""
        if self.phase != "coded" or (self.tables and not self.moved):
            return
        found = [layer.middle.tables() for layer in self.layers if layer.middle is not None]
        if not self.fused:
            # The twin reads what there is and no more.
            found = [(one and one.trimmed(), mark and mark.trimmed()) for one, mark in found]
        if not self.tables or not self.fused:
            self.tables = found
            self.moved = False
            return
        for before, after in zip(self.tables, found, strict=True):
            for own, new in zip(before, after, strict=True):
                if own is not None and new is not None and own is not new:
                    # All else of them are views of the headers.
                    own.offsets.copy_(new.offsets)
        self.moved = False

    def _shared(self) -> Shared:
        """From the buffers alone, on the device."""
        held = self.held
        exact = self.layers[0].exact
        if held is None or exact is None:
            raise RuntimeError("a step before its buffers")
        self.flags.zero_()
        sizes, like = self.layers[0].cache.sizes, exact.keys
        slots = sizes.sink + held.seen % sizes.ring
        count = held.tokens.shape[1]
        exact_positions, middle_positions = held.positions[:, :count], held.positions[:, count:]
        cos, sin = self._turns(exact_positions, like)
        own = torch.arange(len(slots), device=self.device)
        if self.fused and self.phase == "coded" and like.dtype == torch.bfloat16:
            # As keys of codes are worked out there.
            like = like.new_empty(1, 1, 1, like.shape[3], dtype=torch.float16)
        marks = held.mark_positions
        return Shared(
            slots=slots,
            query=(cos[own, slots], sin[own, slots]),
            exact=(cos, sin),
            valid=held.kept & (held.tokens <= held.seen[:, None]),
            middle=self._turns(middle_positions, like),
            marks=None if marks is None else self._turns(marks, like),
        )

    def _turns(
        self, positions: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[R, N, D]`` of positions ``[R, N]``, in the dtype of ``like``."""
        cos, sin = self.scheme.tables(positions, like, positions)
        return cos, sin

    # --- one layer -------------------------------------------------------------------------------

    def attend(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attention ``[B, 1, H, D]`` of the token in flight, which is stored on the way."""
        shared, layer = self.shared, self.layers[index]
        exact = layer.exact
        if shared is None or exact is None:
            raise RuntimeError("attention of a step outside of its pass")
        layer.require_alike(exact, key, value)
        flag = self.flags[index : index + 1]
        if self.fused:
            from adms.kernels.decode_attention_triton import fused_write_token

            fused_write_token(key, value, exact.keys, exact.values, shared.slots, flag)
        else:
            write_token(key, value, exact.keys, exact.values, shared.slots, flag)
        # Slots start as zeros, and what is not finite never stays in one.
        ring = ExactPart(exact.keys, exact.values, *shared.exact, shared.valid, is_finite=True)
        parts = [ring]
        coded: list[CodedPart] = []
        if layer.middle is not None and self.phase != "empty":
            tables = self.tables[index] if self.tables else (None, None)
            self._add_middle(layer.middle, tables, shared, parts, coded)
        output = decode_attention(
            query[:, :, 0], *shared.query, parts, coded, scaling=scaling, fused=self.fused
        )
        return output[:, None]

    def _add_middle(
        self,
        middle: MiddleTier,
        found: Tables,
        shared: Shared,
        parts: list[ExactPart],
        coded: list[CodedPart],
    ) -> None:
        held = self.held
        if held is None or held.valid is None:
            raise RuntimeError("a middle before its buffers")
        tables, mark_tables = found
        if tables is not None:
            records = middle.records()[:, : held.valid.shape[1]]
            coded.append(CodedPart(records, tables, *shared.middle, held.valid))
        else:
            total = FULL if self.phase == "coded" else middle.plan.geometry.raw_tokens
            entries = middle.read([total] * self.batch)
            if entries is None:
                raise RuntimeError("a middle with tokens was read as empty")
            width = held.valid.shape[1]
            keys, values = entries.keys[:, :, :width], entries.values[:, :, :width]
            weight = entries.log_weight
            weight = None if weight is None else weight[:, :, :width]
            parts.append(ExactPart(keys, values, *shared.middle, held.valid, weight))
        if shared.marks is None or held.mark_valid is None:
            return
        shown = held.mark_valid
        if mark_tables is not None:
            records = middle.landmark_records()
            coded.append(CodedPart(records, mark_tables, *shared.marks, shown))
        else:
            marks, _ = middle.landmarks([FULL] * self.batch)
            parts.append(ExactPart(marks.keys, marks.values, *shared.marks, shown))


def phase_of(middle: MiddleTier | None, total: int) -> str:
    """How a middle holds the ``total`` tokens that have entered it."""
    if middle is None or total == 0:
        return "empty"
    return "coded" if middle.plan.geometry.is_coded(total) else "exact"


def _tiers(layers: list[Any]) -> list[torch.Tensor]:
    """Keys, values and bytes of every layer that has tiers."""
    own = [layer for layer in layers if isinstance(layer, ADMSLayer) and layer.exact is not None]
    return [part for layer in own for part in tensors_of(layer)]
