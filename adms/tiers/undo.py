"""What a commit overwrites, kept until the commit is complete."""

from typing import Any

import torch


class Undo:
    """Places in tensors and what they held."""

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, Any, torch.Tensor]] = []

    def keep(self, tensor: torch.Tensor, *index: Any) -> None:
        """Keeps ``tensor[index]``; at least one part of the index is a tensor, so this copies."""
        self._kept.append((tensor, index, tensor[index]))

    def restore(self) -> None:
        """Puts everything back."""
        for tensor, index, held in self._kept:
            tensor[index] = held
