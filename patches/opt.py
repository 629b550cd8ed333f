"""OPT: learned positions, added to the embeddings; approximate past the end of the table.

Shapes: ``B`` rows, ``Q`` new tokens.
"""

from typing import Any

import torch
from torch import nn

from adms.binding import LayerKind
from adms.cache import ADMSKVCache
from adms.entries import TokenShape
from adms.patches.base import FAMILIES, Family, PlainScheme, Undo


class OPTFamily(Family):
    """OPT.

    A learned position enters a token's hidden states and stays in its keys and values, so a token
    kept in the cache cannot be moved to another position. Positions run to the end of the table and
    begin again after the sinks; within a window that straddles the end, order is lost.
    """

    name = "OPT"
    model_types = ("opt",)
    exact = "approximate past the table of learned positions"
    positions = "learned, up to the end of the table and then from after the sinks again"

    def decoder(self, model: nn.Module) -> nn.Module:
        """``OPTDecoder``, which is inside the base model."""
        base: Any = model.base_model
        return base.decoder if hasattr(base, "decoder") else base  # type: ignore[no-any-return]

    def attentions(self, decoder: nn.Module) -> list[nn.Module]:
        """``layers[i].self_attn``."""
        return [layer.self_attn for layer in decoder.layers]  # type: ignore[union-attr,misc]

    def kinds(self, decoder: nn.Module) -> list[LayerKind]:
        """Every layer attends to everything."""
        attentions = self.attentions(decoder)
        first: Any = attentions[0]
        shape = TokenShape(first.num_heads, first.head_dim, first.head_dim)
        return [LayerKind(shape, first.num_heads, PlainScheme())] * len(attentions)

    def install(self, decoder: nn.Module) -> list[Undo]:
        """Keys hold no position that could be taken out of them."""
        return []

    def adjust(self, arguments: dict[str, Any], cache: ADMSKVCache) -> None:
        """The table's rows for the new tokens."""
        view = cache.require_view()
        limit, first = cache.sizes.max_positions, cache.sizes.sink
        if limit is None:
            raise RuntimeError("OPT without a table of positions")
        tokens = view.seen[:, None] + view.column_offsets()
        wrapped = first + (tokens - first) % (limit - first)
        arguments["position_ids"] = torch.where(tokens < limit, tokens, wrapped)


FAMILIES.append(OPTFamily())
