"""A pass as a transaction: ``begin``, then ``commit`` or ``rollback``, and one call at a time.

A forward pass through an enabled model brackets the layers with ``begin`` and ``commit`` (or
``rollback``): in between, a layer only keeps the pass's new tokens aside. What the pass changes for
good is worked out for all layers first and put in place afterwards, so an error anywhere leaves the
cache as it was.

Shapes: ``L`` layers, ``B`` rows, ``Q`` columns of the pass.
"""

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from adms.binding import Binding
from adms.commit import Commit
from adms.config import ADMSConfig, Sizes
from adms.entries import ordinary_tensors
from adms.errors import ADMSValueError, CacheStateError
from adms.kernels.choice import using
from adms.layer import ADMSLayer
from adms.positions import ForwardView
from adms.tiers.window import WindowLayer
from adms.timeline import Timeline

if TYPE_CHECKING:
    from adms.attention.span_learner import SpanLearner
    from adms.steady import SteadyCommit
    from adms.step import DecodeStep


class _Ticket:
    """Held by the one call that uses a cache."""


class TransactionalCache(Cache):
    """A cache's state between passes, and the pass under way, taken in whole or not at all.

    Args:
        config: the parameters.
    """

    layers: list[Any]

    def __init__(self, config: ADMSConfig) -> None:
        super().__init__(layers=[])
        self.config = config
        self.binding: Binding | None = None
        self.timeline: Timeline | None = None
        self.view: ForwardView | None = None
        self.spans: SpanLearner | None = None
        self._in_flight: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._plain_before: list[tuple[Any, dict[str, Any]]] = []
        self._owner: dict[str, weakref.ref[_Ticket]] = {}
        self._broken = False
        #: the static pass of one token, once there was one
        self.step: DecodeStep | None = None
        #: why the last token was decoded without one
        self.step_obstacle: str | None = None
        #: why no further one is tried, and no further static chunk
        self.step_refused: str | None = None
        self.chunk_refused: str | None = None
        self._unchecked: ForwardView | None = None

    @property
    def binding_for_use(self) -> Binding:
        """The binding.

        Raises:
            CacheStateError: the cache was never used with a model.
        """
        if self.binding is None:
            raise CacheStateError(
                "this cache is not bound to a model yet; pass it to an enabled model first"
            )
        return self.binding

    @property
    def sizes(self) -> Sizes:
        """The sizes that the configuration resolves to on the bound model."""
        return self.binding_for_use.sizes

    # --- one pass --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps every other call off the cache: one that streams, saves, copies or changes rows.

        Raises:
            CacheStateError: another call has it.
        """
        ticket = _Ticket()
        mine = weakref.ref(ticket)
        try:
            # No lock, which an interrupt could leave locked: setdefault is one step. A call that
            # an interrupt kept from giving the cache back is gone, and its ticket with it.
            if "call" in self._owner and self._owner["call"]() is None:
                del self._owner["call"]
            if self._owner.setdefault("call", mine) is not mine:
                raise CacheStateError(
                    "this cache is in use by another call; give each thread a cache of its own"
                )
            with ordinary_tensors():
                self._settle()
                yield
        finally:
            if self._owner.get("call") is mine:
                del self._owner["call"]

    def refuse_steps(self, reason: str) -> None:
        """Has single tokens decoded like any other pass from now on."""
        self.step, self.step_refused, self.step_obstacle = None, reason, reason

    def require_whole(self) -> None:
        """Raises ``CacheStateError`` where an update could neither be finished nor undone."""
        if self._broken:
            raise CacheStateError(
                "an earlier update failed half-way and could not be undone, so this cache holds "
                "nothing reliable; call cache.reset(), or load a session"
            )

    def fit_before(self, new: list[int]) -> None:
        """Fits the code to the model if a pass of ``new`` tokens per row is first to need it."""
        self.binding_for_use.fit_before(self._timeline_for(len(new)), new)

    def _timeline_for(self, batch: int) -> Timeline:
        """The counts, those of an empty stream of ``batch`` rows before the first token."""
        if self.timeline is not None and self.timeline.batch_size:
            return self.timeline
        binding = self.binding_for_use
        return Timeline(binding.sizes, binding.block_tokens, [0] * batch, [0] * batch)

    def begin(
        self, batch: int, columns: int, valid: torch.Tensor | None, device: torch.device
    ) -> None:
        """Opens a pass of ``columns`` tokens for every row.

        Args:
            batch: rows.
            columns: tokens per row, padding included.
            valid: ``[B, Q]`` booleans on the CPU, or None where no column is padding.
            device: where the model's input lies.

        Raises:
            CacheStateError: ``batch`` is not the cache's, or the model was disabled.
        """
        binding = self.binding_for_use
        binding.require_active()
        self.require_whole()
        self._settle()
        timeline = self._timeline_for(batch)
        if timeline.batch_size != batch:
            held = timeline.batch_size
            raise CacheStateError(
                f"this cache holds {held} row{'s' * (held > 1)}, the input has {batch}; use "
                "cache.reset() for a new batch, or batch_repeat_interleave / "
                "batch_select_indices to change the rows"
            )
        if valid is not None and bool(valid.all()):
            valid = None
        new = [columns] * batch if valid is None else valid.sum(1).tolist()
        binding.check_room(timeline, new)
        view = ForwardView(
            timeline,
            new,
            columns,
            valid,
            device,
            text_positions=not self.config.enable_pos_shift,
            anchor_mode=self.config.anchor_mode,
        )
        if self.spans is not None:
            interval, ring = self.config.compression_interval, binding.sizes.ring
            view.measures_spans = self.spans.is_due(timeline.seen, new, interval, ring)
        # Layers that ADMS leaves alone take their tokens at once, in new tensors.
        self._plain_before = [
            (layer, dict(layer.__dict__))
            for layer in self.layers
            if not isinstance(layer, ADMSLayer)
        ]
        self._in_flight = {}
        if self.step is not None and columns > 1 and not self.step.captures:
            # A chunk's tokens need the place; a new one is made in no time.
            self.step = None
        # In this order: a view without its timeline is nothing, and rollback sees that.
        self.view = view
        self.timeline = timeline

    def require_view(self) -> ForwardView:
        """The pass under way.

        Raises:
            CacheStateError: there is none: the model is not enabled.
        """
        if self.view is None:
            raise CacheStateError(
                "an ADMSKVCache works only through a model enabled with enable_adms_llm(model); "
                "this call came from elsewhere"
            )
        return self.view

    def span(self, layer_idx: int) -> int | None:
        """Tokens of the recent tier that a layer reads in the pass under way; None: all of them."""
        if self.spans is None or not self.require_view().ring_is_full:
            return None
        return self.spans.span(layer_idx)

    def in_flight_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows with a real token in this one-token pass, and the ring slots it goes to."""
        view, timeline = self.require_view(), self.timeline
        if timeline is None:
            raise RuntimeError("a pass without a timeline")
        if device not in self._in_flight:
            sizes = timeline.sizes
            rows = [row for row, count in enumerate(view.new) if count]
            slots = [sizes.sink + timeline.seen[row] % sizes.ring for row in rows]
            table = torch.tensor([rows, slots], dtype=torch.long).to(device)
            self._in_flight[device] = (table[0], table[1])
        return self._in_flight[device]

    def commit(self) -> None:
        """Makes the pass under way part of the memory, in all layers or in none.

        Raises:
            ADMSValueError: keys or values of a layer were not finite.
            CacheStateError: a layer received no tokens.
        """
        view, timeline = self.require_view(), self.timeline
        if timeline is None:
            raise RuntimeError("a pass without a timeline")
        layers = [layer for layer in self.layers if isinstance(layer, ADMSLayer)]
        windows = [layer for layer in self.layers if isinstance(layer, WindowLayer)]
        after = timeline.evicted_after(view.new)
        if not view.is_step:
            self._require_finite([*layers, *windows])
        elif after != timeline.evicted or view.device.type == "cpu":
            # What is not finite must not be coded; else there is time until the next call.
            self._require_finite_step()
        commit: Commit | SteadyCommit | None = view.commit
        if view.is_step and self.step is not None:
            commit = self.step.commit_of(timeline.evicted, after)
        if commit is None:
            commit = Commit(timeline, view, after, layers, windows)
        with using(self.binding_for_use.kernel):
            commit.prepare()
        spans = self._spans_after(view, layers)
        commit.keep_overwritten()
        try:
            commit.apply()
            # All that tells the new state from the old is this one assignment, so an interrupt
            # falls before it or after it.
            self.timeline = timeline.after(view.new, after, view.columns)
            self.spans = spans
            if self.step is not None and commit.outdates_step:
                self.step.stale = True
            if view.is_step and not commit.moves_tokens and view.device.type != "cpu":
                view.release()
                self._unchecked = view
        except BaseException:
            if self.timeline is timeline:
                self._broken = True
                commit.take_back()
                self._broken = False
            raise
        self._close()

    def _spans_after(self, view: ForwardView, layers: list[ADMSLayer]) -> "SpanLearner | None":
        """The spans once the pass is committed."""
        if self.spans is None or not layers or not view.ring_is_full:
            return self.spans
        measured = None
        if view.measures_spans:
            device = layers[-1].device
            masses = [layer.recent_mass for layer in layers if layer.recent_mass is not None]
            if len(masses) < len(layers):
                raise CacheStateError("a layer's attention did not run in this pass")
            # One transfer from the device per measured pass.
            measured = torch.stack([mass.to(device) for mass in masses])
        return self.spans.after(measured, view.columns)

    def rollback(self) -> None:
        """Forgets the pass under way; does nothing where it was committed."""
        view = self.view
        if self.step is not None:
            self.step.stale = True
        try:
            if view is not None and self.timeline is view.timeline:
                for layer in self.layers:
                    if isinstance(layer, ADMSLayer) and layer.exact is not None:
                        layer.clear_in_flight(view)
                for plain, before in self._plain_before:
                    plain.__dict__.update(before)
                if self.timeline.length == 0:
                    # Nothing was ever committed, so neither the batch size nor the buffers are
                    # settled.
                    self._clear()
        finally:
            self._close()

    def _clear(self) -> None:
        self._broken = True
        self.timeline = self.step = self._unchecked = self.chunk_refused = None
        for index, layer in enumerate(self.layers):
            if isinstance(layer, ADMSLayer):
                layer.reset()
            else:
                self.layers[index] = self.binding_for_use.plain_layer(index)
        self.spans = None if self.binding is None else self.binding.new_spans()
        self._broken = False

    def _close(self) -> None:
        for layer in self.layers:
            if isinstance(layer, ADMSLayer | WindowLayer):
                layer.drop_pass()
        self._plain_before = []
        self._in_flight = {}
        self.view = None

    def _settle(self) -> None:
        """Takes the last token back if it was not finite: a step does not wait to find out.

        Raises:
            ADMSValueError: it was not.
        """
        view, self._unchecked = self._unchecked, None
        if view is None:
            return
        try:
            self._require_finite_step()
        except ADMSValueError:
            self.view, self.timeline = view, view.timeline
            self.rollback()
            raise

    def _require_finite_step(self) -> None:
        layer = None if self.step is None else self.step.bad_layer()
        if layer is not None:
            raise ADMSValueError(
                f"keys or values of layer {layer} hold NaN or infinity; the last token was not "
                "stored; check the input and the model's dtype"
            )

    def _require_finite(self, layers: list[ADMSLayer | WindowLayer]) -> None:
        for layer in layers:
            if layer.finite is None and layer.staged is None:
                raise CacheStateError(
                    f"layer {layer.layer_idx} received no tokens in this pass; every attention "
                    "layer must run"
                )
        for device in {layer.device for layer in layers}:
            own = [layer for layer in layers if layer.device == device]
            # One question to the device per pass, not one per layer.
            for layer, finite in zip(own, _are_finite(own).tolist(), strict=True):
                if not finite:
                    raise ADMSValueError(
                        f"keys or values of layer {layer.layer_idx} hold NaN or infinity; the "
                        "tokens of this pass were not stored; check the input and the model's dtype"
                    )


def _are_finite(layers: list[ADMSLayer | WindowLayer]) -> torch.Tensor:
    """Whether each layer's new tokens are finite, ``[L]`` on their device."""
    staged = [layer for layer in layers if layer.finite is None]
    if not staged:
        return torch.stack([layer.finite for layer in layers if layer.finite is not None])
    # Two operations for all layers: the largest is NaN or infinite where any number is.
    tensors = [
        part
        for layer in staged
        if layer.staged is not None
        for part in (layer.staged.keys, layer.staged.values)
    ]
    largest = torch.stack(torch._foreach_norm(tensors, math.inf))
    found = iter(largest.isfinite().view(-1, 2).all(1))
    return torch.stack([next(found) if one.finite is None else one.finite for one in layers])
