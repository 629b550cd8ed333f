"""Which passes read a middle through a kernel, and the kernel where Triton is installed."""

import torch

from adms.compressors.tables import CodeTables
from adms.entries import Entries, TokenShape
from adms.kernels import Kernel
from adms.kernels.choice import fuses

FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def decodes_by_kernel(kernel: Kernel, like: torch.Tensor) -> bool:
    """Whether codes are decoded by a kernel for states like these."""
    return like.dtype in FUSED_DTYPES and fuses(kernel, like.device)


def fused_states(
    tables: CodeTables, records: torch.Tensor, shape: TokenShape, dtype: torch.dtype
) -> Entries:
    """See ``states_triton.fused_states``; Triton is imported when it is first asked for."""
    from adms.kernels import states_triton

    return states_triton.fused_states(tables, records, shape, dtype)
