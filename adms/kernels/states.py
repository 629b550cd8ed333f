"""Codes as keys and values by their tables: by a kernel on CUDA, by lookups on a CPU.

The coders' own ``decode`` is the twin of both.
"""

import torch

from adms.compressors.tables import CodeTables
from adms.entries import Entries, TokenShape
from adms.kernels import Kernel
from adms.kernels.choice import fuses
from adms.kernels.parts import states_of

# Where Triton works; its interpreter would on a CPU.
KERNEL_DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def decodes_by_tables(kernel: Kernel, like: torch.Tensor) -> bool:
    """Whether codes are decoded by their tables for states like these."""
    on_cpu = like.device.type == "cpu" and kernel != "torch"
    return like.dtype in DTYPES and (on_cpu or fuses(kernel, like.device))


def decode_by_tables(
    tables: CodeTables, records: torch.Tensor, shape: TokenShape, dtype: torch.dtype
) -> Entries:
    """Keys ``[B, K, N, D]`` and values ``[B, K, N, E]`` of records, with their log-weights.

    Rows may be those of several layers, one layer after the other.

    Args:
        tables: how they are read.
        records: ``[B, N, bytes]`` uint8; bytes of a record lie side by side.
        shape: of one token.
        dtype: of the result.
    """
    if records.device.type in KERNEL_DEVICES:
        # Triton is imported when it is first asked for.
        from adms.kernels.states_triton import fused_states

        keys, values = fused_states(tables, records, shape, dtype)
    else:
        keys, values = states_of(records, tables.trimmed(), shape.num_heads)
        keys, values = keys.to(dtype), values.to(dtype)
    weight = tables.log_weight
    if weight is None:
        return Entries(keys, values)
    return Entries(keys, values, weight.float()[..., None].expand(*keys.shape[:3]))
