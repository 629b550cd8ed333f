"""What a family of architectures has to tell, and how one is found for a model.

Shapes: ``B`` rows, ``H`` query heads, ``Q`` new tokens, ``N`` entries, ``D`` head size.
"""

import copy
import sys
import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adms.binding import LayerKind
from adms.cache import ADMSKVCache
from adms.config import Sizes
from adms.errors import UnsupportedModelError

# Undoes one step of an installation.
Undo = Callable[[], None]


class RotaryScheme:
    """Rotary positions by the model's own embedding and the modeling file's own function.

    Args:
        embedding: the model's rotary embedding; a copy is kept, since some kinds change their
            buffers with the longest position they have seen.
        apply: the modeling file's ``apply_rotary_pos_emb``.
        layer_type: which of the embedding's sets of frequencies, where it has several.
    """

    weighs_sinks = False
    adds_bias = False

    def __init__(
        self, embedding: nn.Module, apply: Callable[..., Any], layer_type: str | None = None
    ) -> None:
        self.embedding = copy.deepcopy(embedding)
        self.apply = apply
        self.choice = () if layer_type is None else (layer_type,)
        rope_type = getattr(embedding, "rope_type", "default")
        if isinstance(rope_type, dict):
            rope_type = rope_type.get(layer_type, "default")
        # These choose their frequencies by the farthest position of a call.
        self.depends_on_farthest = "dynamic" in rope_type or rope_type == "longrope"

    def tables(
        self, positions: torch.Tensor, like: torch.Tensor, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[B, N, D]`` of ``positions [B, N]``, as the model computes them."""
        if not self.depends_on_farthest:
            cos, sin = self.embedding(like, positions, *self.choice)
            return cos, sin
        # Keys and queries are asked for apart and must get the same frequencies.
        farthest = queries.amax().to(positions.dtype).expand(positions.shape[0], 1)
        joined = torch.cat([positions, farthest], dim=1)
        cos, sin = self.embedding(like, joined, *self.choice)
        return cos[:, :-1], sin[:, :-1]

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


class PlainScheme:
    """Keys and queries as they are: positions enter elsewhere, or as a bias of a subclass."""

    weighs_sinks = False
    adds_bias = False

    def tables(self, positions: torch.Tensor, like: torch.Tensor, queries: torch.Tensor) -> None:
        """Nothing."""

    def rotate(self, states: torch.Tensor, tables: Any) -> torch.Tensor:
        """The states."""
        return states

    def bias(
        self, queries: torch.Tensor, keys: torch.Tensor, num_heads: int
    ) -> torch.Tensor | None:
        """None."""
        return None


# Sinks of an ALiBi model by default; measured (docs/alibi-streams.md).
ALIBI_SINKS = 8


class Slopes:
    """A model's ALiBi slopes, on whatever device they are asked for.

    Args:
        slopes: ``[H]``.
    """

    def __init__(self, slopes: torch.Tensor) -> None:
        self._by_device = {slopes.device: slopes}
        self.slopes = slopes

    def on(self, device: torch.device, num_heads: int) -> torch.Tensor:
        """The slopes ``[H, 1, 1]``.

        Raises:
            UnsupportedModelError: the attention has other heads, as under tensor parallelism.
        """
        if num_heads != len(self.slopes):
            raise UnsupportedModelError(
                f"attention has {num_heads} heads here and the model {len(self.slopes)} ALiBi "
                "slopes; tensor parallelism is not supported for ALiBi, use one process"
            )
        if device not in self._by_device:
            self._by_device[device] = self.slopes.to(device)
        return self._by_device[device][:, None, None]


class Family(ABC):
    """One family of architectures.

    Attributes:
        name: as it appears in tables and messages.
        model_types: ``config.model_type`` values it covers.
        exact: whether cache positions reproduce the model exactly; a sentence where not.
        positions: how positions are handled, in a few words.
    """

    name: str = ""
    model_types: tuple[str, ...] = ()
    exact: str = "exact"
    positions: str = "rotary"
    # Whether attention modules ask transformers for their attention function.
    uses_attention_interface: bool = True
    # Whether a pass of one token is the same sequence of operations every time.
    captures: bool = False

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module that runs the layers (``model`` itself where it has no head)."""
        return model.base_model  # type: ignore[return-value]

    def max_positions(self, config: Any) -> int | None:
        """Positions the model was trained on; None where any distance works."""
        return int(config.max_position_embeddings)

    def default_sinks(self, config: Any) -> int | None:
        """Sinks where none were asked for; None leaves that to the configuration."""
        return None

    def dtype(self, decoder: nn.Module) -> torch.dtype:
        """The dtype that the decoder computes in, quantised layers aside."""
        for parameter in decoder.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return torch.get_default_dtype()

    @abstractmethod
    def attentions(self, decoder: nn.Module) -> list[nn.Module]:
        """Attention modules in the order of their ``layer_idx``."""

    @abstractmethod
    def kinds(self, decoder: nn.Module) -> list[LayerKind]:
        """A description of every attention layer."""

    def further_kinds(self, decoder: nn.Module, sizes: Sizes) -> list[LayerKind]:
        """Layers that the cache needs beside attention's; none by default."""
        return []

    @abstractmethod
    def install(self, decoder: nn.Module) -> list[Undo]:
        """Makes the attention modules hand keys over before positions; returns how to undo it."""

    def install_model(self, model: nn.Module) -> list[Undo]:
        """Changes methods of the model around the decoder; nothing by default."""
        return []

    def prepare(  # noqa: B027
        self,
        decoder: nn.Module,
        forward: Callable[..., Any],
        cache: ADMSKVCache,
        new: list[int],
    ) -> None:
        """Runs before a chunk of ``new`` real tokens per row is begun; nothing by default."""

    def adjust(self, arguments: dict[str, Any], cache: ADMSKVCache) -> None:  # noqa: B027
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
    return getattr(sys.modules[type(module).__module__], name)


def bind_method(owner: nn.Module, name: str, function: Callable[..., Any]) -> Undo:
    """Binds ``function`` to ``owner`` under ``name``; the undo restores what was there.

    A bound method follows its owner through ``copy.deepcopy``, which a closure would not.
    """
    # accelerate keeps a module's forward aside under this name and calls it from a wrapper.
    aside = "_old_forward"
    places = (name, aside) if name == "forward" else (name,)
    place = aside if aside in places and aside in owner.__dict__ else name
    before = owner.__dict__.get(place)
    owner.__dict__[place] = types.MethodType(function, owner)
    # What undoes it is kept for as long as the owner lives, so it must not keep the owner alive.
    before_function = getattr(before, "__func__", None)
    if before_function is not None and getattr(before, "__self__", None) is owner:
        before = None
    owner_key = weakref.ref(owner)

    def undo() -> None:
        owner = owner_key()
        if owner is None:
            return
        # accelerate may have come or gone since, and our method with it.
        for spot in places:
            if getattr(owner.__dict__.get(spot), "__func__", None) is not function:
                continue
            if before_function is not None and before is None:
                owner.__dict__[spot] = types.MethodType(before_function, owner)
            elif before is not None:
                owner.__dict__[spot] = before
            elif spot == name:
                del owner.__dict__[spot]
            else:
                owner.__dict__[spot] = types.MethodType(getattr(type(owner), name), owner)

    return undo


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
