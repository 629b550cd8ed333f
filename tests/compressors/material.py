"""Keys, values and queries that look a little like a model's, and attention over them.

Shapes: ``B`` rows, ``K`` KV heads, ``H`` query heads, ``N`` tokens or entries, ``Q`` queries,
``D``/``E`` head sizes of keys/values.
"""

from dataclasses import dataclass

import torch

from adms.compressors import COMPRESSORS, Coder, Compressor, LayerContext
from adms.config import ADMSConfig
from adms.entries import Entries, TokenShape

NAMES = sorted(COMPRESSORS)
SHAPE = TokenShape(num_heads=2, key_dim=16, value_dim=8)
QUERY_HEADS = 4


def tokens(seed: int, count: int, shape: TokenShape = SHAPE) -> Entries:
    """One row: few topics that take turns, a mean of their own per head, and noise."""
    generator = torch.Generator().manual_seed(seed)

    def states(size: int) -> torch.Tensor:
        mean = torch.randn(shape.num_heads, 1, size, generator=generator)
        topics = torch.randn(shape.num_heads, 5, size, generator=generator)
        turn = torch.randint(5, (count,), generator=generator)
        noise = torch.randn(shape.num_heads, count, size, generator=generator)
        return (mean + topics[:, turn] + 0.3 * noise)[None]

    return Entries(states(shape.key_dim), states(shape.value_dim))


def some_queries(
    seed: int, count: int = 24, heads: int = QUERY_HEADS, shape: TokenShape = SHAPE
) -> torch.Tensor:
    """Queries ``[1, H, Q, D]`` with a mean direction."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mean = torch.randn(heads, 1, shape.key_dim, generator=generator)
    noise = torch.randn(heads, count, shape.key_dim, generator=generator)
    return (0.5 * mean + noise)[None]


def rows_of(parts: list[Entries]) -> Entries:
    """Rows put into one batch."""
    return Entries(
        torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts])
    )


def attend(queries: torch.Tensor, entries: Entries) -> torch.Tensor:
    """Attention ``[B, H, Q, E]`` in float64; weights count."""
    group = queries.shape[1] // entries.keys.shape[1]
    keys = entries.keys.double().repeat_interleave(group, 1)
    values = entries.values.double().repeat_interleave(group, 1)
    scores = queries.double() @ keys.transpose(2, 3) * keys.shape[3] ** -0.5
    if entries.log_weight is not None:
        scores = scores + entries.log_weight.double().repeat_interleave(group, 1)[:, :, None]
    return scores.softmax(-1) @ values


@dataclass(frozen=True)
class Coded:
    """Rows after coding.

    Attributes:
        coder: what coded them; None where the bytes hold as many tokens exactly.
        entries: what attention reads, of the ``held`` last tokens.
        held: tokens.
    """

    coder: Coder | None
    entries: Entries
    held: int


def bind(
    compressor: Compressor | str,
    budget: int,
    shape: TokenShape = SHAPE,
    dtype: torch.dtype = torch.float32,
) -> Coder:
    """A coder of a budget's bytes, less what waits."""
    if isinstance(compressor, str):
        compressor = COMPRESSORS.get(compressor)
    config = ADMSConfig(compressed_budget=budget)
    left = budget - compressor.block_tokens(config) + 1
    return compressor.bind(LayerContext(shape, dtype), 2 * shape.num_elements * left, config)


def code(name: str, parts: list[Entries], queries: list[torch.Tensor], budget: int) -> Coded:
    """Rows coded as the middle tier would, the oldest tokens dropped where they do not fit."""
    count, batch = parts[0].num_entries, rows_of(parts)
    if count <= budget:
        return Coded(None, batch, count)
    coder = bind(name, budget)
    if coder.capacity <= budget:
        return Coded(None, _last(batch, budget), budget)
    block = coder.block_tokens
    held = min(coder.capacity, count) // block * block
    header = torch.cat([coder.fit(part, query) for part, query in zip(parts, queries, strict=True)])
    records = coder.encode(header, _last(batch, held), torch.cat(queries))
    old = max(0, held // block - coder.num_records)
    whole = coder.decode(header, records[:, old:])
    if not old:
        return Coded(coder, whole, held)
    cut = coder.decode(header, records[:, :old, : coder.coarse_bytes])
    joined = Entries(torch.cat([cut.keys, whole.keys], 2), torch.cat([cut.values, whole.values], 2))
    return Coded(coder, joined, held)


def _last(entries: Entries, count: int) -> Entries:
    return Entries(entries.keys[:, :, -count:], entries.values[:, :, -count:])
