"""Compressors: one algorithm a file behind one contract."""

from adms.compressors import low_rank, quantized
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
    "low_rank",
    "quantized",
    "register_compressor",
    "resolve_compressor",
]
