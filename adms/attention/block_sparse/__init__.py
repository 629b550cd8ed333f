"""Content-adaptive block-sparse attention."""

from adms.attention.block_sparse.config import AdaptiveConfig, get_adaptive_sparsity
from adms.attention.block_sparse.kernels import block_sparse_attention, soft_block_attention
from adms.attention.block_sparse.layout import BlockLayout
from adms.attention.block_sparse.module import BlockSparseAdaptive
from adms.attention.block_sparse.multihead import (
    AdaptiveBlockSparseAttention,
    create_adaptive_block_sparse,
)
from adms.attention.block_sparse.scorer import (
    ImportanceScorer,
    block_mean_scores,
    summarize_blocks,
)
from adms.attention.block_sparse.selection import gumbel_softmax_topk, hard_topk
from adms.attention.block_sparse.training import AdaptiveSparsityTrainer, plot_patterns

__all__ = [
    "AdaptiveBlockSparseAttention",
    "AdaptiveConfig",
    "AdaptiveSparsityTrainer",
    "BlockLayout",
    "BlockSparseAdaptive",
    "ImportanceScorer",
    "block_mean_scores",
    "block_sparse_attention",
    "create_adaptive_block_sparse",
    "get_adaptive_sparsity",
    "gumbel_softmax_topk",
    "hard_topk",
    "plot_patterns",
    "soft_block_attention",
    "summarize_blocks",
]
