"""Where every token of every row is: two integers a row say it for all layers.

A row has seen ``seen`` real tokens (padding never counts) and its first ``evicted`` tokens have
left the recent tier. Token ``t`` (from 0) then lies

- in the recent tier, ring slot ``t % ring``, if ``t >= evicted``;
- in sink slot ``t`` if it was evicted and ``t < sink``;
- in the middle otherwise, as its token number ``t - sink``.

The counts live on the host, so that no layer ever asks a GPU for them. Because padding is not
stored, a padded row is in memory exactly what the same row alone would be.
"""

from dataclasses import dataclass, field

import torch

from adms.config import Sizes


@dataclass(frozen=True)
class Timeline:
    """The counts of all rows of one cache; every change makes another.

    Attributes:
        sizes: the cache's sizes.
        block: tokens that enter the middle together (a compressor's ``block_tokens``).
        seen: real tokens per row.
        evicted: tokens per row that have left the recent tier.
        length: columns of input so far, padding included: what transformers calls the length.
    """

    sizes: Sizes
    block: int
    seen: list[int] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)
    length: int = 0

    @property
    def batch_size(self) -> int:
        """Rows; 0 before the first token."""
        return len(self.seen)

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have the same counts."""
        return len(set(self.seen)) <= 1 and len(set(self.evicted)) <= 1

    def middle_tokens(self, row: int) -> int:
        """Tokens of ``row`` that have entered the middle, also those it has dropped since."""
        return max(0, self.evicted[row] - self.sizes.sink)

    @property
    def middle_totals(self) -> list[int]:
        """``middle_tokens`` of every row."""
        return [self.middle_tokens(row) for row in range(self.batch_size)]

    def evicted_after(self, new: list[int]) -> list[int]:
        """What ``evicted`` becomes per row once ``new`` tokens per row are committed.

        Nothing is evicted while the tokens waiting beyond the window are fewer than the interval;
        then the window is brought back to its size. What enters the middle does so in whole
        blocks, so a remainder waits longer.
        """
        result = []
        for seen, evicted, count in zip(self.seen, self.evicted, new, strict=True):
            held = seen + count - evicted
            if held <= self.sizes.recent + self.sizes.waiting:
                result.append(evicted)
                continue
            target = seen + count - self.sizes.recent
            beyond_sink = target - self.sizes.sink
            if beyond_sink > 0:
                target = self.sizes.sink + beyond_sink // self.block * self.block
            result.append(max(target, evicted))
        return result

    def after(self, new: list[int], evicted: list[int], columns: int) -> "Timeline":
        """The counts once ``new`` tokens per row, of ``columns`` columns, are committed."""
        seen = [old + count for old, count in zip(self.seen, new, strict=True)]
        return Timeline(self.sizes, self.block, seen, evicted, self.length + columns)

    def of_rows(self, rows: list[int]) -> "Timeline":
        """The counts with rows reordered, repeated or dropped."""
        seen = [self.seen[row] for row in rows]
        evicted = [self.evicted[row] for row in rows]
        return Timeline(self.sizes, self.block, seen, evicted, self.length)


def ring_tokens(seen: torch.Tensor, ring: int) -> torch.Tensor:
    """Which token each ring slot holds last.

    Args:
        seen: ``[B]`` tokens written so far, the one in flight included.
        ring: slots.

    Returns:
        ``[B, ring]`` token numbers; negative where a slot was never written.
    """
    slots = torch.arange(ring, device=seen.device)
    last = seen[:, None] - 1
    return last - (last - slots) % ring
