"""``vq``: every block of tokens is clustered by k-means; a cluster becomes one weighted entry.

An entry's key and value are its cluster's means and its log-weight counts the tokens it stands
for, with the second-order term for keys that differ within a cluster. What the queries of the
stream look like is kept in the header, as second moments per channel: they say which channels of a
key matter. Entries are stored at four bits an element.

Shapes: ``B`` rows, ``K`` KV heads, ``R`` blocks, ``P`` problems (``B K R``), ``T`` tokens of a
block, ``M`` clusters of a block, ``D``/``E`` head sizes of keys/values, ``F = D + E``.
"""

from typing import TYPE_CHECKING

import torch

from adms.compressors.base import Coder, Compressor, LayerContext, pack, register_compressor, unpack
from adms.compressors.merging import (
    Merged,
    MergingCoder,
    fitting_block,
    query_moments,
    second_order,
    text_order,
)
from adms.compressors.storage import ABSENT, CodedStorage
from adms.entries import Entries
from adms.errors import ADMSValueError

if TYPE_CHECKING:
    from adms.config import ADMSConfig

# Tokens per cluster; measured (docs/middle-tier.md).
TOKENS_PER_CLUSTER = 2
# Bits an element of a stored entry.
STAGES = 4
ITERATIONS = 8
# Weight of a value's relative error against a key's, as in ``low_rank``.
VALUE_WEIGHT = 0.3
# Weight of a token's place in its block: what is far apart in the text is kept apart, since an
# entry has one position.
TIME_WEIGHT = 0.02


def assign(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Nearest centroid of each token: ``[P, T, F]`` and ``[P, M, F]`` -> ``[P, T]``."""
    offset = 0.5 * centroids.square().sum(2)
    return (features @ centroids.transpose(1, 2) - offset[:, None]).argmax(2)


def members(index: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """``[P, T]`` cluster numbers as ``[P, M, T]`` zeros and ones."""
    return torch.nn.functional.one_hot(index, num_clusters).transpose(1, 2).float()


def kmeans(
    features: torch.Tensor,
    num_clusters: int,
    iterations: int = ITERATIONS,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """K-means of many small problems at once, all on the device.

    A cluster that loses all its tokens takes over the token that lies farthest from its centroid.

    Args:
        features: ``[P, T, F]``.
        num_clusters: clusters of each problem (``M``).
        iterations: steps.
        start: ``[P, T]`` first clusters; equal stretches of tokens if None.

    Returns:
        ``[P, T]`` cluster numbers.

    Source: Lloyd (1957/1982).
    """
    problems, count, size = features.shape
    if num_clusters >= count:
        return torch.arange(count, device=features.device).expand(problems, -1)
    index = torch.arange(count, device=features.device) * num_clusters // count
    index = index.expand(problems, -1) if start is None else start
    for _ in range(iterations):
        member = members(index, num_clusters).to(features.dtype)
        sizes = member.sum(2, keepdim=True)
        centroids = member @ features / sizes.clamp(min=1)
        own = centroids.gather(1, index[..., None].expand(-1, -1, size))
        # The r-th empty cluster takes the r-th farthest token.
        farthest = (features - own).square().sum(2).argsort(dim=1, descending=True, stable=True)
        empty = sizes[..., 0] == 0
        rank = (empty.long().cumsum(1) - 1).clamp(min=0)
        taken = features.gather(1, farthest.gather(1, rank)[..., None].expand(-1, -1, size))
        centroids = torch.where(empty[..., None], taken, centroids)
        index = assign(features, centroids)
    return index


class VQCoder(MergingCoder):
    """See the module; made by ``VQ.bind``."""

    uses_queries = True

    def __init__(
        self, context: LayerContext, nbytes: int, block_tokens: int, num_clusters: int
    ) -> None:
        self.shape = context.shape
        self.layout = (
            (torch.float16, (self.shape.num_heads, self.shape.key_dim)),
            (torch.float16, (2,)),
        )
        super().__init__(
            CodedStorage(context.shape, context.dtype, STAGES),
            nbytes,
            block_tokens=block_tokens,
            entries_per_record=num_clusters,
            extra_header_bytes=2 * self.shape.num_heads * self.shape.key_dim + 4,
        )

    def fit_extra(self, entries: Entries, queries: torch.Tensor | None) -> torch.Tensor:
        """Second moments of the queries per channel, and the spreads of keys and values."""
        heads, size = self.shape.num_heads, self.shape.key_dim
        moments = torch.zeros(1, heads, size, device=entries.keys.device)
        if queries is not None:
            moments = query_moments(queries, heads)
        metric = _metric(moments)
        keys, values = entries.keys.float(), entries.values.float()
        spreads = [
            ((keys - keys.mean(2, keepdim=True)).square() * metric[:, :, None]).sum(3).mean(),
            (values - values.mean(2, keepdim=True)).square().sum(3).mean(),
        ]
        spread = torch.stack(spreads)[None].sqrt().clamp(1e-4, 6e4)
        return pack(moments.clamp(0, 6e4).half(), spread.half())

    def merge(
        self,
        extra: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        queries: torch.Tensor | None,
    ) -> Merged:
        """K-means per block and head; means, counts and the second-order term."""
        moments, spread = (part.float() for part in unpack(extra, *self.layout))
        features = self._features(keys, values, moments, spread)
        lead, clusters = keys.shape[:3], self.entries_per_record
        index = kmeans(features.flatten(0, 2), clusters).unflatten(0, lead)
        member = members(index.flatten(0, 2), clusters).unflatten(0, lead)
        count = member.sum(4)
        share = member / count.clamp(min=1)[..., None]
        centre, value = share @ keys, share @ values
        variance = share @ keys.square() - centre.square()
        weight = count.clamp(min=1).log() + second_order(variance, moments)
        log_weight = torch.where(count > 0, weight, ABSENT)
        place = torch.arange(self.block_tokens, device=keys.device, dtype=keys.dtype)
        when = torch.where(count > 0, share @ place, float(self.block_tokens))
        return Merged(*text_order(when, centre, value, log_weight))

    def _features(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        moments: torch.Tensor,
        spread: torch.Tensor,
    ) -> torch.Tensor:
        """What distances are taken between: ``[B, K, R, T, F + 1]``."""
        metric = _metric(moments).sqrt()[:, :, None, None]
        key_scale = spread[:, 0].view(-1, 1, 1, 1, 1)
        value_scale = spread[:, 1].view(-1, 1, 1, 1, 1)
        tokens = torch.arange(self.block_tokens, device=keys.device) / self.block_tokens
        tokens = tokens.view(-1, 1).expand(*keys.shape[:4], 1)
        return torch.cat(
            [
                keys * metric / key_scale,
                values * VALUE_WEIGHT**0.5 / value_scale,
                tokens * (12 * TIME_WEIGHT) ** 0.5,
            ],
            dim=4,
        )


def _metric(moments: torch.Tensor) -> torch.Tensor:
    """Weights of a key's channels: the queries' moments with mean 1, or ones without queries."""
    mean = moments.mean(2, keepdim=True)
    return torch.where(mean > 0, moments / mean.clamp(min=1e-12), 1.0)


class VQ(Compressor):
    """K-means per block; centroids as weighted entries.

    Source: Lloyd (1957/1982) for the clusters; the second-order term is the cumulant expansion
    ``log mean exp(q k) = q mean(k) + q^T cov(k) q / 2``, averaged over the queries of the stream
    and diagonal in channels; scores are taken to be divided by the square root of the head size.
    """

    name = "vq"
    parameters = frozenset({"num_clusters"})

    def block_tokens(self, config: "ADMSConfig") -> int:
        """Two tokens per cluster; a default ``num_clusters`` is lowered to an eighth of the budget.

        Raises:
            ADMSValueError: ``num_clusters`` was given and its blocks cannot wait in the budget.
        """
        wanted = TOKENS_PER_CLUSTER * config.num_clusters
        if "num_clusters" not in config.explicit:
            return fitting_block(config, wanted, TOKENS_PER_CLUSTER)
        if config.compressed_budget and wanted >= config.compressed_budget:
            raise ADMSValueError(
                f"num_clusters={config.num_clusters} clusters blocks of {wanted} tokens, which "
                f"wait exactly in a compressed_budget of {config.compressed_budget}; use at most "
                f"{max(1, (config.compressed_budget - 1) // TOKENS_PER_CLUSTER)} or leave "
                "num_clusters out"
            )
        return wanted

    def bind(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> Coder:
        """A coder for layers of this shape."""
        block = self.block_tokens(config)
        return VQCoder(context, nbytes, block, block // TOKENS_PER_CLUSTER)


register_compressor("vq", VQ())
