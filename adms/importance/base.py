"""What an importance metric is, and where its name leads.

Shapes: ``B`` rows, ``K`` KV heads, ``H`` query heads, ``N`` tokens, ``Q`` queries, ``D``/``E`` head
size of keys/values.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from adms.entries import Entries
from adms.ranks import ALONE, Ranks
from adms.registry import Registry


@dataclass(frozen=True)
class Others:
    """Tokens of the stream that others are compared with.

    Attributes:
        keys: ``[B, K, M, D]`` exact ones and decoded ones, before positions.
        tokens: ``[B, M]`` their text positions, -1 where there is none.
    """

    keys: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class Evidence:
    """What a metric may look at beside the tokens themselves.

    Attributes:
        queries: ``[B, H, Q, D]`` the pass's queries before positions; only for metrics with an
            attribute ``needs_queries``.
        decode: gives ``decoded``, which not every metric looks at.
        key_spread: ``[B]`` mean squared distance of a key from the mean, all heads together.
        value_spread: ``[B]`` the same of values.
        block_tokens: tokens that were coded together.
        key_mean: ``[B, K, D]`` mean key of the stream's first tokens; None where there were none.
        key_directions: ``[B, K, R, D]`` orthonormal directions along which those vary most.
        tokens: ``[B, N]`` text positions, -1 where a row has fewer tokens; None where ``others``
            is.
        others: gives what the stream holds beside them; None but for metrics with an attribute
            ``compares``, in the few layers that are asked.
        ranks: where there are ``others``, the processes that hold the layer's other heads.
    """

    queries: torch.Tensor | None
    decode: Callable[[], Entries]
    key_spread: torch.Tensor
    value_spread: torch.Tensor
    block_tokens: int = 1
    key_mean: torch.Tensor | None = None
    key_directions: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    others: Callable[[], Others] | None = None
    ranks: Ranks = ALONE

    @cached_property
    def decoded(self) -> Entries:
        """What the tokens' codes decode to, keys ``[B, K, N, D]``.

        Fewer entries where a compressor folds several tokens into one.
        """
        return self.decode()

    def of_rows(self, rows: slice) -> "Evidence":
        """The same of some rows, which see no others."""

        def taken(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part[rows]

        def decode() -> Entries:
            whole = self.decoded
            return Entries(whole.keys[rows], whole.values[rows], taken(whole.log_weight))

        return replace(
            self,
            queries=taken(self.queries),
            decode=decode,
            key_spread=self.key_spread[rows],
            value_spread=self.value_spread[rows],
            key_mean=taken(self.key_mean),
            key_directions=taken(self.key_directions),
            tokens=None,
            others=None,
        )


# Entries and evidence -> scores [B, N], higher is more important. Rows know nothing of each other:
# they are those of a batch, of several layers, or single heads. One that compares is called again
# for the layers that are shown others. Where ranks share the heads between them, their scores are
# added up.
Metric = Callable[[Entries, Evidence], torch.Tensor]

METRICS: Registry[Metric] = Registry("importance metric")


def register_metric(name: str, metric: Metric, *, replace: bool = False) -> Metric:
    """Makes ``importance_metric=name`` mean ``metric``.

    Raises:
        ADMSTypeError: ``name`` is not a string.
        ADMSValueError: ``name`` is empty or taken (and ``replace`` is False).
    """
    return METRICS.register(name, metric, replace=replace)


def needs_queries(metric: Metric) -> bool:
    """Whether a metric looks at queries (it says so by an attribute ``needs_queries``)."""
    return bool(getattr(metric, "needs_queries", False))


def compares(metric: Metric) -> bool:
    """Whether a metric looks at other tokens in some layers (by an attribute ``compares``)."""
    return bool(getattr(metric, "compares", False))
