"""``attention_matching``: fewer keys per block, whose weights and values are fitted to queries.

A quarter of a block's keys stay as they are: those that queries attend to most. Their weights are
fitted so that the block keeps its share of the attention (non-negative least squares), and their
values so that it keeps its output (least squares). The queries are those of the pass under way,
which came after the block, and a few that the header keeps from the time of its fit. Every second
query is held out; where the fitted block reproduces those no better than its chosen tokens left as
they are (plain eviction), it is the chosen tokens that are kept. Entries are stored at five bits an
element.

Shapes: ``B`` rows, ``K`` KV heads, ``R`` blocks, ``T`` tokens of a block, ``M`` entries of a block,
``Q`` queries of a KV head, ``D``/``E`` head sizes of keys/values.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adms.compressors.base import Coder, Compressor, LayerContext, pack, register_compressor, unpack
from adms.compressors.least_squares import least_squares, nnls
from adms.compressors.merging import Merged, MergingCoder, fitting_block, head_queries
from adms.compressors.storage import ABSENT, CodedStorage
from adms.compressors.vq import assign, members
from adms.entries import Entries
from adms.errors import ADMSValueError

if TYPE_CHECKING:
    from adms.config import ADMSConfig

# Tokens per entry, and tokens of a block; measured (docs/middle-tier.md).
TOKENS_PER_ENTRY = 4
BLOCK = 64
# Bits an element of a stored entry.
STAGES = 5
# Queries per KV head that the header keeps, and that a fit takes from a pass.
KEPT_QUERIES = 16
PASS_QUERIES = 96
# Weights of the priors: counts of the tokens nearest to an entry, and the means of their values.
WEIGHT_RIDGE = 0.03
VALUE_RIDGE = 0.03
# Log-weights outside are no sensible share of a block's attention.
LOWEST, HIGHEST = -8.0, 8.0


@dataclass(frozen=True)
class Choice:
    """What one block keeps, before any fit.

    Attributes:
        scores: ``[B, K, R, Q, M]`` of the chosen keys, relative to the block's log-mass.
        values: ``[B, K, R, M, E]`` their own values.
        folded: ``[B, K, R, M, E]`` means of the values of the tokens nearest to them.
        counts: ``[B, K, R, M]`` how many those are.
    """

    scores: torch.Tensor
    values: torch.Tensor
    folded: torch.Tensor
    counts: torch.Tensor


class AttentionMatchingCoder(MergingCoder):
    """See the module; made by ``AttentionMatching.bind``."""

    uses_queries = True

    def __init__(self, context: LayerContext, nbytes: int, block_tokens: int) -> None:
        self.context = context
        shape = context.shape
        self.layout = (
            (torch.int8, (shape.num_heads, KEPT_QUERIES, shape.key_dim)),
            (torch.float16, (shape.num_heads, KEPT_QUERIES, 1)),
        )
        super().__init__(
            CodedStorage(shape, context.dtype, STAGES),
            nbytes,
            block_tokens=block_tokens,
            entries_per_record=block_tokens // TOKENS_PER_ENTRY,
            extra_header_bytes=shape.num_heads * KEPT_QUERIES * (shape.key_dim + 2),
        )

    def fit_extra(self, entries: Entries, queries: torch.Tensor | None) -> torch.Tensor:
        """Some of the queries, in int8.

        Raises:
            ADMSValueError: there are none.
        """
        if queries is None:
            raise ADMSValueError(
                "attention_matching fits what it keeps to queries, and none were given; pass "
                "queries=..., or choose a compressor that needs none, such as vq"
            )
        chosen, real = self._sample(queries, KEPT_QUERIES)
        # A sample that is padding repeats no direction: zeros, which later fits leave out.
        chosen = chosen * real[:, None, :, None]
        scale = (chosen.abs().amax(3, keepdim=True) / 127).clamp(1e-7, 6e4).half()
        return pack((chosen / scale.float()).round().clamp(-127, 127).to(torch.int8), scale)

    def merge(
        self,
        extra: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        queries: torch.Tensor | None,
    ) -> Merged:
        """Chooses keys, fits on half of the queries to judge, and on all of them to keep."""
        stored, scale = unpack(extra, *self.layout)
        seen = stored.float() * scale.float()
        real = (stored != 0).any(3).any(1)
        if queries is not None:
            fresh, fresh_real = self._sample(queries, PASS_QUERIES)
            seen, real = torch.cat([fresh, seen], dim=2), torch.cat([fresh_real, real], dim=1)
        # Equations of queries that are not there vanish.
        there = real[:, None, None, :].float()
        scores = self._scores(seen, keys)
        mass = scores.logsumexp(4, keepdim=True)
        share = (scores - mass).exp()
        output = share @ values
        index = self._choose(share, there)
        chosen_keys = _take(keys, index)
        choice = self._choice(keys, values, scores - mass, index)
        odd = torch.arange(there.shape[3], device=keys.device) % 2
        # Both fits at once: one on half of the queries, to be judged by the others, one on all.
        log_weight, fitted = _fit(choice, output, torch.stack([there * (1 - odd), there]))
        tried = _error(choice, output, there * odd, log_weight[0], fitted[0])
        as_they_are = (torch.zeros_like(log_weight[1]), choice.values)
        rises = tried >= _error(choice, output, there * odd, *as_they_are)
        return Merged(
            chosen_keys,
            torch.where(rises[..., None, None], choice.values, fitted[1]),
            torch.where(rises[..., None], as_they_are[0], log_weight[1]),
        )

    def _sample(self, queries: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """At most ``most`` queries per KV head, evenly from all, and which are real."""
        grouped, real = head_queries(queries, self.context.shape.num_heads)
        count = grouped.shape[2]
        if count > most or most == KEPT_QUERIES:
            index = torch.arange(most, device=queries.device) * count // most
            grouped, real = grouped[:, :, index], real[:, index]
        return grouped, real

    def _scores(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Scores ``[B, K, R, Q, T]`` at distances that the block will have while it is held."""
        rotate, block = self.context.rotate, self.block_tokens
        if rotate is not None:
            rows, heads, blocks = keys.shape[:3]
            places = torch.arange(block, device=keys.device)[None].float()
            keys = rotate(keys.flatten(1, 2), places).unflatten(1, (heads, blocks))
            steps = torch.arange(queries.shape[2], device=keys.device)
            # Multiples of the golden ratio: any run of queries covers the distances evenly.
            spread = (steps * 0.6180339887) % 1 * self.capacity
            queries = rotate(queries, (block + self.context.distance + spread.round())[None])
        return queries[:, :, None] @ keys.transpose(3, 4) * keys.shape[4] ** -0.5

    def _choose(self, share: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """The keys of most attention, by its root mean square: ``[B, K, R, M]`` in text order."""
        power = (share.square() * there[..., None]).sum(3)
        best = power.argsort(dim=3, descending=True, stable=True)[..., : self.entries_per_record]
        return best.sort(dim=3).values

    def _choice(
        self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, index: torch.Tensor
    ) -> Choice:
        lead = keys.shape[:3]
        nearest = assign(keys.flatten(0, 2), _take(keys, index).flatten(0, 2))
        member = members(nearest, self.entries_per_record).unflatten(0, lead)
        counts = member.sum(4)
        own = _take(values, index)
        mean = member @ values / counts.clamp(min=1)[..., None]
        folded = torch.where(counts[..., None] > 0, mean, own)
        relative = scores.gather(4, index[:, :, :, None].expand(-1, -1, -1, scores.shape[3], -1))
        return Choice(relative, own, folded, counts)


def _take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``[B, K, R, T, X]`` at ``[B, K, R, M]``."""
    return states.gather(3, index[..., None].expand(-1, -1, -1, -1, states.shape[4]))


def _fit(
    choice: Choice, output: torch.Tensor, there: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-weights ``[S, B, K, R, M]`` and values ``[S, B, K, R, M, E]`` of blocks.

    Args:
        choice: what they keep.
        output: ``[B, K, R, Q, E]`` the exact blocks'.
        there: ``[S, B, 1, 1, Q]`` which queries count, for each of ``S`` fits.
    """
    kernel = choice.scores.exp() * there[..., None]
    counts = choice.counts.expand(len(there), *choice.counts.shape)
    weight = nnls(kernel, there.expand(kernel.shape[:-1]), counts, WEIGHT_RIDGE)
    log_weight = torch.where(weight > 0, weight.clamp(min=1e-12).log(), ABSENT)
    log_weight = torch.where(weight > 0, log_weight.clamp(LOWEST, HIGHEST), ABSENT)
    share = (choice.scores + log_weight[..., None, :]).softmax(-1) * there[..., None]
    fitted = least_squares(share, output * there[..., None], choice.folded, VALUE_RIDGE)
    return log_weight, fitted


def _error(
    choice: Choice,
    output: torch.Tensor,
    there: torch.Tensor,
    log_weight: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Squared error ``[B, K, R]`` of what the block adds to attention, its mass included."""
    kernel = (choice.scores + log_weight[..., None, :]).exp()
    mass = kernel.sum(4)
    size = output.square().sum(4).mean(3, keepdim=True)
    error = (kernel @ values - output).square().sum(4) + size * (mass - 1).square()
    return (error * there).sum(3)


class AttentionMatching(Compressor):
    """Keys chosen, weights by NNLS, values by least squares, on queries that came after.

    Source: Zweiger et al. (2026), Attention Matching, arXiv 2602.16284; differs in that it runs
    while the model does, that equations are relative to each query's mass, that weights and values
    have priors (few queries leave them open), and in distances spread over the time for which the
    block is held. Scores are taken to be divided by the square root of the head size.
    """

    name = "attention_matching"
    needs_rotation = True

    def block_tokens(self, config: "ADMSConfig") -> int:
        """64, or an eighth of a budget smaller than 512."""
        return fitting_block(config, BLOCK, TOKENS_PER_ENTRY)

    def bind(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> Coder:
        """A coder for this layer."""
        return AttentionMatchingCoder(context, nbytes, self.block_tokens(config))


register_compressor("attention_matching", AttentionMatching())
