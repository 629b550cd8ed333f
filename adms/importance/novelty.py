"""Importance by how far a key lies from what the stream's keys have in common."""

import torch

from adms.entries import Entries
from adms.importance.base import Evidence, register_metric

# Directions per head that the stream's keys are said to have in common, beside their mean.
DIRECTIONS = 2


def principal_directions(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means ``[B, K, D]`` and strongest directions ``[B, K, DIRECTIONS, D]`` of keys per head."""
    states = keys.float()
    mean = states.mean(2)
    centred = (states - mean[:, :, None]).double()
    _, directions = torch.linalg.eigh(centred.transpose(2, 3) @ centred)
    # Rows, the strongest first; a head of one channel has one.
    return mean, directions.flip(3)[..., :DIRECTIONS].transpose(2, 3).float()


def novelty(entries: Entries, evidence: Evidence) -> torch.Tensor:
    """Squared length of keys beside the stream's mean and main directions: ``[B, N]``.

    A stream's keys vary most along one or two directions in each head, which say little of what a
    token is. What is left over is large for what is new in this stream, names and numbers that
    occur once, and these are what a reader may be asked for. Measured (docs/middle-tier.md):
    a passkey's digits are among the top 3% in 43% of the layers, by ``key_diff`` in 21%.
    """
    mean, directions = evidence.key_mean, evidence.key_directions
    if mean is None or directions is None:
        mean, directions = principal_directions(entries.keys)
    centred = entries.keys.float() - mean[:, :, None]
    common = centred @ directions.transpose(2, 3) @ directions
    left = (centred - common).square().sum((1, 3))
    return left / evidence.key_spread[:, None].clamp(min=1e-12)


register_metric("novelty", novelty)
