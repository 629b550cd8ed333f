"""``ADMSLayer``: one attention layer's tiers, and its part of a pass.

Shapes: ``B`` rows, ``K`` KV heads, ``Q`` new tokens, ``D``/``E`` head sizes of keys/values.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from adms.entries import Entries, TokenShape, all_finite
from adms.errors import ADMSValueError
from adms.positions import ForwardView
from adms.tiers.exact import ExactTier
from adms.tiers.middle import MiddleTier

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
        if self.exact is None:
            self.lazy_initialization(key_states, value_states)
        if self.exact is None:
            raise RuntimeError("lazy_initialization left the layer without tiers")
        self.require_alike(self.exact, key_states, value_states)
        if view.in_ring:
            self.finite = all_finite(key_states, value_states)
            rows, slots = self.cache.in_flight_on(key_states.device)
            self.exact.write_in_flight(key_states, value_states, rows, slots)
        else:
            self.staged = Entries(own_storage(key_states), own_storage(value_states))
        return key_states, value_states

    def require_alike(
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
