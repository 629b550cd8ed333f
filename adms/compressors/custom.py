"""Compressors from outside: objects with the whole contract, or with ``compress(K, V)`` alone.

The whole contract is ``Compressor``; an object that has its ``bind`` need not inherit from it. The
simple form takes the keys ``[K, N, D]`` and values ``[K, N, E]`` of one block of one row and
returns fewer entries of the same form.

Shapes: ``B`` rows, ``K`` KV heads, ``R`` blocks, ``T`` tokens of a block, ``M`` entries of a block,
``D``/``E`` head sizes of keys/values.
"""

import math
from typing import TYPE_CHECKING, Any

import torch

from adms.compressors.base import Coder, Compressor, LayerContext
from adms.compressors.merging import Merged, MergingCoder, fitting_block
from adms.compressors.storage import ABSENT, PlainStorage
from adms.errors import ADMSTypeError, ADMSValueError

if TYPE_CHECKING:
    from adms.config import ADMSConfig

# Tokens of a block where the object does not say.
BLOCK = 32
STORAGE_BITS = 8


def adapt(chosen: Any) -> Compressor:
    """The compressor that an object stands for.

    Args:
        chosen: a ``Compressor``; an object with ``bind``; or one with ``compress(K, V)``.

    Raises:
        ADMSTypeError: it is none of these.
    """
    if isinstance(chosen, Compressor):
        return chosen
    # A class has the methods too, but nothing to call them on.
    if not isinstance(chosen, type):
        if callable(getattr(chosen, "bind", None)):
            return ContractObject(chosen)
        if callable(getattr(chosen, "compress", None)):
            return SimpleObject(chosen)
    raise ADMSTypeError(
        "compressor_type must be a name, an adms.compressors.Compressor, or an object with "
        f"bind(context, nbytes, config) or compress(K, V), got {chosen!r}"
    )


class ContractObject(Compressor):
    """An object with ``bind`` (and, if it needs them, ``name``, ``parameters``, ``block_tokens``).

    Args:
        inner: the object.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.name = str(getattr(inner, "name", type(inner).__name__))
        self.parameters = frozenset(getattr(inner, "parameters", ()))
        self.needs_rotation = bool(getattr(inner, "needs_rotation", False))

    def block_tokens(self, config: "ADMSConfig") -> int:
        """What the object says, or 1."""
        found = getattr(self.inner, "block_tokens", None)
        return 1 if found is None else int(found(config))

    def bind(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> Coder:
        """The object's coder.

        Raises:
            ADMSTypeError: it is no ``Coder``.
            ADMSValueError: it takes more bytes than it was given, or other blocks than declared.
        """
        coder = self.inner.bind(context, nbytes, config)
        if not isinstance(coder, Coder):
            raise ADMSTypeError(
                f"bind of {self.name!r} must return an adms.compressors.Coder, got {coder!r}"
            )
        if coder.capacity and coder.nbytes > nbytes:
            raise ADMSValueError(
                f"bind of {self.name!r} was given {nbytes} bytes and returned a coder of "
                f"{coder.nbytes}; lower its num_records"
            )
        declared = self.block_tokens(config)
        if coder.block_tokens != declared:
            raise ADMSValueError(
                f"the coder of {self.name!r} codes {coder.block_tokens} tokens together, its "
                f"compressor declares {declared}; make block_tokens(config) return the same"
            )
        return coder


class SimpleCoder(MergingCoder):
    """Blocks compressed by an object's ``compress(K, V)``; made by ``SimpleObject.bind``."""

    def __init__(
        self, inner: Any, name: str, context: LayerContext, nbytes: int, block: int, bits: int
    ) -> None:
        self.inner = inner
        self.name = name
        shape = context.shape
        self.dtype = context.dtype
        generator = torch.Generator().manual_seed(0)
        # What a block of noise becomes says how many entries a record must hold.
        keys = torch.randn(shape.num_heads, block, shape.key_dim, generator=generator)
        values = torch.randn(shape.num_heads, block, shape.value_dim, generator=generator)
        entries = self._call(keys, values)[0].shape[1]
        super().__init__(
            PlainStorage(shape, context.dtype, bits),
            nbytes,
            block_tokens=block,
            entries_per_record=entries,
        )

    def merge(
        self,
        extra: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        queries: torch.Tensor | None,
    ) -> Merged:
        """The object's entries, block by block (it is asked for one at a time)."""
        rows, _, blocks = keys.shape[:3]
        parts = [
            self._padded(*self._call(keys[row, :, block], values[row, :, block]))
            for row in range(rows)
            for block in range(blocks)
        ]
        stacked = [
            torch.stack(part).unflatten(0, (rows, blocks)).transpose(1, 2)
            for part in zip(*parts, strict=True)
        ]
        return Merged(*stacked)

    def _call(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = self.inner.compress(keys.to(self.dtype), values.to(self.dtype))
        expected = (
            f"compress(K, V) of {self.name!r} must return keys [{keys.shape[0]}, M, "
            f"{keys.shape[2]}] and values [{values.shape[0]}, M, {values.shape[2]}] with M in "
            f"1..{keys.shape[1] - 1}"
        )
        if not (
            isinstance(result, tuple | list)
            and len(result) == 2
            and all(isinstance(part, torch.Tensor) for part in result)
        ):
            raise ADMSTypeError(f"{expected}, got {type(result).__name__}")
        new_keys, new_values = result[0].float(), result[1].float()
        count = new_keys.shape[1] if new_keys.dim() == 3 else 0
        wanted = [(states.shape[0], count, states.shape[2]) for states in (keys, values)]
        if (
            not 1 <= count < keys.shape[1]
            or [tuple(part.shape) for part in (new_keys, new_values)] != wanted
        ):
            raise ADMSValueError(
                f"{expected}, got {tuple(new_keys.shape)} and {tuple(new_values.shape)}"
            )
        if not bool(torch.isfinite(new_keys).all() & torch.isfinite(new_values).all()):
            raise ADMSValueError(f"compress(K, V) of {self.name!r} returned NaN or infinity")
        return new_keys, new_values

    def _padded(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count, most = keys.shape[1], self.entries_per_record
        if count > most:
            raise ADMSValueError(
                f"compress(K, V) of {self.name!r} returned {count} entries for a block, but "
                f"{most} for one of noise, which sized its records; return at most that many"
            )
        # Each entry counts the tokens it stands for on average, so the block keeps its weight.
        weight = keys.new_full(keys.shape[:2], math.log(self.block_tokens / count))
        missing = most - count
        return (
            torch.nn.functional.pad(keys, (0, 0, 0, missing)),
            torch.nn.functional.pad(values, (0, 0, 0, missing)),
            torch.nn.functional.pad(weight, (0, missing), value=ABSENT),
        )


class SimpleObject(Compressor):
    """An object with ``compress(K, V) -> (K, V)``, called on blocks of tokens.

    Its attributes say more, if it has them: ``name``; ``block_tokens``, how many tokens it is given
    at a time (32, or fewer in a small budget); ``storage_bits``, 8 (default) or 16 an element.

    Args:
        inner: the object.

    Raises:
        ADMSTypeError: ``block_tokens`` is no integer.
        ADMSValueError: ``block_tokens`` is below 2, or ``storage_bits`` neither 8 nor 16.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.name = str(getattr(inner, "name", type(inner).__name__))
        self.bits = getattr(inner, "storage_bits", STORAGE_BITS)
        if self.bits not in (8, 16):
            raise ADMSValueError(
                f"storage_bits of {self.name!r} must be 8 or 16, got {self.bits!r}"
            )
        self.block = getattr(inner, "block_tokens", None)
        if self.block is None:
            return
        if isinstance(self.block, bool) or not isinstance(self.block, int):
            raise ADMSTypeError(
                f"block_tokens of {self.name!r} must be an integer, got {self.block!r}"
            )
        if self.block < 2:
            raise ADMSValueError(
                f"block_tokens of {self.name!r} must be at least 2, got {self.block}"
            )

    def block_tokens(self, config: "ADMSConfig") -> int:
        """What the object says, or what may wait in the budget."""
        return self.block if self.block is not None else fitting_block(config, BLOCK, 2)

    def bind(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> Coder:
        """A coder around the object."""
        block = self.block_tokens(config)
        return SimpleCoder(self.inner, self.name, context, nbytes, block, self.bits)
