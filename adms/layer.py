"""``ADMSLayer``: one attention layer's tiers, and its part of a pass and of a commit.

Shapes: ``B`` rows, ``K`` KV heads, ``Q`` new tokens, ``D``/``E`` head sizes of keys/values.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from adms.entries import Entries, TokenShape
from adms.errors import ADMSValueError
from adms.positions import ForwardView
from adms.tiers.candidates import Candidates, settle
from adms.tiers.exact import ExactTier, Moves, keep_overwritten, leaving_entries, write_moves
from adms.tiers.middle import MiddleTier, Write
from adms.tiers.undo import Undo
from adms.timeline import Timeline

if TYPE_CHECKING:
    from adms.cache import ADMSKVCache


def own_storage(states: torch.Tensor) -> torch.Tensor:
    """``states``, copied only where it is a view that would keep a larger storage alive."""
    if states.untyped_storage().nbytes() > states.numel() * states.element_size():
        return states.clone(memory_format=torch.contiguous_format)
    return states


class ADMSLayer(CacheLayerMixin):
    """One attention layer's memory.

    Attributes:
        exact: sinks and recent ring, or None before the first token.
        middle: the compressed tier, or None where the budget is 0.
        staged: the tokens of the pass under way, kept aside until it is committed.
        recent_mass: ``[S]`` where in the recent tier the pass's attention went, if measured.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: "ADMSKVCache", layer_idx: int) -> None:
        super().__init__()
        self.cache = cache
        self.layer_idx = layer_idx
        self.exact: ExactTier | None = None
        self.middle: MiddleTier | None = None
        self.staged: Entries | None = None
        self.queries: torch.Tensor | None = None
        self.finite: torch.Tensor | None = None
        self.recent_mass: torch.Tensor | None = None

    # --- the pass under way ---------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the pass's new tokens; what attention reads is assembled from the tiers.

        Args:
            key_states: ``[B, K, Q, D]`` before positions.
            value_states: ``[B, K, Q, E]``.

        Returns:
            The arguments, unchanged.

        Raises:
            CacheStateError: no enabled model's pass is under way.
            ADMSValueError: heads, head sizes or dtype are not those the layer was filled with.
        """
        view = self.cache.require_view()
        if view.is_step and self.exact is not None:
            # Attention stores them on its way.
            self._require_alike(self.exact, key_states, value_states)
            return key_states, value_states
        if self.exact is None:
            self.lazy_initialization(key_states, value_states)
        if self.exact is None:
            raise RuntimeError("lazy_initialization left the layer without tiers")
        self._require_alike(self.exact, key_states, value_states)
        self.finite = torch.isfinite(key_states).all() & torch.isfinite(value_states).all()
        if view.in_ring:
            rows, slots = self.cache.in_flight_on(key_states.device)
            self.exact.write_in_flight(key_states, value_states, rows, slots)
        else:
            self.staged = Entries(own_storage(key_states), own_storage(value_states))
        return key_states, value_states

    def _require_alike(
        self, exact: ExactTier, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> None:
        """Refuses tokens of another shape or dtype; follows the model to another device."""
        for name, held, new in (
            ("keys", exact.keys, key_states),
            ("values", exact.values, value_states),
        ):
            if (
                held.dtype != new.dtype
                or held.shape[1] != new.shape[1]
                or held.shape[3] != new.shape[3]
            ):
                raise ADMSValueError(
                    f"{name} of layer {self.layer_idx} have {new.shape[1]} heads of size "
                    f"{new.shape[3]} in {new.dtype}, the cache holds {held.shape[1]} of size "
                    f"{held.shape[3]} in {held.dtype}; to change a model's dtype in mid-stream, "
                    "save the cache and load it again"
                )
        if exact.keys.device != key_states.device:
            self.device = key_states.device
            self.map_tensors(lambda tensor: tensor.to(self.device))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the tiers for the batch, heads, dtype and device of the first tokens."""
        sizes = self.cache.sizes
        self.dtype, self.device = key_states.dtype, key_states.device
        self.exact = ExactTier.empty(sizes, key_states, value_states)
        shape = TokenShape(key_states.shape[1], key_states.shape[3], value_states.shape[3])
        plan = self.cache.binding_for_use.middle_plan(self.layer_idx, shape, self.dtype, sizes)
        if plan is not None:
            self.middle = MiddleTier.empty(plan, key_states.shape[0], self.device)
        self.is_initialized = True

    def keep_queries(self, queries: torch.Tensor) -> None:
        """Keeps the pass's queries ``[B, H, Q, D]`` until the commit if anything there asks.

        Those of padding are kept as zeros.
        """
        if self.middle is None or not self.middle.plan.needs_queries:
            return
        valid = self.cache.require_view().column_valid
        if valid is None:
            self.queries = own_storage(queries)
        else:
            padding = ~valid.to(queries.device)[:, None, :, None]
            self.queries = queries.masked_fill(padding, 0)

    def clear_in_flight(self, view: ForwardView) -> None:
        """Empties the slots of a single token that was not committed.

        What it left there may not be finite, and a masked slot is still multiplied by zero.
        """
        if view.in_ring and self.exact is not None:
            rows, slots = self.cache.in_flight_on(self.device)
            self.exact.keys[rows, :, slots] = 0
            self.exact.values[rows, :, slots] = 0

    def drop_pass(self) -> None:
        """Forgets what was kept aside."""
        self.staged = self.queries = self.finite = self.recent_mass = None

    def prepare(self, moves: Moves, totals: list[int], recent: "RecentWindow") -> "LayerCommit":
        """Works out this layer's part of a commit without changing anything."""
        if self.exact is None:
            raise RuntimeError("a commit without tiers")
        leaving = None
        writes: list[Write] = []
        candidates: list[Candidates] = []
        if moves.num_leaving:
            leaving = leaving_entries(self.exact, self.staged, moves)
            if self.middle is not None and any(moves.middle_count):
                writes, candidates = self.middle.prepare(
                    leaving,
                    moves.middle_start,
                    moves.middle_count,
                    totals,
                    self.cache.sizes.sink,
                    lambda row: recent.entries(self, row),
                    self.queries,
                )
        return LayerCommit(leaving, writes, candidates)

    def keep_overwritten(self, commit: "LayerCommit", moves: Moves, undo: Undo) -> None:
        """Keeps what ``apply`` will overwrite."""
        if self.exact is not None:
            keep_overwritten(self.exact, commit.leaving, self.staged, moves, undo)
        if self.middle is not None:
            self.middle.keep_overwritten(commit.writes, undo)

    def apply(self, commit: "LayerCommit", moves: Moves) -> None:
        """Puts a prepared commit in place."""
        if self.exact is not None:
            write_moves(self.exact, commit.leaving, self.staged, moves)
        if self.middle is not None:
            self.middle.apply(commit.writes)

    # --- transformers' contract ------------------------------------------------------------------

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor this layer holds, the pass under way included."""
        held: list[torch.Tensor] = []
        for tier in (self.exact, self.middle):
            held += tier.tensors() if tier is not None else []
        if self.staged is not None:
            held += [self.staged.keys, self.staged.values]
        further = (self.queries, self.finite, self.recent_mass)
        return held + [part for part in further if part is not None]

    def map_tensors(self, change: Any) -> None:
        """Replaces every stored tensor by ``change(tensor)`` (rows come first in all of them)."""
        if self.exact is not None:
            self.exact.keys = _moved(self.exact.keys, change)
            self.exact.values = _moved(self.exact.values, change)
        if self.middle is not None:
            self.middle.arena = _moved(self.middle.arena, change)

    def get_seq_length(self) -> int:
        """Columns of input so far."""
        return self.cache.timeline_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Retained entries plus the query, and how far the text is ahead of them.

        Within a pass, the query alone: attention makes its own mask, and what transformers would
        make for the layers is never read.
        """
        if self.cache.view is not None:
            return query_length, 0
        retained = self.cache.num_entries(self.layer_idx)
        return retained + query_length, self.cache.timeline_length - retained

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (the name before transformers 5.13)."""
        return -1

    def offload(self) -> None:
        """Moves all tiers to the CPU."""
        self.map_tensors(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves all tiers back to the layer's device."""
        if self.is_initialized:
            self.map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forgets everything."""
        self.exact = self.middle = None
        self.is_initialized = False
        self.drop_pass()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in the order of ``beam_idx``."""
        self.map_tensors(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))


def _moved(tensor: torch.Tensor, change: Any) -> torch.Tensor:
    """What ``change`` makes of a tensor, in its place where it fits there.

    A captured graph reads the places, and layers may share one storage.
    """
    after: torch.Tensor = change(tensor)
    if after.shape == tensor.shape and after.device == tensor.device:
        return tensor.copy_(after)
    return after


class LayerCommit:
    """One layer's part of a commit: what leaves, bytes to write, and who could be a landmark."""

    def __init__(
        self, leaving: Entries | None, writes: list[Write], candidates: list[Candidates]
    ) -> None:
        self.leaving = leaving
        self.writes = writes
        self.candidates = candidates


def settle_landmarks(layers: list[ADMSLayer], commits: list[LayerCommit]) -> None:
    """Chooses the landmarks of all layers together and adds the bytes that hold them."""
    asked = [
        (layer.middle, commit)
        for layer, commit in zip(layers, commits, strict=True)
        if layer.middle is not None and commit.candidates
    ]
    if not asked:
        return
    counts = [middle.plan.geometry.landmarks for middle, _ in asked]
    settle([commit.candidates for _, commit in asked], counts, asked[0][0].plan.config)
    for middle, commit in asked:
        commit.writes += middle.landmark_writes(commit.candidates)


class RecentWindow:
    """The tokens of a pass and of the ring that stay, as further material for a fit."""

    def __init__(
        self,
        timeline: Timeline,
        written: list[int],
        columns: list[list[int]],
        evicted_after: list[int],
    ) -> None:
        """Args are per row: tokens in the ring, the pass's columns, and what will have left."""
        self.timeline = timeline
        self.written = written
        self.columns = columns
        self.evicted_after = evicted_after

    def entries(self, layer: ADMSLayer, row: int) -> Entries:
        """One row's exact tokens after those that leave, in order: ``[1, K, N, ...]``."""
        if layer.exact is None:
            raise RuntimeError("a layer without tiers was asked for its window")
        sizes, device = self.timeline.sizes, layer.exact.keys.device
        written = self.written[row]
        # A pass longer than the window may push out tokens of its own: none of the ring stays.
        tokens = torch.arange(min(self.evicted_after[row], written), written, device=device)
        slots = sizes.sink + tokens % sizes.ring
        keys = layer.exact.keys[row : row + 1, :, slots]
        values = layer.exact.values[row : row + 1, :, slots]
        if layer.staged is not None:
            first = max(0, self.evicted_after[row] - self.timeline.seen[row])
            columns = torch.tensor(self.columns[row][first:], device=device)
            keys = torch.cat([keys, layer.staged.keys[row : row + 1, :, columns]], dim=2)
            values = torch.cat([values, layer.staged.values[row : row + 1, :, columns]], dim=2)
        return Entries(keys, values)
