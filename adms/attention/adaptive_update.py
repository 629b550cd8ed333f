"""Attention that refreshes the keys and values of a stream only where its content asks for it.

Letters: ``B`` batch (independent streams), ``H`` heads, ``Q`` queries, ``N`` tokens that keys and
values come from, ``D`` head size, ``C = H * D`` dims.

Queries are always fresh. For every row of the batch two small predictors decide whether its keys
and its values are computed anew or taken from the previous chunk, slot by slot. So a cached key
stands for the token in the same slot of the current chunk, as with the patches of video frames.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from adms.attention.projections import (
    AttentionCombiner,
    BaseAttention,
    KeyModule,
    Linear,
    ProjectionModule,
    QueryModule,
    ValueModule,
    check_mask,
    check_states,
    combine_masks,
    distance_mask,
)
from adms.errors import ADMSTypeError, ADMSValueError


class UpdateCaches(TypedDict):
    """What a chunk leaves for the next one.

    ``key_cache`` and ``value_cache`` are ``[B, H, N, D]``; ``key_updated`` and ``value_updated``
    are boolean ``[B]``, True where the row was computed anew.
    """

    key_cache: Tensor
    value_cache: Tensor
    key_updated: Tensor
    value_updated: Tensor


def _update_predictor(dims: int) -> nn.Sequential:
    """Return the predictor of the sources, opened so far that an untrained one always refreshes."""
    hidden = max(1, dims // 4)
    last = Linear(hidden, 1)
    # An untrained gate must not reuse keys at random: it starts as exact attention.
    nn.init.normal_(last.weight, std=0.02)
    nn.init.ones_(last.bias)
    return nn.Sequential(Linear(dims, hidden), nn.ReLU(), last, nn.Sigmoid())


class AdaptiveUpdateAttention(BaseAttention):
    """Attention with fresh queries, and keys and values that are refreshed per row on demand.

    A predictor sees the mean of the chunk, and, where there is a cache, also the drift: the log of
    how far the mean key (or value) would move, relative to the cached one. Since a projection is
    linear, this costs one projected token. The weight of the drift starts at 0 and is learned.
    Motion that leaves the mean of a chunk where it was shows in no predictor.

    - Training: a straight-through gate (forward the hard decision, backward the probability), so
      the loss reaches the predictors; `update_cost` is the term to add for fewer updates.
    - Inference: projections are computed for rows that update and for no others.

    A cache whose number of tokens differs from the current chunk's cannot stand in for it slot by
    slot: all rows are then refreshed, and reported so. Hence the returned caches always have as
    many tokens as the current chunk, and ``mask`` always speaks of the current chunk's tokens.

    Under ``is_causal`` the decision is made from the chunk's first token alone: the mean of the
    whole chunk would tell early queries about later tokens.

    Args:
        dims: features ``C``.
        heads: number of heads ``H``.
        max_dist: tokens; in self-attention, keys this far from a query or farther are not
            attended. Tokens of ``xa`` have no distance, so there it doesn't apply.

    Attributes:
        update_threshold: a row updates where its probability is above it; 0..1, and 1 never
            updates. Default 0.5.
        update_cost: after a forward in training, the mean update probability (a scalar with
            gradient), None where no decision was made.

    Raises:
        ADMSValueError: ``dims`` is not a multiple of ``heads``, or a size below 1.

    Source: the project's own; the straight-through gate is Bengio, Leonard and Courville (2013),
    arXiv 1308.3432, section 4.
    """

    def __init__(self, dims: int, heads: int, max_dist: int = 512) -> None:
        super().__init__(dims, heads, max_dist)
        self.query_module = QueryModule(dims, heads)
        self.key_module = KeyModule(dims, heads)
        self.value_module = ValueModule(dims, heads)
        self.combiner = AttentionCombiner(dims, heads)
        self.key_update_predictor = _update_predictor(dims)
        self.value_update_predictor = _update_predictor(dims)
        self.key_drift_weight = nn.Parameter(torch.zeros(()))
        self.value_drift_weight = nn.Parameter(torch.zeros(()))
        self.update_threshold = 0.5
        self.update_cost: Tensor | None = None

    @property
    def update_threshold(self) -> float:
        """The probability above which a row updates."""
        return self._update_threshold

    @update_threshold.setter
    def update_threshold(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ADMSValueError(
                f"update_threshold must be within 0..1, got {value}; "
                "0.5 is neutral, 1 never updates"
            )
        self._update_threshold = float(value)

    def __getstate__(self) -> dict[str, Any]:
        # The cost holds a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "update_cost": None}

    def key_update_probability(self, x: Tensor, key_cache: Tensor | None = None) -> Tensor:
        """Return ``[B]``, the probability that the keys of ``x`` ``[B, N, C]`` need a refresh.

        With ``key_cache`` ``[B, H, N, D]`` the drift from it counts too.
        """
        return self._probability(
            x, key_cache, self.key_update_predictor, self.key_module, self.key_drift_weight
        )

    def value_update_probability(self, x: Tensor, value_cache: Tensor | None = None) -> Tensor:
        """Return ``[B]``, as `key_update_probability`, for values."""
        return self._probability(
            x, value_cache, self.value_update_predictor, self.value_module, self.value_drift_weight
        )

    def should_update_key(self, x: Tensor, key_cache: Tensor | None = None) -> Tensor:
        """Return boolean ``[B]``: which rows of ``x`` ``[B, N, C]`` need fresh keys."""
        return self.key_update_probability(x, key_cache) > self.update_threshold

    def should_update_value(self, x: Tensor, value_cache: Tensor | None = None) -> Tensor:
        """Return boolean ``[B]``: which rows of ``x`` ``[B, N, C]`` need fresh values."""
        return self.value_update_probability(x, value_cache) > self.update_threshold

    def forward(
        self,
        x: Tensor,
        xa: Tensor | None = None,
        mask: Tensor | None = None,
        key_cache: Tensor | None = None,
        value_cache: Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> tuple[Tensor, UpdateCaches]:
        """Attend from ``x`` to itself or to ``xa``, with cached keys and values where they serve.

        Args:
            x: ``[B, Q, C]``, what queries come from.
            xa: ``[B, N, C]``, what keys and values come from; ``x`` where None.
            mask: over the current chunk's tokens, boolean (True = attend) or added to the scores;
                ``[Q, N]``, ``[B, Q, N]`` or ``[B, 1 or H, Q, N]``.
            key_cache: ``[B, H, N', D]`` of the previous chunk. Rows that keep it need ``N' == N``;
                otherwise all are refreshed.
            value_cache: as ``key_cache``.
            is_causal: token i attends to tokens 0..i of the chunk.

        Returns:
            The output ``[B, Q, C]`` and the caches to pass with the next chunk. The caches given
            are not changed; one that no row refreshed is returned as it is.

        Raises:
            ADMSTypeError: an input that isn't floating point, or a cache of another dtype/device.
            ADMSValueError: shapes that don't fit, or ``is_causal`` with ``xa``.
        """
        check_states("x", x, self.dims)
        source = x if xa is None else xa
        if xa is not None:
            check_states("xa", xa, self.dims)
            if xa.shape[0] != x.shape[0]:
                raise ADMSValueError(
                    f"xa must have the batch of x, {x.shape[0]}, got {xa.shape[0]}; "
                    "give every row its own source"
                )
            if is_causal:
                raise ADMSValueError(
                    "is_causal must be False with xa, whose tokens have no order relative to x; "
                    "pass a mask that says which of them a query may see"
                )
        self._check_cache("key_cache", key_cache, x)
        self._check_cache("value_cache", value_cache, x)

        seen = source[:, :1] if is_causal else source
        keys, key_updated, key_cost = self._refresh(
            source, seen, key_cache, self.key_module, self.key_update_probability
        )
        values, value_updated, value_cost = self._refresh(
            source, seen, value_cache, self.value_module, self.value_update_probability
        )
        costs = [cost for cost in (key_cost, value_cost) if cost is not None]
        self.update_cost = torch.stack(costs).mean() if costs else None

        batch, queries, num_keys = x.shape[0], x.shape[1], source.shape[1]
        if mask is not None:
            mask = check_mask(mask, batch, self.head, queries, num_keys)
        if xa is None and self.max_dist < num_keys:
            near = distance_mask(queries, num_keys, self.max_dist, is_causal, x.device)
            mask, is_causal = combine_masks(mask, near), False
        output = self.combiner(self.query_module(x), keys, values, mask, is_causal=is_causal)
        return output, {
            "key_cache": keys,
            "value_cache": values,
            "key_updated": key_updated,
            "value_updated": value_updated,
        }

    def _probability(
        self,
        x: Tensor,
        cache: Tensor | None,
        predictor: nn.Sequential,
        projection: ProjectionModule,
        drift_weight: Tensor,
    ) -> Tensor:
        check_states("x", x, self.dims)
        self._check_cache("the cache", cache, x)
        mean = x.mean(dim=1)
        if cache is None:
            return predictor(mean).squeeze(-1)
        # Measured, not learned through: keys should serve attention and not please their gate.
        with torch.no_grad():
            fresh = projection(mean[:, None]).squeeze(2)
            cached = cache.mean(dim=2)
            moved, size = (fresh - cached).flatten(1), cached.flatten(1)
            tiny = torch.finfo(cached.dtype).tiny
            drift = moved.norm(dim=1) / size.norm(dim=1).clamp(min=tiny)
            # The log tells 1% from 10% as it tells 10% from 100%; bounded, since 0 is common.
            drift = drift.clamp(1e-4, 1e4).log()
        logit = predictor[:-1](mean).squeeze(-1) + drift_weight.to(drift.dtype) * drift
        return logit.sigmoid()

    def _refresh(
        self,
        source: Tensor,
        seen: Tensor,
        cache: Tensor | None,
        projection: ProjectionModule,
        probability: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys or values ``[B, H, N, D]``, which rows are fresh, and the cost or None."""
        batch, tokens = source.shape[:2]
        if cache is None or cache.shape[2] != tokens:
            updated = torch.ones(batch, dtype=torch.bool, device=source.device)
            return projection(source), updated, None
        chance = probability(seen, cache[:, :, : seen.shape[1]])
        updated = chance > self.update_threshold
        if self.training and torch.is_grad_enabled():
            # Exactly 0 or 1 forward: the difference is exactly 0, with the gradient of `chance`.
            gate = (updated.to(cache.dtype) + (chance - chance.detach())).view(-1, 1, 1, 1)
            return gate * projection(source) + (1 - gate) * cache, updated, chance.mean()
        rows = updated.nonzero().squeeze(1)
        if rows.numel() == 0:
            return cache, updated, None
        if rows.numel() == batch:
            return projection(source), updated, None
        return cache.index_copy(0, rows, projection(source[rows])), updated, None

    def _check_cache(self, name: str, cache: Tensor | None, x: Tensor) -> None:
        if cache is None:
            return
        wanted = (x.shape[0], self.head, self.head_dim)
        if cache.dim() != 4 or (cache.shape[0], cache.shape[1], cache.shape[3]) != wanted:
            raise ADMSValueError(
                f"{name} must be [{wanted[0]}, {wanted[1]}, tokens, {wanted[2]}] as this layer "
                f"returned it for the same batch, got {list(cache.shape)}; "
                "pass None to start another stream"
            )
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        if cache.dtype != dtype or cache.device != x.device:
            raise ADMSTypeError(
                f"{name} must be {dtype} on {x.device}, got {cache.dtype} on {cache.device}; "
                "move it with .to(...), or pass None to start another stream"
            )
