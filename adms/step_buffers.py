"""What a static pass of one token reads beside the tiers: kept between passes, or made in each.

Shapes: ``B`` rows, ``R`` rows or 1 where all rows agree, ``S`` exact slots, ``N``
entries of the middle, ``M`` landmarks.
"""

import dataclasses

import torch


@dataclasses.dataclass
class Held:
    """What the step reads that changes only with a commit; the same places for every token.

    Attributes:
        seen: ``[R]`` int64, counted up by the step itself.
        tokens: ``[R, S]`` int64, what each exact slot holds until the next commit.
        kept: ``[R, S]`` whether it holds anything by then.
        positions: ``[R, S + N]`` float32 cache positions of exact slots and the middle.
        valid: ``[R, N]`` which entries of the middle are there.
        order: ``[R, N]`` int32 their numbers.
        mark_positions: ``[B, M]`` float32.
        mark_valid: ``[B, M]``.
        hidden: ``[B, M]`` int32 numbers of the entries that landmarks stand for.
    """

    seen: torch.Tensor
    tokens: torch.Tensor
    kept: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None = None
    order: torch.Tensor | None = None
    mark_positions: torch.Tensor | None = None
    mark_valid: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [part for part in vars(self).values() if part is not None]

    def take(self, other: "Held") -> None:
        """Takes over another's numbers in the places of its own."""
        for own, new in zip(self.tensors(), other.tensors(), strict=True):
            own.copy_(new)


@dataclasses.dataclass
class Shared:
    """What a pass works out once for all layers."""

    slots: torch.Tensor
    query: tuple[torch.Tensor, torch.Tensor]
    exact: tuple[torch.Tensor, torch.Tensor]
    valid: torch.Tensor
    middle: tuple[torch.Tensor, torch.Tensor]
    marks: tuple[torch.Tensor, torch.Tensor] | None
