"""``AdaptiveUpdateConfig``: which tokens get an entry of their own in the middle."""

import math
from dataclasses import dataclass
from typing import Any

from adms.errors import ADMSTypeError, ADMSValueError
from adms.gates.learned import UpdateGates

POLICIES = ("similarity", "learned")
USUAL_BLOCK = 64
LEAST_BLOCK = 2


@dataclass(frozen=True, kw_only=True)
class AdaptiveUpdateConfig:
    """A gate before the middle: of each block of tokens, some keep an entry of their own.

    Each of the others is folded into the most similar one of these, which stands for it and weighs
    as many tokens. Every layer decides on its own; how many tokens it admits is fixed, so that
    memory stays bounded and no layer waits for the device.

    Attributes:
        policy: "similarity" folds the tokens that are most alike, in all layers as many; "learned"
            weighs them by gates trained with ``adms train-gates``, which say too how many tokens
            each layer admits.
        admission: share of the tokens that keep an entry of their own, 0.1 to 1 (0.6 if None); 1
            admits all and changes nothing. With "learned", the mean of the gates' own, and left
            out.
        block_tokens: tokens that are decided on together (more where the compressor has blocks of
            its own); they wait for each other, and what waits is charged to ``compressed_budget``.
            Larger blocks hold more tokens that are alike. If None, 64, or a quarter of the budget
            where that is less. With "learned", the gates' own or a quarter of the budget, and left
            out.
        gates: with "learned", ``UpdateGates`` or the file that they were saved in. Gates that were
            never trained admit all tokens.

    Raises:
        ADMSTypeError: a field has a type that cannot work.
        ADMSValueError: a field is out of range, or does not belong to the policy.
    """

    policy: str = "similarity"
    admission: float | None = None
    block_tokens: int | None = None
    gates: Any = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ADMSValueError(
                f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}"
            )
        if self.policy == "learned":
            self._check_learned()
            return
        if self.gates is not None:
            raise ADMSValueError('gates belong to policy="learned"; choose it or leave them out')
        object.__setattr__(
            self, "admission", check_admission(0.6 if self.admission is None else self.admission)
        )
        if self.block_tokens is not None:
            check_block(self.block_tokens)

    def _check_learned(self) -> None:
        for name in ("admission", "block_tokens"):
            if getattr(self, name) is not None:
                raise ADMSValueError(
                    f'{name} is what the gates were trained for; leave it out with policy="learned"'
                )
        gates = self.gates
        if gates is None:
            raise ADMSValueError(
                'policy="learned" needs gates: a file from "adms train-gates", or UpdateGates'
            )
        if not isinstance(gates, UpdateGates):
            gates = UpdateGates.load(gates)
        object.__setattr__(self, "gates", gates)
        object.__setattr__(self, "admission", check_admission(gates.admission))
        object.__setattr__(self, "block_tokens", check_block(gates.block_tokens))

    @property
    def is_identity(self) -> bool:
        """Whether every token is admitted."""
        return self.admission == 1.0

    def block_sizes(
        self, inner_block: int, budget: int, layer_idx: int | None = None
    ) -> tuple[int, int]:
        """Tokens of a block, and those admitted, for a compressor with blocks of its own.

        Args:
            inner_block: tokens that the compressor codes together; 1 for most.
            budget: of the middle, in tokens.
            layer_idx: the layer; None for the mean over layers. Blocks are alike in all of them.
        """
        if self.admission is None:
            raise RuntimeError("a configuration without its numbers")
        tokens = USUAL_BLOCK if self.block_tokens is None else self.block_tokens
        if self.block_tokens is None or self.gates is not None:
            tokens = max(LEAST_BLOCK, min(tokens, budget // 4))
        admitted = _some_of(tokens, self.admission)
        if admitted % inner_block:
            admitted = math.ceil(admitted / inner_block) * inner_block
            tokens = math.ceil(admitted / self.admission - 1e-9)
        if layer_idx is None or self.gates is None or layer_idx >= len(self.gates.admissions):
            return tokens, admitted
        own = math.ceil(_some_of(tokens, self.gates.admissions[layer_idx]) / inner_block)
        return tokens, min(own, tokens // inner_block) * inner_block

    def to_dict(self) -> dict[str, Any]:
        """The policy and its numbers; gates are a model's, and not among them."""
        names = ("policy",) if self.policy == "learned" else ("policy", "admission", "block_tokens")
        return {name: getattr(self, name) for name in names}

    def describe(self) -> str:
        """What codes depend on, in a few words."""
        which = "" if self.gates is None else f" {self.gates.digest()}"
        block = "" if self.block_tokens is None else f" of {self.block_tokens}"
        return f"{self.policy} gates{which} ({self.admission:g}{block})"


def check_admission(value: Any) -> float:
    """``value`` as a share of tokens.

    Raises:
        ADMSTypeError: it is no number.
        ADMSValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ADMSTypeError(f"admission must be a number, got {value!r}")
    if not 0.1 <= value <= 1.0:
        raise ADMSValueError(
            f"admission must lie in 0.1..1, got {value}; an entry that stands for more than ten "
            "tokens is like none of them"
        )
    return float(value)


def _some_of(tokens: int, share: float) -> int:
    """A share of a block, at least one token."""
    # A hair more, so that 0.6 of 10 is 6 whatever the rounding.
    return max(1, math.floor(tokens * share + 1e-9))


def check_block(value: Any) -> int:
    """``value`` as the size of a block.

    Raises:
        ADMSTypeError: it is no integer.
        ADMSValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ADMSTypeError(f"block_tokens must be an integer, got {value!r}")
    if not LEAST_BLOCK <= value <= 128:
        raise ADMSValueError(
            f"block_tokens must lie in {LEAST_BLOCK}..128, got {value}; {USUAL_BLOCK} is usual"
        )
    return value
