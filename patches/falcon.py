"""Falcon: rotary or ALiBi, by an attention of its own that asks for no attention function.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``Q`` new tokens, ``N`` entries, ``D`` head
size.
"""

import math
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
    RotaryScheme,
    Slopes,
    Undo,
    bind_method,
    modeling_function,
)


class FalconAlibi(PlainScheme):
    """ALiBi as Falcon rounds it: slope times position in bfloat16, divided by sqrt(D).

    Args:
        attention: one of the model's attention modules.
        dtype: the model's.
    """

    weighs_sinks = True
    adds_bias = True

    def __init__(self, attention: Any, dtype: torch.dtype) -> None:
        build = modeling_function(attention, "build_alibi_tensor")
        # The row of a text of two tokens: 0 and the slope.
        two = build(torch.ones(1, 2, dtype=torch.long), attention.num_heads, torch.float32)
        self.slopes = Slopes(two[:, 0, 1].bfloat16())
        self.dtype = dtype
        self.divisor = math.sqrt(attention.head_dim)

    def bias(self, queries: torch.Tensor, keys: torch.Tensor, num_heads: int) -> torch.Tensor:
        """``[B, H, 1, N]``: by the key alone, which softmax cannot tell from the distance."""
        slopes = self.slopes.on(keys.device, num_heads)
        steps = slopes * keys[:, None, None].bfloat16()
        return steps.to(self.dtype) / self.divisor


def attention_forward(attention: Any, *args: Any, **kwargs: Any) -> Any:
    """Falcon's attention; with an ADMS cache, over its tiers.

    Keys and values are cached once per KV head, where the new decoder architecture would cache them
    once per query head.
    """
    cache = kwargs.get("layer_past")
    if not isinstance(cache, ADMSKVCache):
        forward = types.MethodType(type(attention).forward, attention)
        return forward(*args, **kwargs)
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    fused = attention.query_key_value(hidden_states)
    query, key, value = (part.transpose(1, 2) for part in split_heads(attention, fused))
    cache.update(key, value, attention.layer_idx)
    dropout = attention.attention_dropout.p if attention.training else 0.0
    output = attend_layer(
        cache, attention.layer_idx, query, attention.head_dim**-0.5, dropout=dropout
    )
    return attention.dense(output.flatten(2)), None


def split_heads(attention: Any, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The fused projection ``[B, Q, ...]`` as queries ``[B, Q, H, D]``, keys and values
    ``[B, Q, K, D]``."""
    if not attention.new_decoder_architecture:
        return attention._split_heads(fused)
    # Falcon's own split repeats keys and values for every query head of their group.
    group = attention.num_heads // attention.num_kv_heads
    parts = fused.unflatten(2, (-1, group + 2, attention.head_dim))
    return parts[:, :, :, :-2].flatten(2, 3), parts[:, :, :, -2], parts[:, :, :, -1]


class FalconFamily(Family):
    """Falcon with rotary positions (multi-query, new decoder architecture) or ALiBi."""

    name = "Falcon"
    model_types = ("falcon",)
    positions = "rotary at cache positions when read, or ALiBi by cache positions"
    uses_attention_interface = False

    def max_positions(self, config: Any) -> int | None:
        """ALiBi takes any distance."""
        return None if config.alibi else int(config.max_position_embeddings)

    def default_sinks(self, config: Any) -> int | None:
        """More with ALiBi."""
        return ALIBI_SINKS if config.alibi else None

    def attentions(self, decoder: Any) -> list[nn.Module]:
        """``h[i].self_attention``."""
        return [layer.self_attention for layer in decoder.h]

    def kinds(self, decoder: nn.Module) -> list[LayerKind]:
        """Every layer attends to everything."""
        config: Any = decoder.config
        attentions = self.attentions(decoder)
        first: Any = attentions[0]
        scheme: RotaryScheme | FalconAlibi
        if config.alibi:
            scheme = FalconAlibi(first, self.dtype(decoder))
        else:
            scheme = RotaryScheme(
                decoder.rotary_emb,
                modeling_function(first, "apply_rotary_pos_emb"),
            )
        shape = TokenShape(first.num_kv_heads, first.head_dim, first.head_dim)
        return [LayerKind(shape, first.num_heads, scheme)] * len(attentions)

    def install(self, decoder: nn.Module) -> list[Undo]:
        """A forward in place of every attention module's own."""
        return [
            bind_method(attention, "forward", attention_forward)
            for attention in self.attentions(decoder)
        ]

    def adjust(self, arguments: dict[str, Any], cache: ADMSKVCache) -> None:
        """With ALiBi, the decoder counts positions in a two-dimensional mask."""
        if cache.sizes.max_positions is not None:
            return
        stand_in = arguments["attention_mask"]
        inputs = arguments.get("input_ids")
        inputs = arguments["inputs_embeds"] if inputs is None else inputs
        arguments["attention_mask"] = stand_in.new_ones(inputs.shape[:2], dtype=torch.long)


FAMILIES.append(FalconFamily())
