"""Landmarks: tokens that an importance metric keeps finely coded for as long as it ranks them high.

They are stored at five bits an element (a squared error of 0.4%), which buys three times as many as
keeping 16 bits would; coarse codes of the same tokens are masked while both are there.

Shapes: ``B`` rows, ``L`` landmarks, ``N`` candidates.
"""

from dataclasses import dataclass

import torch

from adms.compressors.quantized import QuantizedCoder
from adms.compressors.tables import CodeTables
from adms.entries import Entries, TokenShape

STAGES = 5
# Text position and score of a landmark.
TAIL_BYTES = 8
# Spreads of keys and values, beside the coder's own header.
SPREAD_BYTES = 8
# Views as wider types need aligned starts.
ALIGNMENT = 16


@dataclass
class Landmarks:
    """One layer's landmarks.

    Attributes:
        records: ``[B, L, bytes]`` their codes.
        tokens: ``[B, L]`` text positions, -1 where a slot is empty.
        scores: ``[B, L]`` importance when they were chosen.
    """

    records: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor


class LandmarkStore:
    """How landmarks lie in bytes: spreads, header, then records with their tails.

    Args:
        shape: keys and values of one token.
        dtype: dtype of decoded entries.
        count: landmarks (``L``).
    """

    def __init__(self, shape: TokenShape, dtype: torch.dtype, count: int) -> None:
        self.count = count
        self.coder = QuantizedCoder(shape, dtype, STAGES, num_records=count)
        self.header_bytes = _aligned(SPREAD_BYTES + self.coder.header_bytes)
        self.slot_bytes = _aligned(self.coder.record_bytes + TAIL_BYTES)
        self.nbytes = self.header_bytes + count * self.slot_bytes if count else 0

    @classmethod
    def within(cls, shape: TokenShape, dtype: torch.dtype, nbytes: int) -> "LandmarkStore":
        """The store of as many landmarks as fit."""
        probe = cls(shape, dtype, 1)
        return cls(shape, dtype, max(0, (nbytes - probe.header_bytes) // probe.slot_bytes))

    def fit(self, entries: Entries) -> torch.Tensor:
        """Header ``[1, header_bytes]`` from one row's tokens: spreads and means."""
        spreads = [
            (part.float() - part.float().mean(2, keepdim=True)).square().sum((1, 3)).mean(1)
            for part in (entries.keys, entries.values)
        ]
        packed = torch.stack(spreads, dim=1).contiguous().view(torch.uint8)
        header = torch.cat([packed, self.coder.fit(entries)], dim=1)
        return torch.nn.functional.pad(header, (0, self.header_bytes - header.shape[1]))

    def spreads(self, header: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Spreads ``[B]`` of keys and of values."""
        both = header[:, :SPREAD_BYTES].contiguous().view(torch.float32)
        return both[:, 0], both[:, 1]

    def means(self, header: torch.Tensor) -> torch.Tensor:
        """The coder's part of the header."""
        return header[:, SPREAD_BYTES : SPREAD_BYTES + self.coder.header_bytes]

    def records(self, data: torch.Tensor) -> torch.Tensor:
        """Codes ``[B, L, bytes]`` in the bytes ``[B, nbytes]``, without a copy."""
        slots = data[:, self.header_bytes : self.nbytes].unflatten(1, (self.count, self.slot_bytes))
        return slots[..., : self.coder.record_bytes]

    def tables(self, data: torch.Tensor) -> CodeTables | None:
        """How kernels read ``records`` of these bytes."""
        return self.coder.tables(self.means(data[:, : self.header_bytes]))

    def read(self, data: torch.Tensor) -> Landmarks:
        """Landmarks from the bytes ``[B, nbytes]`` that hold them."""
        slots = data[:, self.header_bytes : self.nbytes].unflatten(1, (self.count, self.slot_bytes))
        size = self.coder.record_bytes
        tail = slots[..., size : size + TAIL_BYTES].contiguous()
        return Landmarks(
            records=slots[..., :size],
            # Stored one higher, so that zeros mean an empty slot.
            tokens=tail[..., :4].contiguous().view(torch.int32)[..., 0].long() - 1,
            scores=tail[..., 4:].contiguous().view(torch.float32)[..., 0],
        )

    def decode(self, data: torch.Tensor) -> tuple[Entries, torch.Tensor]:
        """Entries ``[B, K, L, ...]`` and their text positions ``[B, L]``."""
        landmarks = self.read(data)
        entries = self.coder.decode(self.means(data[:, : self.header_bytes]), landmarks.records)
        return entries, landmarks.tokens

    def slots(self, landmarks: Landmarks) -> torch.Tensor:
        """The bytes ``[B, L * slot_bytes]`` of landmarks."""
        tokens = (landmarks.tokens + 1).to(torch.int32)[..., None].contiguous().view(torch.uint8)
        scores = landmarks.scores.float()[..., None].contiguous().view(torch.uint8)
        data = torch.cat([landmarks.records, tokens, scores], dim=2)
        return torch.nn.functional.pad(data, (0, self.slot_bytes - data.shape[2])).flatten(1)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
