"""ADMS: a pretrained language model reads and writes an endless stream in bounded memory.

``enable_adms_llm(model)`` returns an ``ADMSKVCache``;
``model.generate(..., past_key_values=cache)`` does the rest.
"""

from adms.cache import ADMSKVCache
from adms.calibration import Calibration
from adms.compressors import Compressor, register_compressor
from adms.config import ADMSConfig
from adms.enable import disable_adms, enable_adms_llm, enable_streaming_llm, is_enabled
from adms.errors import (
    ADMSError,
    ADMSTypeError,
    ADMSValueError,
    CacheStateError,
    ForwardError,
    SessionFileError,
    UnsupportedModelError,
)
from adms.fit import calibrate
from adms.generation import generate_turn
from adms.importance import register_metric

__all__ = [
    "ADMSConfig",
    "ADMSError",
    "ADMSKVCache",
    "ADMSTypeError",
    "ADMSValueError",
    "CacheStateError",
    "Calibration",
    "Compressor",
    "ForwardError",
    "SessionFileError",
    "UnsupportedModelError",
    "calibrate",
    "disable_adms",
    "enable_adms_llm",
    "enable_streaming_llm",
    "generate_turn",
    "is_enabled",
    "register_compressor",
    "register_metric",
]

__version__ = "0.1.0"
