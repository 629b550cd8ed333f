"""Llama and the families built like it: rotary positions handed to every attention module."""

from typing import Any

import torch
from torch import nn

from adms.binding import LayerKind
from adms.cache import ADMSKVCache
from adms.entries import TokenShape
from adms.patches.base import FAMILIES, Family, RotaryScheme, Undo, modeling_function


def hand_over_unrotated(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook: with an ADMS cache, positions are replaced by the rotation by nothing."""
    if not isinstance(kwargs.get("past_key_values"), ADMSKVCache):
        return None
    cos, sin = kwargs["position_embeddings"]
    # One position that broadcasts over rows and tokens.
    one = torch.ones_like(cos[:1, :1])
    return args, {**kwargs, "position_embeddings": (one, torch.zeros_like(sin[:1, :1]))}


class LlamaFamily(Family):
    """Llama, Mistral, Qwen2, Qwen3: one path."""

    name = "Llama"
    model_types = ("llama", "mistral", "qwen2", "qwen3")

    def attentions(self, decoder: nn.Module) -> list[nn.Module]:
        """``layers[i].self_attn``."""
        return [layer.self_attn for layer in decoder.layers]  # type: ignore[union-attr,misc]

    def kinds(self, decoder: nn.Module) -> list[LayerKind]:
        """Every layer attends to everything."""
        config: Any = decoder.config
        attentions = self.attentions(decoder)
        scheme = RotaryScheme(
            decoder.rotary_emb,  # type: ignore[arg-type]
            modeling_function(attentions[0], "apply_rotary_pos_emb"),
        )
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        shape = TokenShape(config.num_key_value_heads, head_dim, head_dim)
        kind = LayerKind(shape, config.num_attention_heads, scheme)
        return [kind] * len(attentions)

    def install(self, decoder: nn.Module) -> list[Undo]:
        """A pre-hook on every attention module."""
        return [
            attention.register_forward_pre_hook(hand_over_unrotated, with_kwargs=True).remove
            for attention in self.attentions(decoder)
        ]


FAMILIES.append(LlamaFamily())
