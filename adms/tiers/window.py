"""The cache layer of an attention with a sliding window: nothing to compress, everything exact.

ADMS leaves such a layer's memory as the model defines it, the last ``window`` tokens; what differs
from transformers' own layer is that a failed pass leaves no trace, that padding is not stored, and
that keys are kept before positions, so that a stream never outgrows their precision.

Shapes: ``B`` rows, ``K`` KV heads, ``Q`` new tokens, ``S`` slots, ``D``/``E`` head sizes of
keys/values.
"""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from adms.entries import Entries, all_finite
from adms.errors import CacheStateError
from adms.positions import ForwardView
from adms.tiers.undo import Undo
from adms.timeline import Timeline


class WindowLayer(CacheLayerMixin):
    """The last tokens of one sliding-window layer, in a ring.

    Attributes:
        window: tokens that a query sees, itself included.
        keys: ``[B, K, S, D]`` before positions, token ``t`` in slot ``t % S``; None at first.
        values: ``[B, K, S, E]``.
        staged: the tokens of the pass under way.
        finite: whether those were finite, as a tensor.
    """

    is_sliding = True
    supports_early_init = False

    def __init__(self, layer_idx: int, window: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.window = window
        self.length = 0
        self.staged: Entries | None = None
        self.finite: torch.Tensor | None = None

    @property
    def slots(self) -> int:
        """Tokens kept between passes; the new one is the window's last."""
        return max(1, self.window - 1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the ring for the batch, heads, dtype and device of the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads = key_states.shape[:2]
        # Zeros, not garbage: a masked slot is still multiplied by its weight of zero.
        self.keys = key_states.new_zeros(rows, heads, self.slots, key_states.shape[3])
        self.values = value_states.new_zeros(rows, heads, self.slots, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the pass's new tokens aside; attention joins them to the ring.

        Args:
            key_states: ``[B, K, Q, D]`` before positions.
            value_states: ``[B, K, Q, E]``.

        Returns:
            The arguments, unchanged.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.finite = all_finite(key_states, value_states)
        # Copies, since fused projections hand over views that keep all of them alive.
        self.staged = Entries(
            key_states.clone(memory_format=torch.contiguous_format),
            value_states.clone(memory_format=torch.contiguous_format),
        )
        return key_states, value_states

    def require_staged(self) -> Entries:
        """The pass's tokens.

        Raises:
            CacheStateError: the layer received none.
        """
        if self.staged is None:
            raise CacheStateError(f"layer {self.layer_idx} received no tokens in this pass")
        return self.staged

    def commit(self, timeline: Timeline, view: ForwardView) -> None:
        """Writes the pass's last tokens into the ring.

        Args:
            timeline: the counts before the pass.
            view: the pass.
        """
        staged = self.require_staged()
        rows, columns, slots = self._writes(timeline, view)
        self._ring(0)[rows, :, slots] = staged.keys[rows, :, columns]
        self._ring(1)[rows, :, slots] = staged.values[rows, :, columns]
        self.length += view.columns

    def keep_overwritten(self, timeline: Timeline, view: ForwardView, undo: Undo) -> None:
        """Keeps what ``commit`` will overwrite."""
        rows, _, slots = self._writes(timeline, view)
        for index in (0, 1):
            undo.keep(self._ring(index), rows, slice(None), slots)

    def _ring(self, index: int) -> torch.Tensor:
        part = (self.keys, self.values)[index]
        if part is None:
            raise RuntimeError("a window layer without a ring was committed")
        return part

    def _writes(self, timeline: Timeline, view: ForwardView) -> torch.Tensor:
        """Rows, columns and ring slots ``[3, M]`` of the tokens to write, shared between layers."""
        key = ("window writes", self.slots, self.device)
        if key not in view.shared:
            table = []
            for row, (seen, count) in enumerate(zip(timeline.seen, view.new, strict=True)):
                columns = view.columns_of(row)
                first = max(0, count - self.slots)
                table += [
                    (row, columns[index], (seen + index) % self.slots)
                    for index in range(first, count)
                ]
            moves = torch.tensor(table, dtype=torch.long).reshape(-1, 3).T
            view.shared[key] = moves.to(self.device)
        return view.shared[key]  # type: ignore[return-value]

    def drop_pass(self) -> None:
        """Forgets what was kept aside."""
        self.staged = self.finite = None

    # --- transformers' contract ------------------------------------------------------------------

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor this layer holds, the pass under way included."""
        held = [self.keys, self.values, self.finite]
        if self.staged is not None:
            held += [self.staged.keys, self.staged.values]
        return [part for part in held if part is not None]

    def map_tensors(self, change: Any) -> None:
        """Replaces every stored tensor by ``change(tensor)`` (rows come first in all of them)."""
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)

    def get_seq_length(self) -> int:
        """Columns of input so far."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Retained entries plus the query, and how far the text is ahead of them."""
        retained = min(self.length, self.slots)
        return retained + query_length, self.length - retained

    def get_max_length(self) -> int:
        """The window."""
        return self.window

    def get_max_cache_shape(self) -> int:
        """The window (the name before transformers 5.13)."""
        return self.window

    def offload(self) -> None:
        """Moves the ring to the CPU."""
        self.map_tensors(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves the ring back to the layer's device."""
        if self.is_initialized:
            self.map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forgets everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.length = 0
        self.drop_pass()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in the order of ``beam_idx``."""
        self.map_tensors(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))
