"""``ADMSKVCache``: the tiers of every layer behind transformers' cache contract.

What a pass does to them is in ``transaction``.

Shapes: ``B`` rows.
"""

import copy
import os
from typing import Any

import torch

from adms.binding import Binding
from adms.config import ADMSConfig
from adms.errors import ADMSTypeError, ADMSValueError, CacheStateError
from adms.layer import ADMSLayer
from adms.stack import lay_together
from adms.summary import in_one_line, summarize
from adms.tiers.window import WindowLayer
from adms.transaction import TransactionalCache


class ADMSKVCache(TransactionalCache):
    """A stream's memory in bounded bytes: sinks, a compressed middle, and a recent window.

    Made by ``enable_adms_llm``; ``ADMSKVCache(config)`` alone binds to a model on first use through
    an enabled one.

    Args:
        config: the parameters; the defaults if None.

    Raises:
        ADMSTypeError: ``config`` is no ``ADMSConfig``.
    """

    #: what holds an attention layer's memory
    layer_class: type[ADMSLayer] = ADMSLayer

    def __init__(self, config: ADMSConfig | None = None) -> None:
        if config is not None and not isinstance(config, ADMSConfig):
            raise ADMSTypeError(
                f"config must be an ADMSConfig, got {config!r}; single parameters go to "
                "enable_adms_llm or ADMSConfig"
            )
        super().__init__(config if config is not None else ADMSConfig())

    # --- binding ---------------------------------------------------------------------------------

    def bind(self, binding: Binding) -> None:
        """Ties the cache to a model for good.

        Raises:
            CacheStateError: it is tied to another model, or its model was disabled.
        """
        if self.binding is binding:
            return
        if self.binding is not None and self.binding.model_key != binding.model_key:
            raise CacheStateError(
                "this cache is bound to another model; make one cache per model with "
                "enable_adms_llm(model)"
            )
        if self.binding is not None:
            self.binding.require_active()
            return
        self.binding = binding
        self.layers = [
            self.layer_class(self, index)
            if binding.is_adms_layer(index)
            else binding.plain_layer(index)
            for index in range(binding.num_layers)
        ]
        self.spans = binding.new_spans()

    # --- what it holds ---------------------------------------------------------------------------

    @property
    def timeline_length(self) -> int:
        """Columns of input so far, padding included."""
        return 0 if self.timeline is None else self.timeline.length

    @property
    def tokens_seen(self) -> int:
        """Tokens that the longest row has streamed through."""
        return max(self.timeline.seen, default=0) if self.timeline is not None else 0

    def num_entries(self, layer_idx: int) -> int:
        """Entries that attention in this layer reads, of the fullest row."""
        layer = self.layers[layer_idx]
        if self.timeline is None or not isinstance(layer, ADMSLayer):
            seen = layer.get_seq_length()
            return min(seen, layer.slots) if isinstance(layer, WindowLayer) else seen
        counts = [0]
        for row in range(self.timeline.batch_size):
            seen, evicted = self.timeline.seen[row], self.timeline.evicted[row]
            held = seen - evicted + min(evicted, self.sizes.sink)
            if layer.middle is not None:
                geometry = layer.middle.plan.geometry
                total = self.timeline.middle_tokens(row)
                held += geometry.num_entries(total)
                held += geometry.landmarks if geometry.is_coded(total) else 0
            counts.append(held)
        return max(counts)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor the cache holds, hidden and temporary ones included."""
        storages = {}
        for layer in self.layers:
            for tensor in layer.tensors():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr(), tensor.device] = storage.nbytes()
        return sum(storages.values()) + self._span_bytes + self._step_bytes

    @property
    def _span_bytes(self) -> int:
        return 0 if self.spans is None else self.spans.nbytes

    @property
    def _step_bytes(self) -> int:
        """Bytes of positions, masks and counters in the place where a captured pass reads them."""
        if self.step is None:
            return 0
        return sum(tensor.untyped_storage().nbytes() for tensor in self.step.tensors())

    @property
    def max_nbytes(self) -> int:
        """Bytes that ``nbytes`` never exceeds, from configuration, shapes, dtype and batch alone.

        Before the first token a batch of 1 and the model's own dtype are assumed.

        Raises:
            CacheStateError: the cache is not bound to a model.
        """
        binding = self.binding_for_use
        batch = self.timeline.batch_size if self.timeline is not None else 1
        layers = sum(
            binding.max_layer_bytes(index, layer) for index, layer in enumerate(self.layers)
        )
        return layers * max(batch, 1) + self._span_bytes

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token of every row while its pass is under way, in all layers."""
        slots = self.sizes.sink + self.sizes.ring
        layers = [layer for layer in self.layers if isinstance(layer, ADMSLayer)]
        exact = [part for layer in layers if layer.exact for part in layer.exact.tensors()]
        return sum(part.nbytes // slots for part in exact)

    @property
    def chunk_tokens(self) -> int:
        """Most tokens of a pass: a captured step keeps its buffers in the place of some."""
        if self.step is None or not self.step.captures:
            return self.sizes.chunk
        return self.sizes.chunk - -(-self._step_bytes // self.token_nbytes)

    @property
    def shared_nbytes(self) -> int:
        """Bytes that depend on the model alone (calibration), shared by all its caches."""
        return 0 if self.binding is None else self.binding.shared_nbytes

    def summary(self) -> dict[str, Any]:
        """What each tier holds, as plain values (of the fullest row and the first ADMS layer)."""
        return summarize(self)

    def __repr__(self) -> str:
        return in_one_line(self)

    # --- transformers' contract ------------------------------------------------------------------

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands a layer its new tokens; see ``ADMSLayer.update``."""
        if self.require_view().is_step:
            # Attention stores them on its way. Which layer it is must not be asked here, see
            # ``compiled_layers``.
            return key_states, value_states
        if torch.is_autocast_enabled(key_states.device.type):
            # Products come in autocast's dtype, what rotates them in the model's.
            dtype = self.binding_for_use.dtype
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input so far: the logical length."""
        return self.timeline_length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No maximum (the name before transformers 5.13)."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first token."""
        if self.timeline is None or self.timeline.batch_size == 0:
            return -1
        return self.timeline.batch_size

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the decode step."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether any token was stored."""
        return self.timeline is not None and self.timeline.length > 0

    def reset(self) -> None:
        """Forgets the stream; the binding and the configuration stay.

        Raises:
            CacheStateError: another call is using the cache.
        """
        with self.exclusive():
            self._clear()
            self._close()

    def _select_rows(self, rows: torch.Tensor) -> None:
        with self.exclusive():
            timeline = self.timeline
            if timeline is None:
                return
            self.require_whole()
            order = rows.tolist()
            if not order or min(order) < 0 or max(order) >= timeline.batch_size:
                raise ADMSValueError(
                    f"row indices must lie in 0..{timeline.batch_size - 1}, got {order}"
                )
            # Until the counts follow, tensors and counts speak of different rows.
            self._broken = True
            if self.step is not None:
                self.step.stale = self.step.moved = True
            for layer in self.layers:
                layer.reorder_cache(rows)
            self.timeline = timeline.of_rows(order)
            self._broken = False
            self.lay_together()

    def lay_together(self) -> None:
        """Has layers that are alike lie side by side before anything is captured of their places.

        A commit would see to it too.
        """
        lay_together([layer for layer in self.layers if isinstance(layer, ADMSLayer)])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in the order of ``beam_idx`` ``[B]`` (beam search)."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        if self.timeline is not None:
            rows = torch.arange(self.timeline.batch_size).repeat_interleave(repeats)
            self._select_rows(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows of ``indices``."""
        self._select_rows(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was compressed or forgotten cannot be taken back.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError(
            "an ADMSKVCache cannot be cropped, since what left it is gone; for assisted decoding "
            "or prompt lookup use DynamicCache, or copy.deepcopy(cache) before the tokens to undo"
        )

    def activate_past_recording(self) -> None:
        """Refused for the same reason as ``crop``.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError(
            "an ADMSKVCache cannot record its past for a rollback; use copy.deepcopy(cache)"
        )

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], **contents: Any) -> None:
        """Writes the stream to one file, complete or not at all; see ``adms.session``.

        Args:
            path: the file; an older one is replaced.
            **contents: ``last_token_ids`` and ``notes`` of ``save_session``.

        Raises:
            CacheStateError: the cache is unbound or in use.
            SessionFileError: the file cannot be written.
        """
        # Sessions are built on the cache; only these two methods know of them.
        from adms.session import save_session

        save_session(self, path, **contents)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, model: torch.nn.Module, **arguments: Any
    ) -> "ADMSKVCache":
        """The cache that ``save`` wrote, for the same model, which is enabled if it is not yet.

        Args:
            path: the file.
            model: the model, on any device and in any dtype.
            **arguments: of ``enable_adms_llm`` beside the configuration.

        Raises:
            SessionFileError: the file is damaged or foreign, or does not fit the model.
        """
        from adms.session import load_session

        return load_session(path, model, **arguments).cache

    def __deepcopy__(self, memo: dict[int, Any]) -> "ADMSKVCache":
        with self.exclusive():
            self.require_whole()
            twin = type(self).__new__(type(self))
            memo[id(self)] = twin
            for name, value in self.__dict__.items():
                # The binding belongs to the model and is shared by all its caches.
                shared = name in ("binding", "_owner")
                # A captured pass reads the places of this cache alone.
                value = None if name == "step" else value
                twin.__dict__[name] = value if shared else copy.deepcopy(value, memo)
            twin._owner = {}
        return twin
