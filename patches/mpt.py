"""MPT: ALiBi, by an attention of its own that asks for no attention function.

Shapes: ``B`` rows, ``H`` heads, ``Q`` new tokens, ``N`` entries, ``D`` head size.
"""

import types
from typing import Any

import torch
from torch import nn

from adms.attention.window import attend_layer
from adms.binding import LayerKind
from adms.cache import ADMSKVCache
from adms.entries import TokenShape
from adms.patches.base import (
    ALIBI_SINKS,
    FAMILIES,
    Family,
    PlainScheme,
    Slopes,
    Undo,
    bind_method,
    modeling_function,
)


class MptAlibi(PlainScheme):
    """ALiBi in float32, as MPT adds it whatever the model's dtype.

    It knows no longest distance: the table of ``max_seq_len`` that MPT makes is not read.

    Args:
        attention: one of the model's attention modules.
    """

    weighs_sinks = True
    adds_bias = True

    def __init__(self, attention: Any) -> None:
        build = modeling_function(attention, "build_mpt_alibi_tensor")
        # Its first column belongs to the distance -1.
        self.slopes = Slopes(-build(attention.n_heads, 2)[:, 0, 0])

    def bias(self, queries: torch.Tensor, keys: torch.Tensor, num_heads: int) -> torch.Tensor:
        """``[B, H, Q, N]``: slope times how far the key lies ahead."""
        distance = keys[:, None, None, :].float() - queries[:, None, :, None].float()
        return self.slopes.on(keys.device, num_heads) * distance


def attention_forward(attention: Any, *args: Any, **kwargs: Any) -> Any:
    """MPT's attention; with an ADMS cache, over its tiers."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, ADMSKVCache):
        forward = types.MethodType(type(attention).forward, attention)
        return forward(*args, **kwargs)
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    fused = attention.Wqkv(hidden_states)
    if attention.clip_qkv:
        fused = fused.clamp(min=-attention.clip_qkv, max=attention.clip_qkv)
    query, key, value = (
        part.unflatten(2, (attention.n_heads, attention.head_dim)).transpose(1, 2)
        for part in fused.chunk(3, dim=2)
    )
    cache.update(key, value, attention.layer_idx)
    dropout = attention.attn_dropout_p if attention.training else 0.0
    output = attend_layer(
        cache, attention.layer_idx, query, attention.softmax_scale, dropout=dropout
    )
    return attention.out_proj(output.flatten(2)), None


class MptFamily(Family):
    """MPT."""

    name = "MPT"
    model_types = ("mpt",)
    positions = "ALiBi by cache positions"
    uses_attention_interface = False

    def max_positions(self, config: Any) -> int | None:
        """ALiBi takes any distance."""
        return None

    def default_sinks(self, config: Any) -> int | None:
        """More than with rotary positions."""
        return ALIBI_SINKS

    def attentions(self, decoder: Any) -> list[nn.Module]:
        """``blocks[i].attn``."""
        return [block.attn for block in decoder.blocks]

    def kinds(self, decoder: nn.Module) -> list[LayerKind]:
        """Every layer attends to everything."""
        attentions = self.attentions(decoder)
        first: Any = attentions[0]
        shape = TokenShape(first.n_heads, first.head_dim, first.head_dim)
        return [LayerKind(shape, first.n_heads, MptAlibi(first))] * len(attentions)

    def install(self, decoder: nn.Module) -> list[Undo]:
        """A forward in place of every attention module's own."""
        return [
            bind_method(attention, "forward", attention_forward)
            for attention in self.attentions(decoder)
        ]


FAMILIES.append(MptFamily())
