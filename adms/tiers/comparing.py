"""What a stream holds beside arriving tokens, for metrics that compare (``Evidence.others``).

Before them lie codes, after them the window; both matter, since what a text is about comes again
before long. Codes are decoded for this, so only a part of them is (of the whole ones, where others
are cut), spread evenly, and only in a few layers: a choice for all layers needs no more.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` arriving tokens, ``S`` slots of the window, ``D`` head
size.
"""

from dataclasses import dataclass

import torch

from adms.compressors.base import Coder
from adms.importance import Others
from adms.kernels.choice import is_fused
from adms.kernels.states import DTYPES, decode_by_tables
from adms.tiers.middle import MiddlePlan, MiddleTier
from adms.timeline import ring_tokens

# Most records of codes that are decoded.
COMPARED_RECORDS = 576
# Of how many layers one compares.
LAYERS_EACH = 10


@dataclass(frozen=True)
class Window:
    """Recent tokens, of layers that are alike.

    Attributes:
        keys: ``[L, B, K, S, D]`` all slots of the ring, before positions.
        tokens: ``[B, S]`` their text positions, negative where none of them lies.
    """

    keys: torch.Tensor
    tokens: torch.Tensor


def comparing_layers(layers: list[int]) -> frozenset[int]:
    """Those of ``layers`` that compare: one in ten, evenly spread, rather late (8, 16, 24 of 30).

    One whose bytes stay exact compares nothing; where none is left, all see tokens alone.
    """
    count = max(1, round(len(layers) / LAYERS_EACH))
    return frozenset(
        layers[4 * place * len(layers) // (4 * count + 3)] for place in range(1, count + 1)
    )


def others_of(
    plan: MiddlePlan,
    data: torch.Tensor,
    keys: torch.Tensor,
    tokens: torch.Tensor,
    sink: int,
    window: tuple[torch.Tensor, torch.Tensor],
) -> Others:
    """One layer's codes, window and arriving tokens.

    Args:
        plan: of the layer's middle.
        data: ``[B, bytes]`` the middle's bytes, coded.
        keys: ``[B, K, N, D]`` of the arriving tokens.
        tokens: ``[B, N]`` their text positions, the first of a row never -1.
        sink: number of sinks.
        window: keys ``[B, K, S, D]`` and text positions ``[B, S]``.
    """
    coder = plan.coder
    if coder is None:
        raise RuntimeError("a middle without a coder was to be compared with")
    records, places = _some_records(plan, coder, data, tokens[:, 0] - sink)
    header = data[:, : coder.header_bytes]
    # What attention reads codes by, where that is a kernel.
    fused = is_fused(data.device) and plan.dtype in DTYPES
    tables = coder.tables(header, coder.record_bytes) if fused else None
    if tables is None:
        coded = coder.decode(header, records).keys
    else:
        coded = decode_by_tables(tables, records, plan.shape, plan.dtype).keys
    of_record = places[:, :, None].expand(-1, -1, coder.entries_per_record).flatten(1)
    middles = sink + of_record * coder.block_tokens + coder.block_tokens // 2
    return Others(
        torch.cat([coded, window[0], keys], dim=2),
        torch.cat([torch.where(of_record < 0, -1, middles), window[1], tokens], dim=1),
    )


def _some_records(
    plan: MiddlePlan, coder: Coder, data: torch.Tensor, totals: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every few records ``[B, R, bytes]`` and their numbers ``[B, R]``, negative where none is.

    Args:
        plan, coder: of the layer's middle.
        data: ``[B, bytes]``.
        totals: ``[B]`` tokens that have been coded.
    """
    every = -(-coder.num_records // COMPARED_RECORDS)
    places = ring_tokens(totals // coder.block_tokens, coder.num_records)[:, ::every]
    # Bytes that are no codes could decode to anything.
    return MiddleTier(plan, data).records()[:, ::every] * (places >= 0)[..., None], places
