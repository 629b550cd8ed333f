"""Whether a pass runs as a static one (``step``, ``chunk_step``), or as it is."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adms import chunk_step, compat
from adms.attention.chunk import applies
from adms.binding import PositionScheme
from adms.cache import ADMSKVCache
from adms.chunk_step import ChunkStep
from adms.errors import ADMSValueError
from adms.gates.coder import GatedCompressor
from adms.kernels import has_triton
from adms.kernels.decode_attention import rotate
from adms.layer import ADMSLayer
from adms.positions import ForwardView
from adms.steady import has_places
from adms.step import DecodeStep, phase_of
from adms.step_buffers import planned_bytes
from adms.step_capture import first_cause
from adms.tiers.head_landmarks import HeadLandmarkStore

logger = logging.getLogger("adms")

# Where static steps are worth it whatever was forgotten. A CPU captures nothing.
PHASES = {"cuda": ("empty", "exact", "coded"), "cpu": ("coded",)}
# Arguments of a decoder that a step knows to handle.
KNOWN = frozenset(
    {"input_ids", "inputs_embeds", "position_ids", "attention_mask", "past_key_values"}
    | {"use_cache", "cache_position", "return_dict", "adms_cache"}
)


@dataclass
class Reading:
    """One call of a decoder, and how it reads its chunks.

    Attributes:
        decoder: the decoder.
        forward: its own forward.
        cache: the cache.
        chunk: tokens of a chunk of full size.
        left: chunks of full size that are still to be read, the one under way included.
        step: replays them, once there was one to be captured.
        is_general: whether something is in the way of that.
    """

    decoder: nn.Module
    forward: Callable[..., Any]
    cache: ADMSKVCache
    chunk: int
    left: int
    step: ChunkStep | None = None
    is_general: bool = False


def advance(reading: Reading, arguments: dict[str, Any]) -> Any:
    """Runs the pass that is under way: as a static one where that can be, else as it is.

    Raises:
        ADMSValueError: ``kernel="triton"`` was asked for, and a step cannot be made.
    """
    decoder, forward, cache = reading.decoder, reading.forward, reading.cache
    view, kernel = cache.require_view(), cache.binding_for_use.kernel
    if kernel == "torch" or not cache.is_initialized:
        return forward(**arguments)
    # A step made for the rest of a prompt would take the place of tokens of its other chunks.
    if view.columns != 1 or (reading.left and reading.chunk > 1):
        return _read_chunk(reading, arguments)
    step = cache.step
    if step is not None and not step.fits(cache, decoder):
        step = None
    reason = _step_obstacle(cache, step, view, decoder, arguments)
    if kernel == "triton" and view.device.type != "cuda":
        reason = f"it is for CUDA, and the model is on {view.device.type}"
    if reason is None:
        if step is None:
            step = cache.step = DecodeStep(cache, decoder)
        try:
            return step.run(forward, arguments, view)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if kernel == "triton" or not step.captures or step.graph is not None:
                raise
            # What a model does in a pass cannot be known before it is captured; said below.
            reason = cache.step_refused = first_cause(error)
            cache.step, view.is_step = None, False
    if kernel == "triton":
        raise ADMSValueError(f"kernel='triton' cannot be used: {reason}; use kernel='auto'")
    if cache.step_obstacle != reason:
        if view.device.type == "cuda":
            logger.warning("tokens are decoded without a CUDA graph: %s", reason)
        cache.step_obstacle = reason
    return forward(**arguments)


def _read_chunk(reading: Reading, arguments: dict[str, Any]) -> Any:
    """A chunk: replayed where the call has enough of its kind left, else as it is."""
    forward, cache, step = reading.forward, reading.cache, reading.step
    view = cache.require_view()
    if reading.is_general or not _is_steady(cache, view, reading.chunk):
        return forward(**arguments)
    if step is not None and not step.fits(view):
        step = reading.step = None
    if step is None:
        if reading.left < chunk_step.WORTH:
            return forward(**arguments)
        if cache.chunk_refused or _obstacle(cache, None, view, reading.decoder, arguments):
            reading.is_general = True
            return forward(**arguments)
        step = ChunkStep(cache, forward)
    try:
        result = step.run(arguments)
    except Exception as error:
        if step is reading.step:
            raise
        # What a model does in a pass cannot be known before it is captured.
        reading.is_general, reason = True, first_cause(error)
        logger.warning("chunks are read without a CUDA graph: %s", reason)
        if not isinstance(error, torch.OutOfMemoryError):
            cache.chunk_refused = reason
        return forward(**arguments)
    reading.step = step
    return result


def _is_steady(cache: ADMSKVCache, view: ForwardView, chunk: int) -> bool:
    """Whether a chunk is of full size and brings in as many tokens as leave, all of them coded."""
    timeline, layer = view.timeline, cache.layers[0]
    if view.device.type not in chunk_step.DEVICES or view.columns != chunk:
        return False
    if not isinstance(layer, ADMSLayer) or layer.middle is None or not has_places(layer, chunk):
        return False
    if not applies(cache, layer, cache.binding_for_use.kinds[0].scheme):
        return False
    geometry, sink = layer.middle.plan.geometry, cache.sizes.sink
    after = timeline.evicted_after(view.new)
    return all(
        # They leave the ring, which none of the chunk's own has entered.
        new - old == chunk and sink <= old and new <= seen and geometry.is_coded(old - sink)
        for old, new, seen in zip(timeline.evicted, after, timeline.seen, strict=True)
    )


def _obstacle(
    cache: ADMSKVCache,
    step: DecodeStep | None,
    view: ForwardView,
    decoder: nn.Module,
    arguments: dict[str, Any],
) -> str | None:
    """Why this pass cannot be a static one; None where it can.

    What ``step`` was made for is not asked again.
    """
    binding = cache.binding_for_use
    if cache.layer_class is not ADMSLayer:
        return "the cache's layers do more with a pass than hold its tokens"
    if view.device.type not in PHASES:
        return f"static steps are for {' and '.join(PHASES)}, the model is on {view.device.type}"
    if not binding.captures:
        return "the architecture, or tensor parallelism, does more in a pass than a graph can hold"
    if view.device.type == "cuda" and not has_triton():
        return "Triton is not installed"
    if any(layer.device != view.device for layer in cache.layers):
        return "the model has moved to another device, or is on several"
    if not all(view.new) or view.column_valid is not None:
        return "a row has no token in this pass"
    if decoder.training:
        return "the model is in training mode; call model.eval()"
    if torch.is_autocast_enabled(view.device.type):
        return "autocast is on"
    config: Any = decoder.config
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if arguments.get(name) is None and getattr(config, name, False):
            return f"the model's config asks for {name}"
    # transformers' own "sdpa" leaves the cap out, and so do the tiers over it.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped and not compat.get_attention(config).endswith("sdpa"):
        return "the model caps its scores"
    given = [name for name, value in arguments.items() if value is not None and value is not False]
    extra = set(given) - KNOWN
    if extra:
        return f"the call asks for {', '.join(sorted(extra))}"
    if step is None:
        layers = [layer for layer in cache.layers if isinstance(layer, ADMSLayer)]
        if len(layers) < len(cache.layers):
            return "some layers have windows of their own"
        if len({_form(layer) for layer in layers}) > 1:
            return "the layers differ in shape, or in what their middle holds"
        if view.device.type == "cuda" and has_hooks(decoder):
            return "modules have hooks, which a replay would not call"
        if cache.spans is not None:
            return "spans over the recent tier are learned from single tokens too"
        plan = layers[0].middle.plan if layers[0].middle is not None else None
        if plan is not None and isinstance(plan.store, HeadLandmarkStore):
            return "each head keeps landmarks of its own"
        if isinstance(binding.compressor, GatedCompressor):
            return "entries for several tokens are read together with their landmarks"
        if plan is not None and plan.needs_queries:
            return "the compressor or the importance metric asks for the queries of every token"
        schemes = {id(kind.scheme) for kind in binding.kinds}
        if len(schemes) > 1 or not _turns_halves(binding.kinds[0].scheme, layers[0]):
            return "positions enter otherwise than by turning the two halves of a head"
    return None


def _step_obstacle(
    cache: ADMSKVCache,
    step: DecodeStep | None,
    view: ForwardView,
    decoder: nn.Module,
    arguments: dict[str, Any],
) -> str | None:
    """Why this pass cannot be a static step; None where it can."""
    reason = cache.step_refused or _obstacle(cache, step, view, decoder, arguments)
    if reason is not None:
        return reason
    if step is None and _planned_bytes(cache, decoder) > (
        cache.token_nbytes * (cache.sizes.chunk - 1)
    ):
        return "its buffers would take more than the tokens of a chunk; raise prefill_chunk_size"
    timeline, middle = view.timeline, cache.layers[0].middle
    totals = timeline.middle_totals
    phases = {phase_of(middle, total) for total in totals}
    if len(phases) > 1:
        return "some rows hold their middle exactly and others coded"
    # What is exact and complete is read in the general way, equal to a full cache to the last bit.
    forgets = cache.sizes.budget == 0 and min(timeline.evicted) > 0
    if not forgets and not phases <= set(PHASES[view.device.type]):
        return f"nothing is coded yet, and the model is on {view.device.type}"
    return None


def _planned_bytes(cache: ADMSKVCache, decoder: nn.Module) -> int:
    """What a step would keep, in the place of some of a chunk's tokens."""
    layer, timeline = cache.layers[0], cache.timeline
    if timeline is None:
        raise RuntimeError("a step was planned for a cache without tokens")
    keys, values = layer.exact.keys, layer.exact.values
    config: Any = decoder.config
    return planned_bytes(
        cache.sizes,
        None if layer.middle is None else layer.middle.plan.geometry,
        batch=timeline.batch_size,
        layers=len(cache.layers),
        elements=keys.shape[1] * (keys.shape[3] + values.shape[3]),
        hidden_bytes=config.get_text_config().hidden_size * keys.element_size(),
    )


def _form(layer: ADMSLayer) -> object:
    """What layers of one step have in common."""
    if layer.exact is None:
        raise RuntimeError("a layer without tiers was asked for its form")
    shape = (layer.exact.keys.shape, layer.exact.values.shape, layer.dtype)
    return shape, None if layer.middle is None else layer.middle.plan.geometry


def has_hooks(decoder: nn.Module) -> bool:
    """Whether modules of a decoder have hooks of the user's.

    Those of transformers stay once outputs of layers were asked for, and do nothing else.
    """
    return any(
        not str(getattr(hook, "__module__", "")).startswith(("adms.", "transformers."))
        for module in decoder.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def _turns_halves(scheme: PositionScheme, layer: ADMSLayer) -> bool:
    """Whether positions are those of ``rotate``, whatever the farthest one is."""
    if layer.exact is None or getattr(scheme, "depends_on_farthest", False):
        return False
    keys = layer.exact.keys
    size = keys.shape[3]
    if size < 16 or size & (size - 1) or layer.exact.values.shape[3] != size:
        return False
    states = torch.linspace(-1, 1, 3 * size, device=keys.device).view(1, 1, 3, size)
    positions = torch.tensor([[0.0, 1.5, 7.0]], device=keys.device)
    tables = scheme.tables(positions, states, positions)
    if tables is None or tables[0].shape[-1] != size:
        return False
    if scheme.bias(positions, positions, 1) is not None:
        return False
    found = rotate(states, tables[0][:, None], tables[1][:, None])
    return torch.allclose(scheme.rotate(states, tables), found, atol=1e-5)
