"""Random entries and codes for the kernels' tests."""

import dataclasses
import os
from typing import Any

import torch

from adms import ADMSConfig
from adms.compressors.base import COMPRESSORS, Coder, LayerContext
from adms.compressors.tables import CodeTables, Projection
from adms.entries import Entries, TokenShape
from adms.kernels.parts import CodedPart, ExactPart

# Where Triton's kernels run: on a GPU, or on the CPU in its interpreter.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS_TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def moved(given: Any, device: torch.device) -> Any:
    """Tensors, or parts made of them, on a device."""
    if isinstance(given, torch.Tensor):
        return given.to(device)
    if isinstance(given, list | tuple):
        return type(given)(moved(one, device) for one in given)
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
        return dataclasses.replace(
            given, **{name: moved(value, device) for name, value in fields.items()}
        )
    return given


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotations(rows: int, count: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[rows, count, size]`` of random positions."""
    angles = 100 * draw(rows, count, size // 2, seed=seed)
    angles = torch.cat([angles, angles], dim=2)
    return angles.cos(), angles.sin()


def exact_part(
    rows: int, heads: int, count: int, size: int, seed: int = 0, *, weighted: bool = False
) -> ExactPart:
    """Entries some of which are not valid."""
    valid = torch.arange(count) % 7 != 3
    return ExactPart(
        draw(rows, heads, count, size, seed=seed),
        draw(rows, heads, count, size, seed=seed + 1),
        *rotations(1, count, size, seed),
        valid[None].expand(rows, -1).contiguous(),
        draw(rows, heads, count, seed=seed + 2) if weighted else None,
    )


def coder_of(name: str, heads: int, size: int, nbytes: int = 400_000) -> Coder:
    shape = TokenShape(heads, size, size)
    return COMPRESSORS.get(name).bind(
        LayerContext(shape), nbytes, ADMSConfig(compressor_type=name, recent_size=8)
    )


def coded_rows(
    coder: Coder, rows: int, heads: int, count: int, size: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Headers ``[rows, bytes]`` and records ``[rows, count, bytes]`` as a cache would hold them."""
    mix = draw(heads * size, heads * size, seed=seed + 9) / size**0.5
    arenas = []
    for row in range(rows):
        keys, values = (
            (draw(count, heads * size, seed=seed + 20 * row + part) @ mix + 1)
            .view(1, count, heads, size)
            .transpose(1, 2)
            for part in (0, 1)
        )
        entries = Entries(keys, values)
        header = coder.fit(entries)
        records = coder.encode(header, entries)[..., : coder.record_bytes]
        arenas.append(torch.cat([header, records.flatten(1)], dim=1))
    arena = torch.cat(arenas)
    # Rows of more bytes than are used, as in the middle's arena.
    arena = torch.nn.functional.pad(arena, (0, 64 + arena.shape[1] % 2))
    used = coder.header_bytes + count * coder.record_bytes
    records = arena[:, coder.header_bytes : used].unflatten(1, (count, coder.record_bytes))
    return arena[:, : coder.header_bytes], records


def coded_part(
    name: str, rows: int, heads: int, count: int, size: int, seed: int = 0
) -> tuple[CodedPart, Entries]:
    """A part and what its coder decodes it to."""
    coder = coder_of(name, heads, size)
    header, records = coded_rows(coder, rows, heads, count, size, seed)
    tables = coder.tables(header, coder.record_bytes)
    if tables is None:
        raise RuntimeError(f"{name} has no tables")
    valid = (torch.arange(count) < count - 2)[None].expand(rows, -1).contiguous()
    order = torch.arange(count, dtype=torch.int32)[None]
    hidden = torch.tensor([[0, 5, -1]] * rows, dtype=torch.int32)
    part = CodedPart(records, tables, *rotations(1, count, size, seed + 3), valid, order, hidden)
    return part, coder.decode(header, records)


def blocked_part(rows: int, heads: int, count: int, size: int, blocks: int) -> CodedPart:
    """Random codes under a basis and gains per block of heads, other for each row."""
    generator = torch.Generator().manual_seed(0)
    joined, stages = heads // blocks * size, 3
    channels, value_channels = joined // 2 // 8 * 8, joined * 3 // 4 // 8 * 8
    groups = blocks * (channels + value_channels) // 8
    held = (torch.rand(rows, stages, groups, generator=generator) < 0.7).cumprod(1) > 0
    gains = 2 * blocks
    offsets = torch.where(held, gains + held.flatten(1).cumsum(1).view_as(held) - 1, -1)
    width = gains + int(held.flatten(1).sum(1).max())
    records = torch.randint(0, 256, (rows, count, width), generator=generator, dtype=torch.uint8)
    records[..., :gains] = records[..., :gains] % 16 + 120

    def side(coded: int, gain: int, weighted: bool) -> Projection:
        # More directions than are used, chosen by each row; or one basis a row, in order.
        basis = torch.randint(-127, 128, (rows, blocks, joined, joined), generator=generator)
        scale = torch.rand(rows, blocks, joined, generator=generator).half() / 127
        deviation = torch.rand(rows, blocks, coded, generator=generator) / coded**0.5
        mean = torch.randn(rows, blocks, joined, generator=generator).half()
        chosen = torch.rand(rows, blocks, joined, generator=generator).argsort(2)[..., :coded]
        weight = torch.rand(1, blocks, joined, generator=generator).half() + 0.5
        basis = basis.to(torch.int8)
        if not weighted:
            return Projection(basis, scale, deviation.half(), mean, gain, 1)
        return Projection(
            basis[:1], scale[:1], deviation.half(), mean, gain, 1, chosen.to(torch.int16), weight
        )

    sides = side(channels, 0, True), side(value_channels, blocks, blocks > 1)
    weight = torch.rand(rows, heads, generator=generator).half()
    tables = CodeTables(offsets.to(torch.int32), width - 3, *sides, log_weight=weight)
    valid = torch.ones(1, count, dtype=torch.bool)
    return CodedPart(records, tables, *rotations(1, count, size, 5), valid)
