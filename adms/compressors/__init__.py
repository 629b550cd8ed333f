"""Compressors: one algorithm a file behind one contract."""

from adms.compressors import (
    attention_matching,
    low_rank,
    product_quantization,
    quantized,
    summary,
    vq,
)
from adms.compressors.base import (
    COMPRESSORS,
    Block,
    Coder,
    Compressor,
    LayerContext,
    RawCoder,
    register_compressor,
)
from adms.compressors.resolve import resolve_compressor

__all__ = [
    "COMPRESSORS",
    "Block",
    "Coder",
    "Compressor",
    "LayerContext",
    "RawCoder",
    "attention_matching",
    "low_rank",
    "product_quantization",
    "quantized",
    "register_compressor",
    "resolve_compressor",
    "summary",
    "vq",
]
