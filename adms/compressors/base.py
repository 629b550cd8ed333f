"""The contract of a compressor: pure functions between entries and bytes.

A compressor is bound once per kind of layer to a number of bytes, which yields a ``Coder``: so many
bytes of header (what is fitted to the stream: a basis, scales) and a ring of equal records (the
codes of one token, or of one block of tokens). All state is bytes in the middle tier's arena, so
what a compressor holds is counted, saved, reordered and bounded by construction.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` tokens or entries, ``R`` records, ``D``/``E`` head size of
keys/values.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from adms.calibration import LayerCalibration
from adms.entries import Entries, TokenShape
from adms.errors import ADMSValueError
from adms.registry import Registry

if TYPE_CHECKING:
    from adms.compressors.tables import CodeTables
    from adms.config import ADMSConfig


@dataclass(frozen=True)
class LayerContext:
    """What a compressor may know of the layer it works for.

    Attributes:
        shape: keys and values of one token.
        dtype: the model's dtype, in which decoded entries are wanted.
        layer_idx: which layer.
        value_metric: ``[K, E, E]`` how errors in values reach the layer's output (the mean over a
            KV head's query heads of ``W_o^T W_o``), or None if unknown.
        calibration: the model's own directions for this layer; None without a model.
        rotate: brings states ``[B, heads, N, D]`` to positions ``[1 or B, N]``; None where they
            need none, or are not known.
        distance: positions between a token that enters the middle and the newest one.
        gate: weights of a learned gate, for a compressor behind one (``adms.gates``); or None.
    """

    shape: TokenShape
    dtype: torch.dtype = torch.float32
    layer_idx: int = 0
    value_metric: torch.Tensor | None = None
    calibration: LayerCalibration | None = None
    rotate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    distance: int = 0
    gate: torch.Tensor | None = None

    @property
    def is_layer_specific(self) -> bool:
        """Whether layers of equal shape may still differ in what a compressor may know."""
        known = (self.value_metric, self.rotate, self.calibration, self.gate)
        return any(part is not None for part in known)


class Coder(ABC):
    """A compressor bound to a layer and a number of bytes; holds no state of any stream.

    Attributes:
        header_bytes: bytes fitted once per row.
        record_bytes: bytes of one record.
        num_records: whole records that fit.
        coarse_bytes: bytes that an old record is cut to, where codes are embedded (every prefix is
            a coarser code); 0 where records are never cut.
        num_coarse: cut records that fit beside the whole ones.
        fine_bytes: bytes of the finest code that ``encode`` gives, of which a record is the
            start: landmarks keep it whole; 0 where ``encode`` gives records.
        block_tokens: tokens of one record.
        entries_per_record: entries that a record decodes to.
        fit_tokens: most tokens that ``fit`` makes use of.
        uses_queries: whether ``fit`` or ``encode`` makes use of queries.
        is_stackable: whether ``stacked`` can be used.
    """

    header_bytes: int = 0
    record_bytes: int = 0
    num_records: int = 0
    coarse_bytes: int = 0
    num_coarse: int = 0
    fine_bytes: int = 0
    block_tokens: int = 1
    entries_per_record: int = 1
    fit_tokens: int = 512
    uses_queries: bool = False
    is_stackable: bool = False

    def stacked(self, coders: "Sequence[Coder]") -> "Coder":
        """One coder for the rows of several layers.

        Its rows are those of the first layer, then those of the second, and so on, as many of each.

        Args:
            coders: one per layer, of this kind and with the same layout.
        """
        return self

    @property
    def capacity(self) -> int:
        """Tokens that the records hold."""
        return (self.num_records + self.num_coarse) * self.block_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of header and all records."""
        whole = self.num_records * self.record_bytes
        return self.header_bytes + whole + self.num_coarse * self.coarse_bytes

    @abstractmethod
    def fit(self, entries: Entries, queries: torch.Tensor | None = None) -> torch.Tensor:
        """Header ``[1, header_bytes]`` (uint8) for one row, from its exact tokens so far.

        Args:
            entries: one row's tokens, keys ``[1, K, N, D]``.
            queries: ``[1, H, Q, D]`` recent queries before positions, or None.
        """

    @abstractmethod
    def encode(
        self, header: torch.Tensor, entries: Entries, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Records (uint8) of the entries' tokens, in their finest form.

        ``[B, N / block_tokens, fine_bytes or record_bytes]``.
        """

    @abstractmethod
    def decode(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        """Entries ``[B, K, R * entries_per_record, ...]`` of ``records [B, R, bytes]``.

        ``bytes`` is ``record_bytes``, ``coarse_bytes`` for cut records, ``fine_bytes`` for whole.
        """

    def encode_fine(
        self, header: torch.Tensor, entries: Entries, records: torch.Tensor
    ) -> torch.Tensor:
        """Codes ``[B, N, fine_bytes]`` of single tokens, whose ``encode`` gave ``records``."""
        return records

    def decode_fine(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        """Entries ``[B, K, N, ...]`` of what ``encode_fine`` gave."""
        return self.decode(header, records)

    def members(self, records: torch.Tensor) -> torch.Tensor | None:
        """Which entry of its record each token is part of, ``[B, R, block_tokens]``.

        None where that was not kept, or where every token is an entry of its own.
        """
        return None

    def log_weight(self, header: torch.Tensor, record_bytes: int) -> torch.Tensor | None:
        """What ``decode`` adds to the scores of all entries of a head: ``[B, K]``, None for zero.

        Args:
            header: ``[B, header_bytes]``.
            record_bytes: bytes of the records that are read.
        """
        return None

    def tables(self, header: torch.Tensor, record_bytes: int) -> "CodeTables | None":
        """How kernels read records without ``decode``, or None where they cannot.

        Args:
            header: ``[B, header_bytes]``; what is returned may be views of it.
            record_bytes: bytes of the records that are read.
        """
        return None


class RawCoder(Coder):
    """Tokens as they are, in their own dtype: the middle before it has to compress."""

    is_stackable = True

    def __init__(self, shape: TokenShape, dtype: torch.dtype, num_records: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self.record_bytes = shape.num_elements * dtype.itemsize
        self.num_records = num_records

    def fit(self, entries: Entries, queries: torch.Tensor | None = None) -> torch.Tensor:
        """An empty header."""
        return torch.empty(1, 0, dtype=torch.uint8, device=entries.keys.device)

    def encode(
        self, header: torch.Tensor, entries: Entries, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The bytes of keys, then values, token by token."""
        keys, values = (part.transpose(1, 2).flatten(2) for part in (entries.keys, entries.values))
        return torch.cat([keys, values], dim=2).view(torch.uint8)

    def decode(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        """Views of the bytes as keys and values."""
        rows, count, _ = records.shape
        shape = self.shape
        flat = records.view(self.dtype)
        split = shape.num_heads * shape.key_dim
        keys = flat[..., :split].reshape(rows, count, shape.num_heads, shape.key_dim)
        values = flat[..., split:].reshape(rows, count, shape.num_heads, shape.value_dim)
        return Entries(keys.transpose(1, 2), values.transpose(1, 2))


@dataclass(frozen=True)
class Block:
    """One row's compressed tokens: what ``Compressor.compress`` returns."""

    coder: Coder
    header: torch.Tensor
    records: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of header and records."""
        return self.header.numel() + self.records.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens that were compressed."""
        return self.records.shape[1] * self.coder.block_tokens

    def decode(self) -> Entries:
        """The entries that attention reads in place of the tokens."""
        return self.coder.decode(self.header, self.records)


class Compressor(ABC):
    """A way to code tokens; registered under a name, or passed as ``compressor_type``.

    Attributes:
        name: what configurations call it.
        parameters: names of the ``ADMSConfig`` parameters that it uses beside the common ones; one
            that it does not use raises when set explicitly.
        needs_rotation: whether its coders make use of ``LayerContext.rotate``.
        uses_calibration: whether its coders make use of ``LayerContext.calibration``.
    """

    name: str = ""
    parameters: frozenset[str] = frozenset()
    needs_rotation: bool = False
    uses_calibration: bool = False

    def block_tokens(self, config: "ADMSConfig") -> int:
        """Tokens that are coded together."""
        return 1

    @abstractmethod
    def bind(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> Coder:
        """A coder of at most ``nbytes`` for one layer and one row.

        A coder whose ``capacity`` is not above what the same bytes hold exactly is never used.
        """

    def weight(self, layer_idx: int, config: "ADMSConfig") -> float:
        """How many bytes a layer's codes get, beside those of other layers of its shape."""
        return 1.0

    def compress(
        self,
        entries: Entries,
        nbytes: int,
        *,
        queries: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        config: "ADMSConfig | None" = None,
    ) -> Block:
        """Compresses one row's tokens on their own, outside any cache.

        Args:
            entries: keys ``[1, K, N, D]`` and values ``[1, K, N, E]``, finite.
            nbytes: most bytes of the block for this layer and row. A budget that holds the tokens
                exactly does so.
            queries: ``[1, H, Q, D]`` queries that came after, or None.
            generator: unused by deterministic compressors; kept so that all are called alike.
            config: parameters; the defaults if None.

        Raises:
            ADMSValueError: keys or values are not finite, or ``nbytes`` cannot hold the tokens.
        """
        from adms.config import ADMSConfig

        require_finite(entries)
        shape, dtype, count = entries.token_shape, entries.keys.dtype, entries.num_entries
        raw = RawCoder(shape, dtype, count)
        coder: Coder = raw
        if count * raw.record_bytes > nbytes:
            context = LayerContext(shape, dtype)
            coder = self.bind(context, nbytes, config or ADMSConfig(compressor_type=self.name))
        usable = count // coder.block_tokens * coder.block_tokens
        room = coder.num_records * coder.block_tokens
        if room < count or usable < count:
            raise ADMSValueError(
                f"{nbytes} bytes hold {room} tokens of {self.name} in blocks of "
                f"{coder.block_tokens}, got {count} tokens; give more bytes or whole blocks"
            )
        header = coder.fit(entries, queries)
        records = coder.encode(header, entries, queries)[..., : coder.record_bytes]
        return Block(coder, header, records)


def require_finite(entries: Entries) -> None:
    """Raises ``ADMSValueError`` where keys or values hold NaN or infinity."""
    for name, part in (("keys", entries.keys), ("values", entries.values)):
        if not bool(torch.isfinite(part).all()):
            raise ADMSValueError(
                f"{name} hold NaN or infinity; check the layer that produced them before it is "
                "compressed"
            )


COMPRESSORS: Registry[Compressor] = Registry("compressor")


def register_compressor(name: str, compressor: Compressor, *, replace: bool = False) -> Compressor:
    """Makes ``compressor_type=name`` mean ``compressor``.

    Raises:
        ADMSTypeError: ``name`` is not a string.
        ADMSValueError: ``name`` is empty or taken (and ``replace`` is False).
    """
    return COMPRESSORS.register(name, compressor, replace=replace)


def pack(*tensors: torch.Tensor) -> torch.Tensor:
    """Concatenates tensors' bytes row by row: ``[B, ...]`` each -> ``[B, bytes]`` (uint8)."""
    rows = tensors[0].shape[0]
    return torch.cat([as_bytes(part.reshape(rows, -1)) for part in tensors], 1)


def as_bytes(states: torch.Tensor) -> torch.Tensor:
    """``[..., N]`` as ``[..., bytes]`` (uint8)."""
    # Not contiguous(): it leaves the strides of dimensions of size one, which a view refuses.
    return states.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def unpack(data: torch.Tensor, *layout: tuple[torch.dtype, tuple[int, ...]]) -> list[torch.Tensor]:
    """Takes back what ``pack`` put together: a tensor ``[B, *shape]`` per ``(dtype, shape)``.

    Views of ``data`` where its places allow it.
    """
    result, start = [], 0
    for dtype, shape in layout:
        size = dtype.itemsize * torch.Size(shape).numel()
        part: Any = data[:, start : start + size]
        places = (part.storage_offset(), part.stride(0))
        if part.stride(1) != 1 or any(place % dtype.itemsize for place in places):
            # A wider type needs an even start in every row.
            part = part.clone(memory_format=torch.contiguous_format)
        result.append(part.view(dtype).unflatten(1, shape))
        start += size
    return result
