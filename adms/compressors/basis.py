"""The transform of ``low_rank``: where the directions come from, and the way there and back.

Shapes: ``B`` rows, ``N`` tokens, ``J`` channels over all heads, ``S`` blocks of heads with a basis
each, ``C`` coded channels of a block, ``L`` layers, each with as many rows, one after the other.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from adms.calibration import LayerCalibration
from adms.compressors.base import LayerContext
from adms.compressors.codebooks import GROUP
from adms.compressors.tables import Projection

# Share of the channels that the stored basis spans, of keys and of values.
KEY_SHARE = 0.6
VALUE_SHARE = 0.7
# The same where the basis costs nothing.
SHARED_KEY_SHARE = 0.8
SHARED_VALUE_SHARE = 0.9
# Steps of the gain per doubling.
GAIN_STEPS = 8
GAIN_ZERO = 128
# Steps per doubling in which channels are put in the order of their deviation.
ORDER_STEPS = 8
# Largest deviation that float16 keeps.
HALF_LIMIT = 6.0e4


def split_gain(channels: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels ``[B, N, S * C]`` of a size of one in each block, and bytes ``[B, N, S]`` for that.

    Args:
        channels: block by block.
        blocks: how many (``S``).
    """
    own = channels.unflatten(2, (blocks, -1))
    power = own.square().mean(3, keepdim=True).sqrt().clamp(min=1e-6)
    step = (power.log2() * GAIN_STEPS).round().clamp(-GAIN_ZERO, 255 - GAIN_ZERO)
    gain = (step[..., 0] + GAIN_ZERO).to(torch.uint8)
    return (own / torch.exp2(step / GAIN_STEPS)).flatten(2), gain


def with_gain(channels: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """The inverse of ``split_gain``."""
    factor = torch.exp2((gain.float() - GAIN_ZERO) / GAIN_STEPS)
    return (channels.unflatten(2, (gain.shape[2], -1)) * factor[..., None]).flatten(2)


class Basis(ABC):
    """Where the directions of keys or of values come from, and what of them is in the header.

    Attributes:
        layout: dtypes and extents of the header's parts.
        blocks: blocks of heads (``S``).
        channels: coded channels (``S * C``).
    """

    layout: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    blocks: int = 1
    channels: int

    @abstractmethod
    def fit(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The header's parts from tokens ``[N, J]``; the last are the channels' deviations."""

    @abstractmethod
    def analyse(self, parts: list[torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """Channels of unit variance ``[B, N, S * C]`` of states ``[B, N, J]``.

        Args:
            parts: of the header, a row each.
            states: float32.
        """

    @abstractmethod
    def synthesise(self, parts: list[torch.Tensor], channels: torch.Tensor) -> torch.Tensor:
        """The inverse of ``analyse`` up to what was not coded: ``[B, N, J]``."""

    def stacked(self, bases: "Sequence[Basis]") -> "Basis":
        """One for the rows of several layers, ``bases`` in turn; they have one layout."""
        return self

    def query_power(self, device: torch.device) -> torch.Tensor | None:
        """Mean squares ``[J]`` of the queries that will read keys, or None if nobody knows."""
        return None

    @abstractmethod
    def projection(self, parts: list[torch.Tensor], gain_start: int) -> Projection:
        """How kernels restore states from header parts; views, nothing is made.

        Args:
            parts: of the header, a row each.
            gain_start: the byte of the first block's gain; those of the others follow.
        """


class FittedBasis(Basis):
    """Fitted to the stream and stored in the header; for use without a model.

    Args:
        width: channels before the transform (``J``).
        channels: the strongest, which are coded.
    """

    def __init__(self, width: int, channels: int) -> None:
        self.channels = channels
        self.layout = (
            (torch.float16, (width,)),
            (torch.int8, (channels, width)),
            (torch.float16, (channels,)),
            (torch.float16, (channels,)),
        )

    def fit(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean, int8 basis, its scales, deviations."""
        mean = states.mean(0).half()
        centred = states - mean.float()
        _, directions = torch.linalg.eigh(centred.double().T @ centred.double())
        basis = directions.flip(1)[:, : self.channels].T.float()
        scale = (basis.abs().amax(1) / 127).clamp(min=1e-7).half()
        stored = (basis / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        deviation = _deviation(centred @ (stored.float() * scale.float()[:, None]).T)
        # Coded channels must come in the order of their deviation for groups to be alike.
        order = deviation.float().argsort(descending=True, stable=True)
        return mean, stored[order], scale[order], deviation[order]

    def analyse(self, parts: list[torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """One block over all heads."""
        mean, stored, scale, deviation = (part.float() for part in parts)
        centred = states - mean[:, None]
        return centred @ (stored * scale[..., None]).transpose(1, 2) / deviation[:, None]

    def synthesise(self, parts: list[torch.Tensor], channels: torch.Tensor) -> torch.Tensor:
        """One block over all heads."""
        mean, stored, scale, deviation = (part.float() for part in parts)
        return channels @ (stored * scale[..., None] * deviation[..., None]) + mean[:, None]

    def projection(self, parts: list[torch.Tensor], gain_start: int) -> Projection:
        """The basis as it is stored."""
        mean, basis, scale, deviation = (part[:, None] for part in parts)
        return Projection(basis, scale, deviation, mean, gain_start, 1)


class SharedBasis(Basis):
    """The model's own (``adms.calibration``); the header says which channels are the strongest.

    Args:
        calibrations: the layer's, or one for each of several layers.
        name: ``key`` or ``value``.
        blocks: blocks of heads (``S``).
        width: channels before the transform (``J``), of all blocks.
        channels: the strongest, which are coded.
    """

    def __init__(
        self,
        calibrations: Sequence[LayerCalibration],
        name: str,
        blocks: int,
        width: int,
        channels: int,
    ) -> None:
        self.calibrations = calibrations
        self.name = name
        self.blocks = blocks
        self.width = width
        self.channels = channels
        self.layout = (
            (torch.float16, (width,)),
            (torch.int16, (channels,)),
            (torch.float16, (channels,)),
        )

    def stacked(self, bases: "Sequence[Basis]") -> "Basis":
        """One that keeps the layers' calibrations apart."""
        own = [
            one for basis in bases if isinstance(basis, SharedBasis) for one in basis.calibrations
        ]
        return SharedBasis(own, self.name, self.blocks, self.width, self.channels)

    def _part(self, name: str, device: torch.device) -> torch.Tensor | None:
        """One tensor of all layers ``[L, S, ...]``; a copy where they are several."""
        parts = [
            one.on(device, self.blocks).get(f"{self.name}_{name}") for one in self.calibrations
        ]
        found = [part for part in parts if part is not None]
        if not found:
            return None
        return found[0][None] if len(found) == 1 else torch.stack(found)

    def _bases(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All directions ``[L, S, J / S, J / S]``, the channels' weights ``[L, S, 1, J / S]``."""
        stored, scale = self._part("basis", device), self._part("scale", device)
        weight = self._part("weight", device)
        if stored is None or scale is None:
            raise RuntimeError("a calibration without a basis")
        basis = stored.float() * scale.float()[..., None]
        return basis, None if weight is None else weight.float()[:, :, None]

    def query_power(self, device: torch.device) -> torch.Tensor | None:
        """Of the queries seen by the calibration."""
        weight = self._part("weight", device)
        return None if weight is None else weight[0].float().square().flatten()

    def fit(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean, which channels of each block, their deviations."""
        mean = states.mean(0).half()
        deviation = _deviation(self._every_channel((states - mean.float())[None])[0])
        # In steps, and within one in the order of the basis: what differs by rounding alone (on
        # another device, on ranks that share the heads) should be grouped alike, or all codes would
        # differ.
        step = (deviation.float().log2() * ORDER_STEPS).round()
        order = step.argsort(dim=1, descending=True, stable=True)
        order = order[:, : self.channels // self.blocks]
        return mean, order.flatten().to(torch.int16), deviation.gather(1, order).flatten()

    def _every_channel(self, centred: torch.Tensor) -> torch.Tensor:
        """All channels of states ``[B, N, J]`` less their means: ``[B, S, N, J / S]``."""
        basis, weight = self._bases(centred.device)
        layers, rows, count = len(self.calibrations), *centred.shape[:2]
        blocks = centred.unflatten(2, (self.blocks, -1)).unflatten(0, (layers, -1))
        # All rows of a layer in one product: [L, S, B / L * N, J / S].
        blocks = blocks.flatten(1, 2).transpose(1, 2)
        if weight is not None:
            blocks = blocks * weight
        every = (blocks @ basis.transpose(2, 3)).unflatten(2, (rows // layers, count))
        return every.transpose(1, 2).flatten(0, 1)

    def analyse(self, parts: list[torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """Each row's choice of the channels along all shared directions."""
        mean, order, deviation = parts
        every = self._every_channel(states - mean.float()[:, None])
        index = order.long().unflatten(1, (self.blocks, 1, -1))
        chosen = every.gather(3, index.expand(-1, -1, every.shape[2], -1))
        return chosen.transpose(1, 2).flatten(2) / deviation.float()[:, None]

    def synthesise(self, parts: list[torch.Tensor], channels: torch.Tensor) -> torch.Tensor:
        """Each row's choice of the shared directions."""
        mean, order, deviation = parts
        basis, weight = self._bases(mean.device)
        index = order.long().unflatten(1, (self.blocks, -1))
        block = torch.arange(self.blocks, device=mean.device)[:, None]
        if len(self.calibrations) == 1:
            chosen = basis[0][block, index]
            chosen = chosen if weight is None else chosen / weight[0]
        else:
            layer = torch.arange(len(basis), device=mean.device)
            layer = layer.repeat_interleave(len(index) // len(basis))[:, None, None]
            chosen = basis[layer, block, index]
            chosen = chosen if weight is None else chosen / weight[layer[:, 0, 0]]
        scaled = chosen * deviation.float().unflatten(1, (self.blocks, -1))[..., None]
        blocks = channels.unflatten(2, (self.blocks, -1))
        return torch.einsum("bnsc,bscj->bnsj", blocks, scaled).flatten(2) + mean.float()[:, None]

    def projection(self, parts: list[torch.Tensor], gain_start: int) -> Projection:
        """Each row's choice of the shared directions."""
        mean, order, deviation = (part.unflatten(1, (self.blocks, -1)) for part in parts)
        device = mean.device
        basis, scale = self._part("basis", device), self._part("scale", device)
        if basis is None or scale is None:
            raise RuntimeError("a calibration without a basis")
        weight = self._part("weight", device)
        return Projection(basis, scale, deviation, mean, gain_start, 1, rows=order, weight=weight)


def _deviation(channels: torch.Tensor) -> torch.Tensor:
    """Standard deviations ``[..., C]`` (float16) of centred channels ``[..., N, C]``."""
    least = 1e-6
    return channels.square().mean(-2).sqrt().clamp(least, HALF_LIMIT).half().clamp(min=least)


def basis_for(name: str, context: LayerContext, head_dim: int, rank: int | None) -> Basis:
    """Where a layer's directions come from, and how many are coded: a multiple of eight a block.

    As many as ``rank`` asks for per head, or a share of all.
    """
    heads, calibration = context.shape.num_heads, context.calibration
    blocks = 1 if calibration is None else calibration.num_blocks(context.shape)
    width = heads * head_dim // blocks
    fitted, shared = (
        (KEY_SHARE, SHARED_KEY_SHARE) if name == "key" else (VALUE_SHARE, SHARED_VALUE_SHARE)
    )
    share = fitted if calibration is None else shared
    wanted = width * share if rank is None else rank * heads // blocks
    most = width // GROUP * GROUP
    coded = max(GROUP, min(most, math.ceil(wanted / GROUP) * GROUP))
    if calibration is None:
        return FittedBasis(width, coded)
    return SharedBasis((calibration,), name, blocks, blocks * width, blocks * coded)
