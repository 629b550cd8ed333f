"""The transform of ``low_rank``: where the directions come from, and the way there and back.

Shapes: ``B`` rows, ``N`` tokens, ``J`` channels over all heads, ``S`` blocks of heads with a basis
each, ``C`` coded channels of a block.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

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
# Largest deviation that float16 keeps.
HALF_LIMIT = 6.0e4


@dataclass
class Transform:
    """Keys or values of some rows to channels of unit variance and back.

    Attributes:
        mean: ``[B, J]``.
        analysis: ``[B, S, C, J / S]`` its rows give the channels of a block, before scaling.
        synthesis: ``[B, S, C, J / S]`` what each channel adds.
        deviation: ``[B, S * C]`` standard deviations of the channels.
    """

    mean: torch.Tensor
    analysis: torch.Tensor
    synthesis: torch.Tensor
    deviation: torch.Tensor

    def project(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Channels ``[B, N, S * C]`` and the gain's byte ``[B, N, 1]`` of ``[B, N, J]``."""
        blocks = (states - self.mean[:, None]).unflatten(2, (self.analysis.shape[1], -1))
        channels = torch.einsum("bnsj,bscj->bnsc", blocks, self.analysis).flatten(2)
        channels = channels / self.deviation[:, None]
        power = channels.square().mean(2, keepdim=True).sqrt().clamp(min=1e-6)
        step = (power.log2() * GAIN_STEPS).round().clamp(-GAIN_ZERO, 255 - GAIN_ZERO)
        gain = (step + GAIN_ZERO).to(torch.uint8)
        return channels / torch.exp2(step / GAIN_STEPS), gain

    def restore(self, channels: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """The inverse of ``project`` up to what was not coded: ``[B, N, J]``."""
        factor = torch.exp2((gain.float() - GAIN_ZERO) / GAIN_STEPS)
        blocks = self.synthesis.shape[1]
        scaled = self.synthesis * self.deviation.unflatten(1, (blocks, -1))[..., None]
        parts = (channels * factor).unflatten(2, (blocks, -1))
        return torch.einsum("bnsc,bscj->bnsj", parts, scaled).flatten(2) + self.mean[:, None]


class Basis(ABC):
    """Where the directions of keys or of values come from, and what of them is in the header.

    Attributes:
        layout: dtypes and extents of the header's parts.
        channels: coded channels (``S * C``).
    """

    layout: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    channels: int

    @abstractmethod
    def fit(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The header's parts from tokens ``[N, J]``; the last are the channels' deviations."""

    @abstractmethod
    def read(self, parts: list[torch.Tensor]) -> Transform:
        """The transform of header parts, a row each."""

    def query_power(self, device: torch.device) -> torch.Tensor | None:
        """Mean squares ``[J]`` of the queries that will read keys, or None if nobody knows."""
        return None

    @abstractmethod
    def projection(self, parts: list[torch.Tensor], gain_start: int) -> Projection:
        """How kernels restore states from header parts; views, nothing is made.

        Args:
            parts: of the header, a row each.
            gain_start: the gain's byte.
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

    def read(self, parts: list[torch.Tensor]) -> Transform:
        """One block over all heads."""
        mean, stored, scale, deviation = (part.float() for part in parts)
        basis = (stored * scale[..., None])[:, None]
        return Transform(mean, basis, basis, deviation)

    def projection(self, parts: list[torch.Tensor], gain_start: int) -> Projection:
        """The basis as it is stored."""
        mean, basis, scale, deviation = (part[:, None] for part in parts)
        return Projection(basis, scale, deviation, mean, gain_start, 0)


class SharedBasis(Basis):
    """The model's own (``adms.calibration``); the header says which channels are the strongest.

    Args:
        calibration: the layer's.
        name: ``key`` or ``value``.
        blocks: blocks of heads (``S``).
        width: channels before the transform (``J``), of all blocks.
        channels: the strongest, which are coded.
    """

    def __init__(
        self, calibration: LayerCalibration, name: str, blocks: int, width: int, channels: int
    ) -> None:
        self.calibration = calibration
        self.name = name
        self.blocks = blocks
        self.channels = channels
        self.layout = (
            (torch.float16, (width,)),
            (torch.int16, (channels,)),
            (torch.float16, (channels,)),
        )

    def _bases(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All directions ``[S, J / S, J / S]`` and the channels' weights ``[S, 1, J / S]``."""
        tensors = self.calibration.on(device)
        basis = tensors[f"{self.name}_basis"].float()
        basis = basis * tensors[f"{self.name}_scale"].float()[..., None]
        weight = tensors.get(f"{self.name}_weight")
        if weight is None:
            return basis, basis.new_ones(1, 1, 1)
        return basis, weight.float()[:, None]

    def query_power(self, device: torch.device) -> torch.Tensor | None:
        """Of the queries seen by the calibration."""
        weight = self.calibration.on(device).get(f"{self.name}_weight")
        return None if weight is None else weight.float().square().flatten()

    def fit(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean, which channels of each block, their deviations."""
        basis, weight = self._bases(states.device)
        mean = states.mean(0).half()
        blocks = (states - mean.float()).unflatten(1, (self.blocks, -1)).transpose(0, 1)
        deviation = _deviation((blocks * weight) @ basis.transpose(1, 2))
        order = deviation.float().argsort(dim=1, descending=True, stable=True)
        order = order[:, : self.channels // self.blocks]
        return mean, order.flatten().to(torch.int16), deviation.gather(1, order).flatten()

    def read(self, parts: list[torch.Tensor]) -> Transform:
        """Each row's choice of the shared directions."""
        mean, order, deviation = parts
        basis, weight = self._bases(mean.device)
        index = order.long().unflatten(1, (self.blocks, -1))
        block = torch.arange(self.blocks, device=mean.device)[:, None]
        chosen = basis[block, index]
        return Transform(mean.float(), chosen * weight, chosen / weight, deviation.float())

    def projection(self, parts: list[torch.Tensor], gain_start: int) -> Projection:
        """Each row's choice of the shared directions."""
        mean, order, deviation = (part.unflatten(1, (self.blocks, -1)) for part in parts)
        tensors = self.calibration.on(mean.device)
        weight = tensors.get(f"{self.name}_weight")
        return Projection(
            tensors[f"{self.name}_basis"][None],
            tensors[f"{self.name}_scale"][None],
            deviation,
            mean,
            gain_start,
            0,
            rows=order,
            weight=None if weight is None else weight[None],
        )


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
    return SharedBasis(calibration, name, blocks, blocks * width, blocks * coded)
