"""Landmarks: tokens that an importance metric keeps finely coded for as long as it ranks them high.

They are stored in the fine form of the middle's codes or at five bits an element (a squared error
of 0.4%), which buys three to five times as many as keeping 16 bits would; coarse codes of the same
tokens are masked while both are there.

Shapes: ``B`` rows, ``L`` landmarks, ``N`` candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from adms.compressors.base import Coder, pack, unpack
from adms.compressors.quantized import QuantizedCoder
from adms.compressors.tables import CodeTables
from adms.entries import Entries, TokenShape
from adms.importance import Evidence
from adms.importance.novelty import DIRECTIONS, principal_directions
from adms.ranks import ALONE, Ranks

STAGES = 5
# Text position and score of a landmark.
TAIL_BYTES = 8
# Last scores that are kept for the tokens that arrive next (``C``): as far back as a token's score
# depends on others (``candidates``).
CONTEXT = 24
CONTEXT_BYTES = 2 * CONTEXT
# Mean squared sizes of keys and values; mean and deviation of scores.
SPREAD_BYTES = SCALE_BYTES = 8
# Largest magnitude that float16 keeps, with room for rounding.
HALF_LIMIT = 6.0e4
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
    """How landmarks lie in bytes: what scores refer to, records with their tails, the last scores.

    Args:
        shape: keys and values of one token.
        dtype: dtype of decoded entries.
        count: landmarks (``L``).
        codes: the middle's coder. Where its codes have a fine form, that is what landmarks are;
            otherwise they are quantised at five bits an element.
    """

    def __init__(
        self, shape: TokenShape, dtype: torch.dtype, count: int, codes: Coder | None = None
    ) -> None:
        self.count = count
        self.own = None
        self.coder: Coder
        if codes is not None and codes.fine_bytes:
            self.coder, self.record_bytes = codes, codes.fine_bytes
        else:
            self.own = QuantizedCoder(shape, dtype, STAGES, num_records=count)
            self.coder, self.record_bytes = self.own, self.own.record_bytes
        directions = min(DIRECTIONS, shape.key_dim)
        self.layout = (
            (torch.float32, (2,)),
            (torch.float32, (2,)),
            (torch.float16, (shape.num_heads, shape.key_dim)),
            (torch.float16, (shape.num_heads, directions, shape.key_dim)),
        )
        self.reference_bytes = (
            SPREAD_BYTES + SCALE_BYTES + 2 * shape.num_heads * shape.key_dim * (1 + directions)
        )
        own_bytes = self.own.header_bytes if self.own is not None else 0
        self.header_bytes = aligned(self.reference_bytes + own_bytes)
        self.slot_bytes = aligned(self.record_bytes + TAIL_BYTES)
        self.slots_end = self.header_bytes + count * self.slot_bytes
        self.nbytes = self.slots_end + CONTEXT_BYTES if count else 0

    @classmethod
    def within(
        cls, shape: TokenShape, dtype: torch.dtype, nbytes: int, codes: Coder | None = None
    ) -> "LandmarkStore":
        """The store of as many landmarks as fit."""
        probe = cls(shape, dtype, 1, codes)
        room = nbytes - probe.header_bytes - CONTEXT_BYTES
        return cls(shape, dtype, max(0, room // probe.slot_bytes), codes)

    def fit(self, entries: Entries, ranks: Ranks = ALONE) -> torch.Tensor:
        """Header ``[1, header_bytes]`` from one row's tokens.

        Args:
            entries: of this process's heads.
            ranks: those that hold the others; spreads are of all heads.
        """
        spreads = [
            (part.float() - part.float().mean(2, keepdim=True)).square().sum((1, 3)).mean(1)
            for part in (entries.keys, entries.values)
        ]
        mean, directions = principal_directions(entries.keys)
        mean = mean.clamp(-HALF_LIMIT, HALF_LIMIT).half()
        spread = ranks.total(torch.stack(spreads, dim=1))
        header = pack(spread, torch.zeros_like(spread), mean, directions.half())
        if self.own is not None:
            header = torch.cat([header, self.own.fit(entries)], dim=1)
        return torch.nn.functional.pad(header, (0, self.header_bytes - header.shape[1]))

    def with_scale(self, header: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The header with mean and deviation of the scores ``[1, N]`` of the first tokens."""
        scores = scores.float()
        deviation = scores.std(1, correction=0).clamp(min=1e-12)
        scale = pack(torch.stack([scores.mean(1), deviation], dim=1))
        end = SPREAD_BYTES + SCALE_BYTES
        return torch.cat([header[:, :SPREAD_BYTES], scale, header[:, end:]], dim=1)

    def scaled(self, header: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[B, N]`` on the layer's own scale, so that layers can be compared."""
        scale = unpack(header[:, : self.reference_bytes], *self.layout)[1]
        return (scores - scale[:, :1]) / scale[:, 1:]

    def evidence(
        self,
        header: torch.Tensor,
        queries: torch.Tensor | None,
        decode: Callable[[], Entries],
        block_tokens: int,
    ) -> Evidence:
        """What metrics may look at beside the tokens."""
        spreads, _, mean, directions = unpack(header[:, : self.reference_bytes], *self.layout)
        return Evidence(
            queries,
            decode,
            spreads[:, 0],
            spreads[:, 1],
            block_tokens,
            mean.float(),
            directions.float(),
        )

    def encode(
        self, header: torch.Tensor, entries: Entries, codes: torch.Tensor, records: torch.Tensor
    ) -> torch.Tensor:
        """Landmark records ``[B, N, bytes]`` of tokens.

        Args:
            header: of the landmarks.
            entries: the tokens.
            codes: ``[B, bytes]`` header of the middle's codes.
            records: the middle's codes of these tokens.
        """
        if self.own is None:
            return self.coder.encode_fine(codes, entries, records)
        return self.own.encode(header[:, self.reference_bytes :], entries)

    def records(self, data: torch.Tensor) -> torch.Tensor:
        """Codes ``[B, L, bytes]`` in the bytes ``[B, nbytes]``, without a copy."""
        slots = data[:, self.header_bytes : self.slots_end]
        slots = slots.unflatten(1, (self.count, self.slot_bytes))
        return slots[..., : self.record_bytes]

    def tables(self, data: torch.Tensor) -> CodeTables | None:
        """How kernels read ``records`` of these bytes where the store has a coder of its own."""
        if self.own is None:
            return None
        header = data[:, self.reference_bytes : self.reference_bytes + self.own.header_bytes]
        return self.own.tables(header, self.record_bytes)

    def read(self, data: torch.Tensor) -> Landmarks:
        """Landmarks from the bytes ``[B, nbytes]`` that hold them."""
        return self.read_slots(data[:, self.header_bytes : self.slots_end])

    def read_context(self, data: torch.Tensor) -> torch.Tensor:
        """The last scores ``[B, C]`` in the bytes ``[B, nbytes]``."""
        last = data[:, self.slots_end : self.nbytes]
        return unpack(last, (torch.float16, (CONTEXT,)))[0].float()

    def context(self, scores: torch.Tensor) -> torch.Tensor:
        """The bytes ``[B, CONTEXT_BYTES]`` of the last scores ``[B, C]``, -inf for none."""
        return pack(scores.clamp(max=HALF_LIMIT).half())

    def read_slots(self, data: torch.Tensor) -> Landmarks:
        """Landmarks from the bytes ``[B, L * slot_bytes]`` after the header."""
        slots = data.unflatten(1, (-1, self.slot_bytes))
        size = self.record_bytes
        tail = slots[..., size : size + TAIL_BYTES].contiguous()
        return Landmarks(
            records=slots[..., :size],
            # Stored one higher, so that zeros mean an empty slot.
            tokens=tail[..., :4].contiguous().view(torch.int32)[..., 0].long() - 1,
            scores=tail[..., 4:].contiguous().view(torch.float32)[..., 0],
        )

    def decode(self, data: torch.Tensor, codes: torch.Tensor) -> tuple[Entries, torch.Tensor]:
        """Entries ``[B, K, L, ...]`` and their text positions ``[B, L]``.

        Args:
            data: ``[B, nbytes]`` the bytes that hold the landmarks.
            codes: ``[B, bytes]`` header of the middle's codes.
        """
        landmarks = self.read(data)
        if self.own is not None:
            codes = data[:, self.reference_bytes : self.header_bytes]
        return self.coder.decode_fine(codes, landmarks.records), landmarks.tokens

    def slots(self, landmarks: Landmarks) -> torch.Tensor:
        """The bytes ``[B, L * slot_bytes]`` of landmarks."""
        tokens = (landmarks.tokens + 1).to(torch.int32)[..., None].contiguous().view(torch.uint8)
        scores = landmarks.scores.float()[..., None].contiguous().view(torch.uint8)
        data = torch.cat([landmarks.records, tokens, scores], dim=2)
        return torch.nn.functional.pad(data, (0, self.slot_bytes - data.shape[2])).flatten(1)


def aligned(size: int) -> int:
    """The next size at which a wider type may start."""
    return -(-size // ALIGNMENT) * ALIGNMENT
