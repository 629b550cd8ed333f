"""Tiny random models, one for every architecture and for what each has of its own."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 96
TRAINED = 64
WINDOW = 12

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TRAINED,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TRAINED,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MPT = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": TRAINED,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TRAINED,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dropout": 0.0,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 24,
    "factor": TRAINED / 24,
}

#: name -> (model class, configuration class, parameters)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "llama-dynamic": (
        "Llama",
        SMALL | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **ROPE}},
    ),
    "mistral": ("Mistral", SMALL | {"sliding_window": None}),
    "mistral-window": ("Mistral", SMALL | {"sliding_window": WINDOW}),
    "mixtral": (
        "Mixtral",
        SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2": ("Qwen2", SMALL),
    "qwen2-mixed": ("Qwen2", SMALL | MIXED | {"use_sliding_window": True}),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 8}),
    "phi3": ("Phi3", SMALL),
    "phi3-long": (
        "Phi3",
        SMALL | {"rope_parameters": LONG, "original_max_position_embeddings": 24},
    ),
    "gemma": ("Gemma", SMALL | {"head_dim": 8}),
    "gemma2": ("Gemma2", SMALL | MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", SMALL | MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt-neox": (
        "GPTNeoX",
        NEOX | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **ROPE}},
    ),
    "falcon": ("Falcon", FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon-new": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": (
        "Falcon",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "mpt": ("Mpt", MPT),
    "mpt-odd": ("Mpt", MPT | {"n_heads": 6, "d_model": 48}),
    "opt": ("OPT", OPT),
    "opt-post-norm": ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
}
NAMES = tuple(ARCHITECTURES)
ALIBI = ("falcon-alibi", "mpt", "mpt-odd")
LEARNED = ("opt", "opt-post-norm")
WINDOWED = ("mistral-window", "qwen2-mixed", "gemma2", "gemma3")
#: layers whose attention ADMS takes over are all of them, and keys can be moved
MOVABLE = tuple(name for name in NAMES if name not in LEARNED + WINDOWED)


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny model."""
    prefix, parameters = ARCHITECTURES[name]
    text = "Text" if prefix == "Gemma3" else ""
    make: Callable[..., PreTrainedConfig] = getattr(transformers, f"{prefix}{text}Config")
    config = make(**parameters | changes)
    if prefix == "Gemma2":
        # Its softcap is part of eager attention alone.
        config._attn_implementation = "eager"
    return config


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """A random model in float32, ready for inference."""
    prefix, _ = ARCHITECTURES[name]
    make: Callable[..., PreTrainedModel] = getattr(transformers, f"{prefix}ForCausalLM")
    config = config_of(name, **changes)
    torch.manual_seed(3)
    model = make(config).eval()
    # Wide enough that positions and the order of tokens matter to the output.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[rows, tokens]``, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
