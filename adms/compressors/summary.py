"""``summary``: every few neighbouring tokens become one entry, their mean.

The entry counts as many tokens as it stands for, with the second-order term for keys that differ,
and is stored at four bits an element. Cheap, and right where neighbours are alike.

Shapes: ``B`` rows, ``K`` KV heads, ``R`` segments, ``T`` tokens of a segment, ``D``/``E`` head
sizes of keys/values.
"""

import math
from typing import TYPE_CHECKING

import torch

from adms.compressors.base import Coder, Compressor, LayerContext, pack, register_compressor, unpack
from adms.compressors.merging import Merged, MergingCoder, query_moments, second_order
from adms.compressors.storage import CodedStorage
from adms.entries import Entries

if TYPE_CHECKING:
    from adms.config import ADMSConfig

# Tokens per entry; measured (docs/middle-tier.md).
SEGMENT = 2
# Bits an element of a stored entry.
STAGES = 4


class SummaryCoder(MergingCoder):
    """See the module; made by ``Summary.bind``."""

    uses_queries = True

    def __init__(self, context: LayerContext, nbytes: int) -> None:
        self.shape = context.shape
        super().__init__(
            CodedStorage(context.shape, context.dtype, STAGES),
            nbytes,
            block_tokens=SEGMENT,
            entries_per_record=1,
            extra_header_bytes=2 * self.shape.num_heads * self.shape.key_dim,
        )

    def fit_extra(self, entries: Entries, queries: torch.Tensor | None) -> torch.Tensor:
        """Second moments of the queries per channel, zeros without queries."""
        heads, size = self.shape.num_heads, self.shape.key_dim
        moments = torch.zeros(1, heads, size, device=entries.keys.device)
        if queries is not None:
            moments = query_moments(queries, heads)
        return pack(moments.clamp(0, 6e4).half())

    def merge(
        self,
        extra: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        queries: torch.Tensor | None,
    ) -> Merged:
        """Means, and the log of the count with the second-order term."""
        (moments,) = unpack(extra, (torch.float16, (self.shape.num_heads, self.shape.key_dim)))
        centre = keys.mean(3, keepdim=True)
        variance = (keys - centre).square().mean(3, keepdim=True)
        log_weight = math.log(self.block_tokens) + second_order(variance, moments.float())
        return Merged(centre, values.mean(3, keepdim=True), log_weight)


class Summary(Compressor):
    """Segments pooled to one weighted entry.

    Source: pooling as in Rae et al. (2019), Compressive Transformers, arXiv 1911.05507; differs in
    the log-weight.
    """

    name = "summary"

    def block_tokens(self, config: "ADMSConfig") -> int:
        """Tokens of a segment."""
        return SEGMENT

    def bind(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> Coder:
        """A coder for layers of this shape."""
        return SummaryCoder(context, nbytes)


register_compressor("summary", Summary())
