"""Local attention over an adaptive span beside global attention with adaptive updates.

Letters: ``B`` batch, ``H`` heads, ``N`` tokens, ``D`` head size, ``C = H * D`` dims, ``S`` segments
(blocks of ``win_size`` tokens, one decision of the refiner each), ``M`` windows of all rows, ``Q``
and ``K`` queries and keys of a window. Spans, distances and window sizes are in tokens.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adms.attention.adaptive_span import AdaptiveSpan, Predictor
from adms.attention.adaptive_update import AdaptiveUpdateAttention
from adms.attention.focus import focus
from adms.attention.projections import (
    LayerNorm,
    Linear,
    add_mask,
    check_mask,
    check_positive,
    check_states,
)
from adms.attention.refiner import Refiner, StateGrid
from adms.attention.sliding_windows import SlidingWindows
from adms.attention.span_features import (
    NUM_FEATURES,
    SpanReport,
    retained_mass,
    segment_features,
    segment_means,
)
from adms.errors import ADMSValueError


class IntegratedAttention(nn.Module):
    """Two paths, joined by a projection: a local one of adaptive span and a global one.

    The span of a query is ``predicted scale * refined scale * min(max_span, max_dist)`` tokens. The
    predictor reads the global path's output and learns by gradient, through the soft edge of the
    span. The refiner (Q-learning) chooses a factor 0..1 for every segment, and learns from a reward
    of retained attention mass minus ``cost_weight`` times the span's share. It explores and learns
    while training, and at inference where ``learn_online`` is set; otherwise a forward changes
    nothing and is a function of its input.

    With ``causal`` no output depends on later tokens, by any way: the predictor reads the running
    mean up to each query (else the mean of the row, padding included), the refiner decides from the
    segment before (else from the segment itself), and the global gate from the first token.

    A row's output doesn't depend on the other rows. What is computed does: windows are as wide as
    the widest span in the batch needs, narrower spans being masked inside.

    Args:
        ctx: the longest input, tokens; longer ones raise.
        dims: features ``C``.
        head: number of heads ``H``.
        max_dist: tokens; nothing this far or farther is attended on either path.
        win_size: queries of a window at most, and tokens of a segment.
        max_span: the longest span.
        temp_scale: see `AdaptiveSpan`.
        causal: nobody looks ahead.
        sharpen: see `AdaptiveSpan`.
        ramp: tokens of the span's soft edge.
        overlap: share, 0..1, of the reach that a window's keys cover beyond its queries. 1 lets
            every query see its whole span; less is cheaper and cuts spans at window borders.
        cost_weight: what the whole span costs in the reward, in attention mass.
        learn_online: let the refiner explore and learn at inference too.
        seed: of the refiner.
        max_iterations: how often the local path may attend, feeding its output back to the query.
        threshold: absolute part of the change below which a query stops.
        s_factor: part of the change below which a query stops, relative to its output's size.

    Attributes:
        report: `SpanReport` of the last forward, None before.
        span_cost: mean span scale of the last forward in training, a scalar with gradient to add
            to a loss (Sukhbaatar et al.'s penalty); else None.

    Raises:
        ADMSTypeError, ADMSValueError: an argument outside its range.

    Source: span Sukhbaatar et al. (2019), arXiv 1905.07799; refiner Watkins and Dayan (1992); their
    combination is the project's own.
    """

    def __init__(
        self,
        ctx: int,
        dims: int,
        head: int,
        max_dist: int = 512,
        win_size: int = 256,
        max_span: int = 384,
        temp_scale: float = 0.01,
        *,
        causal: bool = False,
        sharpen: bool = True,
        ramp: int = 32,
        overlap: float = 1.0,
        cost_weight: float = 0.1,
        learn_online: bool = False,
        seed: int = 0,
        max_iterations: int = 10,
        threshold: float = 1e-4,
        s_factor: float = 0.1,
    ) -> None:
        super().__init__()
        self.ctx = check_positive("ctx", ctx)
        self.sliding_window = check_positive("win_size", win_size)
        self.max_span = check_positive("max_span", max_span)
        self.max_iterations = check_positive("max_iterations", max_iterations)
        parts = {"cost_weight": cost_weight, "threshold": threshold, "s_factor": s_factor}
        for name, value in parts.items():
            if not 0.0 <= value < math.inf:
                raise ADMSValueError(f"{name} must be at least 0 and finite, got {value}; use 0.1")
        if not 0.0 <= overlap <= 1.0:
            raise ADMSValueError(f"overlap must be within 0..1, got {overlap}; 1 covers all spans")
        self.dims = dims
        self.head = head
        self.max_dist = max_dist
        self.causal = causal
        self.overlap = float(overlap)
        self.cost_weight = float(cost_weight)
        self.learn_online = learn_online
        self.threshold = float(threshold)
        self.s_factor = float(s_factor)
        self.refiner = Refiner(states=10000, actions=10, seed=seed)
        self.grid = StateGrid(self.refiner.states, NUM_FEATURES)
        self.span_pred = Predictor(dims)
        self.attn_local = AdaptiveSpan(dims, head, max_dist, sharpen, temp_scale, ramp=ramp)
        # Spans come from the predictor here; a second, unused parameter would only confuse.
        self.attn_local.span_scale.requires_grad_(False)
        self.attn_global = AdaptiveUpdateAttention(dims, head, max_dist)
        self.projection = Linear(2 * dims, dims)
        self.ln_a = LayerNorm(dims)
        self.ln_b = LayerNorm(dims)
        self.report: SpanReport | None = None
        self.span_cost: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The cost holds a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "span_cost": None}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the refiner's state: the Q-table travels with ``state_dict``."""
        return self.refiner.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the refiner's state."""
        self.refiner.load_state_dict(state)

    def forward(
        self,
        x: Tensor,
        xa: Tensor | None = None,
        mask: Tensor | None = None,
        kv_cache: dict[str, Tensor] | None = None,
        *,
        xa_mask: Tensor | None = None,
    ) -> Tensor:
        """Return ``[B, N, C]`` for ``x`` ``[B, N, C]``.

        Args:
            x: the tokens.
            xa: ``[B, N', C]``: the global path attends to it instead of ``x``.
            mask: over the tokens of ``x``, for both paths (with ``xa`` for the local one); boolean
                (True = attend) or added to the scores; ``[N, N]``, ``[B, N, N]`` or
                ``[B, 1 or H, N, N]``.
            kv_cache: the global path's caches, kept by the caller: start a stream with ``{}`` and
                pass the same dict with every chunk. A call that succeeds writes to it what
                `AdaptiveUpdateAttention` returns. None computes everything anew.
            xa_mask: over the tokens of ``xa``, ``[N, N']`` and so on.

        Raises:
            ADMSTypeError: an input that isn't floating point.
            ADMSValueError: more than ``ctx`` tokens, shapes that don't fit, NaN or infinity in
                ``x``, or ``xa_mask`` without ``xa``.
        """
        check_states("x", x, self.dims)
        batch, tokens = x.shape[:2]
        if tokens > self.ctx:
            raise ADMSValueError(
                f"x must have at most ctx = {self.ctx} tokens, got {tokens}; "
                "split it into chunks or build the layer with a larger ctx"
            )
        if xa is None and xa_mask is not None:
            raise ADMSValueError("xa_mask must come with xa, got it alone; use mask for x")
        if mask is not None:
            mask = check_mask(mask, batch, self.head, tokens, tokens)
        local, globe = self.ln_a(x), self.ln_b(x)
        given = {} if kv_cache is None else kv_cache
        globe_out, caches = self.attn_global(
            globe,
            None if xa is None else self.ln_b(xa),
            mask if xa is None else xa_mask,
            given.get("key_cache"),
            given.get("value_cache"),
            is_causal=self.causal and xa is None,
        )
        predicted = self._predict(globe_out)
        segment_states = self.extract(local, predicted)
        states = F.pad(segment_states[:, :-1], (1, 0)) if self.causal else segment_states
        learning = self.training or self.learn_online
        actions = self.refiner.choose_actions(states, explore=learning)
        refined = self.action_scale(actions).to(predicted)
        segments = torch.arange(tokens, device=x.device) // self.sliding_window
        span_scale = (predicted * refined[:, segments]).clamp(0.0, 1.0)

        reach, win_size = self._plan(span_scale, tokens)
        local_out, iterations = self.slide_win(local, win_size, reach, span_scale, mask)
        rewards = None
        if learning:
            rewards = self.quality(local, span_scale, mask)
            # What the next segment decides from is where a decision leads to.
            following = (
                segment_states if self.causal else F.pad(segment_states[:, 1:], (0, 1), value=-1)
            )
            self.refiner.update(states, actions, rewards, following)
        self.span_cost = span_scale.mean() if self.training else None
        self.report = SpanReport(span_scale.detach(), actions, rewards, iterations, win_size, reach)
        if kv_cache is not None:
            # Detached: the next chunk's backward must not reach into this one's graph.
            kv_cache.update({name: cast(Tensor, kept).detach() for name, kept in caches.items()})
        joined: Tensor = self.projection(torch.cat([local_out, globe_out], dim=-1))
        return joined

    def _predict(self, globe_out: Tensor) -> Tensor:
        """Return the predictor's scale for every token, ``[B, N]``, in at least float32."""
        wide = globe_out.to(torch.promote_types(globe_out.dtype, torch.float32))
        if not self.causal:
            scale: Tensor = self.span_pred(wide).to(wide.dtype)
            return scale.expand(-1, globe_out.shape[1])
        counts = torch.arange(1, wide.shape[1] + 1, device=wide.device, dtype=wide.dtype)
        running = wide.cumsum(dim=1) / counts[:, None]
        scale = self.span_pred(running, pool=False).to(wide.dtype)
        return scale.squeeze(-1)

    @torch.no_grad()
    def _plan(self, span_scale: Tensor, tokens: int) -> tuple[int, int]:
        """Return the reach and the size of windows that serve these spans at the least cost."""
        ramp, farthest = self.attn_local.ramp, self.max_dist - 1
        if self.overlap < 1.0:
            # Borders show in the output here, so they mustn't depend on other rows or tokens.
            widest = min(self._longest_span + ramp - 1, farthest)
            return min(math.ceil(self.overlap * widest), tokens - 1), self.sliding_window
        largest, mean = torch.stack([span_scale.max(), span_scale.mean()]).tolist()
        widest = min(math.ceil(largest * self._longest_span + ramp) - 1, farthest)
        reach = min(widest, tokens - 1)
        # Not below the reach: each key is copied once per window that sees it.
        wanted = max(int(self.sliding_window * mean), reach, 1)
        return reach, min(wanted, self.sliding_window, tokens)

    @property
    def _longest_span(self) -> int:
        return min(self.max_span, self.max_dist)

    @torch.no_grad()
    def extract(self, x: Tensor, span_scale: Tensor) -> Tensor:
        """Return the refiner's state of every segment, ``[B, S]`` (int64, CPU): `segment_features`.

        Args:
            x: normalised tokens ``[B, N, C]``.
            span_scale: the predictor's ``[B, N]``.
        """
        features = segment_features(x, span_scale, self.sliding_window, self.ctx)
        return self.discretize(features)

    def discretize(self, state: Tensor) -> Tensor:
        """Return one number per grid cell ``[...]`` for features ``[..., 4]``; none is shared."""
        return self.grid.encode(state)

    def action_scale(self, action: Tensor) -> Tensor:
        """Return the factor 0..1 that an action stands for, of the same shape."""
        return action / (self.refiner.actions - 1)

    @torch.no_grad()
    def quality(self, x: Tensor, span_scale: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the reward of every segment ``[B, S]``: retained mass minus the span's cost.

        The mass, see `retained_mass`, is of what the longest span would attend to.

        Args:
            x: normalised tokens ``[B, N, C]``.
            span_scale: the chosen scales ``[B, N]``.
            mask: 4-D, as in `check_mask`.
        """
        kept = retained_mass(
            self.attn_local,
            x,
            span_scale,
            self.sliding_window,
            self._longest_span,
            self.causal,
            mask,
        )
        share = segment_means(span_scale, self.sliding_window)
        return (kept - self.cost_weight * share).cpu()

    def slide_win(
        self, x: Tensor, win_size: int, span_len: int, span_scale: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attend within sliding windows.

        Args:
            x: normalised tokens ``[B, N, C]``.
            win_size: queries of a window.
            span_len: tokens that a window's keys cover before (and, unless causal, after) it.
            span_scale: ``[B, N]``.
            mask: 4-D, as in `check_mask`.

        Returns:
            The output ``[B, N, C]`` and each query's number of iterations ``[B, N]``.
        """
        local = self.attn_local
        after = 0 if self.causal else span_len
        windows = SlidingWindows.over(x.shape[1], win_size, span_len, after, x.device)
        scale = windows.scales(span_scale)
        span = (scale * self._longest_span)[:, :, None, :, None]
        bias = local.edge_bias(windows.distance[:, None], span, self.max_dist, self.causal)
        bias = bias.masked_fill(~windows.exists[:, None], float("-inf"))
        if mask is not None:
            bias = add_mask(bias, windows.mask(mask))
        out, iterations = self._focus(
            windows.queries(local.query_module(x)),
            windows.keys(local.key_module(x)),
            windows.keys(local.value_module(x)),
            scale.flatten(0, 1),
            bias.flatten(0, 1),
        )
        merged = windows.merge(out).transpose(1, 2).flatten(2)
        return merged, windows.merge(iterations).flatten(1)

    def _focus(
        self, query: Tensor, key: Tensor, value: Tensor, span_scale: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend with the layer's temperature and stopping rule, see `focus`.

        Args:
            query: ``[M, H, Q, D]``.
            key: ``[M, H, K, D]``.
            value: ``[M, H, K, D]``.
            span_scale: ``[M, Q]``.
            mask: ``[M, 1 or H, Q, K]``, added to the scores.

        Returns:
            The output ``[M, H, Q, D]`` and the iterations of each query ``[M, 1, Q, 1]``.
        """
        temperature = self.attn_local.temperature(span_scale).to(query.dtype)
        return focus(
            query,
            key,
            value,
            mask.to(query.dtype),
            temperature[:, None, :, None],
            max_iterations=self.max_iterations,
            threshold=self.threshold,
            s_factor=self.s_factor,
            use_sdpa=self.attn_local.use_sdpa,
        )
