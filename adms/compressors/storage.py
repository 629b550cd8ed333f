"""How weighted entries lie in bytes, for compressors that put several tokens into one entry.

Shapes: ``B`` rows, ``K`` KV heads, ``M`` entries, ``D``/``E`` head sizes of keys/values.
"""

from abc import ABC, abstractmethod

import torch

from adms.compressors.base import as_bytes, pack, unpack
from adms.compressors.quantized import QuantizedCoder
from adms.entries import Entries, TokenShape

# Log-weight of an entry that stands for no token: no score outweighs it, and it is finite in every
# dtype, so nothing is ever infinite minus infinite.
ABSENT = -1.0e4
WEIGHT_BYTES = 2
# Largest magnitude that float16 keeps, with room for rounding.
HALF_LIMIT = 6.0e4


class EntryStorage(ABC):
    """Bytes of entries: a header for all of them, then so many bytes for each.

    Attributes:
        header_bytes: bytes fitted once per row.
        entry_bytes: bytes of one entry of all heads, its log-weights included.
    """

    header_bytes: int = 0
    entry_bytes: int = 0

    @abstractmethod
    def fit(self, entries: Entries) -> torch.Tensor:
        """Header ``[1, header_bytes]`` from one row's tokens."""

    @abstractmethod
    def write(self, header: torch.Tensor, entries: Entries) -> torch.Tensor:
        """Bytes ``[B, M, entry_bytes]`` of ``M`` entries, which have log-weights."""

    @abstractmethod
    def read(self, header: torch.Tensor, data: torch.Tensor) -> Entries:
        """Entries of ``[B, M, entry_bytes]``."""


class CodedStorage(EntryStorage):
    """A few bits an element by rotation and universal codebooks; log-weights in float16.

    Args:
        shape: keys and values of one entry.
        dtype: dtype of what is read.
        stages: bits an element, 1 to 6.
    """

    def __init__(self, shape: TokenShape, dtype: torch.dtype, stages: int) -> None:
        self.heads = shape.num_heads
        self.coder = QuantizedCoder(shape, dtype, stages, num_records=0)
        self.header_bytes = self.coder.header_bytes
        self.entry_bytes = self.coder.record_bytes + WEIGHT_BYTES * self.heads

    def fit(self, entries: Entries) -> torch.Tensor:
        """Means of keys and values."""
        return self.coder.fit(entries)

    def write(self, header: torch.Tensor, entries: Entries) -> torch.Tensor:
        """Codes, gains and log-weights."""
        records = self.coder.encode(header, entries)
        return torch.cat([records, _weight_bytes(entries)], dim=2)

    def read(self, header: torch.Tensor, data: torch.Tensor) -> Entries:
        """Keys and values in ``dtype``, log-weights in float32."""
        records, weights = data.split([self.coder.record_bytes, WEIGHT_BYTES * self.heads], dim=2)
        found = self.coder.decode(header, records)
        return Entries(found.keys, found.values, _read_weights(weights))


class PlainStorage(EntryStorage):
    """Eight bits an element with a scale per entry and head, or sixteen; nothing is fitted.

    Args:
        shape: keys and values of one entry.
        dtype: dtype of what is read; bfloat16 is stored as such, anything else as float16.
        bits: 8 or 16.
    """

    def __init__(self, shape: TokenShape, dtype: torch.dtype, bits: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self.bits = bits
        self.half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        heads = shape.num_heads
        self.sizes = [
            heads * (size * bits // 8 + (2 if bits == 8 else 0))
            for size in (shape.key_dim, shape.value_dim)
        ]
        self.entry_bytes = sum(self.sizes) + WEIGHT_BYTES * heads

    def fit(self, entries: Entries) -> torch.Tensor:
        """An empty header."""
        return torch.empty(1, 0, dtype=torch.uint8, device=entries.keys.device)

    def write(self, header: torch.Tensor, entries: Entries) -> torch.Tensor:
        """Keys, values and log-weights."""
        parts = [self._write(entries.keys), self._write(entries.values), _weight_bytes(entries)]
        return torch.cat(parts, dim=2)

    def read(self, header: torch.Tensor, data: torch.Tensor) -> Entries:
        """Keys and values in ``dtype``, log-weights in float32."""
        keys, values, weights = data.split(
            [*self.sizes, WEIGHT_BYTES * self.shape.num_heads], dim=2
        )
        return Entries(
            self._read(keys, self.shape.key_dim),
            self._read(values, self.shape.value_dim),
            _read_weights(weights),
        )

    def _write(self, states: torch.Tensor) -> torch.Tensor:
        rows, _, count, _ = states.shape
        if self.bits == 16:
            limit = torch.finfo(self.half).max
            stored = states.float().clamp(-limit, limit).to(self.half).transpose(1, 2)
            return pack(stored.flatten(0, 1)).view(rows, count, -1)
        states = states.float().clamp(-100 * HALF_LIMIT, 100 * HALF_LIMIT)
        scale = (states.abs().amax(3, keepdim=True) / 127).clamp(min=1e-7).half()
        codes = (states / scale.float()).round().clamp(-127, 127).to(torch.int8)
        parts = (codes.transpose(1, 2).flatten(0, 1), scale.transpose(1, 2).flatten(0, 1))
        return pack(*parts).view(rows, count, -1)

    def _read(self, data: torch.Tensor, size: int) -> torch.Tensor:
        rows, count, _ = data.shape
        heads, flat = self.shape.num_heads, data.flatten(0, 1)
        if self.bits == 16:
            (states,) = unpack(flat, (self.half, (heads, size)))
        else:
            codes, scale = unpack(flat, (torch.int8, (heads, size)), (torch.float16, (heads, 1)))
            states = codes.float() * scale.float()
        return states.view(rows, count, heads, size).transpose(1, 2).to(self.dtype)


def _weight_bytes(entries: Entries) -> torch.Tensor:
    """``[B, K, M]`` log-weights as ``[B, M, 2 K]`` bytes."""
    if entries.log_weight is None:
        raise RuntimeError("entries to store have no log-weights")
    weights = entries.log_weight.float().clamp(ABSENT, -ABSENT).half()
    return as_bytes(weights.transpose(1, 2))


def _read_weights(data: torch.Tensor) -> torch.Tensor:
    # Not contiguous(): that is no copy for a single entry, which may start at an odd byte.
    whole = data.clone(memory_format=torch.contiguous_format)
    return whole.view(torch.float16).float().transpose(1, 2)
