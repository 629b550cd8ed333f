"""The methods that are compared: each opens a cache on a model, at the bytes of one ADMS cache.

``adms`` sets the bytes; every bounded method gets no more. The full cache and an exact window of as
many tokens as ADMS holds stand beside them as ceilings and are marked as such.
"""

import contextlib
import difflib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from adms.cache import ADMSKVCache
from adms.config import ADMSConfig
from adms.enable import enable_adms_llm, enable_streaming_llm
from adms.errors import ADMSError, ADMSValueError
from adms.evaluation.baselines import POLICIES, open_policy
from adms.layer import ADMSLayer
from adms.patches import find_family

ADMS, STREAMING, FULL, WINDOW = "adms", "streaming", "full", "window"
CEILINGS = (FULL, WINDOW)
DEFAULT_COMPARISON = (FULL, WINDOW, STREAMING, ADMS)


@dataclass
class Method:
    """A cache on a model, ready to read.

    Attributes:
        name: as in ``--methods``.
        label: as in tables and legends.
        cache: what goes to ``past_key_values``.
        max_nbytes: bytes that the cache never exceeds; None where it grows with the text.
        max_tokens: tokens the method can read; None where a stream is endless.
        config: the parameters it runs with, as written to config.json.
    """

    name: str
    label: str
    cache: Any
    max_nbytes: int | None
    max_tokens: int | None
    config: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes the cache holds now."""
        return cache_bytes(self.cache)

    def fit(self, tokens: int, rows: int = 1) -> float | None:
        """See ``fit_first``."""
        return fit_first(self.cache, tokens, rows)


def fit_first(cache: Any, tokens: int, rows: int = 1) -> float | None:
    """Fits what the next ``tokens`` of each row need fitted to the model, which is done once.

    Returns:
        Seconds it took; None where there was nothing to fit.
    """
    if not isinstance(cache, ADMSKVCache):
        return None
    calibration = cache.binding_for_use.calibration
    if calibration is None or calibration.is_fitted:
        return None
    start = time.perf_counter()
    cache.fit_before([tokens] * rows)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start if calibration.is_fitted else None


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values (and whatever else counts itself) in a cache."""
    counted = getattr(cache, "nbytes", None)
    if counted is not None:
        return int(counted)
    storages = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(storages.values())


def method_names() -> tuple[str, ...]:
    """Every method, the ceilings first."""
    return (FULL, WINDOW, STREAMING, ADMS, *POLICIES)


def check_methods(names: list[str]) -> list[str]:
    """The names, each once.

    Raises:
        ADMSValueError: a name is no method, or none was given.
    """
    if not names:
        raise ADMSValueError(f"no method given; choose among {', '.join(method_names())}")
    for name in names:
        if name not in method_names():
            near = difflib.get_close_matches(name, method_names(), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ADMSValueError(
                f"unknown method {name!r}{hint}; the methods are {', '.join(method_names())}"
            )
    return list(dict.fromkeys(names))


def trained_length(model: nn.Module) -> int | None:
    """Positions a model was trained on; None where any distance works."""
    family = find_family(model)
    return family.max_positions(family.decoder(model).config)


def tokens_held(cache: ADMSKVCache) -> int:
    """Tokens that a full ADMS cache remembers: sinks, coded middle, window."""
    sizes = cache.sizes
    held = sizes.sink + sizes.recent
    binding = cache.binding_for_use
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, ADMSLayer):
            kind = binding.kinds[index]
            plan = binding.middle_plan(index, kind.shape, binding.dtype, sizes)
            if plan is not None:
                geometry = plan.geometry
                held += max(geometry.capacity, geometry.raw_tokens)
            return held
    raise ADMSError("this model has no layer whose memory ADMS holds")


def require_equal_memory(adms: ADMSKVCache, streaming: ADMSKVCache) -> None:
    """Refuses a comparison in which ADMS may use more bytes than StreamingLLM, or other sinks.

    Raises:
        ADMSValueError: the comparison would be unequal.
    """
    if adms.sizes.sink != streaming.sizes.sink:
        raise ADMSValueError(
            f"ADMS has {adms.sizes.sink} sinks and StreamingLLM {streaming.sizes.sink}; a fair "
            "comparison needs the same"
        )
    if adms.max_nbytes > streaming.max_nbytes:
        raise ADMSValueError(
            f"ADMS may hold {adms.max_nbytes:,} bytes and StreamingLLM only "
            f"{streaming.max_nbytes:,}; give StreamingLLM recent_size = compressed_budget + "
            "recent_size"
        )


@contextlib.contextmanager
def open_method(
    model: PreTrainedModel,
    name: str,
    config: ADMSConfig,
    *,
    streaming_recent: int | None = None,
    calibration: Any = None,
) -> Iterator[Method]:
    """A fresh cache of a method.

    The model stays enabled afterwards, which changes nothing for any other cache.

    Args:
        model: the model.
        name: one of ``method_names()``.
        config: of the ADMS cache whose bytes all bounded methods may use.
        streaming_recent: the window of StreamingLLM where memory shall not be equal.
        calibration: what ``calibrate`` returned or wrote, for ``adms``.

    Raises:
        ADMSValueError: an unknown name, or sizes that the model has no positions for.
    """
    check_methods([name])
    extra = {} if calibration is None else {"calibration": calibration}
    adms = enable_adms_llm(model, config, **extra)
    sizes = adms.sizes
    shared = {"prefill_chunk_size": sizes.chunk}
    if name == ADMS:
        label = f"ADMS {sizes.sink}+{sizes.budget}+{sizes.recent}"
        yield Method(name, label, adms, adms.max_nbytes, None, config.to_dict())
    elif name == FULL:
        limit = trained_length(model)
        yield Method(name, "full cache", DynamicCache(), None, limit, {})
    elif name == STREAMING:
        recent = sizes.budget + sizes.recent if streaming_recent is None else streaming_recent
        cache = enable_streaming_llm(model, sizes.sink, recent, **shared)
        if streaming_recent is None:
            require_equal_memory(adms, cache)
        label = f"StreamingLLM {sizes.sink}+{recent}"
        yield Method(name, label, cache, cache.max_nbytes, None, cache.config.to_dict())
    elif name == WINDOW:
        recent = tokens_held(adms) - sizes.sink
        cache = enable_streaming_llm(model, sizes.sink, recent, **shared)
        label = f"exact window {sizes.sink}+{recent}"
        yield Method(name, label, cache, cache.max_nbytes, None, cache.config.to_dict())
    else:
        with open_policy(model, name, adms) as (simulated, settings):
            label = settings.pop("label")
            yield Method(name, label, simulated, simulated.max_nbytes, None, settings)
