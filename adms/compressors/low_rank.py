"""``low_rank``: a Karhunen-Loeve transform over all KV heads, coded in a few bytes a token.

Keys (before positions) and values are centred and projected on principal directions (``basis``);
channels are grouped by eight in the order of their variance and coded by
residual vector quantisation with universal codebooks, one byte a stage. A greedy allocation spends
the bytes of a token where they remove most error, which is water-filling in steps of a byte; in its
order every prefix of a code is a coarser code, and old tokens keep only a prefix. A gain per token
(one byte for keys, one for values) adapts to tokens larger than the rest.

Each block of heads that share a basis has as many bytes as any other, and gains and an allocation
of its own: its code is the same wherever the other blocks are, on other devices say. Bytes of
blocks alternate, so that a prefix has as many of each.

What a code leaves out of a key makes the scores of coded tokens too even: on average over queries,
``exp(q k)`` is ``exp(q c)`` of the code ``c`` times ``exp`` of half the variance of ``q (k - c)``.
Each head's mean of that half is the log-weight of its coded entries.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` tokens, ``J`` channels over all heads (``K * D`` of keys,
``K * E`` of values), ``S`` blocks, ``C`` coded channels, ``G = C / 8`` groups, ``T`` bytes of a
token.
"""

import copy
from collections.abc import Sequence
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
from adms.compressors.basis import GAIN_STEPS, basis_for, split_gain, with_gain
from adms.compressors.codebooks import GROUP, WORDS, assign, codebooks_on, shipped
from adms.compressors.quantized import DEFAULT_STAGES, QuantizedCoder
from adms.compressors.tables import CodeTables, views
from adms.entries import Entries

if TYPE_CHECKING:
    from adms.config import ADMSConfig

# Bits per element of a token's code; measured best on three texts (docs/middle-tier.md).
CODE_BITS = 1.56
# The same of a landmark's, which are kept finely.
FINE_BITS = 3.0
# ``auto``: whole codes of more bits, cut to half once old, each kind in half of the bytes.
AUTO_BITS = 1.4
COARSE_CODE = 0.5
COARSE_SHARE = 0.5
# Weight of a value's relative error against a key's; measured (docs/middle-tier.md).
VALUE_WEIGHT = 0.3
# Gains of a block, a byte each.
BLOCK_GAINS = 2
# The lengths of a token's code, as the header's log-weights come.
FORMS = ("cut", "whole", "fine")
# Tokens on which the errors of codes are measured, and the largest log-weight: of errors beyond it
# an expansion to second order says nothing.
MEASURED_TOKENS = 512
MOST_WEIGHT = 0.5


class LowRankCoder(Coder):
    """See the module; made by ``LowRank.bind``."""

    is_stackable = True

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
        self.keys = basis_for("key", context, shape.key_dim, config.rank)
        self.values = basis_for("value", context, shape.value_dim, config.rank)
        # Keys and values are divided into the same blocks of heads.
        self.blocks = blocks = self.keys.blocks
        elements = shape.num_elements // blocks
        code_bytes = max(2, round(elements * bits / 8))
        # The allocation goes on beyond a record's end.
        most_codes = max(code_bytes, round(elements * FINE_BITS / 8))
        self.gain_bytes = BLOCK_GAINS * blocks
        self.code_bytes, self.most_codes = blocks * code_bytes, blocks * most_codes
        self.record_bytes = self.gain_bytes + self.code_bytes
        self.fine_bytes = self.gain_bytes + self.most_codes
        self.layout = (
            *self.keys.layout,
            *self.values.layout,
            (torch.float16, (len(FORMS), shape.num_heads)),
            (torch.int16, (self.most_codes,)),
            (torch.uint8, (self.most_codes,)),
        )
        self.header_bytes = sum(
            dtype.itemsize * torch.Size(extents).numel() for dtype, extents in self.layout
        )
        # The share of the bytes that old, cut records take; see ``Auto``.
        self.coarse_bytes = self.gain_bytes + blocks * max(1, round(code_bytes * COARSE_CODE))
        left = max(0, nbytes - self.header_bytes)
        self.num_coarse = int(left * coarse_share) // self.coarse_bytes
        self.num_records = (left - self.num_coarse * self.coarse_bytes) // self.record_bytes

    def stacked(self, coders: Sequence[Coder]) -> Coder:
        """One that applies each layer's own basis to its rows."""
        own = [coder for coder in coders if isinstance(coder, LowRankCoder)]
        twin = copy.copy(self)
        twin.keys = self.keys.stacked([coder.keys for coder in own])
        twin.values = self.values.stacked([coder.values for coder in own])
        return twin

    # --- fitting -----------------------------------------------------------------------------

    def fit(self, entries: Entries, queries: torch.Tensor | None = None) -> torch.Tensor:
        """Means, channels, deviations, allocation and log-weights: ``[1, header_bytes]``."""
        keys, values = _flatten(entries.keys)[0], _flatten(entries.values)[0]
        key_parts = self.keys.fit(keys[-self.fit_tokens :])
        value_parts = self.values.fit(values[-self.fit_tokens :])
        group, stage = self._allocate(key_parts[-1], value_parts[-1])
        transforms = [part[None] for part in (*key_parts, *value_parts)]
        allocation = (group[None], stage[None])
        unknown = keys.new_zeros(1, len(FORMS), self.shape.num_heads)
        header = pack(*transforms, unknown.half(), *allocation)
        weights = self._measure(header, entries)
        return pack(*transforms, weights.half(), *allocation)

    def _measure(self, header: torch.Tensor, entries: Entries) -> torch.Tensor:
        """Log-weights ``[1, forms, K]``: half the variance of the scores of what codes leave out.

        Source: the second-order term of a cumulant expansion; queries are those of the calibration.
        """
        power = self.keys.query_power(header.device)
        if power is None:
            return torch.zeros(1, len(FORMS), self.shape.num_heads, device=header.device)
        last = Entries(
            entries.keys[:, :, -MEASURED_TOKENS:], entries.values[:, :, -MEASURED_TOKENS:]
        )
        records = self.encode(header, last)
        power = power.view(1, self.shape.num_heads, 1, -1)
        halves = []
        for size in (self.coarse_bytes, self.record_bytes, self.fine_bytes):
            error = last.keys.float() - self.decode(header, records[..., :size]).keys.float()
            variance = (error.square() * power).sum(3).mean(2) / self.shape.key_dim
            halves.append(0.5 * variance)
        return torch.stack(halves, dim=1).clamp(max=MOST_WEIGHT)

    def log_weight(self, header: torch.Tensor, record_bytes: int) -> torch.Tensor:
        """See ``Coder``."""
        form = 2 if record_bytes > self.record_bytes else int(record_bytes == self.record_bytes)
        return views(header, *self.layout)[-3][:, form]

    def _allocate(
        self, key_deviation: torch.Tensor, value_deviation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Groups and stages ``[T]`` of a token's bytes, the most useful of each block first.

        Args:
            key_deviation: of the coded channels, block by block.
            value_deviation: the same of values.
        """
        key_power, value_power = (
            part.float().square().view(self.blocks, -1) for part in (key_deviation, value_deviation)
        )
        key_power = key_power / key_power.sum(1, keepdim=True).clamp(min=1e-12)
        value_sum = value_power.sum(1, keepdim=True).clamp(min=1e-12)
        value_power = VALUE_WEIGHT * value_power / value_sum
        power = torch.cat([key_power, value_power], dim=1).unflatten(1, (-1, GROUP)).sum(2)
        errors = torch.tensor(shipped()[1], device=power.device)
        saved = errors[:-1] - errors[1:]
        benefit = power[:, None] * saved[:, None]
        # Stages of a group save less and less, so sorting keeps them in order; ties are broken
        # towards earlier stages by a stable sort over stage-major order.
        most = self.most_codes // self.blocks
        order = benefit.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :most]
        groups = power.shape[1]
        # All groups of keys come before those of values.
        of_keys, of_values = (
            torch.arange(part.channels // GROUP, device=power.device).view(self.blocks, -1)
            for part in (self.keys, self.values)
        )
        index = torch.cat([of_keys, of_values + of_keys.numel()], dim=1)
        group, stage = index.gather(1, order % groups), order // groups
        missing = (0, most - order.shape[1])
        group = torch.nn.functional.pad(group, missing, value=0)
        stage = torch.nn.functional.pad(stage, missing, value=255)
        return group.T.flatten().to(torch.int16), stage.T.flatten().to(torch.uint8)

    def _read(
        self, header: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Parts of the keys' and the values' basis, and the allocation."""
        parts = unpack(header, *self.layout)
        split = len(self.keys.layout)
        return parts[:split], parts[split:-3], parts[-2].long(), parts[-1].long()

    # --- coding --------------------------------------------------------------------------------

    def encode(
        self, header: torch.Tensor, entries: Entries, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Bytes ``[B, N, 2 S + T]``: gains, then all codes in the order of the allocation."""
        for_keys, for_values, group, stage = self._read(header)
        key_channels, key_gain = split_gain(
            self.keys.analyse(for_keys, _flatten(entries.keys)), self.blocks
        )
        value_channels, value_gain = split_gain(
            self.values.analyse(for_values, _flatten(entries.values)), self.blocks
        )
        channels = torch.cat([key_channels, value_channels], dim=2).unflatten(2, (-1, GROUP))
        count, groups = channels.shape[1:3]
        # A record's codes are the first of the allocation, and should be the best for its length.
        kept = _stages(group[:, : self.code_bytes], stage[:, : self.code_bytes], groups)
        codes = assign(channels.transpose(1, 2), kept, _stages(group, stage, groups))
        # [B, stages, G, N] -> the bytes that the allocation asks for.
        where = stage.clamp(max=codes.shape[1] - 1) * groups + group
        chosen = codes.flatten(1, 2).gather(1, where[..., None].expand(-1, -1, count))
        return torch.cat([key_gain, value_gain, chosen.transpose(1, 2)], dim=2)

    def decode(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        """Keys and values in the model's dtype."""
        for_keys, for_values, group, stage = self._read(header)
        gains, codes = records[..., : self.gain_bytes], records[..., self.gain_bytes :]
        channels = self._channels(codes.long(), group, stage)
        split, blocks = self.keys.channels, self.blocks
        keys = self.keys.synthesise(for_keys, with_gain(channels[..., :split], gains[..., :blocks]))
        values = self.values.synthesise(
            for_values, with_gain(channels[..., split:], gains[..., blocks:])
        )
        heads = self.shape.num_heads
        weight = self.log_weight(header, records.shape[2])
        return Entries(
            keys.unflatten(2, (heads, -1)).transpose(1, 2).to(self.dtype),
            values.unflatten(2, (heads, -1)).transpose(1, 2).to(self.dtype),
            weight.float()[..., None].expand(-1, -1, records.shape[1]),
        )

    def tables(self, header: torch.Tensor, record_bytes: int) -> CodeTables:
        """Where the code of each group and stage lies in a record, and the two transforms."""
        parts = views(header, *self.layout)
        split = len(self.keys.layout)
        for_keys = self.keys.projection(parts[:split], 0)
        for_values = self.values.projection(parts[split:-3], self.blocks)
        group, stage = parts[-2].long(), parts[-1].long()
        stages, groups = len(shipped()[0]), (self.keys.channels + self.values.channels) // GROUP
        # A record holds the first codes of the allocation.
        held = record_bytes - self.gain_bytes
        group, stage = group[:, :held], stage[:, :held]
        # The allocation's padding goes to a place behind all others, which is dropped.
        index = torch.where(stage < stages, stage * groups + group, stages * groups)
        at = torch.arange(self.gain_bytes, record_bytes, dtype=torch.int32, device=header.device)
        offsets = torch.full(
            (len(header), stages * groups + 1), -1, dtype=torch.int32, device=header.device
        )
        offsets.scatter_(1, index, at.expand(len(header), -1))
        offsets = offsets[:, :-1].unflatten(1, (stages, groups))
        return CodeTables(
            offsets,
            record_bytes,
            for_keys,
            for_values,
            gain_steps=GAIN_STEPS,
            log_weight=self.log_weight(header, record_bytes),
        )

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
        count = (self.keys.channels + self.values.channels) // GROUP
        groups = torch.arange(count, device=group.device)
        member = (group[:, None, :] == groups[:, None]) & (stage[:, None, :] < len(books))
        return torch.einsum("bgt,bntc->bngc", member.to(words.dtype), words).flatten(2)


def _stages(group: torch.Tensor, stage: torch.Tensor, groups: int) -> torch.Tensor:
    """How many stages each group has ``[B, G]`` in an allocation ``[B, T]``."""
    real = (stage < len(shipped()[0])).long()
    return torch.zeros(len(group), groups, dtype=torch.long, device=group.device).scatter_add_(
        1, group, real
    )


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
