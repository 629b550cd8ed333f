"""Plain quantised windows: the middle is the latest tokens at 4, 3 or 2 bits, the rest is exact."""

import torch

from adms.errors import ADMSValueError
from adms.evaluation.baselines.policy import Held, Policy, Setting

GROUP = 32
SCALE_BYTES = 4


def quantize(states: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """``states`` after rounding to ``2 ** bits`` levels between minimum and maximum along ``dim``.

    Minimum and step are rounded to 16 bits, as they would be stored.
    """
    numbers = states.float()
    low = numbers.amin(dim, keepdim=True).to(torch.bfloat16).float()
    step = (numbers.amax(dim, keepdim=True) - low) / (2**bits - 1)
    step = step.to(torch.bfloat16).float().clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((numbers - low) / step).round().clamp(0, 2**bits - 1)
    return (codes * step + low).to(states.dtype)


class QuantizedWindow(Policy):
    """Sinks, quantised tokens, and a recent window, the oldest quantised tokens forgotten.

    Tokens are coded 32 at a time as they leave the window, keys channel by channel over those 32
    tokens and values in groups of 64 channels, each group with a 16-bit minimum and step. What
    waits is exact and charged to the budget.

    Source: Liu et al. (2024), KIVI, arXiv 2402.02750; differs in that keys are coded before
    positions, that sinks are exact, and that the whole stays in bounded memory.
    """

    bits: int = 0

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        budget = (setting.sizes.budget - (GROUP - 1)) * setting.exact_bytes
        self.blocks = budget // self.block_bytes if budget > 0 else 0
        if self.blocks < 1:
            raise ADMSValueError(
                f"{self.label} codes {GROUP} tokens together and needs a compressed_budget of at "
                f"least {GROUP - 1 + -(-self.block_bytes // setting.exact_bytes)}, got "
                f"{setting.sizes.budget}"
            )
        self.coded = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of 32 coded tokens, all heads, minima and steps included."""
        shape = self.setting.shape
        codes = GROUP * shape.num_elements * self.bits // 8
        key_groups = shape.num_heads * shape.key_dim
        value_groups = GROUP * shape.num_heads * -(-shape.value_dim // 64)
        return codes + SCALE_BYTES * (key_groups + value_groups)

    @property
    def max_entries(self) -> int:
        """Sinks, coded tokens, waiting tokens and the recent window."""
        sizes = self.setting.sizes
        return sizes.sink + self.blocks * GROUP + GROUP - 1 + sizes.recent

    def nbytes(self, held: Held) -> int:
        """Exact tokens and blocks."""
        exact = held.num_entries - self.coded * GROUP
        return exact * self.setting.held_bytes + self.coded * self.block_bytes

    def reduce(self, held: Held, weights: torch.Tensor | None, new: int) -> Held:
        """Codes whole groups that left the window, forgets the oldest groups."""
        sink, recent = self.setting.sizes.sink, self.setting.sizes.recent
        start = sink + self.coded * GROUP
        waiting = held.num_entries - start - recent
        fresh = max(0, waiting // GROUP)
        if not fresh:
            return held
        keys, values = held.keys.clone(), held.values.clone()
        for block in range(fresh):
            part = slice(start + block * GROUP, start + (block + 1) * GROUP)
            keys[:, part] = quantize(keys[:, part], self.bits, dim=1)
            for low in range(0, values.shape[2], 64):
                channels = slice(low, low + 64)
                values[:, part, channels] = quantize(values[:, part, channels], self.bits, dim=2)
        self.coded += fresh
        held = Held(keys, values, held.tokens)
        forgotten = max(0, self.coded - self.blocks)
        if forgotten:
            index = torch.arange(held.num_entries, device=keys.device)
            held = held.take(torch.cat([index[:sink], index[sink + forgotten * GROUP :]]))
            self.coded -= forgotten
        return held


class Int4Window(QuantizedWindow):
    """4 bits."""

    label, bits = "int4 window", 4


class Int3Window(QuantizedWindow):
    """3 bits."""

    label, bits = "int3 window", 3


class Int2Window(QuantizedWindow):
    """2 bits."""

    label, bits = "int2 window", 2
