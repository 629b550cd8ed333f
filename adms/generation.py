"""Generation with a cache that cannot be rewound: ``generate`` checked, and ``generate_turn``."""

from typing import Any

import torch

from adms.cache import ADMSKVCache
from adms.errors import ADMSTypeError, ADMSValueError, CacheStateError

# Ways of decoding that take tokens back, which a bounded memory cannot.
REWINDING = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "penalty_alpha",
    "dola_layers",
)


def check_generate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses calls of ``generate`` that an ``ADMSKVCache`` could only answer wrongly.

    Args:
        args: the call's positional arguments.
        kwargs: its keyword arguments; with an ``ADMSKVCache``, ``use_cache`` is set among them.

    Raises:
        CacheStateError: new ids alone on a used cache.
        ADMSValueError: a decoding method that rewinds, a second kind of cache, or none in use.
    """
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, ADMSKVCache):
        return
    settings = kwargs.get("generation_config")

    def asked(name: str) -> Any:
        value = kwargs.get(name)
        return getattr(settings, name, None) if value is None else value

    for name in REWINDING:
        if asked(name) is not None:
            raise ADMSValueError(
                f"{name} rewinds the cache, and an ADMSKVCache has forgotten what it would need; "
                "use greedy search, sampling or beams, or a DynamicCache"
            )
    if asked("cache_implementation") is not None:
        raise ADMSValueError(
            "past_key_values is an ADMSKVCache, so cache_implementation has nothing to choose; "
            "leave one of them out"
        )
    if asked("use_cache") is False:
        raise ADMSValueError(
            "use_cache=False with an ADMSKVCache stores nothing; set use_cache=True or leave it out"
        )
    # The default of some models (MPT) is False.
    kwargs["use_cache"] = True
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    seen = cache.get_seq_length()
    if ids is None or seen == 0:
        return
    mask = kwargs.get("attention_mask")
    covered = ids.shape[1] if mask is None else mask.shape[1]
    if covered <= seen:
        raise CacheStateError(
            f"the cache has seen {seen} tokens and generate was given {ids.shape[1]}: pass the "
            "whole conversation's ids, or use adms.generate_turn(model, cache, new_ids) to go on "
            "with the new ids alone"
        )


@torch.no_grad()
def generate_turn(
    model: Any,
    cache: ADMSKVCache,
    new_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **arguments: Any,
) -> torch.Tensor:
    """Goes on with new ids alone, in the time and memory of those.

    Everything of the turn, its last generated token included, is in the cache afterwards, so turns
    simply follow each other.

    Args:
        model: an enabled model.
        cache: its cache, empty or used.
        new_ids: ``[B, Q]`` ids that follow what the cache has seen.
        attention_mask: ``[B, Q]``, 0 for padding; None where there is none.
        **arguments: of ``model.generate``, such as ``max_new_tokens``.

    Returns:
        ``[B, Q + generated]``: the new ids and what was generated.

    Raises:
        ADMSTypeError: ``cache`` is no ``ADMSKVCache`` or ``new_ids`` no matrix of integers.
        ADMSValueError: there are no new ids, or a decoding method that cannot work.
    """
    if not isinstance(cache, ADMSKVCache):
        raise ADMSTypeError(f"cache must be an ADMSKVCache, got {type(cache).__name__}")
    if not isinstance(new_ids, torch.Tensor) or new_ids.dim() != 2 or new_ids.is_floating_point():
        raise ADMSTypeError("new_ids must be a [rows, tokens] tensor of integers")
    if new_ids.shape[1] == 0:
        raise ADMSValueError("new_ids holds no tokens; give at least one")
    if arguments.get("num_beams", 1) > 1:
        raise ADMSValueError(
            "generate_turn keeps one stream per row, and beams would leave several; use "
            "num_beams=1, or generate with the whole conversation's ids"
        )
    mask = torch.ones_like(new_ids) if attention_mask is None else attention_mask
    # All but the last new id go in first: transformers before 5.21 miscounts a longer input.
    if new_ids.shape[1] > 1:
        model(new_ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, logits_to_keep=1)
    seen = cache.get_seq_length()
    # A mask of the whole length tells generate that the ids are new ones alone. What it says of
    # the past is never read: padding there was not stored.
    past = torch.ones(len(new_ids), seen, dtype=mask.dtype, device=mask.device)
    arguments.setdefault("max_new_tokens", 20)
    produced = model.generate(
        new_ids[:, -1:],
        attention_mask=torch.cat([past, mask[:, -1:]], dim=1),
        past_key_values=cache,
        **arguments,
    )
    sequences = produced if isinstance(produced, torch.Tensor) else produced.sequences
    fresh = sequences[:, 1:]
    missing = sequences[:, cache.get_seq_length() - seen :]
    if missing.shape[1]:
        model(missing, past_key_values=cache, logits_to_keep=1)
    return torch.cat([new_ids, fresh], dim=1)
