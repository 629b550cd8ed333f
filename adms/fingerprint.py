"""What tells models apart whose memories must not be mixed up: form, positions and weights."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adms.binding import Binding
from adms.compressors.codebooks import shipped
from adms.errors import CacheStateError
from adms.patches import find_family

# Parts of the names of configuration entries that change what attention computes.
_POSITIONAL = ("rope", "rotary", "alibi", "position", "sliding", "layer_types", "softcap")
_SAMPLED_PARAMETERS = 48
_SAMPLED_VALUES = 8


def model_of(binding: Binding) -> nn.Module:
    """The model of a binding.

    Raises:
        CacheStateError: it is gone.
    """
    model = binding.model_key()
    if not isinstance(model, nn.Module):
        raise CacheStateError("the model of this cache is gone; a session needs it to be saved")
    return model


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Architecture, sizes and positions of a supported model, as plain values."""
    family = find_family(model)
    decoder = family.decoder(model)
    config: Any = decoder.config
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if any(part in name for part in _POSITIONAL)
    }
    layers = [
        [
            kind.shape.num_heads,
            kind.shape.key_dim,
            kind.shape.value_dim,
            kind.num_query_heads,
            kind.plain is not None,
        ]
        for kind in family.kinds(decoder)
    ]
    described = {
        "architecture": type(decoder).__name__,
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_positions": family.max_positions(config),
        "positions": settings,
        "layers": layers,
    }
    # Through JSON, so that a tuple equals the list that a file gives back.
    return json.loads(json.dumps(described, default=str))


def sample_weights(model: nn.Module) -> dict[str, list[float]]:
    """A few values of parameters all over the model, by name.

    Models of one form with other weights (before and after fine-tuning, say) differ here.
    Parameters that are elsewhere (offloaded, sharded) are left out.
    """
    named = [
        (name, value)
        for name, value in model.named_parameters()
        if type(value) in (nn.Parameter, torch.Tensor)
        and value.device.type != "meta"
        and value.is_floating_point()
        and value.numel() > 0
    ]
    step = max(1, len(named) // _SAMPLED_PARAMETERS)
    samples = {}
    for name, value in named[::step]:
        flat = value.detach().reshape(-1)
        count = min(_SAMPLED_VALUES, flat.numel())
        index = torch.arange(count, device=flat.device) * (flat.numel() // count)
        samples[name] = flat[index].double().tolist()
    return samples


def model_differences(
    stored: Mapping[str, Any], model: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """What differs between two descriptions, each as ``name: stored, model``."""
    found = []
    for name in sorted({*stored, *model}):
        mine, other = stored.get(name), model.get(name)
        if isinstance(mine, dict) and isinstance(other, dict):
            found += model_differences(mine, other, f"{prefix}{name}.")
        elif mine != other:
            found.append(f"{prefix}{name}: {mine!r} in the file, {other!r} in the model")
    return found


def weights_differ(
    stored: Mapping[str, list[float]], model: Mapping[str, list[float]], tolerance: float
) -> str | None:
    """The name of the first parameter whose values differ by more than ``tolerance`` (relative)."""
    for name in stored:
        if name not in model:
            continue
        mine = torch.tensor(stored[name], dtype=torch.float64)
        other = torch.tensor(model[name], dtype=torch.float64)
        if mine.shape != other.shape:
            return name
        # Small values lose more of themselves to a smaller dtype than large ones.
        scale = torch.maximum(mine.abs().max(), other.abs().max())
        if not bool(((mine - other).abs() <= tolerance * scale).all()):
            return name
    return None


def describe_codes(binding: Binding) -> dict[str, Any] | None:
    """What codes in the middle were made with; None where there is no middle."""
    if binding.compressor is None:
        return None
    books = hashlib.sha256(shipped()[0].contiguous().numpy().tobytes()).hexdigest()
    return {"compressor": binding.compressor.name, "codebooks": books}
