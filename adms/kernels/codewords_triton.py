"""The fused form of ``codebooks.assign``; ``codewords`` says how it works.

Shapes: ``B`` rows, ``G`` groups, ``N`` tokens.
"""

from functools import lru_cache

import torch
import triton

from adms.compressors.codebooks import GROUP, JOINT_STAGES, STARTS, WORDS, half_norms_on, shipped
from adms.kernels import codewords as kernels
from adms.kernels.choice import launching

# Vectors of a program, which is a single warp: a maximum over words then needs no other.
VECTORS = 8
# Words whose scores are in registers at a time.
CHUNK = 32


@lru_cache(maxsize=8)
def _words_by_channel_on(device: torch.device) -> torch.Tensor:
    """The codebooks ``[stages, 8, 256]`` on a device: a channel of all words side by side."""
    return shipped()[0].transpose(1, 2).contiguous().to(device)


@launching
def fused_assign(vectors: torch.Tensor, kept: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """See ``codebooks.assign``.

    Args:
        vectors: ``[B, G, N, 8]`` float32.
        kept: ``[B, G]`` int64.
        most: ``[B, G]`` int64.
    """
    rows, groups, count, _ = vectors.shape
    if vectors.stride(3) != 1:
        vectors = vectors.contiguous()
    words = _words_by_channel_on(vectors.device)
    codes = torch.empty(rows, len(words), groups, count, dtype=torch.uint8, device=vectors.device)
    total = rows * groups * count
    if total:
        kernels.assign_codes[(triton.cdiv(total, VECTORS),)](
            vectors, kept.contiguous(), most.contiguous(), words, half_norms_on(vectors.device),
            codes, total, groups, count, *vectors.stride()[:3],
            STAGES=len(words), WORDS=WORDS, GROUP=GROUP, STARTS=STARTS, JOINT=JOINT_STAGES,
            VECTORS=VECTORS, CHUNK=CHUNK, num_warps=1,
        )  # fmt: skip
    return codes
