"""Turning ADMS on and off for a model: the one mechanism everything goes through.

An enabled model works with every other cache exactly as before; what it does with an
``ADMSKVCache`` is in ``enabled_model``.
"""

import os
import weakref
from typing import Any

from torch import nn

from adms.attention.span_learner import IntegratedAttentionConfig
from adms.attention.sparse_prefill import SparsePrefillConfig
from adms.cache import ADMSKVCache
from adms.calibration import Calibration
from adms.config import ADMSConfig, config_from
from adms.enabled_model import install
from adms.errors import ADMSTypeError
from adms.gates.config import AdaptiveUpdateConfig
from adms.installation import Installation, OptionalLayers
from adms.kernels import Kernel, check_kernel
from adms.moments import resolve_calibration
from adms.patches import find_family

_INSTALLED: "weakref.WeakKeyDictionary[nn.Module, Installation]" = weakref.WeakKeyDictionary()


def enable_adms_llm(
    model: nn.Module,
    config: ADMSConfig | None = None,
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    adaptive_update: AdaptiveUpdateConfig | None = None,
    integrated_attention: IntegratedAttentionConfig | None = None,
    sparse_prefill: SparsePrefillConfig | None = None,
    kernel: Kernel = "auto",
    **parameters: Any,
) -> ADMSKVCache:
    """Makes a pretrained model stream in bounded memory and returns a cache for it.

    The model's weights and its behaviour with any other cache stay as they are. A second call
    returns another, independent cache.

    Args:
        model: a transformers causal language model of a supported family.
        config: the configuration; or give single parameters of ``ADMSConfig`` instead.
        calibration: what ``calibrate`` returned, or the path it wrote; None has the code fitted
            to texts of the model's own when the first stream needs it.
        adaptive_update: a gate before the middle, which folds tokens that are alike into one entry;
            None gives every token its own. A saved session is loaded with the same.
        integrated_attention: reads only as much of the recent tier, in each layer, as a span says
            that is learned while the stream runs; None reads all of it.
        sparse_prefill: makes chunks of more than one token attend to the blocks that matter most
            to them, in this cache; None attends to everything. It is no part of a saved session.
        kernel: what decodes single tokens: "triton" (fused kernels in captured CUDA graphs,
            commits too, or an error), "torch" (PyTorch alone), or "auto" (fused kernels in a graph
            on CUDA where it can be, static buffers on a CPU where the middle is coded, else PyTorch
            alone). Chunks are read through kernels on CUDA unless it is "torch".
        **parameters: parameters of ``ADMSConfig``.

    Returns:
        An empty cache, bound to the model.

    Raises:
        UnsupportedModelError: the architecture has no patch.
        ADMSTypeError: both ``config`` and ``parameters``, or an unknown parameter.
        ADMSValueError: a value that cannot work, or that does not fit the model.
    """
    settings = config_from(config, parameters)
    optional = OptionalLayers(
        adaptive_update=adaptive_update,
        integrated_attention=integrated_attention,
        sparse_prefill=sparse_prefill,
    )
    check_kernel(kernel)
    if not isinstance(model, nn.Module):
        raise ADMSTypeError(f"model must be a transformers model, got {type(model).__name__}")
    host = host_of(model)
    installation = _INSTALLED.get(host)
    if installation is None:
        family = find_family(host)
        # Resolved on a trial installation first: a refused call must leave the model as it was.
        trial = Installation(family, weakref.ref(host))
        trial.binding(settings, optional, resolve_calibration(host, family, calibration))
        installation = _INSTALLED[host] = install(host, family)
    given = resolve_calibration(host, installation.family, calibration)
    cache = ADMSKVCache(settings)
    cache.bind(installation.binding(settings, optional, given, kernel))
    return cache


def enable_streaming_llm(
    model: nn.Module, start_size: int = 4, recent_size: int = 2000, **parameters: Any
) -> ADMSKVCache:
    """StreamingLLM: sinks and a recent window, no middle; the same cache with a budget of 0.

    Source: Xiao et al. (2023), arXiv 2309.17453.

    Args:
        model: a transformers causal language model of a supported family.
        start_size: attention sinks.
        recent_size: recent tokens.
        **parameters: further parameters of ``ADMSConfig`` but those of the middle.

    Returns:
        An empty cache, bound to the model.
    """
    for name in ("compressed_budget", "enable_dynamic_sink"):
        if name in parameters:
            raise ADMSTypeError(
                f"enable_streaming_llm has no {name}; use enable_adms_llm for a middle tier"
            )
    sizes: dict[str, Any] = {"start_size": start_size, "recent_size": recent_size}
    return enable_adms_llm(
        model, **sizes, compressed_budget=0, enable_dynamic_sink=False, **parameters
    )


def disable_adms(model: nn.Module) -> None:
    """Restores a model to what it was before it was enabled; its caches stop working.

    Does nothing to a model that is not enabled.
    """
    if not isinstance(model, nn.Module):
        raise ADMSTypeError(f"model must be a transformers model, got {type(model).__name__}")
    installation = _INSTALLED.pop(host_of(model), None)
    if installation is None:
        return
    installation.active = False
    for step in reversed(installation.undo):
        step()


def is_enabled(model: nn.Module) -> bool:
    """Whether a model is enabled."""
    return host_of(model) in _INSTALLED


def host_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a wrapper such as PEFT's."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model
