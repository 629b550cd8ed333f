"""What a cache needs to know of the model it is bound to.

A binding is made by an ``Installation`` for one configuration on one model and shared by the layers
of a cache; it holds nothing of any stream.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from adms.calibration import Calibration
from adms.compressors.base import Coder, Compressor, LayerContext, RawCoder
from adms.config import ADMSConfig, Sizes
from adms.entries import TokenShape
from adms.errors import CacheStateError
from adms.gates.shares import in_proportion
from adms.importance import Metric, compares
from adms.importance.rarity import APART
from adms.kernels import Kernel
from adms.places import MiddleGeometry
from adms.ranks import ALONE, Ranks
from adms.tiers.comparing import comparing_layers
from adms.tiers.head_landmarks import HeadLandmarkStore
from adms.tiers.landmarks import ALIGNMENT, LandmarkStore, aligned
from adms.tiers.middle import MiddlePlan
from adms.timeline import Timeline

if TYPE_CHECKING:
    from adms.attention.span_learner import IntegratedAttentionConfig, SpanLearner
    from adms.attention.sparse_prefill import SparsePrefillConfig

# The middle is counted at this many bytes an element, whatever dtype the model runs in.
BUDGET_ITEMSIZE = 2
# A code that holds fewer times as many tokens is not worth what it loses of them.
WORTH_CODING = 1.5
# Least bytes of a layer's codes where layers differ: with fewer, short streams are coded sooner.
LEAST_PART = 0.5


class PositionScheme(Protocol):
    """How an architecture brings positions into attention.

    Attributes:
        weighs_sinks: whether sinks stand in for the beginning of a text that a stream has left
            (``ForwardView.sink_weight``).
        adds_bias: whether ``bias`` is ever not None.
    """

    weighs_sinks: bool
    adds_bias: bool

    def tables(self, positions: torch.Tensor, like: torch.Tensor, queries: torch.Tensor) -> Any:
        """What ``rotate`` needs for ``positions [B, N]``, in the dtype of ``like``.

        ``queries [B, Q]`` are the positions of the pass's new tokens: some rotary embeddings choose
        their frequencies by the farthest one, which must be the same for keys and queries.
        """

    def rotate(self, states: torch.Tensor, tables: Any) -> torch.Tensor:
        """Queries or keys ``[B, heads, N, D]`` at these positions."""

    def bias(
        self, queries: torch.Tensor, keys: torch.Tensor, num_heads: int
    ) -> torch.Tensor | None:
        """``[B, H, Q or 1, N]`` added to scores for positions ``[B, Q]`` and ``[B, N]``, or None.

        Scores are summed in the precision of what this returns.
        """


def rotate_to(
    scheme: PositionScheme, states: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """States ``[B, heads, N, D]`` at positions ``[1 or B, N]``."""
    return scheme.rotate(states, scheme.tables(positions, states, positions))


@dataclass(frozen=True)
class LayerKind:
    """One attention layer as its family describes it.

    Attributes:
        shape: keys and values of one token, from the model's configuration.
        num_query_heads: query heads per layer.
        scheme: how positions enter.
        plain: makes the cache layer of an attention that ADMS leaves alone (a sliding window);
            None where ADMS takes over.
        plain_tokens: most tokens that such a layer holds.
    """

    shape: TokenShape
    num_query_heads: int
    scheme: PositionScheme
    plain: Callable[[], Any] | None = None
    plain_tokens: int = 0


@dataclass(eq=False)
class Binding:
    """A configuration on a model.

    Attributes:
        model_key: identifies the enabled model (a weak reference, so no cache keeps it alive).
        config: the configuration.
        sizes: what it resolves to.
        kinds: one per attention layer.
        dtype: the model's dtype before the first token tells.
        compressor: the resolved compressor; None where the budget is 0.
        metric: the resolved importance metric.
        block_tokens: that the compressor codes together.
        is_active: asks whether the model is still enabled.
        context: makes what the compressor may know of a layer.
        calibration: what is fitted to the model once, shared with its other bindings; None where
            the compressor has no use for it.
        fit: fits that.
        gates: weights of learned gates, by layer.
        sparse_prefill: how chunks of more than one token attend; None: to everything.
        integrated_attention: how spans over the recent tier are learned; None: all of it is read.
        kernel: what decodes single tokens.
        captures: whether the family's decoder can be captured in a CUDA graph.
        ranks: the processes that hold the model's heads between them.
        rehearsed: forms of chunks that were run before a capture, whose kernels are ready.
    """

    model_key: weakref.ReferenceType[Any]
    config: ADMSConfig
    sizes: Sizes
    kinds: list[LayerKind]
    dtype: torch.dtype
    compressor: Compressor | None
    metric: Metric
    block_tokens: int
    is_active: Callable[[], bool]
    context: Callable[[int, TokenShape, torch.dtype], LayerContext]
    calibration: Calibration | None = None
    fit: Callable[[Calibration], None] | None = None
    gates: tuple[torch.Tensor, ...] = ()
    sparse_prefill: "SparsePrefillConfig | None" = None
    integrated_attention: "IntegratedAttentionConfig | None" = None
    kernel: Kernel = "auto"
    captures: bool = False
    ranks: Ranks = ALONE
    rehearsed: set[object] = field(default_factory=set)
    _plans: dict[Any, MiddlePlan | None] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Binding":
        return self

    @property
    def num_layers(self) -> int:
        """Attention layers of the model."""
        return len(self.kinds)

    @property
    def shared_nbytes(self) -> int:
        """Bytes that depend on the model alone; 0 until the code is fitted."""
        gates = sum(weight.numel() * weight.itemsize for weight in self.gates)
        return gates + (0 if self.calibration is None else self.calibration.nbytes)

    def fit_before(self, timeline: Timeline, new: list[int]) -> None:
        """Fits the code to the model if ``new`` tokens per row are the first that need it."""
        calibration = self.calibration
        if calibration is None or calibration.is_fitted or self.fit is None:
            return
        if timeline.batch_size != len(new):
            # Refused when the pass begins.
            return
        after = timeline.evicted_after(new)
        if max(after) - self.sizes.sink > self.exact_tokens and self.codes_anything:
            self.fit(calibration)

    def require_active(self) -> None:
        """Raises ``CacheStateError`` once the model was disabled or is gone."""
        if self.model_key() is None or not self.is_active():
            raise CacheStateError(
                "the model this cache is bound to was disabled; call enable_adms_llm(model) again "
                "and use the cache it returns"
            )

    def new_spans(self) -> "SpanLearner | None":
        """Spans that read everything, to be learned; None where none are asked for."""
        if self.integrated_attention is None:
            return None
        own = [index for index in range(self.num_layers) if self.is_adms_layer(index)]
        return self.integrated_attention.start(own, self.sizes.recent)

    def is_adms_layer(self, layer_idx: int) -> bool:
        """Whether ADMS holds this layer's memory."""
        return self.kinds[layer_idx].plain is None

    def plain_layer(self, layer_idx: int) -> Any:
        """A fresh cache layer for an attention that ADMS leaves alone."""
        make = self.kinds[layer_idx].plain
        if make is None:
            raise RuntimeError(f"layer {layer_idx} is held by ADMS")
        return make()

    def check_room(self, timeline: Timeline, new: list[int]) -> None:
        """Raises ``CacheStateError`` where positions of the text would leave the trained length."""
        limit = self.sizes.max_positions
        if self.config.enable_pos_shift or limit is None:
            return
        longest = max(seen + count for seen, count in zip(timeline.seen, new, strict=True))
        if longest > limit:
            raise CacheStateError(
                f"enable_pos_shift=False keeps positions of the text, and token {longest} lies "
                f"beyond the {limit} positions the model was trained on; use enable_pos_shift=True"
            )

    @property
    def codes_anything(self) -> bool:
        """Whether any layer's bytes hold more tokens coded than exact."""
        plans = [
            self.middle_plan(index, kind.shape, self.dtype, self.sizes)
            for index, kind in enumerate(self.kinds)
            if kind.plain is None
        ]
        return any(plan is not None and plan.coder is not None for plan in plans)

    def middle_plan(
        self, layer_idx: int, shape: TokenShape, dtype: torch.dtype, sizes: Sizes
    ) -> MiddlePlan | None:
        """How this layer's middle uses its bytes; None where the budget is 0."""
        if self.compressor is None:
            return None
        context = self.context(layer_idx, shape, dtype)
        if self.compressor.needs_rotation:
            rotate = partial(rotate_to, self.kinds[layer_idx].scheme)
            context = replace(context, rotate=rotate, distance=sizes.recent)
        is_asked = layer_idx in self._comparing
        key = (layer_idx if context.is_layer_specific else -1, shape, dtype, is_asked)
        if key not in self._plans:
            plan = self._make_plan(self.compressor, context, sizes)
            self._plans[key] = replace(plan, compares=is_asked)
        return self._plans[key]

    @functools.cached_property
    def _comparing(self) -> frozenset[int]:
        """Layers in which the metric is shown other tokens."""
        held = [index for index, kind in enumerate(self.kinds) if kind.plain is None]
        reach = self.exact_tokens + self.sizes.recent
        asked = compares(self.metric) and not self.config.use_adaptive_budget
        # Where hardly any two tokens are apart there is nothing to compare.
        return comparing_layers(held) if held and asked and reach >= 4 * APART else frozenset()

    @functools.cached_property
    def _parts(self) -> dict[int, float]:
        """Bytes of each layer's codes, in equal shares among layers of its shape."""
        compressor = self.compressor
        if compressor is None:
            return {}
        alike: dict[TokenShape, list[int]] = {}
        for index, kind in enumerate(self.kinds):
            if kind.plain is None:
                alike.setdefault(kind.shape, []).append(index)
        parts: dict[int, float] = {}
        for layers in alike.values():
            weights = [compressor.weight(index, self.config) for index in layers]
            parts |= zip(layers, in_proportion(weights, LEAST_PART), strict=True)
        return parts

    def _tokens_for(self, part: float) -> int:
        """Exact tokens whose bytes a layer's middle has: landmarks are as many in all layers."""
        landmarks = self.config.importance_ratio
        share = landmarks + (1.0 - landmarks) * part
        # A hair more, so that an equal share is all of it.
        return int((self.sizes.budget - self.sizes.waiting) * share + 1e-9)

    @property
    def exact_tokens(self) -> int:
        """Tokens that the middle holds before it is coded, in all layers at the same moment."""
        return self._tokens_for(min(self._parts.values(), default=1.0))

    def _make_plan(self, compressor: Compressor, context: LayerContext, sizes: Sizes) -> MiddlePlan:
        shape, dtype, config = context.shape, context.dtype, self.config
        tokens, exact = self._tokens_for(self._parts[context.layer_idx]), self.exact_tokens
        whole = replace(context, shape=self.kinds[context.layer_idx].shape)
        ranks = self.ranks if shape == self.ranks.share_of(whole.shape) else ALONE
        if ranks.size == 1:
            whole = context
        # All ranks hold as many landmarks and records as one process with all heads would.
        store, left = self._landmark_store(compressor, whole, tokens)
        coder: Coder | None = compressor.bind(context, left // ranks.size, config)
        if coder is not None:
            # Blocks for which nothing waits never come whole.
            in_blocks = self.block_tokens % coder.block_tokens == 0
            if not in_blocks or coder.capacity < WORTH_CODING * tokens:
                coder, store = None, None
        raw = RawCoder(shape, dtype, tokens if coder is None else exact)
        arena_bytes = tokens * raw.record_bytes
        if ranks.size > 1 and coder is not None and store is not None:
            store = type(store)(shape, dtype, store.count, coder)
            # What does not divide, alignment and the like, comes on top.
            arena_bytes = max(arena_bytes, aligned(coder.nbytes) + store.nbytes)
        geometry = MiddleGeometry(
            raw_tokens=raw.num_records,
            capacity=coder.capacity if coder is not None else 0,
            whole_records=coder.num_records if coder is not None else 0,
            block_tokens=coder.block_tokens if coder is not None else 1,
            entries_per_record=coder.entries_per_record if coder is not None else 1,
            landmarks=store.count if store is not None else 0,
        )
        return MiddlePlan(
            shape, dtype, raw, coder, store, geometry, arena_bytes, self.metric, config, ranks
        )

    def _landmark_store(
        self, compressor: Compressor, context: LayerContext, tokens: int
    ) -> tuple[LandmarkStore | HeadLandmarkStore | None, int]:
        """The store of landmarks, as many in all layers, and what it leaves of the bytes."""
        shape, dtype, config = context.shape, context.dtype, self.config
        # Counted like everything of the middle, at two bytes an element whatever the dtype.
        token_bytes = shape.num_elements * BUDGET_ITEMSIZE
        coded_bytes = tokens * token_bytes
        if config.importance_ratio == 0:
            return None, coded_bytes
        equal_bytes = (self.sizes.budget - self.sizes.waiting) * token_bytes
        kind = HeadLandmarkStore if config.use_adaptive_budget else LandmarkStore
        room = equal_bytes
        # What codes the rest may be another coder than for all of the bytes; landmarks are its own.
        for _ in range(2):
            codes = compressor.bind(context, room, config)
            store = kind.within(shape, dtype, int(equal_bytes * config.importance_ratio), codes)
            if store.count < config.min_importance_tokens:
                least = kind(shape, dtype, config.min_importance_tokens, codes)
                # At most half, so that a small budget still codes something.
                store = least if least.nbytes <= self.exact_tokens * token_bytes // 2 else store
            if not store.count:
                break
            # The landmarks start aligned, which can cost up to one step.
            room = max(0, coded_bytes - store.nbytes - ALIGNMENT)
            if type(compressor.bind(context, room, config)) is type(codes):
                return store, room
        return None, coded_bytes

    def max_layer_bytes(self, layer_idx: int, layer: Any) -> int:
        """Most bytes that one row of this layer ever takes."""
        kind = self.kinds[layer_idx]
        shape, dtype = kind.shape, self.dtype
        if getattr(layer, "is_initialized", False):
            dtype = layer.dtype
            if kind.plain is None:
                keys, values = layer.exact.keys, layer.exact.values
                shape = TokenShape(keys.shape[1], keys.shape[3], values.shape[3])
        token = shape.num_elements * dtype.itemsize
        if kind.plain is not None:
            # The ring, the pass under way, and whether it was finite.
            return (kind.plain_tokens + self.sizes.chunk) * token + 1
        total = (self.sizes.sink + self.sizes.ring) * token
        plan = self.middle_plan(layer_idx, shape, dtype, self.sizes)
        total += plan.arena_bytes if plan is not None else 0
        # The pass under way: its tokens, its queries where a commit wants them, one flag a layer.
        total += self.sizes.chunk * token + 1
        if self.integrated_attention is not None:
            total += self.integrated_attention.measured_bytes
        if plan is not None and plan.needs_queries:
            heads = kind.num_query_heads
            total += self.sizes.chunk * heads * shape.key_dim * dtype.itemsize
        return total
