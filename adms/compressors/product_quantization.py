"""``pq``: every token by itself, two bits an element, with codebooks fitted to the stream.

Channels are taken in groups of four neighbours; each group of each head has two codebooks of 16
words, the second for what the first leaves over, so a group takes one byte. Codebooks are fitted
by k-means to the stream's own tokens and stored at eight bits.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` tokens, ``G`` groups of all heads, ``D``/``E`` head sizes
of keys/values, ``W = 16`` words.
"""

from typing import TYPE_CHECKING

import torch

from adms.compressors.base import Coder, Compressor, LayerContext, pack, register_compressor, unpack
from adms.compressors.vq import assign, kmeans, members
from adms.entries import Entries

if TYPE_CHECKING:
    from adms.config import ADMSConfig

CHANNELS = 4
WORDS = 16
STAGES = 2
ITERATIONS = 12


class PQCoder(Coder):
    """See the module; made by ``PQ.bind``."""

    is_stackable = True

    def __init__(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> None:
        self.shape = shape = context.shape
        self.dtype = context.dtype
        self.fit_tokens = config.svd_max_tokens
        # A head size that is no multiple of four is padded with zeros.
        self.key_groups = shape.num_heads * -(-shape.key_dim // CHANNELS)
        self.value_groups = shape.num_heads * -(-shape.value_dim // CHANNELS)
        groups = self.key_groups + self.value_groups
        self.layout = (
            (torch.int8, (groups, STAGES, WORDS, CHANNELS)),
            (torch.float16, (groups, STAGES)),
        )
        self.header_bytes = groups * STAGES * (WORDS * CHANNELS + 2)
        self.record_bytes = groups
        self.num_records = max(0, (nbytes - self.header_bytes) // self.record_bytes)

    def fit(self, entries: Entries, queries: torch.Tensor | None = None) -> torch.Tensor:
        """Codebooks in int8 and their scales: ``[1, header_bytes]``."""
        residual = self._groups(entries)[0, :, -self.fit_tokens :]
        books, scales = [], []
        for _ in range(STAGES):
            book, scale = _codebook(residual)
            restored = book.float() * scale.float()[:, None, None]
            index = assign(residual, restored)
            residual = residual - restored.gather(1, index[..., None].expand_as(residual))
            books.append(book)
            scales.append(scale)
        return pack(torch.stack(books, dim=1)[None], torch.stack(scales, dim=1)[None])

    def encode(
        self, header: torch.Tensor, entries: Entries, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The nearest of all 256 sums of two words, a byte a group: ``[B, N, G]``."""
        words = self._words(header).flatten(0, 1)
        index = assign(self._groups(entries).flatten(0, 1), words)
        codes = index.unflatten(0, (header.shape[0], -1)).to(torch.uint8)
        return codes.transpose(1, 2).contiguous()

    def decode(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        """Keys and values in the model's dtype."""
        codes = records.transpose(1, 2).long()[..., None].expand(-1, -1, -1, CHANNELS)
        # [B, G, N, 4] -> keys and values.
        channels = self._words(header).gather(2, codes)
        split, shape = self.key_groups, self.shape
        return Entries(
            self._states(channels[:, :split], shape.key_dim),
            self._states(channels[:, split:], shape.value_dim),
        )

    def _words(self, header: torch.Tensor) -> torch.Tensor:
        """All sums of two words: ``[B, G, 256, 4]``."""
        books, scales = unpack(header, *self.layout)
        first, second = (books.float() * scales.float()[..., None, None]).unbind(2)
        return (first[:, :, :, None] + second[:, :, None]).flatten(2, 3)

    def _groups(self, entries: Entries) -> torch.Tensor:
        """Channels in groups: ``[B, G, N, 4]`` in float32."""
        parts = []
        for states in (entries.keys, entries.values):
            padded = torch.nn.functional.pad(states.float(), (0, -states.shape[3] % CHANNELS))
            parts.append(padded.unflatten(3, (-1, CHANNELS)).transpose(2, 3).flatten(1, 2))
        return torch.cat(parts, dim=1)

    def _states(self, channels: torch.Tensor, size: int) -> torch.Tensor:
        heads = self.shape.num_heads
        states = channels.unflatten(1, (heads, -1)).transpose(2, 3).flatten(3)
        return states[..., :size].to(self.dtype)


def _codebook(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """16 words for each group ``[G, N, 4]``: int8 ``[G, 16, 4]`` and scales ``[G]``."""
    count = groups.shape[1]
    # Tokens at equal distances as first words.
    picked = torch.arange(WORDS, device=groups.device) * count // WORDS
    index = kmeans(groups, WORDS, ITERATIONS, start=assign(groups, groups[:, picked]))
    member = members(index, WORDS)
    sizes = member.sum(2, keepdim=True)
    words = member @ groups / sizes.clamp(min=1)
    # A word without tokens repeats the mean, where it does no harm.
    words = torch.where(sizes > 0, words, groups.mean(1, keepdim=True))
    scale = (words.abs().amax((1, 2)) / 127).clamp(1e-7, 6e4).half()
    book = (words / scale.float()[:, None, None]).round().clamp(-127, 127)
    return book.to(torch.int8), scale


class PQ(Compressor):
    """Product quantisation with codebooks fitted to the stream, two bits an element.

    Source: Jegou et al. (2011) for product quantisation; cf. Zhang et al. (2024), coupled
    quantisation, arXiv 2405.03917; differs in two additive codebooks per group, searched jointly,
    and in that they are fitted while the model runs.
    """

    name = "pq"
    parameters = frozenset({"svd_max_tokens"})

    def bind(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> PQCoder:
        """A coder for layers of this shape."""
        return PQCoder(context, nbytes, config)


register_compressor("pq", PQ())
