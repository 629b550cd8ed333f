"""Llama and the families built like it: rotary positions handed to every attention module."""

import functools
import logging
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

from adms.binding import LayerKind
from adms.cache import ADMSKVCache
from adms.entries import TokenShape
from adms.errors import UnsupportedModelError
from adms.patches.base import (
    FAMILIES,
    Family,
    RotaryScheme,
    Undo,
    bind_method,
    modeling_function,
)
from adms.tiers.window import WindowLayer

logger = logging.getLogger("adms")


def hand_over_unrotated(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook: with an ADMS cache, positions are replaced by the rotation by nothing."""
    cache = kwargs.get("past_key_values")
    cache = kwargs.get("layer_past") if cache is None else cache
    if not isinstance(cache, ADMSKVCache):
        return None
    cos, sin = kwargs["position_embeddings"]
    # One position that broadcasts over rows and tokens.
    nowhere = (torch.ones_like(cos[:1, :1]), torch.zeros_like(sin[:1, :1]))
    return args, {**kwargs, "position_embeddings": nowhere, "adms_cache": cache}


@functools.cache
def _notice_windows(model_type: str) -> None:
    logger.warning(
        "every layer of this %s has a sliding window of its own, which ADMS leaves as it is: "
        "memory is bounded by the windows, and no compressed middle is held",
        model_type,
    )


def _prepare_inputs(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Phi3's own method drops a cache where the text grows past the shorter of its two lengths.

    An ADMS cache holds keys before positions, so it has nothing to compute anew there.
    """
    cache = kwargs.get("past_key_values")
    owner: Any = GenerationMixin if isinstance(cache, ADMSKVCache) else type(model)
    return owner.prepare_inputs_for_generation(model, *args, **kwargs)


class LlamaFamily(Family):
    """Llama, Mistral, Mixtral, Qwen2, Qwen3, Phi3, Gemma, Gemma2 and Gemma3: one path.

    Layers with a sliding window shorter than the trained length are left as they are.
    """

    name = "Llama, Mistral, Mixtral, Qwen2, Qwen3, Phi3, Gemma, Gemma2, Gemma3 (text)"
    model_types = (
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "phi3",
        "gemma",
        "gemma2",
        "gemma3_text",
    )
    exact = "exact (longrope: within the shorter length, or the longer one in one pass)"
    positions = "rotary, applied at cache positions when read"
    captures = True

    def attentions(self, decoder: Any) -> list[nn.Module]:
        """``layers[i].self_attn``."""
        return [layer.self_attn for layer in decoder.layers]

    def window(self, config: Any, layer_idx: int) -> int | None:
        """Tokens that a layer's queries see; None where they see everything.

        Raises:
            UnsupportedModelError: the layer is neither full nor sliding attention.
        """
        layer_types = getattr(config, "layer_types", None)
        window: int | None = getattr(config, "sliding_window", None)
        layer_type = layer_types[layer_idx] if layer_types else None
        if layer_type not in (None, "full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"layer {layer_idx} of this {config.model_type} is {layer_type!r}; ADMS knows "
                "'full_attention' and 'sliding_attention'"
            )
        if layer_type == "full_attention" or window is None:
            return None
        # One that is never reached within the trained length is no window.
        return None if window >= self.max_positions(config) else window

    def max_positions(self, config: Any) -> int:
        """``max_position_embeddings``."""
        return int(config.max_position_embeddings)

    def kinds(self, decoder: nn.Module) -> list[LayerKind]:
        """Every layer attends to everything, or to a window."""
        config: Any = decoder.config
        if getattr(config, "use_bidirectional_attention", False):
            raise UnsupportedModelError(
                "this model attends to later tokens (use_bidirectional_attention), so it has no "
                "stream to remember; use a causal model"
            )
        attentions = self.attentions(decoder)
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        shape = TokenShape(heads, head_dim, head_dim)
        schemes: dict[str | None, RotaryScheme] = {}
        kinds = []
        for index in range(len(attentions)):
            layer_type = self.rotary_choice(decoder, index)
            if layer_type not in schemes:
                schemes[layer_type] = RotaryScheme(
                    decoder.rotary_emb,
                    modeling_function(attentions[0], "apply_rotary_pos_emb"),
                    layer_type,
                )
            scheme, window = schemes[layer_type], self.window(config, index)
            make = None if window is None else functools.partial(WindowLayer, index, window)
            kept = 0 if window is None else max(1, window - 1)
            kinds.append(LayerKind(shape, config.num_attention_heads, scheme, make, kept))
        if all(kind.plain is not None for kind in kinds):
            _notice_windows(config.model_type)
        return kinds

    def rotary_choice(self, decoder: nn.Module, layer_idx: int) -> str | None:
        """Which of several sets of frequencies a layer uses; None where there is one."""
        if not isinstance(getattr(decoder.rotary_emb, "rope_type", None), dict):
            return None
        return str(decoder.config.layer_types[layer_idx])  # type: ignore[union-attr,index]

    def install(self, decoder: nn.Module) -> list[Undo]:
        """A pre-hook on every attention module."""
        return [
            attention.register_forward_pre_hook(hand_over_unrotated, with_kwargs=True).remove
            for attention in self.attentions(decoder)
        ]

    def install_model(self, model: nn.Module) -> list[Undo]:
        """Keeps Phi3 from dropping the cache."""
        own = getattr(type(model), "prepare_inputs_for_generation", None)
        if own is None or own is GenerationMixin.prepare_inputs_for_generation:
            return []
        # generate looks at the signature to tell which arguments the model takes.
        method = functools.wraps(own)(_prepare_inputs)
        return [bind_method(model, "prepare_inputs_for_generation", method)]


FAMILIES.append(LlamaFamily())
