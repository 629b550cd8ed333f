"""Folds the tokens of a block into fewer entries: some stand for those that are like them.

An entry is one of the tokens, not their mean: a mean is none of the directions that the tokens were
found by, and on SmolLM2 costs three times as much (docs/optional-layers.md).

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
        keys: ``[B, K, R, M, D]`` of the admitted tokens, as they are.
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
    """For every token of a block, the admitted one that stands for it: ``[B, R, T]``.

    One after the other, the token gives up its entry that can at the least cost: the squared
    distance to the nearest one that still has its own, times its importance. In the end each of
    them is stood for by the nearest that remains.

    Args:
        distance: ``[B, R, T, T]``.
        admitted: tokens that keep an entry of their own (``M``).
        log_importance: ``[B, R, T]``, or None where all count alike.
    """
    rows, blocks, tokens = distance.shape[:3]
    itself = torch.eye(tokens, dtype=torch.bool, device=distance.device)
    apart = distance.flatten(0, 1).masked_fill(itself, torch.inf)
    cost = apart.clone()
    if log_importance is not None:
        cost = cost * _bounded(log_importance).flatten(0, 1).exp()[:, :, None]
    index = torch.arange(tokens, device=cost.device)
    kept = torch.ones(len(cost), tokens, dtype=torch.bool, device=cost.device)
    for _ in range(tokens - admitted):
        folded = cost.flatten(1).argmin(1, keepdim=True) // tokens
        # Not by assignment, which sends a number to the device and waits for it.
        kept.scatter_(1, folded, False)
        cost.scatter_(1, folded[:, :, None].expand(-1, -1, tokens), torch.inf)
        cost.scatter_(2, folded[:, None].expand(-1, tokens, -1), torch.inf)
    nearest = apart.masked_fill(~kept[:, None], torch.inf).argmin(2)
    return torch.where(kept, index, nearest).unflatten(0, (rows, blocks))


def fold(keys: torch.Tensor, values: torch.Tensor, hosts: torch.Tensor, admitted: int) -> Folded:
    """The admitted tokens of each block, and which others they stand for.

    Args:
        keys: ``[B, K, R, T, D]``.
        values: ``[B, K, R, T, E]``.
        hosts: ``[B, R, T]`` from ``choose_hosts``.
        admitted: entries of a block (``M``).
    """
    index = torch.arange(hosts.shape[2], device=hosts.device)
    # Admitted tokens first, in the order of the text.
    kept = (hosts != index).long().argsort(dim=2, stable=True)[..., :admitted]
    member = kept[..., None] == hosts[:, :, None]
    own = kept[:, None, :, :, None]

    def taken(states: torch.Tensor) -> torch.Tensor:
        return states.gather(3, own.expand(-1, states.shape[1], -1, -1, states.shape[4]))

    return Folded(taken(keys), taken(values), member.long().argmax(2))


def _bounded(log_importance: torch.Tensor) -> torch.Tensor:
    return log_importance.clamp(-MAX_LOG_IMPORTANCE, MAX_LOG_IMPORTANCE)
