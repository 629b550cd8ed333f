"""Sessions: a stream in a file, to be continued later, elsewhere, or in another precision.

A session holds the tiers of every layer, the counts that say what is where, the configuration, and
what the model was. Continuing equals never having stopped, bit for bit, on the same device and in
the same dtype.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from adms import session_file
from adms.attention.span_learner import IntegratedAttentionConfig
from adms.binding import Binding
from adms.cache import ADMSKVCache
from adms.config import ADMSConfig, Sizes
from adms.enable import disable_adms, enable_adms_llm, is_enabled
from adms.errors import ADMSError, ADMSTypeError, ADMSValueError, SessionFileError
from adms.fingerprint import (
    describe_codes,
    describe_model,
    model_differences,
    model_of,
    sample_weights,
    weights_differ,
)
from adms.gates.coder import GatedCompressor
from adms.gates.config import AdaptiveUpdateConfig
from adms.layer import ADMSLayer
from adms.patches import find_family
from adms.tiers.convert import convert_arena
from adms.tiers.middle import MiddlePlan
from adms.timeline import Timeline

logger = logging.getLogger("adms")

# How the layers that ADMS leaves alone call the number of columns they have seen.
PLAIN_COUNTS = {"DynamicSlidingWindowLayer": "cumulative_length", "WindowLayer": "length"}
_LARGEST_COUNT = 2**53
_LAST_IDS = "last_token_ids"
_SPANS = "spans."


@dataclass(frozen=True)
class Session:
    """What a session file held.

    Attributes:
        cache: continues the stream.
        last_token_ids: ``[B, N]`` as given to ``save_session``, or None.
        notes: as given to ``save_session``.
    """

    cache: ADMSKVCache
    last_token_ids: torch.Tensor | None
    notes: dict[str, Any]


# --- saving --------------------------------------------------------------------------------------


def save_session(
    cache: ADMSKVCache,
    path: str | os.PathLike[str],
    *,
    last_token_ids: torch.Tensor | Sequence[Sequence[int]] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes a cache to one file, which appears complete or not at all.

    The file can be read by its owner alone unless an older one under this name could be read by
    others: it holds what was said.

    Args:
        cache: a cache bound to a model, between two calls.
        path: the file; an older one is replaced.
        last_token_ids: ``[B, N]`` ids to find again beside the cache, such as the newest one.
        notes: plain JSON values to find again.

    Raises:
        ADMSTypeError: an argument of a wrong type, or a compressor without a registered name.
        CacheStateError: the cache is unbound, its model is gone, or another call is using it.
        SessionFileError: the file cannot be written; an older one is unchanged.
    """
    if not isinstance(cache, ADMSKVCache):
        raise ADMSTypeError(f"cache must be an ADMSKVCache, got {type(cache).__name__}")
    target = session_file.resolve_path(path)
    if notes is not None and not isinstance(notes, Mapping):
        raise ADMSTypeError(f"notes must be a mapping of JSON values, got {notes!r}")
    ids = _ids(last_token_ids)
    with cache.exclusive():
        cache.require_whole()
        tensors, info = _collect(cache)
        info["notes"] = dict(notes or {})
        if ids is not None:
            tensors[_LAST_IDS] = ids
        data = session_file.pack(tensors, info)
    session_file.write(target, data)


def _ids(given: Any) -> torch.Tensor | None:
    if given is None:
        return None
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ADMSTypeError(f"last_token_ids must be rows of integers, got {given!r}") from error
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ADMSTypeError("last_token_ids must be rows of integers, [rows, tokens]")
    return ids.long()


def _collect(cache: ADMSKVCache) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor of a cache by name, and what describes them."""
    binding = cache.binding_for_use
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
        tensors |= {_SPANS + name: part for name, part in cache.spans.tensors().items()}
    config = cache.config
    return tensors, {
        "optional": _optional_layers(binding),
        "model": describe_model(model),
        "weights": sample_weights(model),
        "codes": describe_codes(binding),
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
        described["middle"] = _describe_plan(layer.middle.plan)
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


def _describe_plan(plan: MiddlePlan) -> dict[str, Any]:
    coder = plan.coder
    return {
        **vars(plan.geometry),
        "arena_bytes": plan.arena_bytes,
        "landmark_offset": plan.landmark_offset,
        "header_bytes": coder.header_bytes if coder is not None else 0,
        "record_bytes": coder.record_bytes if coder is not None else 0,
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- loading -------------------------------------------------------------------------------------


def load_session(path: str | os.PathLike[str], model: nn.Module, **arguments: Any) -> Session:
    """Reads a session for a model, which is enabled if it is not yet.

    Args:
        path: a file written by ``save_session`` or ``cache.save``.
        model: the model that the stream ran through, on any device and in any dtype.
        **arguments: of ``enable_adms_llm`` that are not part of the configuration, such as
            ``calibration``.

    Raises:
        ADMSTypeError: an argument of a wrong type.
        SessionFileError: the file is missing, damaged, foreign or too new, or does not fit the
            model; the message names what does not fit, and the model is as it was.
    """
    source = session_file.resolve_path(path)
    if not isinstance(model, nn.Module):
        raise ADMSTypeError(f"model must be a transformers model, got {type(model).__name__}")
    settings = sorted({"config", *(field.name for field in fields(ADMSConfig))} & set(arguments))
    if settings:
        raise ADMSTypeError(
            f"{settings[0]} was given, but a session brings its own configuration; leave it out"
        )
    tensors, info = session_file.read(source)
    reader = _Reader(str(source), tensors, info)
    inner = getattr(model, "get_base_model", None)
    host = inner() if callable(inner) else model
    reader.check_model(host)
    config = reader.config()
    notes, last_ids = reader.get("notes", dict), reader.last_ids()
    arguments = {**reader.optional_layers(given=arguments), **arguments}
    was_enabled = is_enabled(model)
    try:
        cache = enable_adms_llm(model, config=config, **arguments)
        reader.fill(cache, host)
    except BaseException:
        if not was_enabled:
            disable_adms(model)
        raise
    return Session(cache, last_ids, notes)


class _Reader:
    """The content of a file on its way into a cache; nothing in it is taken on trust."""

    def __init__(self, name: str, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
        self.name = name
        self.tensors = tensors
        self.info = info

    def misfit(self, why: str) -> SessionFileError:
        """An error about this file."""
        return SessionFileError(f"{self.name} does not fit: {why}")

    def get(self, key: str, kind: type, within: Any = None) -> Any:
        """An entry of the description, of the type it must have."""
        holder = self.info if within is None else within
        value = holder.get(key) if isinstance(holder, dict) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise self.misfit(f"{key} must be a {kind.__name__}, got {value!r}")
        return value

    def check_model(self, model: nn.Module) -> None:
        """Refuses another model than the stream ran through."""
        differences = model_differences(self.get("model", dict), describe_model(model))
        if differences:
            raise self.misfit(
                "it was saved with another model; "
                + "; ".join(differences[:5])
                + ("; ..." if len(differences) > 5 else "")
            )
        stored, own = self.get("weights", dict), sample_weights(model)
        # Exactly equal, or equal up to the rounding between dtypes.
        parameters = [value.dtype for value in model.parameters() if value.is_floating_point()]
        coarsest = max((torch.finfo(dtype).eps for dtype in parameters), default=0.0)
        try:
            exact = weights_differ(stored, own, 0.0)
            name = exact and weights_differ(stored, own, 2 * max(coarsest, 2.0**-7))
        except (TypeError, ValueError) as error:
            raise self.misfit("weights must be lists of numbers") from error
        same_dtype = self._stored_dtype() in (None, _main_dtype(model))
        if name is not None or (exact is not None and same_dtype):
            raise self.misfit(
                f"the model has the same form but other weights ({name or exact} differs); use the "
                "weights that the stream ran through"
            )

    def last_ids(self) -> torch.Tensor | None:
        """The ids kept beside the cache."""
        ids = self.tensors.get(_LAST_IDS)
        if ids is not None and (ids.dim() != 2 or ids.dtype != torch.int64):
            raise self.misfit(f"{_LAST_IDS} are {tuple(ids.shape)} in {ids.dtype}")
        return ids

    def _stored_dtype(self) -> torch.dtype | None:
        layers = self.get("layers", list)
        return self._dtype(layers[0]) if layers else None

    def config(self) -> ADMSConfig:
        """The configuration, with what was left at its default still at it."""
        explicit = self.get("explicit", list)
        try:
            return ADMSConfig.from_dict(self.get("config", dict), explicit=explicit)
        except ADMSError as error:
            raise self.misfit(f"its configuration: {error}") from error

    def optional_layers(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The optional layers that the stream had, unless ``given`` says otherwise."""
        # Files of version 0.1.0 have none.
        stored = self.get("optional", dict) if "optional" in self.info else {}
        layers: dict[str, Any] = {}
        kinds = {
            "adaptive_update": AdaptiveUpdateConfig,
            "integrated_attention": IntegratedAttentionConfig,
        }
        for name, kind in kinds.items():
            if name not in stored or name in given:
                continue
            settings = self.get(name, dict, stored)
            if settings.get("policy") == "learned":
                raise self.misfit(
                    "its stream has learned gates, which belong to the model; load it with "
                    'adaptive_update=AdaptiveUpdateConfig(policy="learned", gates=...)'
                )
            try:
                layers[name] = kind(**settings)
            except (ADMSError, TypeError) as error:
                raise self.misfit(f"its {name}: {error}") from error
        return layers

    def fill(self, cache: ADMSKVCache, model: nn.Module) -> None:
        """Puts the stream into an empty, bound cache."""
        binding = cache.binding_for_use
        own = describe_codes(binding) or {}
        codes = self.get("codes", dict) if self.info.get("codes") is not None else {}
        for part in sorted({*codes, *own}):
            mine, other = codes.get(part), own.get(part)
            if mine != other:
                raise self.misfit(
                    f"its codes were made with {part} {mine!r}, here it is {other!r}; what was "
                    "coded can only be read with the same"
                )
        sizes = self.get("sizes", dict)
        if sizes != vars(binding.sizes):
            raise self.misfit(f"sizes {sizes}, but they resolve to {vars(binding.sizes)} here")
        timeline = self._timeline(binding.sizes, binding.block_tokens)
        layers = self.get("layers", list)
        if timeline is None:
            if layers:
                raise self.misfit("it holds layers of a stream of no tokens")
            return
        if len(layers) != len(cache.layers):
            raise self.misfit(f"{len(layers)} layers, the model has {len(cache.layers)}")
        family = find_family(model)
        attentions = family.attentions(family.decoder(model))
        for index, layer in enumerate(cache.layers):
            # A family may keep further layers after those of its attentions.
            parameter = next(attentions[min(index, len(attentions) - 1)].parameters())
            device = torch.device("cpu") if parameter.is_meta else parameter.device
            if isinstance(layer, ADMSLayer):
                self._fill_adms(cache, layer, timeline, device, parameter.dtype)
            else:
                self._fill_plain(layer, index, timeline, device, parameter.dtype)
        if self._stored_dtype() != _main_dtype(model):
            logger.warning(
                "%s was saved in %s and is continued in %s, within rounding",
                self.name,
                self._stored_dtype(),
                _main_dtype(model),
            )
        if cache.spans is not None and self.info.get("optional", {}).get("integrated_attention"):
            learned = {
                name.removeprefix(_SPANS): part
                for name, part in self.tensors.items()
                if name.startswith(_SPANS)
            }
            try:
                cache.spans.load_tensors(learned)
            except ADMSValueError as error:
                raise self.misfit(str(error)) from error
        cache.timeline = timeline

    def _timeline(self, sizes: Sizes, block: int) -> Timeline | None:
        stored = self.get("timeline", dict)
        seen, evicted = self.get("seen", list, stored), self.get("evicted", list, stored)
        length = self.get("length", int, stored)
        if self.get("block", int, stored) != block:
            raise self.misfit(f"blocks of {stored['block']} tokens, here they have {block}")
        counts = [*seen, *evicted, length]
        if any(isinstance(count, bool) or not isinstance(count, int) for count in counts) or not (
            all(0 <= count < _LARGEST_COUNT for count in counts) and len(seen) == len(evicted)
        ):
            raise self.misfit(f"impossible counts {stored}")
        if not seen:
            return None
        for old, gone in zip(seen, evicted, strict=True):
            held = old - gone
            beyond = max(0, gone - sizes.sink)
            if (
                not (sizes.recent if gone else 0) <= held <= sizes.recent + sizes.waiting
                or beyond % block
                or old > length
            ):
                raise self.misfit(f"impossible counts: {old} tokens seen, {gone} evicted")
        return Timeline(sizes, block, seen, evicted, length)

    def _tensor(self, index: int, name: str) -> torch.Tensor:
        tensor = self.tensors.get(f"layers.{index}.{name}")
        if tensor is None:
            raise self.misfit(f"layer {index} has no {name}")
        return tensor

    def _dtype(self, described: Any) -> torch.dtype:
        dtype = getattr(torch, self.get("dtype", str, described), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise self.misfit(f"unknown dtype {described['dtype']!r}")
        return dtype

    def _states(
        self, index: int, slots: int | None, rows: int, shape: Any, described: Any
    ) -> list[torch.Tensor]:
        """Keys and values of a layer as stored, shape, dtype and values checked."""
        dtype, found = self._dtype(described), []
        for name, size in (("keys", shape.key_dim), ("values", shape.value_dim)):
            part = self._tensor(index, name)
            wanted = (rows, shape.num_heads, slots if slots is not None else -1, size)
            fits = part.dim() == 4 and part.dtype == dtype
            if not fits or any(
                size not in (-1, have) for size, have in zip(wanted, part.shape, strict=True)
            ):
                raise self.misfit(
                    f"{name} of layer {index} are {tuple(part.shape)} in {part.dtype}, expected "
                    f"{wanted} in {dtype}"
                )
            if not bool(torch.isfinite(part).all()):
                raise self.misfit(f"{name} of layer {index} hold NaN or infinity")
            found.append(part)
        return found

    def _moved(
        self, parts: list[torch.Tensor], index: int, device: torch.device, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        moved = [part.to(device=device, dtype=dtype) for part in parts]
        if not all(bool(torch.isfinite(part).all()) for part in moved):
            raise self.misfit(
                f"layer {index} holds values beyond the range of {dtype}; load it with the model "
                f"in {parts[0].dtype}"
            )
        return moved

    def _fill_adms(
        self,
        cache: ADMSKVCache,
        layer: ADMSLayer,
        timeline: Timeline,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        binding, index = cache.binding_for_use, layer.layer_idx
        described = self.get("layers", list)[index]
        if self.get("kind", str, described) != "adms":
            raise self.misfit(f"layer {index} is a {described['kind']}, the model's is adms")
        sizes, shape = timeline.sizes, binding.kinds[index].shape
        slots = sizes.sink + sizes.ring
        stored = self._states(index, slots, timeline.batch_size, shape, described)
        keys, values = self._moved(stored, index, device, dtype)
        layer.lazy_initialization(keys, values)
        if layer.exact is None:
            raise RuntimeError("lazy_initialization left the layer without tiers")
        layer.exact.keys.copy_(keys)
        layer.exact.values.copy_(values)
        if layer.middle is None:
            return
        before = binding.middle_plan(index, shape, self._dtype(described), sizes)
        if before is None or _describe_plan(before) != self.get("middle", dict, described):
            raise self.misfit(
                f"layer {index} divides its middle in another way than this version of ADMS does "
                f"(compressor {cache.config.compressor_type!r})"
            )
        arena = self._tensor(index, "middle")
        wanted = (timeline.batch_size, before.arena_bytes)
        if tuple(arena.shape) != wanted or arena.dtype != torch.uint8:
            raise self.misfit(
                f"the middle of layer {index} is {tuple(arena.shape)} in {arena.dtype}, expected "
                f"{wanted} in torch.uint8"
            )
        totals = [timeline.middle_tokens(row) for row in range(timeline.batch_size)]
        try:
            layer.middle.arena.copy_(convert_arena(arena, before, layer.middle.plan, totals))
        except ADMSValueError as error:
            raise self.misfit(f"layer {index}: {error}") from error

    def _fill_plain(
        self,
        layer: Any,
        index: int,
        timeline: Timeline,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        described = self.get("layers", list)[index]
        kind = type(layer).__name__
        if self.get("kind", str, described) != kind or kind not in PLAIN_COUNTS:
            raise self.misfit(f"layer {index} is a {described['kind']}, the model's is a {kind}")
        count = self.get("count", int, described)
        if count != timeline.length:
            raise self.misfit(f"layer {index} has seen {count} columns of {timeline.length}")
        parts = [self._tensor(index, name) for name in ("keys", "values")]
        moved = self._moved(parts, index, device, dtype)
        layer.lazy_initialization(*moved)
        for name, part in zip(("keys", "values"), moved, strict=True):
            held = getattr(layer, name)
            # A ring is allocated in full; transformers' own layer starts empty and grows.
            if held.numel() and held.shape != part.shape or part.dim() != 4:
                raise self.misfit(
                    f"{name} of layer {index} are {tuple(part.shape)}, expected {tuple(held.shape)}"
                )
            setattr(layer, name, part)
        setattr(layer, PLAIN_COUNTS[kind], count)


def _main_dtype(model: nn.Module) -> torch.dtype:
    family = find_family(model)
    return next(family.attentions(family.decoder(model))[0].parameters()).dtype
