"""The way from a session file into a cache: what is read is checked before it is used."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adms import compat
from adms.attention.span_learner import IntegratedAttentionConfig
from adms.cache import ADMSKVCache
from adms.calibration import Calibration
from adms.config import SINK_PARAMETERS, ADMSConfig, Sizes
from adms.errors import ADMSError, ADMSValueError, SessionFileError
from adms.fingerprint import (
    describe_codes,
    describe_model,
    model_differences,
    sample_weights,
    weights_differ,
)
from adms.gates.config import AdaptiveUpdateConfig
from adms.layer import ADMSLayer
from adms.moments import plan_calibration
from adms.patches import find_family
from adms.session_content import CALIBRATION, LAST_IDS, PLAIN_COUNTS, SPANS, describe_plan
from adms.tiers.convert import convert_arena
from adms.timeline import Timeline

logger = logging.getLogger("adms")

_LARGEST_COUNT = 2**53


class SessionReader:
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
        """Refuses another model than the stream ran through, and a rank's part of one."""
        if compat.tensor_parallel_group(model) is not None:
            raise self.misfit(
                "it holds all heads, and this process has those of one rank; load the model "
                "without tp_plan"
            )
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
        ids = self.tensors.get(LAST_IDS)
        if ids is not None and (ids.dim() != 2 or ids.dtype != torch.int64):
            raise self.misfit(f"{LAST_IDS} are {tuple(ids.shape)} in {ids.dtype}")
        return ids

    def _stored_dtype(self) -> torch.dtype | None:
        layers = self.get("layers", list)
        return self._dtype(layers[0]) if layers else None

    def config(self, model: nn.Module) -> ADMSConfig:
        """The configuration, with what was left at its default still at it."""
        explicit, values = self.get("explicit", list), dict(self.get("config", dict))
        # A family's own number of sinks may have been another one; a stream keeps its own.
        family = find_family(model)
        default = family.default_sinks(family.decoder(model).config)
        sinks = self.get("sink", int, self.get("sizes", dict))
        if default not in (None, sinks) and not any(name in explicit for name in SINK_PARAMETERS):
            values["start_size"], explicit = sinks, [*explicit, "start_size"]
        try:
            return ADMSConfig.from_dict(values, explicit=explicit)
        except ADMSError as error:
            raise self.misfit(f"its configuration: {error}") from error

    def optional_layers(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The optional layers that the stream had, unless ``given`` says otherwise."""
        stored = self.get("optional", dict)
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

    def calibration(self, model: nn.Module) -> Calibration | None:
        """The bases that the codes were made with; None where nothing is coded."""
        prefix = f"{CALIBRATION}."
        state = {
            name.removeprefix(prefix): part
            for name, part in self.tensors.items()
            if name.startswith(prefix)
        }
        if not state:
            return None
        found = plan_calibration(model, find_family(model))
        try:
            found.load_state(state, self.get("calibration", str))
        except ADMSValueError as error:
            raise self.misfit(str(error)) from error
        return found

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
                # Further layers keep positions beside their states, in full.
                whole = index >= len(attentions)
                self._fill_plain(layer, index, timeline, device, parameter.dtype, whole=whole)
        if self._stored_dtype() != _main_dtype(model):
            logger.warning(
                "%s was saved in %s and is continued in %s, within rounding",
                self.name,
                self._stored_dtype(),
                _main_dtype(model),
            )
        if cache.spans is not None and self.info.get("optional", {}).get("integrated_attention"):
            learned = {
                name.removeprefix(SPANS): part
                for name, part in self.tensors.items()
                if name.startswith(SPANS)
            }
            try:
                cache.spans.load_tensors(learned)
            except ADMSValueError as error:
                raise self.misfit(str(error)) from error
        cache.timeline = timeline
        cache.lay_together()

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
        if before is None or describe_plan(before) != self.get("middle", dict, described):
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
        totals = timeline.middle_totals
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
        *,
        whole: bool,
    ) -> None:
        described = self.get("layers", list)[index]
        kind = type(layer).__name__
        if self.get("kind", str, described) != kind or kind not in PLAIN_COUNTS:
            raise self.misfit(f"layer {index} is a {described['kind']}, the model's is a {kind}")
        count = self.get("count", int, described)
        if count != timeline.length:
            raise self.misfit(f"layer {index} has seen {count} columns of {timeline.length}")
        keys, values = (self._tensor(index, name) for name in ("keys", "values"))
        moved = self._moved([keys], index, device, dtype)
        moved += self._moved([values], index, device, values.dtype if whole else dtype)
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
