"""What stands for each token after coding, where entries stand for several tokens.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` tokens, ``M`` entries, ``D``/``E`` head sizes.
"""

import torch

from adms.entries import Entries

# Entries that stand for nothing have log-weights below this.
LEAST_WEIGHT = -100.0


def representatives(entries: Entries, decoded: Entries) -> Entries:
    """For each token, the entry of its own, or of each head the one with the nearest key.

    Args:
        entries: ``N`` exact tokens.
        decoded: what they decode to: ``N`` entries in the same order, or fewer.

    Returns:
        Entries ``[B, K, N, ...]`` without log-weights.
    """
    if decoded.num_entries == entries.num_entries:
        return Entries(decoded.keys, decoded.values)
    keys = decoded.keys.float()
    closeness = entries.keys.float() @ keys.transpose(2, 3)
    closeness = closeness - 0.5 * keys.square().sum(3)[:, :, None]
    if decoded.log_weight is not None:
        absent = decoded.log_weight < LEAST_WEIGHT
        closeness = closeness.masked_fill(absent[:, :, None], -torch.inf)
    nearest = closeness.argmax(3, keepdim=True)
    return Entries(
        decoded.keys.gather(2, nearest.expand(-1, -1, -1, decoded.keys.shape[3])),
        decoded.values.gather(2, nearest.expand(-1, -1, -1, decoded.values.shape[3])),
    )
