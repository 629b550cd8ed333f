"""What a static pass of one token reads beside the tiers: kept between passes, or made in each.

Shapes: ``B`` rows, ``R`` rows or 1 where all rows agree, ``S`` exact slots, ``N``
entries of the middle, ``M`` landmarks.
"""

import dataclasses

import torch

from adms.compressors.codebooks import GROUP, shipped
from adms.compressors.tables import BAG_BYTES
from adms.config import Sizes
from adms.places import MiddleGeometry, Places
from adms.timeline import ring_tokens

# More than any stream has: the geometry of a full middle.
FULL = 2**62


@dataclasses.dataclass
class Held:
    """What the step reads that changes only with a commit; the same places for every token.

    Attributes:
        seen: ``[R]`` int64, counted up by the step itself.
        evicted: ``[R]`` int64, tokens that have left the recent tier.
        tokens: ``[R, S]`` int64, what each exact slot holds until the next commit.
        kept: ``[R, S]`` whether it holds anything by then.
        positions: ``[R, S + N]`` float32 cache positions of exact slots and the middle.
        valid: ``[R, N]`` which entries of the middle are read: those that are there and that no
            landmark stands for.
        mark_positions: ``[B, M]`` float32.
        mark_valid: ``[B, M]``.
    """

    seen: torch.Tensor
    evicted: torch.Tensor
    tokens: torch.Tensor
    kept: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None = None
    mark_positions: torch.Tensor | None = None
    mark_valid: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [part for part in vars(self).values() if part is not None]

    def take(self, other: "Held") -> None:
        """Takes over another's numbers in the places of its own."""
        for own, new in zip(self.tensors(), other.tensors(), strict=True):
            own.copy_(new)


def hold(
    places: Places,
    seen: torch.Tensor,
    evicted: torch.Tensor,
    width: int,
    marks: torch.Tensor | None,
) -> Held:
    """What follows from the counts of a commit, by the same rules as any other pass.

    Args:
        places: by ``evicted``.
        seen: ``[R]`` int64.
        evicted: ``[R]`` int64.
        width: entries of the middle that are read; 0 where there is none.
        marks: ``[B, M]`` text positions of landmarks, -1 where a slot is empty; None: there are
            none.
    """
    sizes, geometry = places.sizes, places.geometry
    sinks = torch.arange(sizes.sink, device=evicted.device).expand(len(evicted), -1)
    tokens = torch.cat([sinks, ring_tokens(evicted + sizes.ring, sizes.ring)], dim=1)
    filled = torch.ones_like(tokens[:, sizes.sink :]).bool()
    kept = torch.cat([sinks < evicted[:, None], filled], dim=1)
    held = Held(seen, evicted, tokens, kept, places.exact(tokens))
    if geometry is None or not width:
        return held
    found = places.middle(width)
    held.valid = found.valid
    shown = torch.where(found.valid, found.positions, 0)
    held.positions = torch.cat([held.positions, shown], dim=1)
    if marks is None:
        return held
    held.mark_positions, held.mark_valid = places.landmarks(marks), marks >= 0
    if geometry.entries_per_record == geometry.block_tokens:
        held.valid = held.valid & ~found.hidden(marks, places.first)
    return held


@dataclasses.dataclass
class Shared:
    """What a pass works out once for all layers."""

    slots: torch.Tensor
    query: tuple[torch.Tensor, torch.Tensor]
    exact: tuple[torch.Tensor, torch.Tensor]
    valid: torch.Tensor
    middle: tuple[torch.Tensor, torch.Tensor]
    marks: tuple[torch.Tensor, torch.Tensor] | None


def planned_bytes(
    sizes: Sizes,
    geometry: MiddleGeometry | None,
    *,
    batch: int,
    layers: int,
    elements: int,
    hidden_bytes: int,
) -> int:
    """Bytes that a step's own buffers never exceed, tables of codes included.

    Args:
        sizes: of the cache.
        geometry: of its middle; None where there is none.
        batch: rows.
        layers: with a middle of that geometry.
        elements: of one token's keys and values in a layer.
        hidden_bytes: of one token between two layers.
    """
    slots = sizes.sink + sizes.ring
    # As the fields of ``Held`` come: counts, then slots, entries and landmarks.
    a_row = 2 * 8 + slots * (8 + 1 + 4)
    if geometry is not None:
        a_row += max(geometry.raw_tokens, geometry.num_entries(FULL)) * (4 + 1)
        a_row += geometry.landmarks * (4 + 1)
    if geometry is not None and geometry.capacity:
        # Of codes and of landmarks, which may have codes of their own: offsets for every stage and
        # group, and one more; where they are read in plain PyTorch, their bags too.
        groups = -(-elements // GROUP)
        a_row += 2 * layers * ((4 + BAG_BYTES) * len(shipped()[0]) * groups + 4 * (groups + 1))
    # A token's number or state on the way in, its state on the way out, two flags a layer.
    return batch * (a_row + 8 + 2 * hidden_bytes) + 2 * layers
