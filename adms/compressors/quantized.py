"""``quantized``: every token by itself in a few bits an element; nothing is fitted but the mean.

Keys and values of each head are centred, turned by a fixed random rotation (which makes channels
alike and close to Gaussian), scaled by a gain per token and head, and coded by residual vector
quantisation with the universal codebooks, one bit an element and stage. It also keeps landmarks.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` tokens, ``D``/``E`` head sizes of keys/values.
"""

from functools import lru_cache
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
from adms.compressors.codebooks import GROUP, WORDS, assign, codebooks_on
from adms.compressors.tables import CodeTables, Projection, views
from adms.entries import Entries, TokenShape

if TYPE_CHECKING:
    from adms.config import ADMSConfig

# Stages of ``compressor_type="quantized"``: bits an element.
DEFAULT_STAGES = 2


@lru_cache(maxsize=32)
def rotation(size: int, device: torch.device) -> torch.Tensor:
    """A fixed orthogonal matrix ``[size, size]``, the same on every machine up to rounding."""
    generator = torch.Generator().manual_seed(size)
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal, triangle = torch.linalg.qr(normal)
    # The signs of a QR decomposition are a convention of the library; these make it unique.
    return (orthogonal * triangle.diagonal().sign()).float().to(device)


@lru_cache(maxsize=32)
def inverse(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotation back, row by row, and as many ones."""
    return rotation(size, device).T.contiguous(), torch.ones(size, device=device)


class QuantizedCoder(Coder):
    """See the module.

    Args:
        shape: keys and values of one token.
        dtype: dtype of decoded entries.
        stages: bytes per eight elements, 1 to 6.
        nbytes: bytes for header and records; or give ``num_records``.
        num_records: tokens to hold.
    """

    is_stackable = True

    def __init__(
        self,
        shape: TokenShape,
        dtype: torch.dtype,
        stages: int,
        *,
        nbytes: int = 0,
        num_records: int | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.stages = stages
        # A head size that is no multiple of eight is padded with zeros.
        self.key_groups = -(-shape.key_dim // GROUP)
        self.value_groups = -(-shape.value_dim // GROUP)
        heads = shape.num_heads
        self.key_bytes = heads * (self.key_groups * stages + 2)
        self.value_bytes = heads * (self.value_groups * stages + 2)
        self.record_bytes = self.key_bytes + self.value_bytes
        self.layout = (
            (torch.float16, (heads, shape.key_dim)),
            (torch.float16, (heads, shape.value_dim)),
        )
        self.header_bytes = 2 * shape.num_elements
        if num_records is None:
            num_records = max(0, (nbytes - self.header_bytes) // self.record_bytes)
        self.num_records = num_records

    def fit(self, entries: Entries, queries: torch.Tensor | None = None) -> torch.Tensor:
        """Means over the tokens: ``[1, header_bytes]``."""
        means = [
            part.float().mean(2).clamp(-6e4, 6e4).half() for part in (entries.keys, entries.values)
        ]
        return pack(*means)

    def encode(
        self, header: torch.Tensor, entries: Entries, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Codes and gains of keys, then of values: ``[B, N, record_bytes]``."""
        key_mean, value_mean = unpack(header, *self.layout)
        return torch.cat(
            [self._encode(entries.keys, key_mean), self._encode(entries.values, value_mean)], dim=2
        )

    def decode(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        """Keys and values in the model's dtype."""
        key_mean, value_mean = unpack(header, *self.layout)
        keys = self._decode(records[..., : self.key_bytes], key_mean)
        values = self._decode(records[..., self.key_bytes :], value_mean)
        return Entries(keys, values)

    def tables(self, header: torch.Tensor, record_bytes: int) -> CodeTables | None:
        """Every head is a block of its own; the basis is the fixed rotation."""
        if self.shape.key_dim % GROUP or self.shape.value_dim % GROUP:
            return None
        device, heads = header.device, self.shape.num_heads
        offsets, sides, start = [], [], 0
        for mean, groups in zip(
            views(header, *self.layout), (self.key_groups, self.value_groups), strict=True
        ):
            head = start + torch.arange(heads, device=device) * (groups * self.stages + 2)
            group = torch.arange(groups, device=device) * self.stages
            stage = torch.arange(self.stages, device=device)[:, None, None]
            offsets.append((head[:, None] + group + stage).flatten(1))
            size = mean.shape[2]
            basis, ones = (part.expand(1, heads, *part.shape) for part in inverse(size, device))
            gain_start = start + groups * self.stages
            stride = groups * self.stages + 2
            sides.append(Projection(basis, ones, ones, mean, gain_start, stride))
            start += heads * (groups * self.stages + 2)
        where = torch.cat(offsets, dim=1).to(torch.int32)[None]
        return CodeTables(where, self.record_bytes, sides[0], sides[1], half_gain=True)

    def _encode(self, states: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        size = states.shape[3]
        centred = (states.float() - mean.float()[:, :, None]) @ rotation(size, states.device)
        gain = centred.square().mean(3, keepdim=True).sqrt().clamp(1e-6, 6e4).half()
        residual = torch.nn.functional.pad(centred / gain.float(), (0, -size % GROUP))
        residual = residual.unflatten(3, (-1, GROUP))
        # [B, K, N, G, 8]: the groups of all heads are searched as one coder's.
        heads, groups = residual.shape[1], residual.shape[3]
        vectors = residual.transpose(2, 3).flatten(1, 2)
        stages = torch.full(vectors.shape[:2], self.stages, device=states.device)
        found = assign(vectors, stages, stages)[:, : self.stages]
        code = found.unflatten(2, (heads, groups)).permute(0, 2, 4, 3, 1).flatten(3)
        record = torch.cat([code, gain.view(torch.uint8)], dim=3)
        return record.transpose(1, 2).flatten(2)

    def _decode(self, records: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        size, heads = mean.shape[2], self.shape.num_heads
        per_head = records.unflatten(2, (heads, -1)).transpose(1, 2)
        # Not contiguous(): that is no copy for a single gain, which may start at an odd byte.
        gain = per_head[..., -2:].clone(memory_format=torch.contiguous_format)
        gain = gain.view(torch.float16).float()
        code = per_head[..., :-2].unflatten(3, (-1, self.stages)).long()
        books = codebooks_on(records.device)[: self.stages]
        offset = torch.arange(self.stages, device=records.device) * WORDS
        words = torch.nn.functional.embedding(code + offset, books.flatten(0, 1)).sum(-2)
        channels = words.flatten(3)[..., :size] * gain
        restored = channels @ rotation(size, records.device).T + mean.float()[:, :, None]
        return restored.to(self.dtype)


class Quantized(Compressor):
    """Random rotation and residual vector quantisation, two bits an element.

    Source: cf. Zandieh et al. (2025), TurboQuant, arXiv 2504.19874, for the rotation; differs in
    vector codebooks and a gain per token and head.
    """

    name = "quantized"

    def bind(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> QuantizedCoder:
        """A coder for layers of this shape."""
        return QuantizedCoder(context.shape, context.dtype, DEFAULT_STAGES, nbytes=nbytes)


register_compressor("quantized", Quantized())
