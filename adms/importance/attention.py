"""Importance by the attention that the latest queries pay: what they read may be read again.

Scores are taken before positions and over the arriving tokens alone; queries of padding, which are
zeros, do not count.

Shapes: ``B`` rows, ``K`` KV heads, ``H`` query heads, ``N`` tokens, ``Q`` queries, ``D`` head size
of keys.
"""

import torch

from adms.entries import Entries
from adms.errors import ADMSValueError
from adms.importance.base import Evidence, register_metric

# Neighbours that share a score in ``snap``.
SNAP_POOL = 7


def require_queries(evidence: Evidence, name: str) -> torch.Tensor:
    """The queries of ``evidence``.

    Raises:
        ADMSValueError: there are none.
    """
    if evidence.queries is None:
        raise ADMSValueError(
            f"importance metric {name!r} looks at queries, and none were kept; give its function "
            "an attribute needs_queries = True, or use a metric that needs none, such as key_diff"
        )
    return evidence.queries


def attention_shares(entries: Entries, queries: torch.Tensor) -> torch.Tensor:
    """Attention ``[B, H, N]`` that each token gets of the arriving tokens', averaged over queries.

    In units of an even share, so that scores of few and of many arriving tokens compare.

    Args:
        entries: keys ``[B, K, N, D]``.
        queries: ``[B, H, Q, D]`` before positions; columns of padding are zeros.
    """
    keys = entries.keys.float()
    heads, size = keys.shape[1], keys.shape[3]
    grouped = queries.float().unflatten(1, (heads, -1))
    scores = grouped @ keys[:, :, None].transpose(-1, -2) * size**-0.5
    real = (queries != 0).flatten(3).any(3).any(1).float()[:, None, None, :, None]
    shares = scores.softmax(-1) * real
    return (shares.sum(3) / real.sum(3).clamp(min=1)).flatten(1, 2) * keys.shape[2]


def attention(entries: Entries, evidence: Evidence) -> torch.Tensor:
    """Mean attention of the pass's queries: ``[B, N]``, heads averaged.

    Source: cf. Zhang et al. (2023), H2O, arXiv 2306.14048, and Oren et al. (2024), TOVA, arXiv
    2401.06104; differs in that keys and queries are taken before positions and only the queries of
    the pass that compresses are looked at.
    """
    return attention_shares(entries, require_queries(evidence, "attention")).mean(1)


def snap(entries: Entries, evidence: Evidence) -> torch.Tensor:
    """``attention``, each token taking the best of its neighbours: ``[B, N]``.

    Source: Li et al. (2024), SnapKV, arXiv 2404.14469; differs as ``attention`` does.
    """
    shares = attention_shares(entries, require_queries(evidence, "snap"))
    pooled = torch.nn.functional.max_pool1d(shares, SNAP_POOL, stride=1, padding=SNAP_POOL // 2)
    return pooled.mean(1)


attention.needs_queries = True  # type: ignore[attr-defined]
snap.needs_queries = True  # type: ignore[attr-defined]
register_metric("attention", attention)
register_metric("snap", snap)
