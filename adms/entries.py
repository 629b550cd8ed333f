"""What the tiers of the cache exchange: entries, and the shape of one token.

Shapes: ``B`` batch rows, ``K`` KV heads, ``N`` entries, ``D`` head size of keys, ``E`` head size of
values.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenShape:
    """The keys and values of one token in one layer.

    Attributes:
        num_heads: KV heads on this process (under tensor parallelism, the local ones).
        key_dim: head size of keys.
        value_dim: head size of values.
    """

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_elements(self) -> int:
        """Numbers in the keys and values of one token, all heads together."""
        return self.num_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class Entries:
    """Keys and values that attention reads, each standing for one or more tokens.

    Attributes:
        keys: ``[B, K, N, D]``, before any position is applied.
        values: ``[B, K, N, E]``.
        log_weight: ``[B, K, N]`` added to the attention score; None stands for zeros.
        positions: ``[B, N]`` text positions (token index in the row; an entry that stands for
            several tokens sits at their mean); None where the holder knows them.
        valid: ``[B, N]`` or ``[B, K, N]`` booleans; None stands for all valid.
    """

    keys: torch.Tensor
    values: torch.Tensor
    log_weight: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    @property
    def num_entries(self) -> int:
        """Entries per row, valid or not."""
        return self.keys.shape[2]

    @property
    def token_shape(self) -> TokenShape:
        """The shape of one of these entries."""
        return TokenShape(self.keys.shape[1], self.keys.shape[3], self.values.shape[3])


def all_finite(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Whether keys and values ``[B, K, N, ...]`` hold no NaN and no infinity, as a tensor ``[]``.

    For a few tokens, where operations cost more than what they do: only what is finite is nothing
    times zero, which takes a third of the operations of asking each number.
    """
    return ~torch.cat([keys, values], dim=-1).mul_(0).sum().isnan()


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Has tensors allocated that may be written anywhere, without gradients.

    What is allocated in inference mode could never be written outside of it again.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
