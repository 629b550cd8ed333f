"""The only file that branches on a transformers version."""

import copy
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch.distributed.tensor import DTensor

VERSION = Version(transformers.__version__)


def set_attention(config: transformers.PretrainedConfig, name: str | None) -> None:
    """Sets the attention implementation by name, without the checks meant for users."""
    config._attn_implementation_internal = name


def get_attention(config: transformers.PretrainedConfig) -> str:
    """The attention implementation in force."""
    return config._attn_implementation or "eager"


def tensor_parallel_group(model: torch.nn.Module) -> Any | None:
    """The process group that a model's heads are shared out over; None where it is whole."""
    if (getattr(model, "tp_size", None) or 1) == 1:
        return None
    # Newer versions have a mesh for each use, older ones a single one.
    manager = getattr(model, "_mesh_manager", None)
    mesh: Any = manager.get_mesh("tp") if manager is not None else model._device_mesh
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights, all ranks' parts together."""
    held = list(model.parameters())
    nbytes = sum(part.numel() * part.itemsize for part in held)
    shared_out = tensor_parallel_group(model) is not None
    # A ``DTensor`` has the number of elements of the whole. Before transformers 5.17 a rank's parts
    # are plain tensors, which do not say what they are parts of.
    if shared_out and not any(isinstance(part, DTensor) for part in held):
        with torch.device("meta"):
            whole = type(model)(copy.deepcopy(model.config))
        count = sum(part.numel() for part in held)
        return nbytes * sum(part.numel() for part in whole.parameters()) // count
    return nbytes


def is_compiling() -> bool:
    """Whether the call is being traced by ``torch.compile``."""
    return torch.compiler.is_compiling()
