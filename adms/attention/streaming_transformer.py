"""A small transformer for streams of chunks whose keys and values are refreshed on demand.

Letters: ``B`` batch (independent streams), ``N`` tokens of a chunk, ``C`` dims, ``L`` layers,
``T`` frames, ``H`` heads, ``D`` head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from adms.attention.adaptive_update import AdaptiveUpdateAttention, UpdateCaches
from adms.attention.projections import LayerNorm, Linear, check_positive, check_states
from adms.errors import ADMSTypeError, ADMSValueError


class StreamingTransformer(nn.Module):
    """Pre-norm transformer blocks around `AdaptiveUpdateAttention`, with the stream's caches.

    Memory is that of one chunk per layer, however long the stream. The caches are the stream's and
    not the model's: they are not part of ``state_dict``; `reset` starts another stream.

    Args:
        dims: features ``C``.
        heads: number of heads.
        num_layers: number of blocks ``L``.
        embedding: maps what `process_stream_chunk` gets to ``[B, N, C]``; None where chunks are
            ``[B, N, C]`` already.
        max_dist: tokens, see `AdaptiveUpdateAttention`.
        is_causal: token i of a chunk attends to tokens 0..i.
        detach_caches: True ends gradients at the chunk's start, so that a long stream can be
            trained in bounded memory; False keeps the graph until `reset`.

    Attributes:
        key_caches, value_caches: per layer ``[B, H, N, D]``, None before the first chunk.
        key_updated, value_updated: boolean ``[L, B]`` of the last chunk, None before the first.

    Raises:
        ADMSValueError: a size below 1, or ``dims`` no multiple of ``heads``.
    """

    def __init__(
        self,
        dims: int,
        heads: int,
        num_layers: int,
        embedding: nn.Module | None = None,
        *,
        max_dist: int = 512,
        is_causal: bool = False,
        detach_caches: bool = True,
    ) -> None:
        super().__init__()
        check_positive("num_layers", num_layers)
        if embedding is not None and not isinstance(embedding, nn.Module):
            raise ADMSTypeError(
                f"embedding must be a torch module or None, got {type(embedding).__name__}; "
                f"pass e.g. torch.nn.Linear(features, {dims})"
            )
        self.dims = dims
        self.num_layers = num_layers
        self.embedding = nn.Identity() if embedding is None else embedding
        self.adaptive_layers = nn.ModuleList(
            AdaptiveUpdateAttention(dims, heads, max_dist) for _ in range(num_layers)
        )
        self.attention_norms = nn.ModuleList(LayerNorm(dims) for _ in range(num_layers))
        self.mlp_norms = nn.ModuleList(LayerNorm(dims) for _ in range(num_layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(Linear(dims, 4 * dims), nn.GELU(), Linear(4 * dims, dims))
            for _ in range(num_layers)
        )
        self.is_causal = is_causal
        self.detach_caches = detach_caches
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next chunk starts another one, of any batch size."""
        self.key_caches: list[Tensor | None] = [None] * self.num_layers
        self.value_caches: list[Tensor | None] = [None] * self.num_layers
        self.key_updated: Tensor | None = None
        self.value_updated: Tensor | None = None

    @property
    def update_cost(self) -> Tensor | None:
        """Mean update probability of the last chunk in training (a scalar), or None."""
        layers = [cast(AdaptiveUpdateAttention, layer) for layer in self.adaptive_layers]
        costs = [layer.update_cost for layer in layers if layer.update_cost is not None]
        return torch.stack(costs).mean() if costs else None

    def process_stream_chunk(self, new_data: Tensor, mask: Tensor | None = None) -> Tensor:
        """Process the next chunk of the stream.

        Args:
            new_data: ``[B, N, C]``, or what ``embedding`` takes.
            mask: over the chunk's tokens, see `AdaptiveUpdateAttention`.

        Returns:
            ``[B, N, C]``.

        Raises:
            ADMSTypeError: the embedded chunk is not floating point, or of another dtype or device
                than the stream so far.
            ADMSValueError: it is not ``[B, N, C]``, or has another batch than the stream so far.
                The stream is then as it was before the call.
        """
        x = self.embedding(new_data)
        check_states("the embedded chunk", x, self.dims)
        caches: list[UpdateCaches] = []
        blocks = zip(
            self.adaptive_layers, self.attention_norms, self.mlp_norms, self.mlps, strict=True
        )
        for index, (attention, attention_norm, mlp_norm, mlp) in enumerate(blocks):
            attended, cache = attention(
                attention_norm(x),
                mask=mask,
                key_cache=self.key_caches[index],
                value_cache=self.value_caches[index],
                is_causal=self.is_causal,
            )
            x = x + attended
            x = x + mlp(mlp_norm(x))
            caches.append(cache)
        # Stored only now: an error in a later layer must not leave half a chunk behind.
        for index, cache in enumerate(caches):
            keys, values = cache["key_cache"], cache["value_cache"]
            self.key_caches[index] = keys.detach() if self.detach_caches else keys
            self.value_caches[index] = values.detach() if self.detach_caches else values
        self.key_updated = torch.stack([cache["key_updated"] for cache in caches])
        self.value_updated = torch.stack([cache["value_updated"] for cache in caches])
        return cast(Tensor, x)

    def forward(self, new_data: Tensor, mask: Tensor | None = None) -> Tensor:
        """Process the next chunk: `process_stream_chunk` under the name that modules have."""
        return self.process_stream_chunk(new_data, mask)


def process_video_sequence(
    frames: Iterable[Tensor], model: AdaptiveUpdateAttention | StreamingTransformer
) -> tuple[list[Tensor], Tensor]:
    """Run a whole sequence of frames through a layer or a model, from a fresh start.

    Args:
        frames: ``T`` frames ``[B, N, C]`` (or what the model's ``embedding`` takes), as a tensor
            with ``T`` first, a list, or a generator.
        model: a `StreamingTransformer` is reset first, and keeps the caches of the last frame.

    Returns:
        The outputs, ``T`` tensors ``[B, N, C]``, and ``update_frames``, boolean ``[T, B]``: True
        where the frame's keys were computed anew (in any layer). The first frame is always True.

    Raises:
        ADMSTypeError: another kind of model.
        ADMSValueError: no frames.
    """
    outputs: list[Tensor] = []
    updates: list[Tensor] = []
    if isinstance(model, StreamingTransformer):
        model.reset()
        for frame in frames:
            outputs.append(model.process_stream_chunk(frame))
            updates.append(cast(Tensor, model.key_updated).any(dim=0))
    elif isinstance(model, AdaptiveUpdateAttention):
        keys = values = None
        for frame in frames:
            output, caches = model(frame, key_cache=keys, value_cache=values)
            keys, values = caches["key_cache"], caches["value_cache"]
            outputs.append(output)
            updates.append(caches["key_updated"])
    else:
        raise ADMSTypeError(
            "model must be an AdaptiveUpdateAttention or a StreamingTransformer, "
            f"got {type(model).__name__}; wrap the layer in one of them"
        )
    if not outputs:
        raise ADMSValueError("frames must hold at least one frame, got none; check the source")
    return outputs, torch.stack(updates)
