"""The only file that branches on a transformers version."""

import torch
import transformers
from packaging.version import Version

VERSION = Version(transformers.__version__)


def set_attention(config: transformers.PretrainedConfig, name: str | None) -> None:
    """Sets the attention implementation by name, without the checks meant for users."""
    config._attn_implementation_internal = name


def get_attention(config: transformers.PretrainedConfig) -> str:
    """The attention implementation in force."""
    return config._attn_implementation or "eager"


def is_compiling() -> bool:
    """Whether the call is being traced by ``torch.compile``."""
    return torch.compiler.is_compiling()
