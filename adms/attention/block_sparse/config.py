"""How sparse content-adaptive attention is, and what its scorer looks like."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from adms.errors import ADMSTypeError, ADMSValueError


def get_adaptive_sparsity(seq_len: int) -> float:
    """Sparsity by length: 0.8 below 1024 tokens, 0.9 below 4096, 0.95 from there on.

    Raises:
        ADMSValueError: `seq_len` is less than 1.
    """
    if seq_len < 1:
        raise ADMSValueError(f"seq_len must be at least 1, got {seq_len}")
    if seq_len < 1024:
        return 0.8
    return 0.9 if seq_len < 4096 else 0.95


@dataclass(frozen=True)
class AdaptiveConfig:
    """Parameters of `BlockSparseAdaptive`.

    Attributes:
        base_sparsity: Share of the block pairs allowed by causality that are not attended, on
            average over rows; None takes `get_adaptive_sparsity` of the number of keys. At least
            one block per row always remains, so short inputs are denser.
        budget_range: How far content moves a row's number of adaptive connections: between
            1 - budget_range and 1 + budget_range times the base. 0 keeps every row at the base.
        temperature: Initial temperature of the soft selection; lower is closer to hard.
        learnable_temperature: Whether the temperature is a parameter.
        min_temperature: Lower bound of the temperature, learned or annealed.
        hidden_dim: Width of the importance scorer.
        num_layers: Linear layers in the importance scorer, at least 1.
        share_across_heads: One pattern for all heads instead of one for each.
        hard_sparsity: In training, select hard instead of soft. In evaluation selection is
            always hard.
        straight_through: With `hard_sparsity` in training, pass the soft selection's gradient to
            the scorer (dense cost). Without, the scorer gets no gradient and the sparse kernel
            runs.
        gumbel_noise: Whether selection in training explores with Gumbel noise.
        block_size: Tokens in a block.
        local_fraction: Share of a row's connections that the local pattern (segments and
            dilation) takes before content chooses the rest. 1 is a fixed pattern, in which
            content chooses nothing, also where the local pattern is short of blocks.
        coarse_factor: Blocks in a coarse block of the multi-scale pattern: content then chooses
            whole coarse blocks outside the longest segment, and single blocks within it. None
            chooses single blocks anywhere, as does a row whose share holds no coarse block.
        coarse_fraction: Share of the adaptive connections chosen as coarse blocks; more where
            the segment has too few blocks for the rest.
        strict_causal: With causal attention, judge a block of queries by its first query, so
            that no output depends on later tokens. False judges it by its mean: better patterns,
            for prefill, where the whole block is known.
    """

    base_sparsity: float | None = 0.9
    budget_range: float = 0.5
    temperature: float = 1.0
    learnable_temperature: bool = False
    min_temperature: float = 0.1
    hidden_dim: int = 128
    num_layers: int = 2
    share_across_heads: bool = False
    hard_sparsity: bool = False
    straight_through: bool = True
    gumbel_noise: bool = True
    block_size: int = 64
    local_fraction: float = 0.25
    coarse_factor: int | None = None
    coarse_fraction: float = 0.5
    strict_causal: bool = True

    def __post_init__(self) -> None:
        """Checks types and ranges.

        Raises:
            ADMSTypeError: A field has a type that cannot work.
            ADMSValueError: A field is out of range.
        """
        if self.base_sparsity is not None:
            self._number("base_sparsity", 0.0, 1.0, below_high=True)
        self._number("budget_range", 0.0, 1.0, below_high=True)
        self._number("min_temperature", 1e-3, math.inf)
        self._number("temperature", self.min_temperature, math.inf)
        self._number("local_fraction", 0.0, 1.0)
        self._number("coarse_fraction", 0.0, 1.0)
        for name in ("hidden_dim", "num_layers", "block_size"):
            self._integer(name, 1)
        if self.coarse_factor is not None:
            self._integer("coarse_factor", 2)
        for field in dataclasses.fields(self):
            if field.type in (bool, "bool") and not isinstance(getattr(self, field.name), bool):
                raise ADMSTypeError(
                    f"{field.name} must be a bool, got {type(getattr(self, field.name)).__name__}"
                )

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "AdaptiveConfig":
        """The inverse of `to_dict`.

        Raises:
            ADMSValueError: There is a name that is no field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ADMSValueError(
                f"AdaptiveConfig has no field {unknown[0]!r}; its fields are {sorted(known)}"
            )
        return cls(**fields)

    def _number(self, name: str, low: float, high: float, below_high: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ADMSTypeError(f"{name} must be a number, got {type(value).__name__}")
        if not low <= value <= high or (below_high and value == high) or math.isinf(value):
            end = "below" if below_high else "at most"
            raise ADMSValueError(f"{name} must be at least {low} and {end} {high}, got {value}")

    def _integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ADMSTypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < low:
            raise ADMSValueError(f"{name} must be at least {low}, got {value}")
