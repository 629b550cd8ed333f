"""What an importance metric is, and where its name leads.

Shapes: ``B`` rows, ``K`` KV heads, ``H`` query heads, ``N`` tokens, ``Q`` queries, ``D``/``E`` head
size of keys/values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from adms.entries import Entries
from adms.registry import Registry


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
    """

    queries: torch.Tensor | None
    decode: Callable[[], Entries]
    key_spread: torch.Tensor
    value_spread: torch.Tensor
    block_tokens: int = 1
    key_mean: torch.Tensor | None = None
    key_directions: torch.Tensor | None = None

    @cached_property
    def decoded(self) -> Entries:
        """What the tokens' codes decode to, keys ``[B, K, N, D]``.

        Fewer entries where a compressor folds several tokens into one.
        """
        return self.decode()


# Entries and evidence -> scores [B, N], higher is more important. Rows know nothing of each other:
# they are those of a batch, of several layers, or single heads. Where ranks share the heads between
# them, their scores are added up.
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
