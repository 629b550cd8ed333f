"""What is fitted once per model: directions along which its keys and values vary.

A transform code needs the principal directions of keys and values. Fitted to a stream they must be
stored with it, which takes a third of a small budget; but they are nearly the same for every text,
so they are fitted to the model instead, once (``adms.moments``), and shared by all its caches like
weights.

Shapes: ``S`` blocks of KV heads with a basis each, ``J`` channels of a block.
"""

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adms.entries import TokenShape
from adms.errors import ADMSValueError
from adms.outputs import replaced
from adms.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from adms.moments import Moments

# Widest block: applying a basis costs as much per channel as the block is wide, for every token
# that is decoded (docs/performance.md).
MAX_BLOCK_CHANNELS = 256
# Share of the model's own bytes that all bases together may take.
MAX_SHARE = 0.02
FORMAT = "adms-calibration-1"


class LayerCalibration:
    """One layer's bases, or the place for them until they are fitted.

    Args:
        block_heads: KV heads that share a basis.
        tensors: see below.
        ranks: the processes that hold the layer's heads between them.

    Attributes:
        tensors: ``key_basis``/``value_basis`` ``[S, J, J]`` (int8, rows are directions, strongest
            first), ``key_scale``/``value_scale`` ``[S, J]`` (float16, what a row's integers are
            multiplied with), ``key_weight`` ``[S, J]`` (float16); None before the fit.
    """

    def __init__(
        self,
        block_heads: int,
        tensors: dict[str, torch.Tensor] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.block_heads = block_heads
        self.tensors = tensors
        self.ranks = ranks

    def num_blocks(self, shape: TokenShape) -> int:
        """Blocks of a layer of this shape, a rank's share of the heads or all of them."""
        return shape.num_heads // math.gcd(shape.num_heads, self.block_heads)

    def block_channels(self, shape: TokenShape) -> int:
        """Channels of a block, of keys or of values, whichever are more."""
        heads = shape.num_heads // self.num_blocks(shape)
        return heads * max(shape.key_dim, shape.value_dim)

    def on(self, device: torch.device, blocks: int) -> dict[str, torch.Tensor]:
        """The tensors of this process's blocks of heads, moved for good to where they are used.

        Args:
            device: where.
            blocks: how many they are; fewer than there are on a rank that has a share of the heads.

        Raises:
            RuntimeError: nothing is fitted yet.
        """
        if self.tensors is None:
            raise RuntimeError("a calibration was used before it was fitted")
        if self.tensors["key_basis"].device != device:
            self.tensors = {name: part.to(device) for name, part in self.tensors.items()}
        if len(self.tensors["key_basis"]) == blocks:
            return self.tensors
        own = slice(self.ranks.rank * blocks, (self.ranks.rank + 1) * blocks)
        return {name: part[own] for name, part in self.tensors.items()}

    def nbytes(self, shape: TokenShape) -> int:
        """Bytes of the tensors, fitted or not."""
        blocks = self.num_blocks(shape)
        heads = shape.num_heads // blocks
        keys, values = heads * shape.key_dim, heads * shape.value_dim
        return blocks * (keys * (keys + 4) + values * (values + 2))


@dataclass(eq=False)
class Calibration:
    """The bases of all layers of one model, of all heads on every rank.

    Attributes:
        layers: by layer index.
        shapes: a token of each of them, of all heads.
        source: where they come from, in a few words.
        ranks: the processes that hold the model's heads between them.
    """

    layers: dict[int, LayerCalibration]
    shapes: dict[int, TokenShape]
    source: str = ""
    ranks: Ranks = ALONE

    @classmethod
    def planned(
        cls, shapes: dict[int, TokenShape], model_bytes: int, ranks: Ranks = ALONE
    ) -> "Calibration":
        """Places for bases that together stay within their share of the model's bytes.

        Args:
            shapes: per layer index, keys and values of one token, of all heads.
            model_bytes: of all weights.
            ranks: the processes that the heads are shared out over. No block lies on two of them;
                else blocks do not depend on them.
        """
        most = max((shape.num_heads for shape in shapes.values()), default=1)
        for heads in sorted((n for n in range(1, most + 1) if most % n == 0), reverse=True):
            layers = {
                index: LayerCalibration(
                    math.gcd(ranks.share_of(shape).num_heads, heads), ranks=ranks
                )
                for index, shape in shapes.items()
            }
            plan = cls(layers, dict(shapes), ranks=ranks)
            wanted = sum(layer.nbytes(shapes[index]) for index, layer in layers.items())
            widest = max(
                (heads * max(shape.key_dim, shape.value_dim) for shape in shapes.values()),
                default=0,
            )
            if widest <= MAX_BLOCK_CHANNELS and wanted <= MAX_SHARE * model_bytes:
                break
        return plan

    @property
    def is_fitted(self) -> bool:
        """Whether every layer has its bases."""
        return all(layer.tensors is not None for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all bases; 0 before the fit."""
        return sum(part.numel() * part.itemsize for part in self.state().values())

    def fill(self, moments: "dict[int, Moments]", source: str) -> None:
        """Fits all layers, or none where one fails."""
        fitted = {
            index: moments[index].fit(self.layers[index].num_blocks(moments[index].shape))
            for index in self.layers
        }
        for index, tensors in fitted.items():
            if moments[index].shape != self.shapes[index]:
                tensors = {name: self.ranks.joined(part) for name, part in tensors.items()}
            self.layers[index].tensors = tensors
        self.source = source

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors by ``layer.name``; empty before the fit."""
        return {
            f"{index}.{name}": part
            for index, layer in self.layers.items()
            for name, part in (layer.tensors or {}).items()
        }

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what ``state()`` gives once fitted."""
        return {
            f"{index}.{name}": (tuple(shape), dtype)
            for index, layer in self.layers.items()
            for name, (shape, dtype) in _layout(self.shapes[index], layer).items()
        }

    def equals(self, other: "Calibration") -> bool:
        """Whether both hold the same tensors."""
        mine, theirs = self.state(), other.state()
        return mine.keys() == theirs.keys() and all(
            torch.equal(part.cpu(), theirs[name].cpu()) for name, part in mine.items()
        )

    def load_state(self, state: dict[str, torch.Tensor], source: str) -> None:
        """Takes over the tensors of ``state()``.

        Raises:
            ADMSValueError: names, shapes or dtypes are not those of this model, or a number is not
                finite.
        """
        expected = self.layout()
        found = {name: (tuple(part.shape), part.dtype) for name, part in state.items()}
        if found != expected:
            name = next(
                name
                for name in sorted({*found, *expected})
                if found.get(name) != expected.get(name)
            )
            raise ADMSValueError(
                f"the calibration is not one of this model: {name} is {found.get(name)}, expected "
                f"{expected.get(name)}; make one with adms.calibrate(model, texts)"
            )
        broken = [name for name, part in state.items() if not bool(torch.isfinite(part).all())]
        if broken:
            raise ADMSValueError(
                f"the calibration holds NaN or infinity in {broken[0]}; make one with "
                "adms.calibrate(model, texts)"
            )
        for index, layer in self.layers.items():
            prefix = f"{index}."
            # Kernels read row by row.
            layer.tensors = {
                name.removeprefix(prefix): part.contiguous()
                for name, part in state.items()
                if name.startswith(prefix)
            }
        self.source = source

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; of several ranks the first one does.

        Raises:
            ADMSValueError: nothing is fitted yet, or the file cannot be written.
        """
        if not self.is_fitted:
            raise ADMSValueError("this calibration is not fitted yet; call adms.calibrate first")
        if self.ranks.rank > 0:
            return
        state = {name: part.cpu().contiguous() for name, part in self.state().items()}
        with replaced(path) as partial:
            save_file(state, partial, metadata={"format": FORMAT, "source": self.source})


def read_calibration(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors and source of a file written by ``Calibration.save``.

    Raises:
        ADMSValueError: the file is missing, damaged or of another kind.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            described = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ADMSValueError(
            f"{os.fspath(path)} is not a readable calibration: {error}; make one with "
            "adms.calibrate(model, texts, path)"
        ) from error
    if described.get("format") != FORMAT:
        raise ADMSValueError(
            f"{os.fspath(path)} holds no calibration of format {FORMAT}, got "
            f"{described.get('format')!r}; make one with adms.calibrate(model, texts, path)"
        )
    return state, described.get("source", "")


def _layout(
    shape: TokenShape, layer: LayerCalibration
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    blocks = layer.num_blocks(shape)
    keys = shape.num_heads // blocks * shape.key_dim
    values = shape.num_heads // blocks * shape.value_dim
    return {
        "key_basis": ((blocks, keys, keys), torch.int8),
        "key_scale": ((blocks, keys), torch.float16),
        "key_weight": ((blocks, keys), torch.float16),
        "value_basis": ((blocks, values, values), torch.int8),
        "value_scale": ((blocks, values), torch.float16),
    }
