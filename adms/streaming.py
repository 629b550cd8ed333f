"""One call of an enabled decoder: split into chunks, each committed or undone as a whole.

Shapes: ``B`` rows, ``Q`` columns of the call.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adms.cache import ADMSKVCache
from adms.decode import Reading, advance
from adms.errors import ADMSError, ADMSTypeError, ADMSValueError, CacheStateError, ForwardError
from adms.kernels.choice import on_device

# Arguments that have one entry per column.
PER_COLUMN = ("input_ids", "inputs_embeds", "token_type_ids")


def stream(
    decoder: nn.Module,
    forward: Callable[..., Any],
    cache: ADMSKVCache,
    arguments: dict[str, Any],
    adjust: Callable[[dict[str, Any], ADMSKVCache], None] | None = None,
    prepare: Callable[[nn.Module, Callable[..., Any], ADMSKVCache, list[int]], None] | None = None,
) -> Any:
    """Runs a decoder over all columns of a call, at most ``prefill_chunk_size`` at a time.

    The first chunk takes the remainder, so that chunks end at the same distance from the end for
    every row, padded or not.

    Args:
        decoder: the module whose ``forward`` it is.
        forward: the decoder's own forward.
        cache: the cache, bound to the decoder's model.
        arguments: the call's arguments by name.
        adjust: changes a chunk's arguments where the family asks for it.
        prepare: what the family does before a chunk, which gets the chunk's real tokens per row.

    Returns:
        The decoder's output for all columns.

    Raises:
        ForwardError: a layer failed; the message says how many columns were stored.
    """
    inputs = arguments.get("inputs_embeds")
    inputs = arguments.get("input_ids") if inputs is None else inputs
    if inputs is None:
        raise ADMSValueError("give input_ids or inputs_embeds")
    if torch.is_grad_enabled() and decoder.training:
        raise CacheStateError(
            "an ADMSKVCache is for inference; call model.eval() (training works with any other "
            "cache, or none)"
        )
    batch, columns = inputs.shape[:2]
    if columns == 0:
        raise ADMSValueError("the input has no tokens; give at least one")
    if columns > cache.chunk_tokens:
        _check_joinable(decoder, arguments)
    valid = column_validity(arguments.get("attention_mask"), cache, batch, columns)
    chunk = cache.chunk_tokens
    bounds = list(range(columns % chunk or min(chunk, columns), columns, chunk)) + [columns]
    outputs, start = [], 0
    reading = Reading(decoder, forward, cache, chunk, columns // chunk)
    # Held for the whole call: tokens of another one must not come between its chunks. Without
    # gradients, which would keep what the tiers held alive.
    with cache.exclusive(), on_device(inputs.device):
        for stop in bounds:
            own = slice_arguments(arguments, start, stop, columns)
            own_valid = None if valid is None else valid[:, start:stop]
            try:
                width = stop - start
                new = [width] * batch if own_valid is None else own_valid.sum(1).tolist()
                cache.fit_before(new)
                if prepare is not None:
                    prepare(decoder, forward, cache, new)
                cache.begin(batch, stop - start, own_valid, inputs.device)
                own["past_key_values"] = cache
                own["adms_cache"] = cache
                if adjust is not None:
                    adjust(own, cache)
                outputs.append(advance(reading, own))
                cache.commit()
            except Exception as error:
                cache.rollback()
                stored = f"{start} of the call's {columns} tokens per row were stored before"
                if isinstance(error, ADMSError):
                    raise type(error)(f"{error}; {stored}") from error
                raise ForwardError(
                    f"{type(error).__name__} in a forward pass: {error}; {stored}, the cache is as "
                    "it was after those and the stream can go on from there"
                ) from error
            except BaseException:
                cache.rollback()
                raise
            start, reading.left = stop, (columns - stop) // chunk
    return join_outputs(outputs, cache)


def column_validity(
    mask: torch.Tensor | None, cache: ADMSKVCache, batch: int, columns: int
) -> torch.Tensor | None:
    """Which of the call's columns are real tokens: ``[B, Q]`` on the CPU, or None for all.

    Raises:
        ADMSTypeError: the mask is not two-dimensional.
        CacheStateError: the mask covers neither the new columns nor the whole stream.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ADMSTypeError(
            "with an ADMSKVCache attention_mask must be two-dimensional [rows, tokens] (1 for "
            "tokens, 0 for padding); the cache builds its own causal mask"
        )
    seen = cache.get_seq_length()
    if mask.shape[0] != batch or mask.shape[1] not in (columns, seen + columns):
        raise CacheStateError(
            f"attention_mask has shape {tuple(mask.shape)}; expected [{batch}, {columns}] for the "
            f"new tokens or [{batch}, {seen + columns}] for the whole stream"
        )
    return mask[:, -columns:].to(device="cpu", dtype=torch.bool)


def slice_arguments(
    arguments: dict[str, Any], start: int, stop: int, columns: int
) -> dict[str, Any]:
    """A call's arguments for its columns ``start`` to ``stop``, as the decoder gets them."""
    own = dict(arguments)
    for name in PER_COLUMN:
        if own.get(name) is not None:
            own[name] = own[name][:, start:stop]
    first = own.get("input_ids")
    first = own.get("inputs_embeds") if first is None else first
    if first is None:
        raise ADMSValueError("give input_ids or inputs_embeds")
    # Neither positions of the text nor a mask of the whole stream means anything to the cache;
    # these stand-ins keep the model from building them at their full length.
    own["position_ids"] = torch.zeros(1, stop - start, dtype=torch.long, device=first.device)
    own["attention_mask"] = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=first.device)
    own["use_cache"] = True
    if own.get("cache_position") is not None:
        own["cache_position"] = own["cache_position"][start:stop]
    return own


def join_outputs(outputs: list[Any], cache: ADMSKVCache) -> Any:
    """One output for all chunks."""
    if len(outputs) == 1:
        return outputs[0]
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(
            cache if part is cache else torch.cat([output[index] for output in outputs], dim=1)
            for index, part in enumerate(first)
        )
    # The model around the decoder may ask for what only its own class of outputs has.
    joined = type(first)(
        last_hidden_state=torch.cat([output.last_hidden_state for output in outputs], dim=1),
        past_key_values=cache,
    )
    for name, join in (("hidden_states", _join_columns), ("router_logits", _join_flat)):
        parts = [output.get(name) for output in outputs]
        if parts[0] is not None:
            batch = first.last_hidden_state.shape[0]
            joined[name] = tuple(join(layer, batch) for layer in zip(*parts, strict=True))
    return joined


def _check_joinable(decoder: nn.Module, arguments: dict[str, Any]) -> None:
    """Refuses what several chunks cannot give together, before anything is stored."""
    config: Any = decoder.config

    def asked(name: str) -> Any:
        given = arguments.get(name)
        return getattr(config, name, None) if given is None else given

    if asked("output_attentions"):
        raise ADMSValueError(
            "output_attentions is not available for an input longer than prefill_chunk_size, since "
            "every chunk attends to a different cache; shorten the input or leave it out"
        )
    if asked("output_hidden_states") and asked("return_dict") is False:
        raise ADMSValueError(
            "return_dict=False with hidden states is not available for an input longer than "
            "prefill_chunk_size; leave return_dict out or shorten the input"
        )


def _join_columns(parts: tuple[torch.Tensor, ...], batch: int) -> torch.Tensor:
    """``[B, Q, ...]`` of every chunk as one."""
    return torch.cat(parts, dim=1)


def _join_flat(parts: tuple[torch.Tensor, ...], batch: int) -> torch.Tensor:
    """``[B * Q, ...]`` of every chunk as one, rows still one after the other."""
    return torch.cat([part.unflatten(0, (batch, -1)) for part in parts], dim=1).flatten(0, 1)


def named_arguments(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A call's arguments by name."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(forward)
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return dict(bound)
