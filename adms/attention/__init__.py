"""Attention over the tiers, and the stand-alone attention modules of the project's sources.

The names below load when they are first asked for, so that `import adms` pays for none of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adms.attention.adaptive_span import (
        AdaptiveSpan,
        Predictor,
        soft_span_bias,
        soft_span_share,
    )
    from adms.attention.adaptive_update import AdaptiveUpdateAttention, UpdateCaches
    from adms.attention.block_sparse import (
        AdaptiveBlockSparseAttention,
        AdaptiveConfig,
        AdaptiveSparsityTrainer,
        BlockLayout,
        BlockSparseAdaptive,
        ImportanceScorer,
        block_mean_scores,
        block_sparse_attention,
        create_adaptive_block_sparse,
        get_adaptive_sparsity,
        gumbel_softmax_topk,
        hard_topk,
        plot_patterns,
        soft_block_attention,
        summarize_blocks,
    )
    from adms.attention.dynamic import DynamicAttention
    from adms.attention.integrated import IntegratedAttention
    from adms.attention.projections import (
        AttentionCombiner,
        BaseAttention,
        KeyModule,
        LayerNorm,
        Linear,
        ProjectionModule,
        QueryModule,
        ValueModule,
        calculate_attention,
        prepare_mask_for_attention,
    )
    from adms.attention.refiner import Refiner, StateGrid
    from adms.attention.span_features import SpanReport
    from adms.attention.span_learner import IntegratedAttentionConfig
    from adms.attention.sparse_prefill import SparsePrefillConfig
    from adms.attention.streaming_transformer import StreamingTransformer, process_video_sequence

_MODULES = {
    "adaptive_span": ("AdaptiveSpan", "Predictor", "soft_span_bias", "soft_span_share"),
    "adaptive_update": ("AdaptiveUpdateAttention", "UpdateCaches"),
    "block_sparse": (
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
    ),
    "dynamic": ("DynamicAttention",),
    "integrated": ("IntegratedAttention",),
    "projections": (
        "AttentionCombiner",
        "BaseAttention",
        "KeyModule",
        "LayerNorm",
        "Linear",
        "ProjectionModule",
        "QueryModule",
        "ValueModule",
        "calculate_attention",
        "prepare_mask_for_attention",
    ),
    "refiner": ("Refiner", "StateGrid"),
    "span_features": ("SpanReport",),
    "span_learner": ("IntegratedAttentionConfig",),
    "sparse_prefill": ("SparsePrefillConfig",),
    "streaming_transformer": ("StreamingTransformer", "process_video_sequence"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AdaptiveBlockSparseAttention",
    "AdaptiveConfig",
    "AdaptiveSpan",
    "AdaptiveSparsityTrainer",
    "AdaptiveUpdateAttention",
    "AttentionCombiner",
    "BaseAttention",
    "BlockLayout",
    "BlockSparseAdaptive",
    "DynamicAttention",
    "ImportanceScorer",
    "IntegratedAttention",
    "IntegratedAttentionConfig",
    "KeyModule",
    "LayerNorm",
    "Linear",
    "Predictor",
    "ProjectionModule",
    "QueryModule",
    "Refiner",
    "SpanReport",
    "SparsePrefillConfig",
    "StateGrid",
    "StreamingTransformer",
    "UpdateCaches",
    "ValueModule",
    "block_mean_scores",
    "block_sparse_attention",
    "calculate_attention",
    "create_adaptive_block_sparse",
    "get_adaptive_sparsity",
    "gumbel_softmax_topk",
    "hard_topk",
    "plot_patterns",
    "prepare_mask_for_attention",
    "process_video_sequence",
    "soft_block_attention",
    "soft_span_bias",
    "soft_span_share",
    "summarize_blocks",
]


def __getattr__(name: str) -> Any:
    """Imports the module that defines an exported name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
