"""Models of known shapes with random weights: times do not depend on what weights are."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adms.calibration import Calibration


def random_llama(shape: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of a known shape with random weights.

    Args:
        shape: ``llama-3-8b``, ``smollm2-135m`` or ``tiny``.
        device: where it is made.
        dtype: of its weights.
    """
    sizes = {
        "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 8192),
        "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 8192),
        "tiny": (97, 64, 96, 2, 4, 2, 512),
    }[shape]
    vocabulary, hidden, intermediate, layers, heads, kv_heads, positions = sizes
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    # Random weights end a text anywhere.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def random_calibration(calibration: Calibration, device: torch.device, seed: int = 0) -> None:
    """Random orthogonal bases in place of fitted ones; times do not depend on directions.

    Args:
        calibration: planned for a model, not fitted yet.
        device: where the bases go.
        seed: of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, (shape, dtype) in calibration.layout().items():
        if dtype == torch.int8:
            normal = torch.randn(shape, generator=generator, device=device)
            basis = torch.linalg.qr(normal).Q
            largest = basis.abs().amax(2) / 127
            state[name] = (basis / largest[..., None]).round().to(dtype)
            state[name.replace("_basis", "_scale")] = largest.half()
        elif name.endswith("_weight"):
            state[name] = torch.ones(shape, dtype=dtype, device=device)
    calibration.load_state(state, "random directions")
