"""What stands for each token after coding, where entries stand for several tokens.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` tokens, ``M`` entries, ``D``/``E`` head sizes.
"""

import torch

from adms.entries import Entries

# Entries that stand for nothing have log-weights below this.
LEAST_WEIGHT = -100.0


def representatives(entries: Entries, decoded: Entries, block_tokens: int) -> Entries:
    """For each token, its own entry, or in each head the one of its block with the nearest key.

    Args:
        entries: ``N`` exact tokens.
        decoded: what they decode to: ``N`` entries in the same order, or fewer.
        block_tokens: tokens that were coded together.

    Returns:
        Entries ``[B, K, N, ...]`` without log-weights.
    """
    if decoded.num_entries == entries.num_entries:
        return Entries(decoded.keys, decoded.values)
    blocks = entries.num_entries // block_tokens
    per_block = decoded.num_entries // blocks
    keys = decoded.keys.float().unflatten(2, (blocks, per_block))
    closeness = entries.keys.float().unflatten(2, (blocks, -1)) @ keys.transpose(3, 4)
    closeness = closeness - 0.5 * keys.square().sum(4)[:, :, :, None]
    if decoded.log_weight is not None:
        absent = decoded.log_weight.unflatten(2, (blocks, per_block)) < LEAST_WEIGHT
        closeness = closeness.masked_fill(absent[:, :, :, None], -torch.inf)
    first = torch.arange(blocks, device=keys.device)[:, None] * per_block
    nearest = (closeness.argmax(4) + first).flatten(2)[..., None]
    return Entries(
        decoded.keys.gather(2, nearest.expand(-1, -1, -1, decoded.keys.shape[3])),
        decoded.values.gather(2, nearest.expand(-1, -1, -1, decoded.values.shape[3])),
    )
