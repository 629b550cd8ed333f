"""How the records of a coder are read by kernels that decode them on the fly.

Shapes: ``R`` rows or 1 where all rows agree, ``C`` coded channels of a block of heads, ``J``
elements of a block.
"""

import dataclasses
from dataclasses import dataclass

import torch

from adms.compressors.codebooks import GROUP


@dataclass(frozen=True)
class Projection:
    """From channels to states: ``gain * (factor * channels) @ basis + mean``.

    Attributes:
        basis: ``[R, blocks, C, J]``, integers or floats; heads are split evenly over the blocks.
        factor: ``[R, blocks, C]`` float32.
        mean: ``[R, blocks, J]``.
        gain_start: first byte of block 0's gain in a record.
        gain_stride: bytes from one block's gain to the next one's; 0 where they share it.
    """

    basis: torch.Tensor
    factor: torch.Tensor
    mean: torch.Tensor
    gain_start: int
    gain_stride: int

    @property
    def blocks(self) -> int:
        """Blocks of heads."""
        return self.basis.shape[1]

    @property
    def channels(self) -> int:
        """Coded channels of a block."""
        return self.basis.shape[2]


@dataclass(frozen=True)
class CodeTables:
    """How records of one coder are read; made of headers per pass, since kept it would be memory.

    Attributes:
        offsets: ``[R, stages, groups]`` int32, the byte of a record that holds the code of a group
            of eight channels in a stage; negative where there is none. Groups of keys come first,
            block by block, then those of values.
        keys, values: from channels to states.
        half_gain: gains are two bytes of float16; else one byte of ``gain_steps`` per doubling.
        gain_steps: steps per doubling of a gain of one byte, whose zero is 128.
        log_weight: ``[R, K]`` float32, added to the scores of each KV head; None: zero.
    """

    offsets: torch.Tensor
    keys: Projection
    values: Projection
    half_gain: bool = False
    gain_steps: int = 8
    log_weight: torch.Tensor | None = None

    def cut(self, record_bytes: int, log_weight: torch.Tensor | None) -> "CodeTables":
        """The tables of records that end earlier, with the log-weight of those."""
        offsets = torch.where(self.offsets < record_bytes, self.offsets, -1)
        return dataclasses.replace(self, offsets=offsets, log_weight=log_weight)

    def trimmed(self) -> "CodeTables":
        """Without the last groups of blocks that no record has a code for; asks the device."""
        split = self.keys.blocks * self.keys.channels // GROUP
        offsets, sides = [], []
        for side, own in (
            (self.keys, self.offsets[..., :split]),
            (self.values, self.offsets[..., split:]),
        ):
            per_block = own.unflatten(2, (side.blocks, -1))
            used = (per_block >= 0).flatten(0, 2).any(0).nonzero()
            count = int(used[-1]) + 1 if len(used) else 1
            offsets.append(per_block[..., :count].flatten(2))
            width = count * GROUP
            sides.append(
                dataclasses.replace(
                    side, basis=side.basis[:, :, :width], factor=side.factor[:, :, :width]
                )
            )
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
