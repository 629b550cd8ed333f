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
        is_finite: whether values that are not valid are known to be finite too.
    """

    keys: torch.Tensor
    values: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    valid: torch.Tensor
    log_weight: torch.Tensor | None = None
    is_finite: bool = False


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
    return states_of(part.records, part.tables, heads, part.valid)


def states_of(
    records: torch.Tensor, tables: CodeTables, heads: int, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[B, K, N, D]`` in float32 of records ``[B, N, bytes]``.

    ``valid [R, N]`` says which records are any; None: all of them.
    """
    channels = channels_of(records, tables)
    split = tables.keys.blocks * tables.keys.channels
    keys, values = (
        restore(side, own, gains_of(records, tables, side, valid), heads)
        for side, own in (
            (tables.keys, channels[:, :, :split]),
            (tables.values, channels[:, :, split:]),
        )
    )
    return keys, values


def channels_of(records: torch.Tensor, tables: CodeTables) -> torch.Tensor:
    """Sums of codewords ``[B, N, channels]``, those of keys first."""
    books = codebooks_on(records.device)[: tables.offsets.shape[1]].flatten(0, 1)
    bags = tables.bags * (len(records) // len(tables.bags))
    rows = [_channels(own, bag, books) for own, bag in zip(records, bags, strict=True)]
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def _channels(records: torch.Tensor, bag: Bags, books: torch.Tensor) -> torch.Tensor:
    """One row's: ``[N, channels]`` of ``records [N, bytes]``."""
    count, groups = len(records), len(bag.ends)
    # Bytes of a record in the order of their groups; a group's words are summed as one bag.
    width = len(bag.places)
    # A CPU gathers single bytes four times faster than it selects columns of them.
    codes = records.gather(1, bag.places.long().expand(count, -1))
    words = codes + bag.words.to(torch.int32)
    # Not by steps of the width: a row of nothing but means has no codes.
    first = torch.arange(count, dtype=torch.int32, device=records.device) * width
    starts = first.new_zeros(groups)
    starts[1:] = bag.ends[:-1]
    bags = (first[:, None] + starts).flatten()
    summed = torch.nn.functional.embedding_bag(words.flatten(), books, bags, mode="sum")
    return summed.view(count, groups * GROUP)


def restore(
    side: Projection,
    channels: torch.Tensor,
    gain: torch.Tensor,
    heads: int,
    directions: torch.Tensor | None = None,
) -> torch.Tensor:
    """States ``[B, K, N, D]`` of channels ``[B, N, blocks * C]`` and gains ``[B, N, blocks]``.

    ``directions`` are those of ``side`` where they are known.
    """
    own = channels.unflatten(2, (side.blocks, side.channels)).transpose(1, 2)
    states = own @ (side.directions(channels.dtype) if directions is None else directions)
    mean = side.mean[:, :, None].to(states.dtype)
    states = torch.addcmul(mean, states, gain.transpose(1, 2)[..., None].to(states.dtype))
    share = heads // side.blocks
    return states.unflatten(3, (share, -1)).transpose(2, 3).flatten(1, 2)


def gains_of(
    records: torch.Tensor, tables: CodeTables, side: Projection, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Gains ``[B, N, blocks]``; of two bytes 1 where not ``valid``, whatever the bytes are."""
    start, stride = side.gain_start, side.gain_stride
    # Blocks that share a gain have a stride of zero, which no slice has.
    bytes_of = records[:, :, start : start + max(1, stride * side.blocks) : max(1, stride)]
    if not tables.half_gain:
        gain = bytes_of.float().sub_(128).div_(tables.gain_steps).exp2_()
    else:
        high = records[:, :, start + 1 :][:, :, : max(1, stride * side.blocks) : max(1, stride)]
        gain = torch.stack([bytes_of, high], dim=-1).view(torch.float16)[..., 0].float()
        if valid is not None:
            gain = gain.masked_fill(~valid[..., None], 1.0)
    return gain.expand(-1, -1, side.blocks)
