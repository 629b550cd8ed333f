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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

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
CODE_BITS = 1.1
# Share of the channels that the stored basis spans, of keys and of values.
KEY_SHARE = 0.6
VALUE_SHARE = 0.7
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


@dataclass
class Transform:
    """What is fitted to keys or to values of one row.

    Attributes:
        mean: ``[B, J]``.
        basis: ``[B, C, J]`` rows of the transform, as stored (dequantised).
        deviation: ``[B, C]`` standard deviations of the channels.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    deviation: torch.Tensor


class LowRankCoder(Coder):
    """See the module; made by ``LowRank.bind``."""

    def __init__(
        self,
        context: LayerContext,
        nbytes: int,
        config: "ADMSConfig",
        *,
        code_bits: float = CODE_BITS,
        coarse_share: float = 0.0,
    ) -> None:
        shape = context.shape
        self.shape = shape
        self.dtype = context.dtype
        self.fit_tokens = config.svd_max_tokens
        self.key_channels = shape.num_heads * shape.key_dim
        self.value_channels = shape.num_heads * shape.value_dim
        self.code_bytes = max(2, round(shape.num_elements * code_bits / 8))
        rank = None if config.rank is None else config.rank * shape.num_heads
        self.key_coded = _coded(self.key_channels, KEY_SHARE, rank)
        self.value_coded = _coded(self.value_channels, VALUE_SHARE, rank)
        self.record_bytes = GAIN_BYTES + self.code_bytes
        self.layout = (
            (torch.float16, (self.key_channels,)),
            (torch.int8, (self.key_coded, self.key_channels)),
            (torch.float16, (self.key_coded,)),
            (torch.float16, (self.key_coded,)),
            (torch.float16, (self.value_channels,)),
            (torch.int8, (self.value_coded, self.value_channels)),
            (torch.float16, (self.value_coded,)),
            (torch.float16, (self.value_coded,)),
            (torch.uint8, (self.code_bytes,)),
            (torch.uint8, (self.code_bytes,)),
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
        """Means, bases, deviations and the allocation: ``[1, header_bytes]``."""
        keys, values = _flatten(entries.keys)[0], _flatten(entries.values)[0]
        key_parts = _fit_transform(keys[-self.fit_tokens :], self.key_coded)
        value_parts = _fit_transform(values[-self.fit_tokens :], self.value_coded)
        group, stage = self._allocate(key_parts, value_parts, keys, values)
        parts = [part[None] for part in (*key_parts, *value_parts, group, stage)]
        return pack(*parts)

    def _allocate(
        self,
        key_parts: tuple[torch.Tensor, ...],
        value_parts: tuple[torch.Tensor, ...],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Groups and stages ``[T]`` of a token's bytes, the most useful first."""
        key_power = key_parts[3].float().square()
        value_power = value_parts[3].float().square()
        key_scale = key_power.sum().clamp(min=1e-12)
        value_scale = value_power.sum().clamp(min=1e-12)
        power = torch.cat([key_power / key_scale, VALUE_WEIGHT * value_power / value_scale])
        power = power.view(-1, GROUP).sum(1)
        errors = torch.tensor(shipped()[1], device=power.device)
        saved = errors[:-1] - errors[1:]
        benefit = power[:, None] * saved
        # Stages of a group save less and less, so sorting keeps them in order; ties are broken
        # towards earlier stages by a stable sort over stage-major order.
        order = benefit.T.flatten().argsort(descending=True, stable=True)[: self.code_bytes]
        groups = power.shape[0]
        missing = self.code_bytes - len(order)
        group = torch.nn.functional.pad(order % groups, (0, missing), value=0)
        stage = torch.nn.functional.pad(order // groups, (0, missing), value=255)
        return group.to(torch.uint8), stage.to(torch.uint8)

    def _read(
        self, header: torch.Tensor
    ) -> tuple[Transform, Transform, torch.Tensor, torch.Tensor]:
        parts = unpack(header, *self.layout)
        transforms = []
        for first in (0, 4):
            mean, basis, scale, deviation = (part.float() for part in parts[first : first + 4])
            transforms.append(Transform(mean, basis * scale[..., None], deviation))
        return transforms[0], transforms[1], parts[8].long(), parts[9].long()

    # --- coding --------------------------------------------------------------------------------

    def encode(
        self, header: torch.Tensor, entries: Entries, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Bytes ``[B, N, 2 + T]``: two gains, then the codes in the order of the allocation."""
        for_keys, for_values, group, stage = self._read(header)
        key_channels, key_gain = _project(for_keys, _flatten(entries.keys))
        value_channels, value_gain = _project(for_values, _flatten(entries.values))
        channels = torch.cat([key_channels, value_channels], dim=2)
        residual = channels.unflatten(2, (-1, GROUP))
        books = codebooks_on(residual.device)
        codes = []
        for book in books:
            index = nearest(residual, book)
            residual = residual - book[index]
            codes.append(index)
        # [B, N, stages, G] -> the bytes that the allocation asks for.
        every = torch.stack(codes, dim=2).flatten(2)
        groups = residual.shape[2]
        where = stage.clamp(max=len(books) - 1) * groups + group
        chosen = every.gather(2, where[:, None].expand(-1, every.shape[1], -1))
        return torch.cat([key_gain, value_gain, chosen.to(torch.uint8)], dim=2)

    def decode(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        """Keys and values in the model's dtype."""
        for_keys, for_values, group, stage = self._read(header)
        books = codebooks_on(records.device)
        groups = (self.key_coded + self.value_coded) // GROUP
        codes = records[..., GAIN_BYTES:].long()
        # A cut record holds the first codes of the allocation.
        group, stage = group[:, : codes.shape[2]], stage[:, : codes.shape[2]]
        offset = stage.clamp(max=len(books) - 1) * WORDS
        words = torch.nn.functional.embedding(codes + offset[:, None], books.flatten(0, 1))
        # [B, G, T]: which byte belongs to which group, none where the stage marks padding.
        member = (group[:, None, :] == torch.arange(groups, device=group.device)[:, None]) & (
            stage[:, None, :] < len(books)
        )
        channels = torch.einsum("bgt,bntc->bngc", member.to(words.dtype), words).flatten(2)
        split = self.key_coded
        keys = _restore(for_keys, channels[..., :split], records[..., :1])
        values = _restore(for_values, channels[..., split:], records[..., 1:2])
        heads = self.shape.num_heads
        return Entries(
            keys.unflatten(2, (heads, -1)).transpose(1, 2).to(self.dtype),
            values.unflatten(2, (heads, -1)).transpose(1, 2).to(self.dtype),
        )

    def tables(self, header: torch.Tensor) -> CodeTables:
        """Where the code of each group and stage lies in a record, and the two transforms."""
        parts = views(header, *self.layout)
        sides = []
        for gain_start, first in enumerate((0, 4)):
            mean, basis, scale, deviation = parts[first : first + 4]
            factor = scale.float() * deviation.float()
            sides.append(Projection(basis[:, None], factor[:, None], mean[:, None], gain_start, 0))
        stages, groups = len(shipped()[0]), (self.key_coded + self.value_coded) // GROUP
        group, stage = parts[8].long(), parts[9].long()
        # The allocation's padding goes to a stage of its own, which is dropped.
        index = stage.clamp(max=stages) * groups + group
        at = torch.arange(GAIN_BYTES, GAIN_BYTES + self.code_bytes, device=header.device)
        offsets = torch.full(
            (len(header), (stages + 1) * groups), -1, dtype=torch.int32, device=header.device
        )
        offsets.scatter_(1, index, at.to(torch.int32).expand(len(header), -1))
        offsets = offsets.unflatten(1, (stages + 1, groups))[:, :stages]
        return CodeTables(offsets, sides[0], sides[1], gain_steps=GAIN_STEPS)


def _coded(channels: int, share: float, rank: int | None) -> int:
    """Channels of the basis, a multiple of eight: as asked for, or a share of all."""
    wanted = channels * share if rank is None else rank
    most = channels // GROUP * GROUP
    return max(GROUP, min(most, math.ceil(wanted / GROUP) * GROUP))


def _flatten(states: torch.Tensor) -> torch.Tensor:
    """``[B, K, N, D]`` -> ``[B, N, K * D]`` in float32."""
    return states.transpose(1, 2).flatten(2).float()


def _fit_transform(
    states: torch.Tensor, coded: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, int8 basis, its scales and the channels' deviations of ``[N, J]``."""
    mean = states.mean(0).half()
    centred = states - mean.float()
    _, directions = torch.linalg.eigh(centred.double().T @ centred.double())
    basis = directions.flip(1)[:, :coded].T.float()
    scale = (basis.abs().amax(1) / 127).clamp(min=1e-7).half()
    stored = (basis / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    channels = centred @ (stored.float() * scale.float()[:, None]).T
    deviation = channels.square().mean(0).sqrt().clamp(min=1e-6).half().clamp(min=1e-6)
    # Coded channels must come in the order of their deviation for groups to be alike.
    order = deviation.float().argsort(descending=True, stable=True)
    return mean, stored[order], scale[order], deviation[order]


def _project(transform: Transform, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of unit variance ``[B, N, C]`` and the gain's byte ``[B, N, 1]``."""
    channels = (states - transform.mean[:, None]) @ transform.basis.transpose(1, 2)
    channels = channels / transform.deviation[:, None]
    power = channels.square().mean(2, keepdim=True).sqrt().clamp(min=1e-6)
    step = (power.log2() * GAIN_STEPS).round().clamp(-GAIN_ZERO, 255 - GAIN_ZERO)
    gain = (step + GAIN_ZERO).to(torch.uint8)
    return channels / torch.exp2(step / GAIN_STEPS), gain


def _restore(transform: Transform, channels: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_project`` up to what was not coded."""
    factor = torch.exp2((gain.float() - GAIN_ZERO) / GAIN_STEPS)
    scaled = transform.deviation[:, :, None] * transform.basis
    return (channels * factor) @ scaled + transform.mean[:, None]


class LowRank(Compressor):
    """Karhunen-Loeve transform, joint over heads, with residual vector quantisation.

    Source: cf. KVTC (2025), arXiv 2511.01815, for transform coding of caches; differs in a basis
    fitted to the stream itself, vector codebooks and a greedy embedded allocation.
    """

    name = "low_rank"
    parameters = frozenset({"rank", "svd_max_tokens"})

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
