"""OPT: learned positions, added to the embeddings; approximate past the end of the table.

Shapes: ``B`` rows, ``Q`` new tokens, ``W`` width of an embedding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from adms.binding import LayerKind
from adms.cache import ADMSKVCache
from adms.config import Sizes
from adms.entries import TokenShape
from adms.patches.base import FAMILIES, Family, PlainScheme, Undo
from adms.tiers.window import WindowLayer
from adms.timeline import Timeline


class OPTFamily(Family):
    """OPT.

    A learned position enters a token's hidden states and stays in its keys and values, so a token
    in the cache cannot be moved to another position. Positions therefore run to the end of the
    table; then the recent tokens go through the model once more, at positions after the sinks, and
    the middle of that time is forgotten, since its positions would lie ahead of theirs. So the
    middle remembers at most a table's length, and what follows the first is approximate.

    What that takes is kept as one more layer of the cache: the recent tokens' embeddings as its
    keys ``[B, 1, ring, W]``, their positions as its values ``[B, 1, ring, 1]``. An error while
    tokens are encoded anew leaves each of them valid, at the old or at the new position.
    """

    name = "OPT"
    model_types = ("opt",)
    exact = "exact up to the table's end, approximate after it"
    positions = "learned; at the table's end the recent tokens are encoded anew, the middle dropped"

    def decoder(self, model: nn.Module) -> nn.Module:
        """``OPTDecoder``, which is inside the base model."""
        base: Any = model.base_model
        return base.decoder if hasattr(base, "decoder") else base

    def attentions(self, decoder: Any) -> list[nn.Module]:
        """``layers[i].self_attn``."""
        return [layer.self_attn for layer in decoder.layers]

    def kinds(self, decoder: nn.Module) -> list[LayerKind]:
        """Every layer attends to everything."""
        attentions = self.attentions(decoder)
        first: Any = attentions[0]
        shape = TokenShape(first.num_heads, first.head_dim, first.head_dim)
        return [LayerKind(shape, first.num_heads, PlainScheme())] * len(attentions)

    def further_kinds(self, decoder: Any, sizes: Sizes) -> list[LayerKind]:
        """Embeddings and positions of the recent tokens."""
        # Positions are float32 whatever the dtype of the rest, so they count twice.
        shape = TokenShape(1, decoder.config.word_embed_proj_dim, 2)
        index, kept = len(self.attentions(decoder)), sizes.ring
        make = partial(WindowLayer, index, kept + 1)
        return [LayerKind(shape, 1, PlainScheme(), make, kept)]

    def install(self, decoder: nn.Module) -> list[Undo]:
        """Keys hold no position that could be taken out of them."""
        return []

    def prepare(
        self, decoder: Any, forward: Callable[..., Any], cache: ADMSKVCache, new: list[int]
    ) -> None:
        """Encodes recent tokens anew in rows whose new ones would leave the table."""
        timeline, limit = cache.timeline, cache.sizes.max_positions
        if timeline is None or limit is None or not any(timeline.seen):
            return
        following = next_positions(cache, timeline)
        rows = [row for row, count in enumerate(new) if following[row] + count > limit]
        if rows:
            encode_anew(forward, cache, timeline, rows)

    def adjust(self, arguments: dict[str, Any], cache: ADMSKVCache) -> None:
        """The embeddings, which are kept, and the table's rows for the new tokens."""
        view = cache.require_view()
        embeddings = arguments.get("inputs_embeds")
        if embeddings is None:
            model: Any = cache.binding_for_use.model_key()
            embeddings = self.decoder(model).embed_tokens(arguments["input_ids"])  # type: ignore[operator]
            arguments["input_ids"], arguments["inputs_embeds"] = None, embeddings
        first = torch.tensor(next_positions(cache, view.timeline), device=embeddings.device)
        positions = first[:, None] + view.column_offsets()
        # Recent tokens were encoded anew where positions lag behind the text; what had left before
        # that holds positions which now lie ahead.
        lag = view.seen - first
        if bool((lag > 0).any()):
            view.forgotten = torch.where(lag > 0, lag + cache.sizes.sink, 0)
        arguments["position_ids"] = positions
        remember(cache, embeddings, positions)


def recent_layer(cache: ADMSKVCache) -> WindowLayer:
    """The layer that holds the recent tokens' embeddings and positions."""
    layer = cache.layers[-1]
    if not isinstance(layer, WindowLayer):
        raise RuntimeError("an OPT cache without its layer of embeddings")
    return layer


def remember(cache: ADMSKVCache, embeddings: torch.Tensor, positions: torch.Tensor) -> None:
    """Hands embeddings ``[B, Q, W]`` and positions ``[B, Q]`` of a pass to their layer."""
    recent_layer(cache).update(embeddings[:, None], positions[:, None, :, None].float())


def next_positions(cache: ADMSKVCache, timeline: Timeline) -> list[int]:
    """Per row, the position after that of its last token."""
    held = recent_layer(cache).values
    if held is None:
        return [0] * timeline.batch_size
    slots = torch.tensor([(seen - 1) % held.shape[2] for seen in timeline.seen])
    rows = torch.arange(timeline.batch_size)
    last: list[float] = held[rows.to(held.device), 0, slots.to(held.device), 0].tolist()
    return [int(one) + 1 if seen else 0 for one, seen in zip(last, timeline.seen, strict=True)]


def encode_anew(
    forward: Callable[..., Any], cache: ADMSKVCache, timeline: Timeline, rows: list[int]
) -> None:
    """Sends the recent tokens of some rows through the decoder at the earliest free positions.

    The ring is taken as empty meanwhile, so every token sees the sinks and the tokens before it at
    their new positions, and comes to lie in the slot it had.
    """
    layer, sizes = recent_layer(cache), cache.sizes
    held_embeddings = layer.keys
    if held_embeddings is None:
        raise RuntimeError("tokens without embeddings cannot be encoded anew")
    device, slots = held_embeddings.device, held_embeddings.shape[2]
    evicted = timeline.evicted
    held = [seen - evicted[row] if row in rows else 0 for row, seen in enumerate(timeline.seen)]
    width = max(held)
    column = torch.arange(width) - (width - torch.tensor(held))[:, None]
    valid = column >= 0
    tokens = torch.tensor(evicted)[:, None] + column.clamp(min=0)
    base = torch.tensor([min(one, sizes.sink) for one in evicted])
    positions = (base[:, None] + column.clamp(min=0)).to(device)
    batch = torch.arange(len(held), device=device)[:, None]
    embeddings = held_embeddings[batch, 0, (tokens % slots).to(device)]
    length = layer.length
    seen = [evicted[row] if row in rows else count for row, count in enumerate(timeline.seen)]
    cache.timeline = Timeline(sizes, timeline.block, seen, evicted, timeline.length - width)
    try:
        for part in torch.arange(width).split(sizes.chunk):
            cache.begin(len(held), len(part), valid[:, part], device)
            cache.require_view().forgotten = torch.tensor(evicted, device=device)
            inputs, places = embeddings[:, part.to(device)], positions[:, part.to(device)]
            remember(cache, inputs, places)
            forward(
                inputs_embeds=inputs,
                position_ids=places,
                attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
                past_key_values=cache,
                adms_cache=cache,
                use_cache=True,
            )
            cache.commit()
    except BaseException:
        cache.rollback()
        raise
    finally:
        cache.timeline = timeline
        layer.length = length


FAMILIES.append(OPTFamily())
