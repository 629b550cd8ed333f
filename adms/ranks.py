"""The processes that hold a model's heads between them (tensor parallelism).

Each rank has an equal, consecutive share of every layer's KV heads, and a memory of its own for
them. What is decided for all heads together, which tokens become landmarks, is decided from sums
over the ranks, so that all decide alike, and as one process with all heads would.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from adms.entries import TokenShape


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a model.

    Attributes:
        size: how many there are.
        rank: the number of this one.
        group: their ``torch.distributed`` process group; None where this one is alone.
    """

    size: int = 1
    rank: int = 0
    group: Any = None

    @classmethod
    def of(cls, group: Any | None) -> "Ranks":
        """Those of a process group; None: this process is alone."""
        if group is None:
            return ALONE
        return cls(distributed.get_world_size(group), distributed.get_rank(group), group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks; every one must ask for it, in the same order."""
        if self.size == 1:
            return part
        total = part.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=self.group)
        return total

    def joined(self, part: torch.Tensor) -> torch.Tensor:
        """Parts of all ranks one after the other; every one must ask for it, in the same order."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        distributed.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts)

    def share_of(self, shape: TokenShape) -> TokenShape:
        """A rank's part of a token of all heads."""
        if shape.num_heads % self.size:
            # transformers keeps a layer whole where its heads cannot be shared out evenly.
            return shape
        return TokenShape(shape.num_heads // self.size, shape.key_dim, shape.value_dim)


#: a process that has all heads
ALONE = Ranks()
