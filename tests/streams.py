"""A tiny Llama and small streams that many tests share."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adms import ADMSKVCache, enable_adms_llm
from adms.compressors.quantized import inverse

VOCABULARY = 97
# Evicts early, codes early: 4 sinks, a middle of 160 exact or some 1500 coded tokens.
SMALL: dict[str, Any] = {"start_size": 4, "recent_size": 64, "compressed_budget": 160}


def tiny_llama(
    *, layers: int = 2, trained: int = 512, heads: int = 4, kv_heads: int = 2, seed: int = 0
) -> LlamaForCausalLM:
    """A random Llama with grouped heads of size 16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16 * heads,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=trained,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def random_ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)


def small_cache(model: LlamaForCausalLM, **changes: Any) -> ADMSKVCache:
    """A cache of the sizes above."""
    return enable_adms_llm(model, **{**SMALL, **changes})


@torch.no_grad()
def feed(model: LlamaForCausalLM, ids: torch.Tensor, cache: Any, step: int = 0) -> torch.Tensor:
    """Logits of ``ids``, ``step`` columns a call (0: all at once)."""
    parts = ids.split(step, dim=1) if step else (ids,)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


@torch.no_grad()
def check_padded_row(
    model: LlamaForCausalLM,
    together: ADMSKVCache,
    alone: ADMSKVCache,
    *,
    total: int,
    padding: int = 24,
    chunk: int = 64,
) -> None:
    """Asserts that a row with padding on its left, in a batch, gets the logits it gets by itself.

    Streams ``total`` columns into both caches, which are fresh; the bound holds at every step.
    """
    ids = random_ids(2, total)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    for start in range(0, total, chunk):
        end = start + chunk
        batch = model(
            ids[:, start:end], past_key_values=together, attention_mask=mask[:, :end]
        ).logits
        skipped = padding if start == 0 else 0
        single = model(ids[:1, start + skipped : end], past_key_values=alone).logits
        torch.testing.assert_close(batch[:1, skipped:], single, atol=2e-4, rtol=2e-4)
        assert together.nbytes <= together.max_nbytes


def reachable_bytes(cache: ADMSKVCache) -> int:
    """Bytes of every tensor storage reachable from a cache by its attributes, whatever they are."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[Any] = [cache]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            continue
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            stack += list(item.values()) + list(item.keys())
        elif isinstance(item, list | tuple | set | frozenset):
            stack += list(item)
        elif hasattr(item, "__dict__") and type(item).__module__.startswith("adms"):
            # A layer's kind holds a copy of the model's rotary embedding: the model's, not the
            # stream's. A pass's view holds its mask and rotations: workspace, gone with the pass.
            stack += [
                value
                for name, value in vars(item).items()
                if name not in ("model_key", "kinds", "context", "is_active", "view")
            ]
    # Made from a seed once a process, like the codebooks; a step's tables show them.
    sizes = {kind.shape.key_dim for kind in cache.binding_for_use.kinds}
    for size in sizes:
        for part in inverse(size, torch.device("cpu")):
            storages.pop(part.untyped_storage().data_ptr(), None)
    return sum(storages.values())
