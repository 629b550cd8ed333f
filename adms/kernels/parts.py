"""What decode attention reads: entries as they are, and entries as codes.

Shapes: ``B`` rows, ``R`` rows or 1 where all rows agree, ``K`` KV heads, ``N`` entries, ``D`` head
size, ``C`` coded channels of a block of heads.
"""

from dataclasses import dataclass

import torch

from adms.compressors.codebooks import GROUP, codebooks_on
from adms.compressors.tables import Bags, CodeTables, Projection


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
        valid: ``[R, N]`` booleans, which are read.
    """

    records: torch.Tensor
    tables: CodeTables
    cos: torch.Tensor
    sin: torch.Tensor
    valid: torch.Tensor


def decode(part: CodedPart, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[B, K, N, D]`` in float32."""
    tables = part.tables
    channels = channels_of(part)
    split = tables.keys.blocks * tables.keys.channels
    keys = restore(tables.keys, channels[:, :, :split], gains_of(part, tables.keys), heads)
    values = restore(tables.values, channels[:, :, split:], gains_of(part, tables.values), heads)
    return keys, values


def channels_of(part: CodedPart) -> torch.Tensor:
    """Sums of codewords ``[B, N, channels]``, those of keys first."""
    tables, count = part.tables, len(part.records)
    books = codebooks_on(part.records.device)[: tables.offsets.shape[1]].flatten(0, 1)
    bags = tables.bags * (count // len(tables.bags))
    rows = [_channels(records, bag, books) for records, bag in zip(part.records, bags, strict=True)]
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def _channels(records: torch.Tensor, bag: Bags, books: torch.Tensor) -> torch.Tensor:
    """One row's: ``[N, channels]`` of ``records [N, bytes]``."""
    count, groups = len(records), len(bag.ends)
    # Bytes of a record in the order of their groups; a group's words are summed as one bag.
    words = records.index_select(1, bag.places) + bag.words.to(torch.int32)
    width = words.shape[1]
    first = torch.arange(0, count * width, width, dtype=torch.int32, device=records.device)
    starts = first.new_zeros(groups)
    starts[1:] = bag.ends[:-1]
    bags = (first[:, None] + starts).flatten()
    summed = torch.nn.functional.embedding_bag(words.flatten(), books, bags, mode="sum")
    return summed.view(count, groups * GROUP)


def restore(
    side: Projection, channels: torch.Tensor, gain: torch.Tensor, heads: int
) -> torch.Tensor:
    """States ``[B, K, N, D]`` of channels ``[B, N, blocks * C]`` and gains ``[B, N, blocks]``."""
    own = channels.unflatten(2, (side.blocks, side.channels)).transpose(1, 2)
    states = own @ side.directions(channels.dtype)
    mean = side.mean[:, :, None].to(states.dtype)
    states = torch.addcmul(mean, states, gain.transpose(1, 2)[..., None].to(states.dtype))
    share = heads // side.blocks
    return states.unflatten(3, (share, -1)).transpose(2, 3).flatten(1, 2)


def gains_of(part: CodedPart, side: Projection) -> torch.Tensor:
    """Gains ``[B, N, blocks]``; 1 where nothing is to be read, whatever the bytes are."""
    records = part.records
    block = torch.arange(side.blocks, device=records.device)
    start = side.gain_start + side.gain_stride * block
    low = records[:, :, start]
    if not part.tables.half_gain:
        return torch.exp2((low.float() - 128) / part.tables.gain_steps)
    both = torch.stack([low, records[:, :, start + 1]], dim=-1)
    gain = both.view(torch.float16)[..., 0].float()
    return gain.masked_fill(~part.valid[..., None], 1.0)
