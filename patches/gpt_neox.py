"""GPT-NeoX and Pythia: Llama's path with rotary positions on a part of each head."""

from typing import Any

from torch import nn

from adms.patches.base import FAMILIES
from adms.patches.llama import LlamaFamily


class GPTNeoXFamily(LlamaFamily):
    """GPT-NeoX, Pythia."""

    name = "GPT-NeoX, Pythia"
    model_types = ("gpt_neox",)
    exact = "exact"
    positions = "rotary on part of each head, applied at cache positions when read"

    def attentions(self, decoder: Any) -> list[nn.Module]:
        """``layers[i].attention``."""
        return [layer.attention for layer in decoder.layers]


FAMILIES.append(GPTNeoXFamily())
