"""Sessions: a stream in a file, to be continued later, elsewhere, or in another precision.

A session holds the tiers of every layer, the counts that say what is where, the configuration, and
what the model was. Continuing equals never having stopped, bit for bit, on the same device and in
the same dtype.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from adms import session_file
from adms.cache import ADMSKVCache
from adms.config import ADMSConfig
from adms.enable import disable_adms, enable_adms_llm, is_enabled
from adms.entries import ordinary_tensors
from adms.errors import ADMSTypeError, ADMSValueError
from adms.moments import resolve_calibration
from adms.patches import find_family
from adms.session_content import LAST_IDS, collect
from adms.session_reader import SessionReader


@dataclass(frozen=True)
class Session:
    """What a session file held.

    Attributes:
        cache: continues the stream.
        last_token_ids: ``[B, N]`` as given to ``save_session``, or None.
        notes: as given to ``save_session``.
    """

    cache: ADMSKVCache
    last_token_ids: torch.Tensor | None
    notes: dict[str, Any]


def save_session(
    cache: ADMSKVCache,
    path: str | os.PathLike[str],
    *,
    last_token_ids: torch.Tensor | Sequence[Sequence[int]] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes a cache to one file, which appears complete or not at all.

    The file can be read by its owner alone unless an older one under this name could be read by
    others: it holds what was said.

    Args:
        cache: a cache bound to a model, between two calls.
        path: the file; an older one is replaced.
        last_token_ids: ``[B, N]`` ids to find again beside the cache, such as the newest one.
        notes: plain JSON values to find again.

    Raises:
        ADMSTypeError: an argument of a wrong type, or a compressor without a registered name.
        CacheStateError: the cache is unbound, its model is gone, or another call is using it.
        SessionFileError: the file cannot be written; an older one is unchanged.
    """
    if not isinstance(cache, ADMSKVCache):
        raise ADMSTypeError(f"cache must be an ADMSKVCache, got {type(cache).__name__}")
    target = session_file.resolve_path(path)
    if notes is not None and not isinstance(notes, Mapping):
        raise ADMSTypeError(f"notes must be a mapping of JSON values, got {notes!r}")
    ids = _ids(last_token_ids)
    with cache.exclusive():
        cache.require_whole()
        tensors, info = collect(cache)
        info["notes"] = dict(notes or {})
        if ids is not None:
            tensors[LAST_IDS] = ids
        data = session_file.pack(tensors, info)
    session_file.write(target, data)


def _ids(given: Any) -> torch.Tensor | None:
    if given is None:
        return None
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ADMSTypeError(f"last_token_ids must be rows of integers, got {given!r}") from error
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ADMSTypeError("last_token_ids must be rows of integers, [rows, tokens]")
    return ids.long()


def load_session(path: str | os.PathLike[str], model: nn.Module, **arguments: Any) -> Session:
    """Reads a session for a model, which is enabled if it is not yet.

    Args:
        path: a file written by ``save_session`` or ``cache.save``.
        model: the model that the stream ran through, on any device and in any dtype.
        **arguments: of ``enable_adms_llm`` that are not part of the configuration, such as
            ``calibration``.

    Raises:
        ADMSTypeError: an argument of a wrong type.
        SessionFileError: the file is missing, damaged, foreign or too new, or does not fit the
            model; the message names what does not fit, and the model is as it was.
    """
    source = session_file.resolve_path(path)
    if not isinstance(model, nn.Module):
        raise ADMSTypeError(f"model must be a transformers model, got {type(model).__name__}")
    settings = sorted({"config", *(field.name for field in fields(ADMSConfig))} & set(arguments))
    if settings:
        raise ADMSTypeError(
            f"{settings[0]} was given, but a session brings its own configuration; leave it out"
        )
    tensors, info = session_file.read(source)
    reader = SessionReader(str(source), tensors, info)
    inner = getattr(model, "get_base_model", None)
    host = inner() if callable(inner) else model
    reader.check_model(host)
    config = reader.config(host)
    notes, last_ids = reader.get("notes", dict), reader.last_ids()
    arguments = {**reader.optional_layers(given=arguments), **arguments}
    stored = reader.calibration(host)
    if stored is not None:
        given = resolve_calibration(host, find_family(host), arguments.pop("calibration", None))
        if given is not None and not given.equals(stored):
            raise reader.misfit("its codes were made with another calibration; leave yours out")
        arguments["calibration"] = given or stored
    was_enabled = is_enabled(model)
    try:
        with ordinary_tensors():
            cache = _enabled(model, config, reader, arguments)
            reader.fill(cache, host)
    except BaseException:
        if not was_enabled:
            disable_adms(model)
        raise
    return Session(cache, last_ids, notes)


def _enabled(
    model: nn.Module, config: ADMSConfig, reader: SessionReader, arguments: dict[str, Any]
) -> ADMSKVCache:
    try:
        return enable_adms_llm(model, config=config, **arguments)
    except ADMSValueError as error:
        # Valid by itself, but not on this model.
        raise reader.misfit(f"its configuration: {error}") from error
