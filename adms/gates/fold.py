"""Folds the tokens of a block into fewer entries, each a mean of the tokens it stands for.

Shapes: ``B`` rows, ``K`` KV heads, ``R`` blocks, ``T`` tokens of a block, ``M`` admitted ones,
``D``/``E`` head sizes of keys/values.
"""

from dataclasses import dataclass

import torch

# Weight of a value's relative distance against a key's, as in ``low_rank``.
VALUE_WEIGHT = 0.3
# Largest logarithm of how much more a token counts than another.
MAX_LOG_IMPORTANCE = 6.0


@dataclass(frozen=True)
class Folded:
    """Admitted tokens after folding, in the order of the text.

    Attributes:
        keys: ``[B, K, R, M, D]`` means over the tokens an entry stands for, by importance.
        values: ``[B, K, R, M, E]``.
        members: ``[B, R, T]`` which of the block's entries each token is part of.
    """

    keys: torch.Tensor
    values: torch.Tensor
    members: torch.Tensor


def token_distance(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How unlike the tokens of a block are, all heads together: ``[B, R, T, T]``, 1 on average.

    Args:
        keys: ``[B, K, R, T, D]``.
        values: ``[B, K, R, T, E]``.
    """

    def squared(states: torch.Tensor) -> torch.Tensor:
        flat = states.permute(0, 2, 3, 1, 4).flatten(3).float()
        # Differences, not a product: of tokens that are alike, the product keeps no digit.
        distance = (flat[:, :, :, None] - flat[:, :, None]).square().sum(4)
        return distance / distance.mean((2, 3), keepdim=True).clamp(min=1e-12)

    return squared(keys) + VALUE_WEIGHT * squared(values)


def choose_hosts(
    distance: torch.Tensor, admitted: int, log_importance: torch.Tensor | None = None
) -> torch.Tensor:
    """For every token of a block, the admitted one that it becomes part of: ``[B, R, T]``.

    One after the other, the token is folded that can be at the least cost: the squared distance to
    another one, times the sum of their importances. A token that others were folded into is
    admitted for good.

    Args:
        distance: ``[B, R, T, T]``.
        admitted: tokens that keep an entry of their own (``M``), at least half of ``T``.
        log_importance: ``[B, R, T]``, or None where all count alike.
    """
    rows, blocks, tokens = distance.shape[:3]
    cost = distance.flatten(0, 1)
    if log_importance is not None:
        own = _bounded(log_importance).flatten(0, 1)
        cost = cost * torch.logaddexp(own[:, :, None], own[:, None]).exp()
    itself = torch.eye(tokens, dtype=torch.bool, device=cost.device)
    cost = cost.masked_fill(itself, torch.inf)
    every = torch.arange(cost.shape[0], device=cost.device)
    hosts = torch.arange(tokens, device=cost.device).repeat(cost.shape[0], 1)
    for _ in range(tokens - admitted):
        cheapest = cost.flatten(1).argmin(1)
        folded, host = cheapest // tokens, cheapest % tokens
        hosts[every, folded] = host
        cost[every, folded] = torch.inf
        cost[every, :, folded] = torch.inf
        cost[every, host] = torch.inf
    return hosts.unflatten(0, (rows, blocks))


def fold(
    keys: torch.Tensor,
    values: torch.Tensor,
    hosts: torch.Tensor,
    admitted: int,
    log_importance: torch.Tensor | None = None,
) -> Folded:
    """The admitted tokens of each block with the others folded into them.

    Args:
        keys: ``[B, K, R, T, D]``.
        values: ``[B, K, R, T, E]``.
        hosts: ``[B, R, T]`` from ``choose_hosts``.
        admitted: entries of a block (``M``).
        log_importance: ``[B, R, T]``, or None where all count alike.
    """
    tokens = hosts.shape[2]
    index = torch.arange(tokens, device=hosts.device)
    # Admitted tokens first, in the order of the text.
    kept = (hosts != index).long().argsort(dim=2, stable=True)[..., :admitted]
    member = kept[..., None] == hosts[:, :, None]
    dtype = torch.promote_types(keys.dtype, torch.float32)
    share = member.to(dtype)
    if log_importance is not None:
        share = share * _bounded(log_importance).exp()[:, :, None]
    share = (share / share.sum(3, keepdim=True))[:, None]
    return Folded(
        (share @ keys.to(dtype)).to(keys.dtype),
        (share @ values.to(dtype)).to(values.dtype),
        member.long().argmax(2),
    )


def _bounded(log_importance: torch.Tensor) -> torch.Tensor:
    return log_importance.clamp(-MAX_LOG_IMPORTANCE, MAX_LOG_IMPORTANCE)
