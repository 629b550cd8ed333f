"""What an enabled model calls in place of its own: attention, the decoder's forward, ``generate``.

With any other cache each of them does what was there before. With an ``ADMSKVCache`` the decoder
splits long inputs (``streaming``), and its attention modules, which hand over keys before positions
(``patches``), read the tiers (``attention.window``).
"""

import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adms import compat
from adms.attention.window import attend_layer
from adms.cache import ADMSKVCache
from adms.compiled_layers import step_attention
from adms.errors import ADMSValueError, CacheStateError
from adms.generation import check_generate, passes_of
from adms.installation import Installation, Undo
from adms.patches import Family
from adms.patches.base import bind_method, modeling_function
from adms.streaming import named_arguments, stream

# Decoders look their installation up here; a deep copy of a model is not in it.
_DECODERS: "weakref.WeakKeyDictionary[nn.Module, Installation]" = weakref.WeakKeyDictionary()


def install(model: nn.Module, family: Family) -> Installation:
    """Puts these in place of the model's own, all or none."""
    installation = Installation(family, weakref.ref(model))
    decoder = family.decoder(model)
    if decoder in _DECODERS:
        raise CacheStateError(
            f"the decoder of this {type(model).__name__} is enabled already, through a model "
            "around or inside of it; use that one, or disable_adms it first"
        )
    try:
        installation.undo += family.install(decoder)
        installation.undo += family.install_model(model)
        if family.uses_attention_interface:
            installation.attention = _install_attention(decoder)
            undo = partial(_uninstall_attention, decoder.config, installation)
            installation.undo.append(undo)
        installation.undo.append(_install_forward(decoder))
        _DECODERS[decoder] = installation
        installation.undo.append(partial(_forget_decoder, weakref.ref(decoder)))
        if hasattr(model, "generate"):
            installation.undo.append(bind_method(model, "generate", _generate))
    except BaseException:
        for step in reversed(installation.undo):
            step()
        raise
    return installation


# --- the attention function --------------------------------------------------------------------


def _registered_name(base: str) -> str:
    # transformers treats names with "flash" in them as flash attention with its own masks.
    return "adms_" + base.replace("flash", "fa")


def _install_attention(decoder: nn.Module) -> tuple[str, str]:
    """Registers the attention function over the one in force and puts it in force.

    Returns:
        Its name, and the name of the one in force before.
    """
    config: Any = decoder.config
    base = compat.get_attention(config)
    sharing = _sharing(config)
    if sharing:
        # Another model of this config has been enabled.
        return sharing[0]
    name = _registered_name(base)
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, partial(adms_attention, base=base))
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    compat.set_attention(config, name)
    return name, base


def _uninstall_attention(config: Any, installation: Installation) -> None:
    """Puts the function before back in force, unless the user has chosen another meanwhile."""
    name, base = installation.attention or (None, None)
    # Called while this model's decoder is no longer among those that are enabled.
    if base is not None and compat.get_attention(config) == name and not _sharing(config):
        compat.set_attention(config, base)


def _sharing(config: Any) -> list[tuple[str, str]]:
    """What is in force by the enabled models of one config."""
    enabled: list[tuple[Any, Installation]] = list(_DECODERS.items())
    return [one.attention for own, one in enabled if own.config is config and one.attention]


def _require_attention(decoder: nn.Module, installation: Installation) -> None:
    """Refuses a model whose attention no longer reads the tiers."""
    config: Any = decoder.config
    if installation.attention is None:
        return
    name, _ = installation.attention
    found = compat.get_attention(config)
    if found != name:
        raise CacheStateError(
            f"the model's attention implementation was changed to {found!r} after "
            "enable_adms_llm, so it would not read the cache; call disable_adms(model) and "
            "enable_adms_llm(model) again, and go on with a new cache or a saved session"
        )


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
    dtype, device = query.dtype, query.device.type
    if torch.is_autocast_enabled(device):
        query = query.to(adms_cache.binding_for_use.dtype)
    with torch.autocast(device, enabled=False):
        output = attend_layer(
            adms_cache,
            layer_idx,
            query,
            scaling,
            dropout=kwargs.get("dropout", 0.0),
            # transformers' own "sdpa" has none; a model that asks for both runs without it there.
            softcap=None if base == "sdpa" else kwargs.get("softcap"),
        )
    return output.to(dtype).contiguous(), None


def _base_function(module: nn.Module, base: str) -> Callable[..., Any]:
    if base in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[base]
    return modeling_function(module, "eager_attention_forward")


# --- the decoder's forward, and generate -------------------------------------------------------


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
    _require_attention(decoder, installation)
    if named.get("use_cache") is False:
        raise ADMSValueError("use_cache=False with an ADMSKVCache stores nothing; leave it out")
    if cache.binding is None or cache.binding.model_key is not installation.model_key:
        cache.bind(installation.binding(cache.config))
    family = installation.family
    for call in passes_of(cache, named):
        output = stream(decoder, forward, cache, call, family.adjust, family.prepare)
    return output


def _install_forward(decoder: nn.Module) -> Undo:
    return bind_method(decoder, "forward", _decoder_forward)


def _forget_decoder(decoder_key: weakref.ReferenceType[nn.Module]) -> None:
    decoder = decoder_key()
    if decoder is not None:
        _DECODERS.pop(decoder, None)


def _generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of an enabled model: refuses what could only go wrong silently."""
    own: Any = type(model)
    generate = types.MethodType(own.generate, model)
    check_generate(model, args, kwargs)
    return generate(*args, **kwargs)
