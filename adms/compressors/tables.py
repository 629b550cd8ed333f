"""How the records of a coder are read by kernels that decode them on the fly.

Shapes: ``R`` rows or 1 where all rows agree, ``M`` directions and ``C`` coded channels of a block
of heads, ``J`` elements of a block.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch

from adms.compressors.codebooks import GROUP, WORDS


@dataclass(frozen=True)
class Projection:
    """From channels to states: ``gain * (deviation * channels) @ directions / weight + mean``.

    Attributes:
        basis: ``[R, blocks, M, J]`` directions before scaling, integers or floats; heads are split
            evenly over the blocks. Where rows of several layers lie one layer after the other,
            ``[L, blocks, M, J]``, as ``scale`` and ``weight``.
        scale: ``[R, blocks, M]`` what each is multiplied with.
        deviation: ``[R, blocks, C]`` of the coded channels.
        mean: ``[R, blocks, J]``.
        gain_start: first byte of block 0's gain in a record.
        gain_stride: bytes from one block's gain to the next one's; 0 where they share it.
        rows: ``[R, blocks, C]`` integers, which direction each channel follows; None where it is
            the first ``C`` in order.
        weight: ``[R, blocks, J]`` what elements are divided by; None for ones.
    """

    basis: torch.Tensor
    scale: torch.Tensor
    deviation: torch.Tensor
    mean: torch.Tensor
    gain_start: int
    gain_stride: int
    rows: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    @property
    def blocks(self) -> int:
        """Blocks of heads."""
        return self.deviation.shape[1]

    @property
    def channels(self) -> int:
        """Coded channels of a block."""
        return self.deviation.shape[2]

    def directions(self, dtype: torch.dtype) -> torch.Tensor:
        """What a unit of each channel adds to the states before the gain: ``[R, blocks, C, J]``."""
        basis, scale = self.basis, self.scale
        if self.rows is None:
            basis, scale = basis[:, :, : self.channels], scale[:, :, : self.channels]
        else:
            rows = max(len(self.rows), len(basis))
            # Rows of a layer share its basis.
            own = torch.arange(rows, device=basis.device)[:, None, None] * len(basis) // rows
            block = torch.arange(self.blocks, device=basis.device)[:, None]
            index = self.rows.long()
            basis, scale = basis[own, block, index], scale[own, block, index]
        factor = scale.to(dtype) * self.deviation.to(dtype)
        found = basis.to(dtype) * factor[..., None]
        if self.weight is None:
            return found
        weight = self.weight.repeat_interleave(max(1, len(found) // len(self.weight)), 0)
        return found / weight[:, :, None].to(dtype)

    def first(self, channels: int) -> "Projection":
        """Of the first channels of every block alone."""
        return dataclasses.replace(
            self,
            deviation=self.deviation[:, :, :channels],
            rows=None if self.rows is None else self.rows[:, :, :channels],
        )


# Of a code in ``Bags``, the ends of groups not counted.
BAG_BYTES = 6


@dataclass(frozen=True)
class Bags:
    """Which bytes of a row's records are summed to which group, the groups in their order.

    Attributes:
        places: ``[T]`` int32 the byte.
        words: ``[T]`` int16 the number of its stage's first codeword among those of all stages.
        ends: ``[groups]`` int32 how many bytes a group and those before it have.
    """

    places: torch.Tensor
    words: torch.Tensor
    ends: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [self.places, self.words, self.ends]


@dataclass(frozen=True)
class CodeTables:
    """How records of one coder are read.

    Attributes:
        offsets: ``[R, stages, groups]`` int32, the byte of a record that holds the code of a group
            of eight channels in a stage; negative where there is none, and then in later stages
            neither. Groups of keys come first, block by block, then those of values.
        record_bytes: where records end; codes behind it are none.
        keys, values: from channels to states, over the same number of blocks.
        half_gain: gains are two bytes of float16; else one byte of ``gain_steps`` per doubling.
        gain_steps: steps per doubling of a gain of one byte, whose zero is 128.
        log_weight: ``[R, K]`` numbers added to the scores of each KV head; None: zero.
    """

    offsets: torch.Tensor
    record_bytes: int
    keys: Projection
    values: Projection
    half_gain: bool = False
    gain_steps: int = 8
    log_weight: torch.Tensor | None = None

    def cut(self, record_bytes: int, log_weight: torch.Tensor | None) -> "CodeTables":
        """The tables of records that end earlier, with the log-weight of those."""
        return dataclasses.replace(self, record_bytes=record_bytes, log_weight=log_weight)

    def coded(self) -> torch.Tensor:
        """Which groups have a code in which stage: ``[R, stages, groups]``."""
        return (self.offsets >= 0) & (self.offsets < self.record_bytes)

    @functools.cached_property
    def bags(self) -> tuple[Bags, ...]:
        """One for each row of ``offsets``; asks the device."""
        found = []
        for offsets, coded in zip(self.offsets, self.coded(), strict=True):
            group, stage = coded.T.nonzero().unbind(1)
            words = (stage * WORDS).to(torch.int16)
            ends = coded.sum(0).cumsum(0).to(torch.int32)
            found.append(Bags(offsets.T[group, stage], words, ends))
        return tuple(found)

    def tensors(self) -> list[torch.Tensor]:
        """What was made of headers, and is no view of them."""
        bags = self.__dict__.get("bags", ())
        return [self.offsets, *(part for bag in bags for part in bag.tensors())]

    def trimmed(self) -> "CodeTables":
        """Without the last groups of blocks that no record has a code for; asks the device."""
        split = self.keys.blocks * self.keys.channels // GROUP
        coded, offsets, sides = self.coded(), [], []
        for side, own in ((self.keys, slice(0, split)), (self.values, slice(split, None))):
            used = coded[..., own].unflatten(2, (side.blocks, -1)).flatten(0, 2).any(0).nonzero()
            count = int(used[-1]) + 1 if len(used) else 1
            per_block = self.offsets[..., own].unflatten(2, (side.blocks, -1))
            offsets.append(per_block[..., :count].flatten(2))
            sides.append(side.first(count * GROUP))
        return dataclasses.replace(
            self, offsets=torch.cat(offsets, dim=2), keys=sides[0], values=sides[1]
        )


def views(header: torch.Tensor, *layout: tuple[torch.dtype, tuple[int, ...]]) -> list[torch.Tensor]:
    """What ``base.unpack`` gives, without copies: ``header [R, bytes]`` may be part of more bytes.

    Every part starts at a multiple of its item size, and so does every row.
    """
    result, start = [], 0
    for dtype, shape in layout:
        size = dtype.itemsize * torch.Size(shape).numel()
        part = header[:, start : start + size].view(dtype)
        result.append(part.unflatten(1, shape))
        start += size
    return result
