"""What a baseline decides: which entries stay after each forward pass, in which form.

Shapes: ``K`` KV heads, ``N`` entries, ``Q`` new tokens, ``D``/``E`` head sizes of keys/values.
Every baseline reads one row.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch

from adms.binding import BUDGET_ITEMSIZE
from adms.config import Sizes
from adms.entries import TokenShape
from adms.errors import ADMSValueError

SCORE_BYTES = 4


@dataclass(frozen=True)
class Held:
    """What a layer holds, in the order of the text; every head the same number of entries.

    Attributes:
        keys: ``[K, N, D]`` before positions.
        values: ``[K, N, E]``.
        tokens: ``[K, N]`` text positions (of a merged entry, the mean).
        fields: further ``[K, N]`` tensors of the policy, such as scores.
        log_weight: ``[K, N]`` added to attention scores, or None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor
    fields: dict[str, torch.Tensor] = field(default_factory=dict)
    log_weight: torch.Tensor | None = None

    @property
    def num_entries(self) -> int:
        """Entries of each head."""
        return self.keys.shape[1]

    def take(self, index: torch.Tensor) -> "Held":
        """The entries ``index [K, M]`` of each head, or ``[M]`` of all heads."""
        index = index.expand(self.keys.shape[0], -1)

        def pick(states: torch.Tensor) -> torch.Tensor:
            return states.gather(1, index[..., None].expand(-1, -1, states.shape[2]))

        return Held(
            pick(self.keys),
            pick(self.values),
            self.tokens.gather(1, index),
            {name: values.gather(1, index) for name, values in self.fields.items()},
            None if self.log_weight is None else self.log_weight.gather(1, index),
        )

    def with_fields(self, **fields: torch.Tensor) -> "Held":
        """A copy with further or other fields."""
        return replace(self, fields={**self.fields, **fields})


@dataclass(frozen=True)
class Setting:
    """The memory and the layer a policy works in.

    Attributes:
        sizes: of the ADMS cache whose bytes the policy may use.
        shape: keys and values of one token.
        layer_idx: which layer it is.
        itemsize: bytes of a number in the model's dtype, in which exact tokens are held.
    """

    sizes: Sizes
    shape: TokenShape
    layer_idx: int
    itemsize: int

    @property
    def slots(self) -> int:
        """Exact tokens that the memory holds."""
        return self.sizes.sink + self.sizes.budget + self.sizes.recent

    @property
    def exact_bytes(self) -> int:
        """Bytes of one exact 16-bit token, all heads: the unit of the budget."""
        return self.shape.num_elements * BUDGET_ITEMSIZE

    @property
    def held_bytes(self) -> int:
        """Bytes of one exact token in the model's dtype, all heads."""
        return self.shape.num_elements * self.itemsize

    def scored_slots(self, numbers: int = 1) -> int:
        """Exact tokens that fit where each slot of each head also has this many 4-byte numbers."""
        extra = SCORE_BYTES * numbers * self.shape.num_heads
        return self.slots * self.exact_bytes // (self.exact_bytes + extra)


class Policy(ABC):
    """One method on one layer.

    Attributes:
        label: as in tables and legends.
        needs_weights: whether ``reduce`` looks at attention weights.
    """

    label: str = ""
    needs_weights: bool = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def reduce(self, held: Held, weights: torch.Tensor | None, new: int) -> Held:
        """What stays after a pass.

        Args:
            held: the entries before the pass and its ``new`` tokens at the end.
            weights: ``[K, Q, N]`` attention of the pass, mean over the query heads of a KV head.
            new: tokens of the pass.

        Returns:
            Entries within the memory.
        """

    @abstractmethod
    def nbytes(self, held: Held) -> int:
        """Bytes in which an implementation stores ``held``."""

    @property
    @abstractmethod
    def max_entries(self) -> int:
        """Most entries ever held after a pass."""


class Eviction(Policy):
    """Methods that keep exact tokens and drop the rest.

    Attributes:
        numbers: 4-byte numbers that each slot of each head has beside its token.
    """

    numbers: int = 0

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.slots = setting.scored_slots(self.numbers)
        protected = setting.sizes.sink + setting.sizes.recent
        if self.slots <= protected:
            raise ADMSValueError(
                f"{self.label} has {self.slots} slots in these bytes, all taken by "
                f"{setting.sizes.sink} sinks and {setting.sizes.recent} recent tokens; use a "
                "larger compressed_budget"
            )

    @property
    def max_entries(self) -> int:
        """The slots."""
        return self.slots

    def nbytes(self, held: Held) -> int:
        """Exact tokens and their numbers."""
        extra = SCORE_BYTES * self.numbers * self.setting.shape.num_heads
        return held.num_entries * (self.setting.held_bytes + extra)

    def keep_best(self, held: Held, scores: torch.Tensor, recent: int | None = None) -> Held:
        """Keeps sinks, the ``recent`` last tokens, and the best others by ``scores [K, N]``."""
        count = held.num_entries
        if count <= self.slots:
            return held
        scores = scores.clone()
        recent = self.setting.sizes.recent if recent is None else recent
        scores[:, : self.setting.sizes.sink] = torch.inf
        scores[:, count - recent :] = torch.inf
        best = scores.topk(self.slots, dim=1).indices.sort(dim=1).values
        return held.take(best)
