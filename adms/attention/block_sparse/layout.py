"""Which block pairs causality allows, what the local pattern takes, and how many are left.

All of it follows from lengths and configuration, not from content, and is cached by them.

Shapes: `Q` queries, `N` keys, `I` query blocks, `J` key blocks, `C` coarse key blocks. The queries
are the last `Q` of the `N` positions.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adms.attention.block_sparse.config import AdaptiveConfig, get_adaptive_sparsity
from adms.errors import ADMSValueError


@dataclass(frozen=True)
class BlockLayout:
    """Lengths of a call and the patterns that follow from them alone."""

    num_queries: int
    num_keys: int
    block_size: int
    is_causal: bool

    def __post_init__(self) -> None:
        """Checks the lengths.

        Raises:
            ADMSValueError: There are no queries, or more than keys.
        """
        if not 1 <= self.num_queries <= self.num_keys:
            raise ADMSValueError(
                f"queries must be the last of the keys' positions: expected 1 to {self.num_keys} "
                f"(the keys) queries, got {self.num_queries}"
            )

    @property
    def query_blocks(self) -> int:
        """I, the last one possibly partial."""
        return -(-self.num_queries // self.block_size)

    @property
    def key_blocks(self) -> int:
        """J, the last one possibly partial."""
        return -(-self.num_keys // self.block_size)

    def query_starts(self) -> Tensor:
        """Position [I] of each query block's first query."""
        offset = self.num_keys - self.num_queries
        return offset + self.block_size * torch.arange(self.query_blocks)

    def allowed(self) -> Tensor:
        """bool [I, J]: pairs in which some query may see some key."""
        if not self.is_causal:
            return torch.ones(self.query_blocks, self.key_blocks, dtype=torch.bool)
        ends = (self.query_starts() + self.block_size).clamp(max=self.num_keys)
        return self.block_size * torch.arange(self.key_blocks) < ends.unsqueeze(-1)

    def own(self) -> Tensor:
        """bool [I, J]: pairs that causality cuts through, always attended; none without it."""
        if not self.is_causal:
            return torch.zeros(self.query_blocks, self.key_blocks, dtype=torch.bool)
        ends = self.block_size * (1 + torch.arange(self.key_blocks))
        return self.allowed() & (ends > self.query_starts().unsqueeze(-1))

    def connections(self, sparsity: float) -> int:
        """Blocks a row, at least 1: the most that keep to `sparsity` of the allowed pairs.

        Rows that are allowed fewer attend to all they may.
        """
        counts = self.allowed().sum(-1)
        totals = torch.arange(1, self.key_blocks + 1).unsqueeze(-1).minimum(counts).sum(-1)
        within = totals <= (1.0 - sparsity) * int(counts.sum()) + 1e-6
        return max(1, int(within.sum()))

    def segments(self, length: int) -> Tensor:
        """bool [I, J]: pairs of blocks that begin in the same segment of `length` tokens."""
        starts = self.block_size * torch.arange(self.key_blocks)
        return (self.query_starts() // length).unsqueeze(-1) == starts // length

    def local_ranks(
        self, segment_lengths: tuple[int, ...], dilation_rates: tuple[int, ...]
    ) -> Tensor:
        """Order [I, J] in which the local pattern takes blocks; inf for those it never takes.

        Within a segment, dilation rate r takes every r-th block, nearest first. Over the levels,
        a block's rank is its distance in steps of the level that reaches it soonest, so that the
        first few ranks reach as far as the largest rate.

        Source: Ding et al. (2023), LongNet, arXiv:2307.02486; differs in dilating blocks instead
        of tokens.
        """
        blocks = self.query_starts() // self.block_size
        distance = (blocks.unsqueeze(-1) - torch.arange(self.key_blocks)).abs().double()
        ranks = torch.full_like(distance, math.inf)
        for length, rate in zip(segment_lengths, dilation_rates, strict=True):
            reached = self.segments(length) & (distance % rate == 0) & self.allowed()
            ranks = torch.where(reached, torch.minimum(ranks, distance / rate), ranks)
        # Between equal ranks the nearer block goes first.
        ranks = ranks + distance / (2.0 * self.key_blocks * max(dilation_rates))
        return torch.where(self.own(), -1.0, ranks)


class Budget(NamedTuple):
    """What the local pattern takes and what content may choose from.

    Attributes:
        allowed: bool [I, J].
        local: Always attended, bool [I, J].
        candidates: What content may choose, bool [I, J].
        adaptive: How many blocks content chooses a row, float [I].
        coarse: Coarse blocks among them, [I]; 0 without the multi-scale pattern.
        coarse_candidates: bool [I, C].
        fine_candidates: What it may choose as single blocks, bool [I, J].
        least: How many content must choose a row, float [I]: 1 where nothing else is attended.
        wanted: The larger of `adaptive` and `least`.
        pairs: How many pairs are allowed in all.
        target_density: Share of the allowed pairs that local and adaptive have together.
    """

    allowed: Tensor
    local: Tensor
    candidates: Tensor
    adaptive: Tensor
    coarse: Tensor
    coarse_candidates: Tensor
    fine_candidates: Tensor
    least: Tensor
    wanted: Tensor
    pairs: float
    target_density: float


@functools.lru_cache(maxsize=64)
def block_budget(
    layout: BlockLayout,
    config: AdaptiveConfig,
    segment_lengths: tuple[int, ...],
    dilation_rates: tuple[int, ...],
    device: torch.device,
) -> Budget:
    """The content-independent part of the pattern, on `device`."""
    sparsity = config.base_sparsity
    if sparsity is None:
        sparsity = get_adaptive_sparsity(layout.num_keys)
    allowed, own = layout.allowed(), layout.own()
    total = layout.connections(sparsity)
    num_local = round(config.local_fraction * total)
    ranks = layout.local_ranks(segment_lengths, dilation_rates)
    order = ranks.argsort(dim=-1, stable=True).argsort(dim=-1)
    local = own | ((order < num_local) & ranks.isfinite())
    candidates = allowed & ~local
    # What the local pattern cannot use goes to content, unless the pattern is to be fixed.
    adaptive = (allowed.sum(-1).clamp(max=total) - local.sum(-1)).clamp(min=0)
    adaptive = adaptive * (config.local_fraction < 1.0)
    factor = config.coarse_factor
    coarse = torch.zeros_like(adaptive)
    coarse_candidates = torch.zeros(layout.query_blocks, 0, dtype=torch.bool)
    fine_candidates = candidates
    if factor is not None:
        near = layout.segments(max(segment_lengths))
        # Padding counts as forbidden: a last coarse block that is not whole is none.
        far = torch.nn.functional.pad(allowed & ~own & ~near, (0, -layout.key_blocks % factor))
        coarse_candidates = far.unflatten(-1, (-1, factor)).all(-1)
        covered = coarse_candidates.repeat_interleave(factor, -1)[..., : layout.key_blocks]
        fine_candidates = candidates & ~covered
        coarse = (config.coarse_fraction * adaptive / factor).round().long()
        coarse = coarse.maximum((adaptive - fine_candidates.sum(-1)) // factor)
        coarse = coarse.minimum(coarse_candidates.sum(-1))
        # A row too short for a coarse block would otherwise see its own segment only.
        fine_candidates = fine_candidates | (candidates & (coarse == 0).unsqueeze(-1))
    # A row must attend to something, also where the budget rounds to nothing.
    least = ~local.any(-1) & (coarse == 0)
    pairs = float(allowed.sum())
    density = float(local.sum() + adaptive.sum()) / pairs
    return Budget(
        allowed.to(device),
        local.to(device),
        candidates.to(device),
        adaptive.float().to(device),
        coarse.float().to(device),
        coarse_candidates.to(device),
        fine_candidates.to(device),
        least.float().to(device),
        torch.maximum(adaptive.float(), least.float()).to(device),
        pairs,
        density,
    )


def check_levels(segments: Sequence[int], rates: Sequence[int], block_size: int) -> None:
    """Raises ADMSValueError unless segments and rates describe levels of a local pattern."""
    if len(segments) != len(rates) or not segments:
        raise ADMSValueError(
            f"segment_lengths and dilation_rates must have as many entries, at least one, got "
            f"{list(segments)} and {list(rates)}"
        )
    if any(length < 1 or length % block_size for length in segments):
        raise ADMSValueError(
            f"segment_lengths must be multiples of block_size {block_size}, got {list(segments)}"
        )
    if any(rate < 1 for rate in rates):
        raise ADMSValueError(f"dilation_rates must be at least 1, got {list(rates)}")
