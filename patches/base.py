"""What a family of architectures has to tell, and how one is found for a model.

Shapes: ``B`` rows, ``H`` query heads, ``N`` entries, ``D`` head size.
"""

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adms.binding import LayerKind
from adms.cache import ADMSKVCache
from adms.errors import UnsupportedModelError

# Undoes one step of an installation.
Undo = Callable[[], None]


class RotaryScheme:
    """Rotary positions by the model's own embedding and the modeling file's own function.

    Args:
        embedding: the model's rotary embedding; a copy is kept, since some kinds change their
            buffers with the longest position they have seen.
        apply: the modeling file's ``apply_rotary_pos_emb``.
    """

    def __init__(self, embedding: nn.Module, apply: Callable[..., Any]) -> None:
        self.embedding = copy.deepcopy(embedding)
        self.apply = apply

    def tables(
        self, positions: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[B, N, D]`` of ``positions [B, N]``, as the model computes them."""
        cos, sin = self.embedding(like, positions)
        return cos, sin

    def rotate(
        self, states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Queries or keys ``[B, heads, N, D]`` rotated to their positions."""
        # The function takes queries and keys together; no heads of the latter cost nothing.
        rotated, _ = self.apply(states, states[:, :0], *tables)
        return rotated

    def bias(
        self, queries: torch.Tensor, keys: torch.Tensor, num_heads: int
    ) -> torch.Tensor | None:
        """None: rotary positions add nothing to scores."""
        return None


class Family(ABC):
    """One family of architectures.

    Attributes:
        name: as it appears in tables and messages.
        model_types: ``config.model_type`` values it covers.
        exact: whether cache positions reproduce the model exactly; a sentence where not.
    """

    name: str = ""
    model_types: tuple[str, ...] = ()
    exact: str = "exact"

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module that runs the layers (``model`` itself where it has no head)."""
        return model.base_model  # type: ignore[return-value]

    def max_positions(self, config: Any) -> int | None:
        """Positions the model was trained on; None where any distance works."""
        return int(config.max_position_embeddings)

    @abstractmethod
    def attentions(self, decoder: nn.Module) -> list[nn.Module]:
        """Attention modules in the order of their ``layer_idx``."""

    @abstractmethod
    def kinds(self, decoder: nn.Module) -> list[LayerKind]:
        """A description of every attention layer."""

    @abstractmethod
    def install(self, decoder: nn.Module) -> list[Undo]:
        """Makes the attention modules hand keys over before positions; returns how to undo it."""

    def adjust(self, arguments: dict[str, Any], cache: ADMSKVCache) -> None:
        """Changes a chunk's arguments before the decoder sees them; nothing by default."""

    def output_weight(self, attention: nn.Module) -> torch.Tensor | None:
        """Weight ``[hidden, H * E]`` of the projection after attention, if it is a plain one."""
        for name in ("o_proj", "dense", "out_proj"):
            weight = getattr(getattr(attention, name, None), "weight", None)
            if isinstance(weight, torch.Tensor) and weight.is_floating_point():
                return weight
        return None


FAMILIES: list[Family] = []


def modeling_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """A function of the file that defines a module's class."""
    return getattr(sys.modules[type(module).__module__], name)  # type: ignore[no-any-return]


def find_family(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: there is none.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise UnsupportedModelError(
        f"{type(model).__name__} (model_type {model_type!r}) is not supported; supported model "
        f"types are {supported}. CONTRIBUTING.md says how to add a family in patches/"
    )
