"""Attention modules that learn which blocks of keys each block of queries should attend to.

Shapes: `B` batch, `N` keys, `Q` queries (the last `Q` of the `N` positions), `H` heads, `D` head
size, `I` query blocks, `J` key blocks, `P` patterns (`H`, or 1 if shared across heads).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adms.attention.block_sparse.config import AdaptiveConfig
from adms.attention.block_sparse.kernels import (
    Kernel,
    block_sparse_attention,
    soft_block_attention,
)
from adms.attention.block_sparse.layout import BlockLayout, Budget, block_budget, check_levels
from adms.attention.block_sparse.replay import Replay
from adms.attention.block_sparse.scorer import (
    BudgetPredictor,
    ImportanceScorer,
    block_mean_squares,
    first_of_blocks,
    summarize_blocks,
)
from adms.attention.block_sparse.selection import gumbel_softmax_topk
from adms.errors import ADMSTypeError, ADMSValueError, CacheStateError
from adms.kernels import has_triton


class BlockSparseAdaptive(nn.Module):
    """Block-sparse attention whose pattern follows from the content.

    A row of the pattern is a block of queries. It attends to a local pattern (segments and
    dilation) and to the blocks of keys that an importance scorer, reading summaries of blocks,
    ranks highest; how many of those is predicted too (`budget_range`). In training selection is
    soft (every block counts by how much it is chosen; dense cost) or, with `hard_sparsity`, hard
    with the soft gradient. In evaluation it is hard, without noise, and runs on a sparse kernel.

    Source: seeds' "Content-Adaptive Attention Patterns Guide".
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        num_heads: int,
        head_dim: int,
        adaptive_config: AdaptiveConfig | None = None,
        *,
        kernel: Kernel = "auto",
    ) -> None:
        """Makes the scorer and the budget predictor.

        Args:
            segment_lengths: Tokens in a segment of each level of the local pattern; multiples of
                the block size.
            dilation_rates: Of as many levels: every how many-th block of a segment is reached.
            num_heads: H.
            head_dim: D.
            adaptive_config: None means `AdaptiveConfig()`.
            kernel: As in `block_sparse_attention`.

        Raises:
            ADMSTypeError: `adaptive_config` is no `AdaptiveConfig`.
            ADMSValueError: Segments, dilation, heads or size do not fit.
        """
        super().__init__()
        config = AdaptiveConfig() if adaptive_config is None else adaptive_config
        if not isinstance(config, AdaptiveConfig):
            raise ADMSTypeError(
                f"adaptive_config must be an AdaptiveConfig, got {type(config).__name__}"
            )
        check_levels(segment_lengths, dilation_rates, config.block_size)
        if num_heads < 1 or head_dim < 1:
            raise ADMSValueError(
                f"num_heads and head_dim must be at least 1, got {num_heads} and {head_dim}"
            )
        self.segment_lengths = tuple(segment_lengths)
        self.dilation_rates = tuple(dilation_rates)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.config = config
        self.kernel: Kernel = kernel
        patterns = 1 if config.share_across_heads else num_heads
        self.scorer = ImportanceScorer(head_dim, patterns, config.hidden_dim, config.num_layers)
        self.budget = (
            BudgetPredictor(head_dim, patterns, config.hidden_dim) if config.budget_range else None
        )
        log_temperature = torch.tensor(math.log(config.temperature))
        if config.learnable_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)
        self._density: Tensor | None = None
        self._replay = Replay()
        self._target_density = 0.0
        # A trainer sets a list to gather (pattern [B, H, I, J], sparsity [B, H]) of each call.
        self.recorded: list[tuple[Tensor, Tensor]] | None = None

    @property
    def temperature(self) -> float:
        """Temperature of the soft selection, at least `min_temperature`."""
        return float(self._temperature().detach())

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not self.config.min_temperature <= value < math.inf:
            raise ADMSValueError(
                f"temperature must be at least min_temperature {self.config.min_temperature}, "
                f"got {value}"
            )
        with torch.no_grad():
            self.log_temperature.fill_(math.log(value))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        return_pattern: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """Attends; gives the output [B, Q, H, D], and with `return_pattern` also what was chosen.

        The second item holds "patterns", a list of one [B, I, J] a head (bool where selection
        was hard, weights within 0 and 1 where soft), and "sparsity" [B, H], the share of allowed
        pairs not attended.

        Args:
            q: [B, Q, H, D].
            k: [B, N, H, D].
            v: [B, N, H, D].
            is_causal: Whether keys after a query are hidden from it.
            return_pattern: Whether to return the pattern.

        Raises:
            ADMSValueError: A shape does not fit.
        """
        output, info = self.attend(q, k, v, is_causal)
        return (output, info) if return_pattern else output

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """As `forward` with the pattern."""
        self._check(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        size = self.config.block_size
        weights, sparsity = self.block_weights(q, k, is_causal)
        if weights.is_floating_point():
            output = soft_block_attention(q, k, v, weights, size, is_causal=is_causal)
            patterns = weights.detach()
            patterns = patterns > 0.5 if self.config.hard_sparsity else patterns
        else:
            output = block_sparse_attention(
                q, k, v, weights, size, is_causal=is_causal, kernel=self.kernel
            )
            patterns = weights
        info = {"patterns": list(patterns.unbind(1)), "sparsity": sparsity}
        return output.transpose(1, 2), info

    def block_weights(self, q: Tensor, k: Tensor, is_causal: bool = False) -> tuple[Tensor, Tensor]:
        """The pattern [B, H, I, J] for q [B, H, Q, D], k [B, H, N, D], and its sparsity [B, H].

        The pattern is bool where the sparse kernel is to run, else weights within 0 and 1 with
        a gradient.
        """
        config = self.config
        trained = self.training and (not config.hard_sparsity or config.straight_through)
        layout = BlockLayout(q.shape[2], k.shape[2], config.block_size, is_causal)
        budget = block_budget(layout, config, self.segment_lengths, self.dilation_rates, q.device)
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            summaries = self._summarize(q, k, is_causal and config.strict_causal)
            choose = functools.partial(
                self._choose, budget, trained, not trained or config.hard_sparsity
            )
            if trained or self.training or not Replay.applies(q):
                weights, density = choose(*summaries)
            else:
                # A recording reads parameters where they were.
                places = tuple(parameter.data_ptr() for parameter in self.parameters())
                weights, density = self._replay(choose, summaries, (id(budget), places), budget)
        weights = weights.expand(-1, self.num_heads, -1, -1)
        density = density.expand(-1, self.num_heads)
        self._density = density
        self._target_density = budget.target_density
        sparsity = 1.0 - density.detach()
        if self.recorded is not None:
            self.recorded.append((weights.detach() > 0.5, sparsity))
        return weights, sparsity

    def get_sparsity_loss(self) -> Tensor:
        """Squared distance of the last pattern's mean density from the one asked for, a scalar.

        Relative to the density asked for, so that 1 means all of it. Differentiable after a
        forward pass in training.

        Raises:
            CacheStateError: There was no forward pass yet.
        """
        if self._density is None:
            raise CacheStateError(
                "get_sparsity_loss speaks of the last forward pass and there was none; call the "
                "module first"
            )
        return (self._density.mean() / self._target_density - 1.0).square()

    def _summarize(self, q: Tensor, k: Tensor, strict: bool) -> list[Tensor]:
        """What is known of queries and keys: of query blocks, key blocks, their squares, and of
        coarse key blocks (empty where there are none)."""
        config, size = self.config, self.config.block_size
        if config.share_across_heads:
            q, k = q.mean(1, keepdim=True), k.mean(1, keepdim=True)
        if strict:
            # The kernels convert what they load.
            of_queries = q[..., ::size, :] if _takes_triton(q) else first_of_blocks(q, size)
        else:
            of_queries = _summaries(q, size, False)[0]
        of_keys, squares = _summaries(k, size, self.budget is not None)
        of_coarse = of_keys[:, :, :0]
        if config.coarse_factor is not None:
            of_coarse = _summaries(k, size * config.coarse_factor, False)[0]
        return [of_queries, of_keys, squares, of_coarse]

    def _choose(
        self,
        budget: Budget,
        trained: bool,
        hard: bool,
        of_queries: Tensor,
        of_keys: Tensor,
        squares: Tensor,
        of_coarse: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The local and adaptive pattern together, [B, P, I, J], and its density [B, P].

        The pattern is bool unless it is `trained`.
        """
        config = self.config
        factor = None
        if self.budget is not None:
            needed = self.budget(of_queries, of_keys, squares, budget.candidates)
            factor = 1.0 + config.budget_range * needed
        if not (trained or self.training) and self._in_one_launch(of_queries, of_keys):
            from adms.attention.block_sparse.selection_triton import choose_blocks

            wanted = budget.wanted
            if factor is not None:
                wanted = torch.maximum(budget.adaptive * factor, budget.least)
            chosen, shares = choose_blocks(
                self.scorer,
                of_queries,
                of_keys,
                wanted,
                budget.candidates,
                budget.local,
                budget.pairs,
            )
            return chosen, shares.sum(-1)
        if factor is None:
            factor = torch.ones_like(of_queries[..., 0])
        scores = self.scorer(of_queries, of_keys, budget.candidates)
        weights = budget.local.to(scores.dtype)
        fine = budget.adaptive
        allowed = budget.fine_candidates
        if config.coarse_factor is not None:
            coarse = self._choose_coarse(of_queries, of_coarse, budget, factor, hard)
            fine = fine - budget.coarse * config.coarse_factor
            weights = 1.0 - (1.0 - weights) * (1.0 - coarse)
        wanted = torch.maximum(fine * factor, budget.least)
        chosen = self._select(scores, wanted, allowed, hard)
        weights = 1.0 - (1.0 - weights) * (1.0 - chosen)
        density = weights.sum((-1, -2)) / budget.pairs
        return (weights if trained else weights > 0.5), density

    def _in_one_launch(self, of_queries: Tensor, of_keys: Tensor) -> bool:
        """Whether the choice without noise and gradients is to be made by the Triton kernel."""
        if self.config.coarse_factor is not None or not _takes_triton(of_queries):
            return False
        from adms.attention.block_sparse.selection_triton import scores_fit

        wide = torch.float64 in (of_queries.dtype, of_keys.dtype)
        return not wide and scores_fit(self.scorer, of_keys.shape[2])

    def _choose_coarse(
        self, of_queries: Tensor, of_keys: Tensor, budget: Budget, factor: Tensor, hard: bool
    ) -> Tensor:
        """Weights [B, P, I, J] of the blocks chosen as members of coarse blocks."""
        merged = self.config.coarse_factor or 1
        scores = self.scorer(of_queries, of_keys, budget.coarse_candidates)
        chosen = self._select(scores, budget.coarse * factor, budget.coarse_candidates, hard)
        return chosen.repeat_interleave(merged, -1)[..., : budget.allowed.shape[-1]]

    def _select(self, scores: Tensor, count: Tensor, allowed: Tensor, hard: bool) -> Tensor:
        noise = self.training and self.config.gumbel_noise
        temperature = self._temperature()
        return gumbel_softmax_topk(scores, count, temperature, hard, allowed=allowed, noise=noise)

    def _temperature(self) -> Tensor:
        return self.log_temperature.exp().clamp(min=self.config.min_temperature)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        tail = [self.num_heads, self.head_dim]
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise ADMSTypeError(f"{name} must be a floating-point tensor, got {kind}")
            if x.dim() != 4 or list(x.shape[2:]) != tail or x.shape[0] != q.shape[0]:
                raise ADMSValueError(
                    f"{name} must be [batch, tokens, {tail[0]}, {tail[1]}] with the batch of q, "
                    f"got {list(x.shape)}"
                )
        if v.shape != k.shape:
            raise ADMSValueError(f"v must have the shape of k {list(k.shape)}, got {list(v.shape)}")

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what can be neither copied nor pickled: graphs of either kind."""
        return {**self.__dict__, "_density": None, "_replay": Replay()}


def _takes_triton(x: Tensor) -> bool:
    """Whether kernels without gradients and in dtypes of their own can serve here."""
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled()
    return x.is_cuda and plain and has_triton()


def _summaries(x: Tensor, block_size: int, squares: bool) -> tuple[Tensor, Tensor]:
    """Means [B, H, J, D] of blocks of x [B, H, N, D], and if asked for mean squares, else none."""
    if _takes_triton(x):
        from adms.attention.block_sparse.summaries_triton import block_summaries, summaries_fit

        if summaries_fit(x):
            return block_summaries(x, block_size, squares)
    means = summarize_blocks(x, block_size)
    return means, block_mean_squares(x, block_size) if squares else means[..., :0]
