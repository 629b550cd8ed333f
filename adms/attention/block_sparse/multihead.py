"""Multi-head attention with learned block-sparse patterns, projections included.

Shapes: as in `module.py`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from adms.attention.block_sparse.config import AdaptiveConfig
from adms.attention.block_sparse.kernels import Kernel
from adms.attention.block_sparse.module import BlockSparseAdaptive
from adms.errors import ADMSValueError


class AdaptiveBlockSparseAttention(nn.Module):
    """Multi-head attention on [B, N, embed_dim] around `BlockSparseAdaptive`."""

    def __init__(self, embed_dim: int, core: BlockSparseAdaptive, bias: bool = True) -> None:
        """Makes the four projections around `core`, whose heads must make up `embed_dim`."""
        super().__init__()
        if core.num_heads * core.head_dim != embed_dim:
            raise ADMSValueError(
                f"embed_dim must be num_heads * head_dim = {core.num_heads} * {core.head_dim}, "
                f"got {embed_dim}"
            )
        self.embed_dim = embed_dim
        self.core = core
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(embed_dim, embed_dim, bias=bias) for _ in range(4)
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        is_causal: bool = False,
        return_pattern: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """Attends from query [B, Q, embed_dim] to key and value [B, N, embed_dim].

        `key` None means `query`, `value` None means `key`. With `return_pattern` also what
        `BlockSparseAdaptive.forward` says of the pattern.

        Raises:
            ADMSValueError: A shape does not fit.
        """
        key = query if key is None else key
        value = key if value is None else value
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != 3 or x.shape[-1] != self.embed_dim:
                raise ADMSValueError(
                    f"{name} must be [batch, tokens, {self.embed_dim}], got {list(x.shape)}"
                )
        heads = (-1, self.core.head_dim)
        q = self.q_proj(query).unflatten(-1, heads)
        k = self.k_proj(key).unflatten(-1, heads)
        v = self.v_proj(value).unflatten(-1, heads)
        attended, info = self.core.attend(q, k, v, is_causal)
        output: Tensor = self.out_proj(attended.flatten(2))
        return (output, info) if return_pattern else output

    def get_sparsity_loss(self) -> Tensor:
        """As `BlockSparseAdaptive.get_sparsity_loss`."""
        return self.core.get_sparsity_loss()


def create_adaptive_block_sparse(
    embed_dim: int,
    num_heads: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    adaptive_config: AdaptiveConfig | None = None,
    *,
    bias: bool = True,
    kernel: Kernel = "auto",
    **parameters: Any,
) -> AdaptiveBlockSparseAttention:
    """An adaptive block-sparse attention module on [B, N, embed_dim].

    `parameters` are fields of `AdaptiveConfig`, instead of `adaptive_config`.

    Raises:
        ADMSTypeError: A parameter has a type that cannot work.
        ADMSValueError: A value does not fit, or both ways to configure were used.
    """
    if num_heads < 1 or embed_dim % num_heads:
        raise ADMSValueError(
            f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
        )
    if adaptive_config is not None and parameters:
        raise ADMSValueError(
            f"adaptive_config and its fields exclude each other, got both (fields "
            f"{sorted(parameters)}); use dataclasses.replace(adaptive_config, ...)"
        )
    config = AdaptiveConfig.from_dict(parameters) if parameters else adaptive_config
    core = BlockSparseAdaptive(
        segment_lengths, dilation_rates, num_heads, embed_dim // num_heads, config, kernel=kernel
    )
    return AdaptiveBlockSparseAttention(embed_dim, core, bias)
