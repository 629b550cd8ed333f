"""Importance by the attention that queries like the latest ones are expected to pay.

Shapes: ``B`` rows, ``K`` KV heads, ``H`` query heads, ``G = H / K``, ``N`` tokens, ``Q`` queries,
``D`` head size of keys.
"""

import torch

from adms.entries import Entries
from adms.importance.attention import require_queries
from adms.importance.base import Evidence, register_metric


def query_statistics(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ``[B, H, D]`` and covariance ``[B, H, D, D]`` of ``queries [B, H, Q, D]``.

    Columns of padding are zeros and do not count.
    """
    states = queries.float()
    real = (queries != 0).flatten(3).any(3).any(1).float()[:, None, :, None]
    count = real.sum(2).clamp(min=1)
    mean = (states * real).sum(2) / count
    centred = (states - mean[:, :, None]) * real
    return mean, centred.transpose(2, 3) @ centred / count[..., None]


def expected_attention(entries: Entries, evidence: Evidence) -> torch.Tensor:
    """``softmax(mu k / sqrt d + k S k / 2 d) |v|`` over the arriving tokens: ``[B, N]``.

    ``mu`` and ``S`` are mean and covariance of the pass's queries; for Gaussian queries the
    exponent is the logarithm of the expected ``exp(q k / sqrt d)``. Heads are averaged, and shares
    are in units of an even one, so that scores of few and of many arriving tokens compare.

    Source: Devoto et al. (2025), Expected Attention, arXiv 2510.00636; differs in that keys and
    queries are taken before positions where the paper averages over future rotations.
    """
    queries = require_queries(evidence, "expected_attention")
    keys = entries.keys.float()
    heads, size = keys.shape[1], keys.shape[3]
    mean, covariance = query_statistics(queries)
    mean, covariance = mean.unflatten(1, (heads, -1)), covariance.unflatten(1, (heads, -1))
    first = mean @ keys.transpose(2, 3) * size**-0.5
    # k S k for every query head of a KV head: [B, K, G, N].
    second = ((keys[:, :, None] @ covariance) * keys[:, :, None]).sum(-1) / (2 * size)
    shares = (first + second).softmax(-1)
    weight = entries.values.float().norm(dim=3)[:, :, None]
    return (shares * weight).flatten(1, 2).mean(1) * keys.shape[2]


expected_attention.needs_queries = True  # type: ignore[attr-defined]
register_metric("expected_attention", expected_attention)
