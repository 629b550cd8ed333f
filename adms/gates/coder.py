"""A compressor behind a gate: tokens are folded while they wait, then what is left is coded.

Any compressor can stand behind it. Of a block of tokens some are admitted and stand for the others
too; the compressor codes these, and a byte for each token says which entry it is part of. The
logarithm of an entry's tokens is its log-weight.

Shapes: ``B`` rows, ``K`` KV heads, ``N`` tokens, ``R`` blocks (records), ``T`` tokens of a block,
``M`` entries of a block, ``I`` records of the compressor behind the gate in one of the gate's.
"""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from adms.compressors.base import Coder, Compressor, LayerContext
from adms.entries import Entries
from adms.gates.fold import choose_hosts, fold, token_distance
from adms.gates.learned import log_importance

if TYPE_CHECKING:
    from adms.config import ADMSConfig
    from adms.gates.config import AdaptiveUpdateConfig


class GatedCoder(Coder):
    """Folds blocks of ``tokens`` into ``admitted`` entries, coded by ``inner``.

    Where the inner coder folds blocks itself, it is told nothing of counts, and every entry weighs
    ``log(T / M)`` more: right for the block as a whole.

    Args:
        inner: codes the entries; its ``block_tokens`` divide ``admitted``.
        tokens: tokens of a block (``T``).
        admitted: entries of a block (``M``).
        gate: ``[K * (D + E)]`` weights of a learned gate; None compares tokens alone.
    """

    def __init__(self, inner: Coder, tokens: int, admitted: int, gate: torch.Tensor | None) -> None:
        self.inner = inner
        self.admitted = admitted
        self.is_stackable = inner.is_stackable
        self._gates = {} if gate is None else {gate.device: gate}
        self._layers = [self]
        self.block_tokens = tokens
        self.folds_once = inner.block_tokens == inner.entries_per_record == 1
        self.inner_records = admitted // inner.block_tokens
        self.entries_per_record = self.inner_records * inner.entries_per_record
        self.member_bytes = tokens if self.folds_once else 0
        self.header_bytes = inner.header_bytes
        self.fine_bytes = inner.fine_bytes if self.folds_once else 0
        self.fit_tokens = inner.fit_tokens
        self.uses_queries = inner.uses_queries
        self.record_bytes = self.member_bytes + self.inner_records * inner.record_bytes
        self.num_records = inner.num_records * inner.record_bytes // self.record_bytes
        if inner.num_coarse:
            self.coarse_bytes = self.member_bytes + self.inner_records * inner.coarse_bytes
            self.num_coarse = inner.num_coarse * inner.coarse_bytes // self.coarse_bytes

    def stacked(self, coders: Sequence[Coder]) -> Coder:
        """One that applies each layer's own gate and code to its rows."""
        twin = copy.copy(self)
        twin._layers = [coder for coder in coders if isinstance(coder, GatedCoder)]
        twin.inner = self.inner.stacked([coder.inner for coder in twin._layers])
        return twin

    def fit(self, entries: Entries, queries: torch.Tensor | None = None) -> torch.Tensor:
        """The inner coder's header."""
        return self.inner.fit(entries, queries)

    def encode(
        self, header: torch.Tensor, entries: Entries, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Which token is part of which entry, then the entries' records, byte by byte in turn."""
        keys = entries.keys.unflatten(2, (-1, self.block_tokens))
        values = entries.values.unflatten(2, (-1, self.block_tokens))
        scores = None
        if self._gates:
            weights = torch.stack([layer._gate_on(keys.device) for layer in self._layers])
            scores = log_importance(weights, keys, values)
        hosts = choose_hosts(token_distance(keys, values), self.admitted, scores)
        folded = fold(keys, values, hosts, self.admitted)
        left = Entries(folded.keys.flatten(2, 3), folded.values.flatten(2, 3))
        # No finer than what is kept: these may stand for several tokens, and landmarks are one.
        codes = self.inner.encode(header, left, queries)[..., : self.inner.record_bytes]
        records = codes.unflatten(1, (-1, self.inner_records))
        # In turn, so that the start of a record is the start of each code in it.
        data = records.transpose(2, 3).flatten(2)
        if not self.folds_once:
            return data
        return torch.cat([folded.members.to(torch.uint8), data], dim=2)

    def encode_fine(
        self, header: torch.Tensor, entries: Entries, records: torch.Tensor
    ) -> torch.Tensor:
        """The inner coder's codes of tokens, whatever they were folded into."""
        return self.inner.encode(header, entries)

    def decode_fine(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        """The inner coder's entries."""
        return self.inner.decode(header, records)

    def members(self, records: torch.Tensor) -> torch.Tensor | None:
        """Which entry of its record each token is part of, ``[B, R, T]``; see ``Coder``."""
        if not self.folds_once:
            return None
        # Bytes left over from exact tokens may hold anything.
        return records[..., : self.member_bytes].long().clamp(max=self.admitted - 1)

    def inner_view(self, records: torch.Tensor) -> torch.Tensor:
        """The inner coder's records ``[B, R * I, bytes]`` in records ``[B, R, bytes]``."""
        data = records[..., self.member_bytes :].unflatten(2, (-1, self.inner_records))
        # A copy, since a coder may read its bytes as a wider type, which needs an aligned start.
        return data.transpose(2, 3).clone(memory_format=torch.contiguous_format).flatten(1, 2)

    def _gate_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._gates:
            self._gates[device] = next(iter(self._gates.values())).to(device)
        return self._gates[device]

    def decode(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        """The inner coder's entries, each with the weight of its tokens."""
        found = self.inner.decode(header, self.inner_view(records))
        members = self.members(records)
        if members is not None:
            # Records beyond a row's own are blank and masked; their empty entries count as one.
            counts = torch.nn.functional.one_hot(members, self.admitted).sum(2)
            own = counts.flatten(1).clamp(min=1).float().log()[:, None]
            weight = own.expand(-1, found.keys.shape[1], -1)
        else:
            more = math.log(self.block_tokens / self.admitted)
            weight = torch.full_like(found.keys[..., 0], more, dtype=torch.float32)
        if found.log_weight is not None:
            weight = weight + found.log_weight
        return Entries(found.keys, found.values, weight)


class GatedCompressor(Compressor):
    """A compressor behind a gate; made by ``enable_adms_llm(adaptive_update=...)``.

    Args:
        inner: codes what the gate leaves.
        update: the gate.
    """

    def __init__(self, inner: Compressor, update: "AdaptiveUpdateConfig") -> None:
        self.inner = inner
        self.update = update
        self.parameters = inner.parameters
        self.needs_rotation = inner.needs_rotation
        self.uses_calibration = inner.uses_calibration
        self.name = f"{inner.name} behind {update.describe()}"

    def block_tokens(self, config: "ADMSConfig") -> int:
        """Tokens of a block, of which the inner compressor gets whole blocks of its own."""
        inner = self.inner.block_tokens(config)
        return self.update.block_sizes(inner, config.compressed_budget)[0]

    def weight(self, layer_idx: int, config: "ADMSConfig") -> float:
        """The share of the tokens that the layer admits, so that all layers reach as far back."""
        tokens, admitted = self.update.block_sizes(
            self.inner.block_tokens(config), config.compressed_budget, layer_idx
        )
        return admitted / tokens

    def bind(self, context: LayerContext, nbytes: int, config: "ADMSConfig") -> Coder:
        """A coder for this layer; a layer that admits every token has no gate."""
        inner = self.inner.bind(context, nbytes, config)
        layer = None if context.gate is None else context.layer_idx
        tokens, admitted = self.update.block_sizes(
            self.inner.block_tokens(config), config.compressed_budget, layer
        )
        if admitted == tokens:
            return inner
        return GatedCoder(inner, tokens, admitted, context.gate)


def put_gate(
    compressor: Compressor, update: "AdaptiveUpdateConfig", model: nn.Module
) -> tuple[Compressor, tuple[torch.Tensor, ...]]:
    """The compressor behind its gate, and the weights of learned gates by layer.

    Raises:
        ADMSValueError: the gates were trained for another model.
    """
    if update.gates is not None:
        update.gates.check_model(model)
    if update.is_identity:
        return compressor, ()
    weights = () if update.gates is None else update.gates.weights
    return GatedCompressor(compressor, update), weights
