"""Blocks of tokens folded into fewer weighted entries: what such compressors share.

Shapes: ``B`` rows, ``K`` KV heads, ``R`` blocks, ``T`` tokens of a block, ``M`` entries of a block,
``Q`` queries, ``D``/``E`` head sizes of keys/values.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch

from adms.compressors.base import Coder
from adms.compressors.storage import EntryStorage
from adms.config import ADMSConfig
from adms.entries import Entries

# Blocks take at most this share of the budget: a block waits exact until it is full, and what may
# wait is charged to the budget.
WAITING_SHARE = 8
# Largest second-order term: beyond it, the expansion says nothing any more.
MAX_CORRECTION = 2.0


@dataclass(frozen=True)
class Merged:
    """Blocks after merging; entries in the order of the text.

    Attributes:
        keys: ``[B, K, R, M, D]``.
        values: ``[B, K, R, M, E]``.
        log_weight: ``[B, K, R, M]``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    log_weight: torch.Tensor


class MergingCoder(Coder):
    """Stores ``entries_per_record`` weighted entries for every ``block_tokens`` tokens.

    Args:
        storage: how entries lie in bytes.
        nbytes: bytes for header and records.
        block_tokens: tokens of a block (``T``).
        entries_per_record: entries of a block (``M``).
        extra_header_bytes: bytes of what a subclass fits, which follow the storage's header.
    """

    def __init__(
        self,
        storage: EntryStorage,
        nbytes: int,
        *,
        block_tokens: int,
        entries_per_record: int,
        extra_header_bytes: int = 0,
    ) -> None:
        self.storage = storage
        self.block_tokens = block_tokens
        self.entries_per_record = entries_per_record
        self.record_bytes = entries_per_record * storage.entry_bytes
        self.header_bytes = storage.header_bytes + extra_header_bytes
        self.num_records = max(0, (nbytes - self.header_bytes) // self.record_bytes)

    @abstractmethod
    def merge(
        self,
        extra: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        queries: torch.Tensor | None,
    ) -> Merged:
        """Folds blocks.

        Args:
            extra: ``[B, extra_header_bytes]`` what ``fit_extra`` made.
            keys: ``[B, K, R, T, D]`` in float32.
            values: ``[B, K, R, T, E]`` in float32.
            queries: ``[B, H, Q, D]`` the pass's queries before positions, or None; a column of
                padding is all zeros.
        """

    def fit_extra(self, entries: Entries, queries: torch.Tensor | None) -> torch.Tensor:
        """What a subclass fits to one row beside the storage's header: ``[1, bytes]``."""
        return torch.empty(1, 0, dtype=torch.uint8, device=entries.keys.device)

    def fit(self, entries: Entries, queries: torch.Tensor | None = None) -> torch.Tensor:
        """The storage's header, then what the subclass fits."""
        return torch.cat([self.storage.fit(entries), self.fit_extra(entries, queries)], dim=1)

    def encode(
        self, header: torch.Tensor, entries: Entries, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Blocks as records ``[B, R, record_bytes]``."""
        split = self.storage.header_bytes
        keys = entries.keys.unflatten(2, (-1, self.block_tokens)).float()
        values = entries.values.unflatten(2, (-1, self.block_tokens)).float()
        merged = self.merge(header[:, split:], keys, values, queries)
        flat = Entries(
            merged.keys.flatten(2, 3), merged.values.flatten(2, 3), merged.log_weight.flatten(2)
        )
        data = self.storage.write(header[:, :split], flat)
        return data.unflatten(1, (-1, self.entries_per_record)).flatten(2)

    def decode(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        """The stored entries with their log-weights."""
        data = records.unflatten(2, (self.entries_per_record, -1)).flatten(1, 2)
        return self.storage.read(header[:, : self.storage.header_bytes], data)


def fitting_block(config: ADMSConfig, wanted: int, step: int) -> int:
    """The block that may wait: ``wanted`` tokens, or fewer where the budget is small.

    A multiple of ``step`` and at least ``step``.
    """
    most = max(step, config.compressed_budget // WAITING_SHARE // step * step)
    return min(wanted, most)


def head_queries(queries: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries by the KV head they read.

    Args:
        queries: ``[B, H, Q, D]``; a column of padding is all zeros.
        num_heads: KV heads (``K``).

    Returns:
        ``[B, K, (H / K) * Q, D]`` in float32, and ``[B, (H / K) * Q]`` booleans of the real ones.
    """
    rows, heads, count, size = queries.shape
    grouped = queries.float().reshape(rows, num_heads, heads // num_heads * count, size)
    real = (queries != 0).flatten(3).any(3).any(1)
    return grouped, real.repeat(1, heads // num_heads)


def query_moments(queries: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Second moments per channel ``[B, K, D]`` of the queries ``[B, H, Q, D]`` of a KV head."""
    grouped, real = head_queries(queries, num_heads)
    weight = real[:, None, :, None].float()
    return (grouped.square() * weight).sum(2) / weight.sum(2).clamp(min=1)


def second_order(variance: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """How much more keys that differ weigh than their mean does: ``[B, K, R, M]``.

    ``log mean exp(q k) = q mean(k) + q^T cov(k) q / 2`` to second order, averaged over queries and
    diagonal in channels; scores are taken to be divided by the square root of the head size.

    Args:
        variance: ``[B, K, R, M, D]`` of the keys of an entry.
        moments: ``[B, K, D]`` of the queries.
    """
    scaled = variance.clamp(min=0) * moments[:, :, None, None] / variance.shape[4]
    return (0.5 * scaled.sum(4)).clamp(max=MAX_CORRECTION)


def text_order(first: torch.Tensor, *parts: torch.Tensor) -> list[torch.Tensor]:
    """Sorts entries by ``first [..., M]``: each part ``[..., M]`` or ``[..., M, X]``."""
    order = first.argsort(dim=-1, stable=True)
    return [
        part.gather(
            -1 if part.dim() == order.dim() else -2,
            order if part.dim() == order.dim() else order[..., None].expand_as(part),
        )
        for part in parts
    ]
