"""A tiny random Llama and text for it."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 97


def tiny_llama(trained: int = 4096) -> LlamaForCausalLM:
    """Two layers, two query heads on one KV head each of two, head size 8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=trained,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def random_ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Ids that are not special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)


@torch.no_grad()
def feed(
    model: LlamaForCausalLM, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of ids in one call (which the model cuts into chunks by itself)."""
    return model(ids, past_key_values=cache, attention_mask=mask).logits
