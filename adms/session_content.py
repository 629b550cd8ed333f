"""What a session file holds of a cache: tensors by name, and what describes them."""

from typing import Any

import torch

from adms.binding import Binding
from adms.cache import ADMSKVCache
from adms.errors import ADMSTypeError, CacheStateError
from adms.fingerprint import describe_codes, describe_model, model_of, sample_weights
from adms.gates.coder import GatedCompressor
from adms.layer import ADMSLayer
from adms.tiers.middle import MiddlePlan

# How the layers that ADMS leaves alone call the number of columns they have seen.
PLAIN_COUNTS = {"DynamicSlidingWindowLayer": "cumulative_length", "WindowLayer": "length"}
# The tensor of ids that a caller keeps beside the cache.
LAST_IDS = "last_token_ids"
# What comes before the names of a calibration's tensors.
CALIBRATION = "calibration"
SPANS = "spans."


def collect(cache: ADMSKVCache) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor of a cache by name, and what describes them."""
    binding = cache.binding_for_use
    if binding.ranks.size > 1:
        raise CacheStateError(
            f"this process has the heads of one of {binding.ranks.size} ranks, and a session holds "
            "all; load the model without tp_plan to save or load one"
        )
    model = model_of(binding)
    timeline = cache.timeline
    tensors: dict[str, torch.Tensor] = {}
    layers: list[dict[str, Any]] = []
    filled = cache.is_initialized
    for index, layer in enumerate(cache.layers if filled else []):
        own: dict[str, torch.Tensor]
        if isinstance(layer, ADMSLayer):
            own, described = _adms_state(layer)
        else:
            own, described = _plain_state(layer, index)
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in own.items()}
        layers.append(described)
    if cache.spans is not None:
        tensors |= {SPANS + name: part for name, part in cache.spans.tensors().items()}
    config = cache.config
    if filled and binding.calibration is not None:
        # Codes can only be read with the bases that they were made with.
        state = binding.calibration.state()
        tensors |= {f"{CALIBRATION}.{name}": part for name, part in state.items()}
    return tensors, {
        "optional": _optional_layers(binding),
        "model": describe_model(model),
        "weights": sample_weights(model),
        "codes": describe_codes(binding),
        "calibration": "" if binding.calibration is None else binding.calibration.source,
        "config": config.to_dict(),
        "explicit": sorted(config.explicit),
        "sizes": dict(vars(binding.sizes)),
        "timeline": {
            "block": binding.block_tokens,
            "seen": list(timeline.seen) if filled and timeline else [],
            "evicted": list(timeline.evicted) if filled and timeline else [],
            "length": timeline.length if filled and timeline else 0,
        },
        "layers": layers,
    }


def _optional_layers(binding: Binding) -> dict[str, dict[str, Any]]:
    """The settings of the optional layers that a stream's state depends on."""
    found = {}
    if isinstance(binding.compressor, GatedCompressor):
        found["adaptive_update"] = binding.compressor.update.to_dict()
    if binding.integrated_attention is not None:
        found["integrated_attention"] = binding.integrated_attention.to_dict()
    return found


def _adms_state(layer: ADMSLayer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if layer.exact is None:
        raise RuntimeError("a cache that has seen tokens has a layer without tiers")
    own = {"keys": layer.exact.keys, "values": layer.exact.values}
    described: dict[str, Any] = {"kind": "adms", "dtype": _dtype_name(layer.dtype)}
    if layer.middle is not None:
        own["middle"] = layer.middle.arena
        described["middle"] = describe_plan(layer.middle.plan)
    held = {tensor.data_ptr() for tensor in own.values()}
    if any(tensor.data_ptr() not in held for tensor in layer.tensors()):
        raise RuntimeError(f"layer {layer.layer_idx} holds a tensor that sessions do not know")
    return own, described


def _plain_state(layer: Any, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    kind = type(layer).__name__
    if kind not in PLAIN_COUNTS:
        raise ADMSTypeError(
            f"layer {index} is a {kind}, which sessions cannot hold; they hold "
            f"{', '.join(sorted(PLAIN_COUNTS))}"
        )
    described = {
        "kind": kind,
        "dtype": _dtype_name(layer.dtype),
        "count": getattr(layer, PLAIN_COUNTS[kind]),
    }
    return {"keys": layer.keys, "values": layer.values}, described


def describe_plan(plan: MiddlePlan) -> dict[str, Any]:
    """How a layer divides the bytes of its middle."""
    coder = plan.coder
    return {
        **vars(plan.geometry),
        "arena_bytes": plan.arena_bytes,
        "landmark_offset": plan.landmark_offset,
        "landmark_bytes": plan.store.nbytes if plan.store is not None else 0,
        "header_bytes": coder.header_bytes if coder is not None else 0,
        "record_bytes": coder.record_bytes if coder is not None else 0,
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
