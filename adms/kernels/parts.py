"""What decode attention reads: entries as they are, and entries as codes.

Shapes: ``B`` rows, ``R`` rows or 1 where all rows agree, ``K`` KV heads, ``N`` entries, ``D`` head
size, ``C`` coded channels of a block of heads, ``L`` landmarks.
"""

from dataclasses import dataclass

import torch

from adms.compressors.codebooks import GROUP, codebooks_on
from adms.compressors.tables import CodeTables, Projection


@dataclass(frozen=True)
class ExactPart:
    """Entries as they are, keys before positions.

    Attributes:
        keys, values: ``[B, K, N, D]``.
        cos, sin: ``[R, N, D]`` of their positions.
        valid: ``[R, N]`` booleans.
        log_weight: ``[B, K, N]``, or None for zeros.
    """

    keys: torch.Tensor
    values: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    valid: torch.Tensor
    log_weight: torch.Tensor | None = None


@dataclass(frozen=True)
class CodedPart:
    """Entries as records.

    Attributes:
        records: ``[B, N, bytes]`` uint8.
        tables: how they are read.
        cos, sin: ``[R, N, D]`` of their positions.
        valid: ``[R, N]`` booleans.
        order: ``[R, N]`` int32 numbers of the entries, by which ``hidden`` names them; or None.
        hidden: ``[B, L]`` int32 numbers of entries not to be read (negative: none); or None.
    """

    records: torch.Tensor
    tables: CodeTables
    cos: torch.Tensor
    sin: torch.Tensor
    valid: torch.Tensor
    order: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def visible(self) -> torch.Tensor:
        """Which entries are read: ``[R or B, N]``."""
        if self.order is None or self.hidden is None:
            return self.valid
        return self.valid & ~(self.order[:, :, None] == self.hidden[:, None, :]).any(2)


def decode(part: CodedPart, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[B, K, N, D]`` in float32: the twin of what the kernels decode."""
    tables = part.tables
    # What is not read may be left over from other uses of the bytes and decode to anything.
    records = part.records * part.valid[..., None]
    offsets = tables.offsets.long().expand(records.shape[0], -1, -1)
    index = offsets.clamp(min=0).flatten(1)[:, None].expand(-1, records.shape[1], -1)
    codes = records.gather(2, index).unflatten(2, offsets.shape[1:]).long()
    books = codebooks_on(records.device)[: offsets.shape[1]]
    stage = torch.arange(offsets.shape[1], device=records.device)[:, None]
    words = books[stage, codes] * (offsets >= 0)[:, None, :, :, None]
    channels = words.sum(2)
    split = tables.keys.blocks * tables.keys.channels // GROUP
    states = []
    for side, own in (
        (tables.keys, channels[:, :, :split]),
        (tables.values, channels[:, :, split:]),
    ):
        blocks = own.flatten(2).unflatten(2, (side.blocks, side.channels))
        scaled = blocks * side.factor[:, None]
        restored = torch.einsum("bnkc,bkcj->bnkj", scaled, _rows(side.basis.float(), scaled))
        restored = restored * _gain(part, records, side)[..., None] + side.mean.float()[:, None]
        states.append(restored.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2))
    return states[0], states[1]


def _rows(basis: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return basis.expand(like.shape[0], -1, -1, -1)


def _gain(part: CodedPart, records: torch.Tensor, side: Projection) -> torch.Tensor:
    """Gains ``[B, N, blocks]``."""
    device = records.device
    start = side.gain_start + side.gain_stride * torch.arange(side.blocks, device=device)
    low = records[:, :, start]
    if not part.tables.half_gain:
        return torch.exp2((low.float() - 128) / part.tables.gain_steps)
    both = torch.stack([low, records[:, :, start + 1]], dim=-1)
    return both.view(torch.float16)[..., 0].float()
