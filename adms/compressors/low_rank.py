"""``low_rank``: a Karhunen-Loeve transform over all KV heads, coded in a few bytes a token.

Keys (before positions) and values are centred and projected on the principal directions of the
stream's own exact tokens; channels are grouped by eight in the order of their variance and coded by
residual vector quantisation with universal codebooks, one byte a stage. A greedy allocation spends
the bytes of a token where they remove most error, which is water-filling in steps of a byte; in its
order every prefix of a code is a coarser code, and old tokens keep only a prefix. A gain per token
(one byte for keys, one for values) adapts to tokens larger than the rest.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` tokens, ``J`` channels over all heads (``K * D`` of keys,
``K * E`` of values), ``C`` coded channels, ``G = C / 8`` groups, ``T`` bytes of a token.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adms.calibration import LayerCalibration
from adms.compressors.base import (
    Coder,
    Compressor,
    LayerContext,
    pack,
    register_compressor,
    unpack,
)
from adms.compressors.codebooks import GROUP, WORDS, codebooks_on, nearest, shipped
from adms.compressors.quantized import DEFAULT_STAGES, QuantizedCoder
from adms.compressors.tables import CodeTables, Projection, views
from adms.entries import Entries

if TYPE_CHECKING:
    from adms.config import ADMSConfig

# Bits per element of a token's code; measured best on three texts (docs/middle-tier.md).
CODE_BITS = 1.56
# The same of a landmark's, which are kept finely.
FINE_BITS = 3.0
# Share of the channels that the stored basis spans, of keys and of values.
KEY_SHARE = 0.6
VALUE_SHARE = 0.7
# The same where the basis costs nothing.
SHARED_KEY_SHARE = 0.8
SHARED_VALUE_SHARE = 0.9
# ``auto``: whole codes of more bits, cut to half once old, each kind in half of the bytes.
AUTO_BITS = 1.4
COARSE_CODE = 0.5
COARSE_SHARE = 0.5
# Weight of a value's relative error against a key's; measured (docs/middle-tier.md).
VALUE_WEIGHT = 0.3
# Steps of the gain per doubling.
GAIN_STEPS = 8
GAIN_ZERO = 128
GAIN_BYTES = 2
# Largest deviation that float16 keeps.
HALF_LIMIT = 6.0e4


@dataclass
class Transform:
    """Keys or values of some rows to channels of unit variance and back.

    Attributes:
        mean: ``[B, J]``.
        analysis: ``[B, S, C, J / S]`` its rows give the channels of a block, before scaling.
        synthesis: ``[B, S, C, J / S]`` what each channel adds.
        deviation: ``[B, S * C]`` standard deviations of the channels.
    """

    mean: torch.Tensor
    analysis: torch.Tensor
    synthesis: torch.Tensor
    deviation: torch.Tensor

    def project(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Channels ``[B, N, S * C]`` and the gain's byte ``[B, N, 1]`` of ``[B, N, J]``."""
        blocks = (states - self.mean[:, None]).unflatten(2, (self.analysis.shape[1], -1))
        channels = torch.einsum("bnsj,bscj->bnsc", blocks, self.analysis).flatten(2)
        channels = channels / self.deviation[:, None]
        power = channels.square().mean(2, keepdim=True).sqrt().clamp(min=1e-6)
        step = (power.log2() * GAIN_STEPS).round().clamp(-GAIN_ZERO, 255 - GAIN_ZERO)
        gain = (step + GAIN_ZERO).to(torch.uint8)
        return channels / torch.exp2(step / GAIN_STEPS), gain

    def restore(self, channels: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """The inverse of ``project`` up to what was not coded: ``[B, N, J]``."""
        factor = torch.exp2((gain.float() - GAIN_ZERO) / GAIN_STEPS)
        blocks = self.synthesis.shape[1]
        scaled = self.synthesis * self.deviation.unflatten(1, (blocks, -1))[..., None]
        parts = (channels * factor).unflatten(2, (blocks, -1))
        return torch.einsum("bnsc,bscj->bnsj", parts, scaled).flatten(2) + self.mean[:, None]


class Basis(ABC):
    """Where the directions of keys or of values come from, and what of them is in the header.

    Attributes:
        layout: dtypes and extents of the header's parts.
        channels: coded channels (``S * C``).
    """

    layout: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    channels: int

    @abstractmethod
    def fit(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The header's parts from tokens ``[N, J]``; the last are the channels' deviations."""

    @abstractmethod
    def read(self, parts: list[torch.Tensor]) -> Transform:
        """The transform of header parts, a row each."""

    @abstractmethod
    def projection(
        self, parts: list[torch.Tensor], gain_start: int, dtype: torch.dtype
    ) -> Projection:
        """How kernels restore states from header parts, with as little made as possible.

        Args:
            parts: of the header, a row each.
            gain_start: the gain's byte.
            dtype: the model's.
        """


class FittedBasis(Basis):
    """Fitted to the stream and stored in the header; for use without a model.

    Args:
        width: channels before the transform (``J``).
        channels: the strongest, which are coded.
    """

    def __init__(self, width: int, channels: int) -> None:
        self.channels = channels
        self.layout = (
            (torch.float16, (width,)),
            (torch.int8, (channels, width)),
            (torch.float16, (channels,)),
            (torch.float16, (channels,)),
        )

    def fit(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean, int8 basis, its scales, deviations."""
        mean = states.mean(0).half()
        centred = states - mean.float()
        _, directions = torch.linalg.eigh(centred.double().T @ centred.double())
        basis = directions.flip(1)[:, : self.channels].T.float()
        scale = (basis.abs().amax(1) / 127).clamp(min=1e-7).half()
        stored = (basis / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        deviation = _deviation(centred @ (stored.float() * scale.float()[:, None]).T)
        # Coded channels must come in the order of their deviation for groups to be alike.
        order = deviation.float().argsort(descending=True, stable=True)
        return mean, stored[order], scale[order], deviation[order]

    def read(self, parts: list[torch.Tensor]) -> Transform:
        """One block over all heads."""
        mean, stored, scale, deviation = (part.float() for part in parts)
        basis = (stored * scale[..., None])[:, None]
        return Transform(mean, basis, basis, deviation)

    def projection(
        self, parts: list[torch.Tensor], gain_start: int, dtype: torch.dtype
    ) -> Projection:
        """The basis as it is stored."""
        mean, stored, scale, deviation = parts
        factor = scale.float() * deviation.float()
        return Projection(stored[:, None], factor[:, None], mean[:, None], gain_start, 0)


class SharedBasis(Basis):
    """The model's own (``adms.calibration``); the header says which channels are the strongest.

    Args:
        calibration: the layer's.
        name: ``key`` or ``value``.
        blocks: blocks of heads (``S``).
        width: channels before the transform (``J``), of all blocks.
        channels: the strongest, which are coded.
    """

    def __init__(
        self, calibration: LayerCalibration, name: str, blocks: int, width: int, channels: int
    ) -> None:
        self.calibration = calibration
        self.name = name
        self.blocks = blocks
        self.channels = channels
        self.layout = (
            (torch.float16, (width,)),
            (torch.int16, (channels,)),
            (torch.float16, (channels,)),
        )

    def _bases(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All directions ``[S, J / S, J / S]`` and the channels' weights ``[S, 1, J / S]``."""
        tensors = self.calibration.on(device)
        basis = tensors[f"{self.name}_basis"].float()
        basis = basis * tensors[f"{self.name}_scale"].float()[..., None]
        weight = tensors.get(f"{self.name}_weight")
        if weight is None:
            return basis, basis.new_ones(1, 1, 1)
        return basis, weight.float()[:, None]

    def fit(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean, which channels of each block, their deviations."""
        basis, weight = self._bases(states.device)
        mean = states.mean(0).half()
        blocks = (states - mean.float()).unflatten(1, (self.blocks, -1)).transpose(0, 1)
        deviation = _deviation((blocks * weight) @ basis.transpose(1, 2))
        order = deviation.float().argsort(dim=1, descending=True, stable=True)
        order = order[:, : self.channels // self.blocks]
        return mean, order.flatten().to(torch.int16), deviation.gather(1, order).flatten()

    def read(self, parts: list[torch.Tensor]) -> Transform:
        """Each row's choice of the shared directions."""
        mean, order, deviation = parts
        basis, weight = self._bases(mean.device)
        index = order.long().unflatten(1, (self.blocks, -1))
        block = torch.arange(self.blocks, device=mean.device)[:, None]
        chosen = basis[block, index]
        return Transform(mean.float(), chosen * weight, chosen / weight, deviation.float())

    def projection(
        self, parts: list[torch.Tensor], gain_start: int, dtype: torch.dtype
    ) -> Projection:
        """Each row's choice of the shared directions, as integers where they have no weights."""
        mean, order, deviation = parts
        tensors = self.calibration.on(mean.device)
        index = order.long().unflatten(1, (self.blocks, -1))
        block = torch.arange(self.blocks, device=mean.device)[:, None]
        basis = tensors[f"{self.name}_basis"][block, index]
        weight = tensors.get(f"{self.name}_weight")
        if weight is not None:
            kind = torch.float32 if dtype.itemsize > 2 else torch.float16
            basis = basis * weight.float().reciprocal().to(kind)[:, None]
        scale = tensors[f"{self.name}_scale"].float()[block, index]
        factor = scale * deviation.float().unflatten(1, (self.blocks, -1))
        return Projection(basis, factor, mean.unflatten(1, (self.blocks, -1)), gain_start, 0)


def _deviation(channels: torch.Tensor) -> torch.Tensor:
    """Standard deviations ``[..., C]`` (float16) of centred channels ``[..., N, C]``."""
    least = 1e-6
    return channels.square().mean(-2).sqrt().clamp(least, HALF_LIMIT).half().clamp(min=least)


class LowRankCoder(Coder):
    """See the module; made by ``LowRank.bind``."""

    def __init__(
        self,
        context: LayerContext,
        nbytes: int,
        config: "ADMSConfig",
        *,
        code_bits: float | None = None,
        coarse_share: float = 0.0,
    ) -> None:
        shape = context.shape
        self.shape = shape
        self.dtype = context.dtype
        self.fit_tokens = config.svd_max_tokens
        bits = CODE_BITS if code_bits is None else code_bits
        self.code_bytes = max(2, round(shape.num_elements * bits / 8))
        self.keys = _basis("key", context, shape.key_dim, config.rank)
        self.values = _basis("value", context, shape.value_dim, config.rank)
        self.record_bytes = GAIN_BYTES + self.code_bytes
        # The allocation goes on beyond a record's end.
        self.most_codes = max(self.code_bytes, round(shape.num_elements * FINE_BITS / 8))
        self.fine_bytes = GAIN_BYTES + self.most_codes
        self.layout = (
            *self.keys.layout,
            *self.values.layout,
            (torch.int16, (self.most_codes,)),
            (torch.uint8, (self.most_codes,)),
        )
        self.header_bytes = sum(
            dtype.itemsize * torch.Size(extents).numel() for dtype, extents in self.layout
        )
        # The share of the bytes that old, cut records take; see ``Auto``.
        self.coarse_bytes = GAIN_BYTES + max(1, round(self.code_bytes * COARSE_CODE))
        left = max(0, nbytes - self.header_bytes)
        self.num_coarse = int(left * coarse_share) // self.coarse_bytes
        self.num_records = (left - self.num_coarse * self.coarse_bytes) // self.record_bytes

    # --- fitting -----------------------------------------------------------------------------

    def fit(self, entries: Entries, queries: torch.Tensor | None = None) -> torch.Tensor:
        """Means, channels, deviations and the allocation: ``[1, header_bytes]``."""
        keys, values = _flatten(entries.keys)[0], _flatten(entries.values)[0]
        key_parts = self.keys.fit(keys[-self.fit_tokens :])
        value_parts = self.values.fit(values[-self.fit_tokens :])
        group, stage = self._allocate(key_parts[-1], value_parts[-1])
        return pack(*(part[None] for part in (*key_parts, *value_parts, group, stage)))

    def _allocate(
        self, key_deviation: torch.Tensor, value_deviation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Groups and stages ``[T]`` of a token's bytes, the most useful first."""
        key_power, value_power = key_deviation.float().square(), value_deviation.float().square()
        key_power = key_power / key_power.sum().clamp(min=1e-12)
        value_power = VALUE_WEIGHT * value_power / value_power.sum().clamp(min=1e-12)
        power = torch.cat([key_power, value_power]).view(-1, GROUP).sum(1)
        errors = torch.tensor(shipped()[1], device=power.device)
        saved = errors[:-1] - errors[1:]
        benefit = power[:, None] * saved
        # Stages of a group save less and less, so sorting keeps them in order; ties are broken
        # towards earlier stages by a stable sort over stage-major order.
        order = benefit.T.flatten().argsort(descending=True, stable=True)[: self.most_codes]
        groups = power.shape[0]
        missing = self.most_codes - len(order)
        group = torch.nn.functional.pad(order % groups, (0, missing), value=0)
        stage = torch.nn.functional.pad(order // groups, (0, missing), value=255)
        return group.to(torch.int16), stage.to(torch.uint8)

    def _read(
        self, header: torch.Tensor
    ) -> tuple[Transform, Transform, torch.Tensor, torch.Tensor]:
        parts = unpack(header, *self.layout)
        split = len(self.keys.layout)
        for_keys = self.keys.read(parts[:split])
        for_values = self.values.read(parts[split:-2])
        return for_keys, for_values, parts[-2].long(), parts[-1].long()

    # --- coding --------------------------------------------------------------------------------

    def encode(
        self, header: torch.Tensor, entries: Entries, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Bytes ``[B, N, 2 + T]``: two gains, then all codes in the order of the allocation."""
        for_keys, for_values, group, stage = self._read(header)
        key_channels, key_gain = for_keys.project(_flatten(entries.keys))
        value_channels, value_gain = for_values.project(_flatten(entries.values))
        residual = torch.cat([key_channels, value_channels], dim=2).unflatten(2, (-1, GROUP))
        books = codebooks_on(residual.device)
        codes = []
        for book in books:
            index = nearest(residual, book)
            residual = residual - book[index]
            codes.append(index)
        # [B, N, stages, G] -> the bytes that the allocation asks for.
        every = torch.stack(codes, dim=2).flatten(2)
        where = stage.clamp(max=len(books) - 1) * residual.shape[2] + group
        chosen = every.gather(2, where[:, None].expand(-1, every.shape[1], -1))
        return torch.cat([key_gain, value_gain, chosen.to(torch.uint8)], dim=2)

    def decode(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        """Keys and values in the model's dtype."""
        for_keys, for_values, group, stage = self._read(header)
        channels = self._channels(records[..., GAIN_BYTES:].long(), group, stage)
        split = self.keys.channels
        keys = for_keys.restore(channels[..., :split], records[..., :1])
        values = for_values.restore(channels[..., split:], records[..., 1:2])
        heads = self.shape.num_heads
        return Entries(
            keys.unflatten(2, (heads, -1)).transpose(1, 2).to(self.dtype),
            values.unflatten(2, (heads, -1)).transpose(1, 2).to(self.dtype),
        )

    def tables(self, header: torch.Tensor, record_bytes: int) -> CodeTables:
        """Where the code of each group and stage lies in a record, and the two transforms."""
        parts = views(header, *self.layout)
        split = len(self.keys.layout)
        for_keys = self.keys.projection(parts[:split], 0, self.dtype)
        for_values = self.values.projection(parts[split:-2], 1, self.dtype)
        group, stage = parts[-2].long(), parts[-1].long()
        stages, groups = len(shipped()[0]), (self.keys.channels + self.values.channels) // GROUP
        # A record holds the first codes of the allocation.
        held = record_bytes - GAIN_BYTES
        group, stage = group[:, :held], stage[:, :held]
        # The allocation's padding goes to a stage of its own, which is dropped.
        index = stage.clamp(max=stages) * groups + group
        at = torch.arange(GAIN_BYTES, record_bytes, dtype=torch.int32, device=header.device)
        offsets = torch.full(
            (len(header), (stages + 1) * groups), -1, dtype=torch.int32, device=header.device
        )
        offsets.scatter_(1, index, at.expand(len(header), -1))
        offsets = offsets.unflatten(1, (stages + 1, groups))[:, :stages]
        return CodeTables(offsets, for_keys, for_values, gain_steps=GAIN_STEPS)

    def _channels(
        self, codes: torch.Tensor, group: torch.Tensor, stage: torch.Tensor
    ) -> torch.Tensor:
        """Channels ``[B, N, C]`` of keys and values that codes ``[B, N, T]`` stand for."""
        books = codebooks_on(codes.device)
        # A record holds the first codes of the allocation, a cut one fewer.
        group, stage = group[:, : codes.shape[2]], stage[:, : codes.shape[2]]
        offset = stage.clamp(max=len(books) - 1) * WORDS
        words = torch.nn.functional.embedding(codes + offset[:, None], books.flatten(0, 1))
        # [B, G, T]: which byte belongs to which group, none where the stage marks padding.
        groups = torch.arange((self.keys.channels + self.values.channels) // GROUP)
        member = (group[:, None, :] == groups.to(group.device)[:, None]) & (
            stage[:, None, :] < len(books)
        )
        return torch.einsum("bgt,bntc->bngc", member.to(words.dtype), words).flatten(2)


def _basis(name: str, context: LayerContext, head_dim: int, rank: int | None) -> Basis:
    """Where a layer's directions come from, and how many are coded: a multiple of eight a block.

    As many as ``rank`` asks for per head, or a share of all.
    """
    heads, calibration = context.shape.num_heads, context.calibration
    blocks = 1 if calibration is None else calibration.num_blocks(context.shape)
    width = heads * head_dim // blocks
    fitted, shared = (
        (KEY_SHARE, SHARED_KEY_SHARE) if name == "key" else (VALUE_SHARE, SHARED_VALUE_SHARE)
    )
    share = fitted if calibration is None else shared
    wanted = width * share if rank is None else rank * heads // blocks
    most = width // GROUP * GROUP
    coded = max(GROUP, min(most, math.ceil(wanted / GROUP) * GROUP))
    if calibration is None:
        return FittedBasis(width, coded)
    return SharedBasis(calibration, name, blocks, blocks * width, blocks * coded)


def _flatten(states: torch.Tensor) -> torch.Tensor:
    """``[B, K, N, D]`` -> ``[B, N, K * D]`` in float32."""
    return states.transpose(1, 2).flatten(2).float()


class LowRank(Compressor):
    """Karhunen-Loeve transform, joint over heads, with residual vector quantisation.

    Source: cf. KVTC (2025), arXiv 2511.01815, for transform coding of caches; differs in a basis
    fitted to the stream itself, vector codebooks and a greedy embedded allocation.
    """

    name = "low_rank"
    parameters = frozenset({"rank", "svd_max_tokens"})
    uses_calibration = True

    def bind(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> Coder:
        """A coder for this layer."""
        return LowRankCoder(context, nbytes, config)


class Auto(LowRank):
    """``low_rank`` that codes recent tokens finely and cuts old ones to half of their code.

    Nothing is coded twice: the bytes come in the order of their use, so a prefix is a coarser code.
    Where a basis would take more than half of the bytes, it is ``quantized``, which needs none.
    """

    name = "auto"

    def bind(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> Coder:
        """A coder for this layer."""
        coder = LowRankCoder(
            context, nbytes, config, code_bits=AUTO_BITS, coarse_share=COARSE_SHARE
        )
        if 2 * coder.header_bytes <= nbytes:
            return coder
        return QuantizedCoder(context.shape, context.dtype, DEFAULT_STAGES, nbytes=nbytes)


register_compressor("low_rank", LowRank())
register_compressor("auto", Auto())
