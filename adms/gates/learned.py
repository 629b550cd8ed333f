"""``UpdateGates``: what training learned of which tokens must not be folded, and in which layers.

A gate is one linear map per layer from a token's keys and values, all heads together, to the
logarithm of its importance; ``fold`` weighs the cost of folding by it. The maps are a model's
constants: a few hundred numbers a layer, in a safetensors file with a description of the model.

Shapes: ``L`` layers, ``K`` KV heads, ``D``/``E`` head sizes of keys/values, ``F = K * (D + E)``.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from adms.errors import ADMSTypeError, ADMSValueError
from adms.outputs import replaced

_FORMAT = "adms-update-gates-2"


def log_importance(weight: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How much each token counts, as a logarithm: ``[B, ...]`` without the heads and their size.

    Args:
        weight: ``[F]``, or ``[L, F]`` for rows of ``L`` layers, one layer's after another's.
        keys: ``[B, K, ..., D]`` before positions.
        values: ``[B, K, ..., E]``.

    Raises:
        ADMSValueError: the gate was made for other heads.
    """

    def scaled(states: torch.Tensor) -> torch.Tensor:
        flat = states.movedim(1, -2).flatten(-2).float()
        return flat * flat.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()

    features = torch.cat([scaled(keys), scaled(values)], dim=-1)
    if features.shape[-1] != weight.shape[-1]:
        raise ADMSValueError(
            f"the gate is made for {weight.shape[-1]} numbers a token, this layer has "
            f"{features.shape[-1]}; gates do not work under tensor parallelism"
        )
    if weight.dim() == 1:
        return features @ weight
    by_layer = features.unflatten(0, (len(weight), -1))
    return (by_layer.flatten(1, -2) @ weight[:, :, None]).view(features.shape[:-1])


@dataclass(frozen=True, eq=False)
class UpdateGates:
    """Trained gates of one model, one a layer.

    Attributes:
        weights: per attention layer ``[F]``, float32.
        admissions: per attention layer, the share of the tokens that keep an entry of their own.
        block_tokens: tokens that are decided on together.
        model: what the model was (``adms.fingerprint.describe_model``).
        samples: a few of its weights (``adms.fingerprint.sample_weights``).
    """

    weights: tuple[torch.Tensor, ...]
    admissions: tuple[float, ...]
    block_tokens: int
    model: dict[str, Any]
    samples: dict[str, list[float]]

    @classmethod
    def untrained(cls, model: nn.Module, block_tokens: int = 16) -> "UpdateGates":
        """Gates that admit every token."""
        # A session's code knows of caches, which know of compressors, which gates are made of.
        from adms.fingerprint import describe_model, sample_weights

        described = describe_model(model)
        weights = tuple(
            torch.zeros(heads * (key_dim + value_dim))
            for heads, key_dim, value_dim, *_ in described["layers"]
        )
        every = (1.0,) * len(weights)
        return cls(weights, every, block_tokens, described, sample_weights(model))

    @property
    def admission(self) -> float:
        """The mean share over layers."""
        return sum(self.admissions) / len(self.admissions)

    def check_model(self, model: nn.Module) -> None:
        """Refuses gates of another model.

        Raises:
            ADMSValueError: form or weights differ.
        """
        from adms.fingerprint import (
            describe_model,
            model_differences,
            sample_weights,
            weights_differ,
        )

        differences = model_differences(self.model, describe_model(model))
        if differences:
            raise ADMSValueError(
                f"these gates were trained for another model ({differences[0]}); train gates for "
                "this one with adms train-gates"
            )
        # Half precision keeps three digits.
        name = weights_differ(self.samples, sample_weights(model), 2.0**-6)
        if name is not None:
            raise ADMSValueError(
                f"these gates were trained for other weights ({name} differs); train gates for "
                "this model with adms train-gates"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights)

    def digest(self) -> str:
        """A few letters that tell these gates from others."""
        found = hashlib.sha256()
        for weight in self.weights:
            found.update(weight.detach().cpu().contiguous().numpy().tobytes())
        found.update(repr(self.admissions).encode())
        return found.hexdigest()[:12]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, complete or not at all.

        Raises:
            ADMSValueError: it cannot be written.
        """
        about = {
            "format": _FORMAT,
            "admissions": list(self.admissions),
            "block_tokens": self.block_tokens,
            "model": self.model,
            "samples": self.samples,
        }
        tensors = {
            f"layers.{index}": weight.detach().float().cpu().contiguous()
            for index, weight in enumerate(self.weights)
        }
        with replaced(path) as partial:
            save_file(tensors, partial, metadata={"adms": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "UpdateGates":
        """What ``save`` wrote.

        Raises:
            ADMSTypeError: ``path`` is no path.
            ADMSValueError: there is no such file, or it holds something else.
        """
        if not isinstance(path, str | os.PathLike):
            raise ADMSTypeError(f"gates must be UpdateGates or a path, got {path!r}")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("adms", "{}"))
                if about.get("format") != _FORMAT:
                    raise ADMSValueError(f"{path} holds no gates; make some with adms train-gates")
                count = len(file.keys())
                weights = tuple(file.get_tensor(f"layers.{index}") for index in range(count))
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ADMSValueError(f"{path} cannot be read as gates: {error}") from error
        return cls(
            weights,
            tuple(float(share) for share in about["admissions"]),
            int(about["block_tokens"]),
            about["model"],
            about["samples"],
        )
