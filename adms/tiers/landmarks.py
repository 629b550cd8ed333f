"""Landmarks: tokens that an importance metric keeps finely coded for as long as it ranks them high.

They are stored at five bits an element (a squared error of 0.4%), which buys three times as many as
keeping 16 bits would; coarse codes of the same tokens are masked while both are there.

Shapes: ``B`` rows, ``K`` KV heads, ``L`` landmarks, ``N`` candidates.
"""

from dataclasses import dataclass

import torch

from adms.budget import select_landmarks
from adms.compressors.quantized import QuantizedCoder
from adms.config import ADMSConfig
from adms.entries import Entries, TokenShape
from adms.importance import Evidence, Metric

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

    def take(self, index: torch.Tensor) -> "Landmarks":
        """Those at ``index [B, M]``."""
        own = torch.arange(index.shape[0], device=index.device)[:, None]
        return Landmarks(self.records[own, index], self.tokens[own, index], self.scores[own, index])


@dataclass(frozen=True)
class Candidates:
    """Tokens on their way into the middle.

    Attributes:
        entries: the ``N`` tokens, exact.
        tokens: ``[B, N]`` text positions, -1 where there is none.
        decoded: what their codes decode to.
        block_tokens: tokens that were coded together.
        queries: ``[B, H, Q, D]`` the pass's queries before positions, or None.
    """

    entries: Entries
    tokens: torch.Tensor
    decoded: Entries
    block_tokens: int
    queries: torch.Tensor | None


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
        self.header_bytes = aligned(SPREAD_BYTES + self.coder.header_bytes)
        self.slot_bytes = aligned(self.coder.record_bytes + TAIL_BYTES)

    @property
    def nbytes(self) -> int:
        """Bytes of one row's landmarks; 0 where there are none."""
        return self.header_bytes + self.count * self.slot_bytes if self.count else 0

    @classmethod
    def within(cls, shape: TokenShape, dtype: torch.dtype, nbytes: int) -> "LandmarkStore":
        """The store of as many landmarks as fit."""
        probe = cls(shape, dtype, 1)
        return cls(shape, dtype, max(0, (nbytes - probe.header_bytes) // probe.slot_bytes))

    def fit(self, arriving: Candidates) -> torch.Tensor:
        """Header ``[B, header_bytes]`` from rows' tokens: spreads and means."""
        entries = arriving.entries
        spreads = [
            (part.float() - part.float().mean(2, keepdim=True)).square().sum((1, 3)).mean(1)
            for part in (entries.keys, entries.values)
        ]
        packed = torch.stack(spreads, dim=1).contiguous().view(torch.uint8)
        header = torch.cat([packed, self.coder.fit(entries)], dim=1)
        return torch.nn.functional.pad(header, (0, self.header_bytes - header.shape[1]))

    def update(
        self,
        header: torch.Tensor,
        present: torch.Tensor | None,
        arriving: Candidates,
        metric: Metric,
        config: ADMSConfig,
    ) -> torch.Tensor:
        """The bytes after the header, once tokens have arrived: ``[B, L * slot_bytes]``.

        Args:
            header: ``[B, header_bytes]``.
            present: ``[B, nbytes]`` with the landmarks so far, or None.
            arriving: tokens that may become landmarks.
            metric: scores them.
            config: parameters of the choice.
        """
        held = self.read(present) if present is not None else None
        return self.slots(self.choose(header, held, arriving, metric, config, self.count))

    def choose(
        self,
        header: torch.Tensor,
        present: Landmarks | None,
        arriving: Candidates,
        metric: Metric,
        config: ADMSConfig,
        count: int,
        limits: torch.Tensor | None = None,
    ) -> Landmarks:
        """The best ``count`` of the tokens that arrive and those ``present``, best first.

        ``limits [B]``: places that a row is going to fill of those, for its share of coverage.
        """
        key_spread, value_spread = self.spreads(header)
        evidence = Evidence(
            arriving.queries, arriving.decoded, key_spread, value_spread, arriving.block_tokens
        )
        found = Landmarks(
            self.coder.encode(self.means(header), arriving.entries),
            arriving.tokens,
            metric(arriving.entries, evidence).float(),
        )
        if present is not None:
            found = _join(present, found)
        missing = count - found.tokens.shape[1]
        if missing > 0:
            found = Landmarks(
                torch.nn.functional.pad(found.records, (0, 0, 0, missing)),
                torch.nn.functional.pad(found.tokens, (0, missing), value=-1),
                torch.nn.functional.pad(found.scores, (0, missing)),
            )
        chosen = select_landmarks(
            found.scores,
            found.tokens,
            count,
            segments=config.coverage_segments,
            priority=config.coverage_priority,
            limits=limits,
        )
        return found.take(chosen)

    def spreads(self, header: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Spreads ``[B]`` of keys and of values."""
        both = header[:, :SPREAD_BYTES].contiguous().view(torch.float32)
        return both[:, 0], both[:, 1]

    def means(self, header: torch.Tensor) -> torch.Tensor:
        """The coder's part of the header."""
        return header[:, SPREAD_BYTES : SPREAD_BYTES + self.coder.header_bytes]

    def read(self, data: torch.Tensor) -> Landmarks:
        """Landmarks from the bytes ``[B, nbytes]`` that hold them."""
        return self.read_slots(data[:, self.header_bytes : self.nbytes])

    def read_slots(self, data: torch.Tensor) -> Landmarks:
        """Landmarks from the bytes ``[B, L * slot_bytes]`` after the header."""
        slots = data.unflatten(1, (-1, self.slot_bytes))
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


def _join(first: Landmarks, second: Landmarks) -> Landmarks:
    return Landmarks(
        torch.cat([first.records, second.records], dim=1),
        torch.cat([first.tokens, second.tokens], dim=1),
        torch.cat([first.scores, second.scores], dim=1),
    )


def aligned(size: int) -> int:
    """The next size at which a wider type may start."""
    return -(-size // ALIGNMENT) * ALIGNMENT
