"""Turning ADMS on and off for a model: the one mechanism everything goes through.

An enabled model works with every other cache exactly as before. With an ``ADMSKVCache``, its
decoder splits long inputs (``streaming``), its attention modules hand over keys before positions
(``patches``), and the attention function registered here reads the tiers (``attention.tiered``).
"""

import dataclasses
import os
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adms import compat
from adms.attention.span_learner import IntegratedAttentionConfig
from adms.attention.sparse_prefill import SparsePrefillConfig
from adms.attention.window import attend_layer
from adms.binding import Binding
from adms.cache import ADMSKVCache
from adms.calibration import Calibration
from adms.compiled_layers import step_attention
from adms.compressors import resolve_compressor
from adms.compressors.base import LayerContext
from adms.config import ADMSConfig, Sizes, check_layer_config, config_from, resolve_sizes
from adms.entries import TokenShape
from adms.errors import ADMSTypeError, ADMSValueError, CacheStateError
from adms.gates.coder import put_gate
from adms.gates.config import AdaptiveUpdateConfig
from adms.generation import check_generate
from adms.importance import METRICS
from adms.kernels import Kernel, check_kernel
from adms.moments import fit_to_own_texts, plan_calibration, resolve_calibration
from adms.patches import Family, find_family
from adms.patches.base import bind_method, modeling_function
from adms.ranks import Ranks
from adms.streaming import named_arguments, stream

Undo = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class OptionalLayers:
    """What a cache may have beside its tiers; see ``enable_adms_llm``.

    Raises:
        ADMSTypeError: a value of the wrong type.
    """

    adaptive_update: AdaptiveUpdateConfig | None = None
    integrated_attention: IntegratedAttentionConfig | None = None
    sparse_prefill: SparsePrefillConfig | None = None

    def __post_init__(self) -> None:
        check_layer_config(self.adaptive_update, AdaptiveUpdateConfig, "adaptive_update")
        check_layer_config(
            self.integrated_attention, IntegratedAttentionConfig, "integrated_attention"
        )
        check_layer_config(self.sparse_prefill, SparsePrefillConfig, "sparse_prefill")


@dataclass(eq=False)
class Installation:
    """What enabling did to one model."""

    family: Family
    model_key: weakref.ReferenceType[nn.Module]
    undo: list[Undo] = field(default_factory=list)
    active: bool = True
    own_calibration: Calibration | None = None

    def _own_calibration(self, model: nn.Module) -> Calibration:
        """The model's calibration to texts of its own, fitted when first needed."""
        if self.own_calibration is None:
            self.own_calibration = plan_calibration(model, self.family)
        return self.own_calibration

    def _fit(self, calibration: Calibration) -> None:
        model = self.model_key()
        if model is None:
            raise CacheStateError("the model of this installation is gone")
        fit_to_own_texts(model, calibration)

    def binding(
        self,
        config: ADMSConfig,
        optional: OptionalLayers | None = None,
        calibration: Calibration | None = None,
        kernel: Kernel = "auto",
    ) -> Binding:
        """A configuration resolved on this model.

        Raises:
            ADMSValueError: the configuration does not fit the model, or names something unknown.
        """
        model = self.model_key()
        if model is None:
            raise CacheStateError("the model of this installation is gone")
        decoder = self.family.decoder(model)
        metric = METRICS.get(config.importance_metric)
        compressor = resolve_compressor(config)
        layers = OptionalLayers() if optional is None else optional
        gates: tuple[torch.Tensor, ...] = ()
        if layers.adaptive_update is not None:
            if compressor is None:
                raise ADMSValueError(
                    "adaptive_update folds tokens that enter the middle, and compressed_budget=0 "
                    "leaves none; give it a budget, or leave adaptive_update out"
                )
            compressor, gates = put_gate(compressor, layers.adaptive_update, model)
        block = compressor.block_tokens(config) if compressor is not None else 1
        sizes = resolve_sizes(
            config,
            self.family.max_positions(decoder.config),
            block,
            self.family.default_sinks(decoder.config),
        )

        ranks = Ranks.of(compat.tensor_parallel_group(model))
        uses = compressor is not None and compressor.uses_calibration
        if calibration is not None and not uses:
            raise ADMSValueError(
                f"compressor_type={config.compressor_type!r} makes no use of a calibration; leave "
                "it out"
            )
        calibration = (calibration or self._own_calibration(model)) if uses else None

        def context(layer_idx: int, shape: TokenShape, dtype: torch.dtype) -> LayerContext:
            own = None if calibration is None else calibration.layers[layer_idx]
            # A family may keep further layers after those of its attentions.
            gate = gates[layer_idx] if layer_idx < len(gates) else None
            return LayerContext(shape, dtype, layer_idx, calibration=own, gate=gate)

        def bind(sizes: Sizes, block: int) -> Binding:
            kinds = [*self.family.kinds(decoder), *self.family.further_kinds(decoder, sizes)]
            if layers.sparse_prefill is not None:
                layers.sparse_prefill.check_kinds(kinds)
            return Binding(
                model_key=self.model_key,
                config=config,
                sizes=sizes,
                kinds=kinds,
                dtype=self.family.dtype(decoder),
                compressor=compressor,
                metric=metric,
                block_tokens=block,
                is_active=lambda: self.active,
                context=context,
                kernel=kernel,
                # Ranks wait for one another in a pass, and each would capture at a time of its own.
                captures=self.family.captures and ranks.size == 1,
                ranks=ranks,
                calibration=calibration,
                fit=self._fit,
                gates=gates,
                sparse_prefill=layers.sparse_prefill,
                integrated_attention=layers.integrated_attention,
            )

        binding = bind(sizes, block if sizes.interval >= block else 1)
        if sizes.budget and not binding.codes_anything:
            # Tokens wait to be coded together; where the bytes are too few to code, none need wait.
            binding = bind(dataclasses.replace(sizes, interval=1), 1)
        return binding


_INSTALLED: "weakref.WeakKeyDictionary[nn.Module, Installation]" = weakref.WeakKeyDictionary()
# Decoders look their installation up here; a deep copy of a model is not in it.
_DECODERS: "weakref.WeakKeyDictionary[nn.Module, Installation]" = weakref.WeakKeyDictionary()


def enable_adms_llm(
    model: nn.Module,
    config: ADMSConfig | None = None,
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    adaptive_update: AdaptiveUpdateConfig | None = None,
    integrated_attention: IntegratedAttentionConfig | None = None,
    sparse_prefill: SparsePrefillConfig | None = None,
    kernel: Kernel = "auto",
    **parameters: Any,
) -> ADMSKVCache:
    """Makes a pretrained model stream in bounded memory and returns a cache for it.

    The model's weights and its behaviour with any other cache stay as they are. A second call
    returns another, independent cache.

    Args:
        model: a transformers causal language model of a supported family.
        config: the configuration; or give single parameters of ``ADMSConfig`` instead.
        calibration: what ``calibrate`` returned, or the path it wrote; None has the code fitted
            to texts of the model's own when the first stream needs it.
        adaptive_update: a gate before the middle, which folds tokens that are alike into one entry;
            None gives every token its own. A saved session is loaded with the same.
        integrated_attention: reads only as much of the recent tier, in each layer, as a span says
            that is learned while the stream runs; None reads all of it.
        sparse_prefill: makes chunks of more than one token attend to the blocks that matter most
            to them, in this cache; None attends to everything. It is no part of a saved session.
        kernel: what decodes single tokens: "triton" (fused kernels in captured CUDA graphs,
            commits too, or an error), "torch" (PyTorch alone), or "auto" (fused kernels in a graph
            on CUDA where it can be, static buffers on a CPU where the middle is coded, else PyTorch
            alone). Chunks are read through kernels on CUDA unless it is "torch".
        **parameters: parameters of ``ADMSConfig``.

    Returns:
        An empty cache, bound to the model.

    Raises:
        UnsupportedModelError: the architecture has no patch.
        ADMSTypeError: both ``config`` and ``parameters``, or an unknown parameter.
        ADMSValueError: a value that cannot work, or that does not fit the model.
    """
    settings = config_from(config, parameters)
    optional = OptionalLayers(
        adaptive_update=adaptive_update,
        integrated_attention=integrated_attention,
        sparse_prefill=sparse_prefill,
    )
    check_kernel(kernel)
    if not isinstance(model, nn.Module):
        raise ADMSTypeError(f"model must be a transformers model, got {type(model).__name__}")
    host = host_of(model)
    installation = _INSTALLED.get(host)
    if installation is None:
        family = find_family(host)
        # Resolved on a trial installation first: a refused call must leave the model as it was.
        trial = Installation(family, weakref.ref(host))
        trial.binding(settings, optional, resolve_calibration(host, family, calibration))
        installation = _install(host, family)
    given = resolve_calibration(host, installation.family, calibration)
    cache = ADMSKVCache(settings)
    cache.bind(installation.binding(settings, optional, given, kernel))
    return cache


def enable_streaming_llm(
    model: nn.Module, start_size: int = 4, recent_size: int = 2000, **parameters: Any
) -> ADMSKVCache:
    """StreamingLLM: sinks and a recent window, no middle; the same cache with a budget of 0.

    Source: Xiao et al. (2023), arXiv 2309.17453.

    Args:
        model: a transformers causal language model of a supported family.
        start_size: attention sinks.
        recent_size: recent tokens.
        **parameters: further parameters of ``ADMSConfig`` but those of the middle.

    Returns:
        An empty cache, bound to the model.
    """
    for name in ("compressed_budget", "enable_dynamic_sink"):
        if name in parameters:
            raise ADMSTypeError(
                f"enable_streaming_llm has no {name}; use enable_adms_llm for a middle tier"
            )
    sizes: dict[str, Any] = {"start_size": start_size, "recent_size": recent_size}
    return enable_adms_llm(
        model, **sizes, compressed_budget=0, enable_dynamic_sink=False, **parameters
    )


def disable_adms(model: nn.Module) -> None:
    """Restores a model to what it was before it was enabled; its caches stop working.

    Does nothing to a model that is not enabled.
    """
    if not isinstance(model, nn.Module):
        raise ADMSTypeError(f"model must be a transformers model, got {type(model).__name__}")
    installation = _INSTALLED.pop(host_of(model), None)
    if installation is None:
        return
    installation.active = False
    for step in reversed(installation.undo):
        step()


def is_enabled(model: nn.Module) -> bool:
    """Whether a model is enabled."""
    return host_of(model) in _INSTALLED


def host_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a wrapper such as PEFT's."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def _install(model: nn.Module, family: Family) -> Installation:
    installation = Installation(family, weakref.ref(model))
    decoder = family.decoder(model)
    try:
        installation.undo += family.install(decoder)
        installation.undo += family.install_model(model)
        if family.uses_attention_interface:
            installation.undo.append(_install_attention(decoder))
        installation.undo.append(_install_forward(decoder))
        _DECODERS[decoder] = installation
        installation.undo.append(partial(_forget_decoder, weakref.ref(decoder)))
        if hasattr(model, "generate"):
            installation.undo.append(bind_method(model, "generate", _generate))
    except BaseException:
        for step in reversed(installation.undo):
            step()
        raise
    _INSTALLED[model] = installation
    return installation


# --- the attention function --------------------------------------------------------------------


def _registered_name(base: str) -> str:
    # transformers treats names with "flash" in them as flash attention with its own masks.
    return "adms_" + base.replace("flash", "fa")


def _forget_decoder(decoder_key: weakref.ReferenceType[nn.Module]) -> None:
    decoder = decoder_key()
    if decoder is not None:
        _DECODERS.pop(decoder, None)


def _install_attention(decoder: nn.Module) -> Undo:
    """Registers the attention function over the one in force and puts it in force."""
    config: Any = decoder.config
    base = compat.get_attention(config)
    name = _registered_name(base)
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, partial(adms_attention, base=base))
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    compat.set_attention(config, name)
    return partial(compat.set_attention, config, base)


def adms_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    base: str,
    adms_cache: ADMSKVCache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What attention modules of enabled models call: the tiers, or the function that was in force.

    Args:
        module: the attention module.
        query: ``[B, H, Q, D]``; before positions if ``adms_cache`` is given.
        key, value: ``[B, K, N, D]``/``[B, K, N, E]``, read only by the function in force before.
        base: name of that function.
        adms_cache: the cache of the pass under way.

    Returns:
        ``[B, Q, H, E]`` and no weights.
    """
    if adms_cache is None:
        function = _base_function(module, base)
        return function(module, query, key, value, attention_mask, **kwargs)
    given = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if given is None else given
    step = adms_cache.step if adms_cache.require_view().is_step else None
    if step is not None and torch.compiler.is_compiling():
        return step_attention(query, key, value, scaling), None
    layer_idx: Any = module.layer_idx
    if step is not None:
        return step.attend(layer_idx, query, key, value, scaling), None
    output = attend_layer(
        adms_cache,
        layer_idx,
        query,
        scaling,
        dropout=kwargs.get("dropout", 0.0),
        # transformers' own "sdpa" has none; a model that asks for both runs without it there.
        softcap=None if base == "sdpa" else kwargs.get("softcap"),
    )
    return output.contiguous(), None


def _base_function(module: nn.Module, base: str) -> Callable[..., Any]:
    if base in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[base]
    return modeling_function(module, "eager_attention_forward")


# --- the decoder's forward ---------------------------------------------------------------------


def _decoder_forward(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of an enabled decoder."""
    forward = types.MethodType(type(decoder).forward, decoder)
    named = named_arguments(forward, args, kwargs)
    cache = named.get("past_key_values")
    if not isinstance(cache, ADMSKVCache):
        return forward(*args, **kwargs)
    installation = _DECODERS.get(decoder)
    if installation is None:
        raise CacheStateError(
            "this model is a copy of an enabled one; call enable_adms_llm on the copy and use the "
            "cache it returns"
        )
    if named.get("use_cache") is False:
        raise ADMSValueError("use_cache=False with an ADMSKVCache stores nothing; leave it out")
    if cache.binding is None or cache.binding.model_key is not installation.model_key:
        cache.bind(installation.binding(cache.config))
    family = installation.family
    return stream(decoder, forward, cache, named, family.adjust, family.prepare)


def _install_forward(decoder: nn.Module) -> Undo:
    return bind_method(decoder, "forward", _decoder_forward)


def _generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of an enabled model: refuses what could only go wrong silently."""
    own: Any = type(model)
    generate = types.MethodType(own.generate, model)
    check_generate(args, kwargs)
    return generate(*args, **kwargs)
