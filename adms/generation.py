"""Generation with a cache that cannot be rewound: ``generate`` checked, and ``generate_turn``."""

from contextvars import ContextVar
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
# transformers' own.
DEFAULT_NEW_TOKENS = 20


def asked(model: Any, arguments: dict[str, Any], name: str) -> Any:
    """A setting of ``generate``: the call's, else its ``generation_config``'s, else the model's."""
    if name in arguments:
        return arguments[name]
    for settings in (arguments.get("generation_config"), model.generation_config):
        value = getattr(settings, name, None)
        if value is not None:
            return value
    return None


def check_generate(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses calls of ``generate`` that an ``ADMSKVCache`` could only answer wrongly.

    Args:
        model: whose ``generate`` it is.
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

    def given(name: str) -> Any:
        value = kwargs.get(name)
        return getattr(settings, name, None) if value is None else value

    for name in REWINDING:
        if asked(model, kwargs, name) is not None:
            raise ADMSValueError(
                f"{name} rewinds the cache, and an ADMSKVCache has forgotten what it would need; "
                "use greedy search, sampling or beams, or a DynamicCache"
            )
    if given("cache_implementation") is not None:
        raise ADMSValueError(
            "past_key_values is an ADMSKVCache, so cache_implementation has nothing to choose; "
            "leave one of them out"
        )
    if given("use_cache") is False:
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


class Turn:
    """What the forward passes of one ``generate_turn`` store, which ``generate`` does not know.

    Shapes: ``B`` rows, ``Q`` columns of the turn or of a pass.

    Args:
        cache: the turn's cache.
        new_ids: ``[B, Q]``.
        mask: ``[B, Q]``, 0 for padding.
        eos: ids that end a row; None where nothing does.
    """

    def __init__(
        self,
        cache: ADMSKVCache,
        new_ids: torch.Tensor,
        mask: torch.Tensor,
        eos: int | list[int] | torch.Tensor | None,
    ) -> None:
        self.cache, self.new_ids, self.mask = cache, new_ids, mask
        # A single row ends the turn, so that nothing follows its end.
        self.eos = None if eos is None or len(new_ids) == 1 else torch.as_tensor(eos).cpu()
        self.ended = torch.zeros(len(new_ids), 1, dtype=torch.bool)
        self.begun = False

    def passes(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        """A decoder's call as what it has to be, one pass after the other.

        Raises:
            ADMSValueError: the call has several rows for one of the turn's.
        """
        ids = call["input_ids"]
        if self.begun:
            if self.eos is None:
                return [call]
            return [{**call, "attention_mask": self._unended(torch.isin(ids.cpu(), self.eos))}]
        if len(ids) != len(self.new_ids):
            raise ADMSValueError(
                "generate_turn keeps one stream per row, and beams or several return sequences "
                "would leave several; use num_beams=1 and num_return_sequences=1, or generate "
                "with the whole conversation's ids"
            )
        self.begun = True
        passes = [{**call, "attention_mask": self.mask[:, -1:]}]
        if self.new_ids.shape[1] > 1:
            before = {
                "input_ids": self.new_ids[:, :-1].to(ids.device),
                "attention_mask": self.mask[:, :-1],
            }
            passes.insert(0, before)
        return passes

    def _unended(self, ends: torch.Tensor) -> torch.Tensor:
        """Which columns are no padding after a row's end, given which are an EOS: ``[B, Q]``."""
        ended = self.ended | (ends.cumsum(1) > ends)
        self.ended = ended[:, -1:] | ends[:, -1:]
        return ~ended


# The turn under way in this thread.
_TURN: ContextVar[Turn | None] = ContextVar("adms_turn", default=None)


def passes_of(cache: ADMSKVCache, call: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder's call as passes: itself, unless a ``generate_turn`` of this cache is under way."""
    turn = _TURN.get()
    return [call] if turn is None or turn.cache is not cache else turn.passes(call)


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
    simply follow each other. In a batch a row stores nothing after its EOS; padding after another
    end (``stop_strings``, ``stopping_criteria``) is stored like any token, and
    ``kernel="triton"``, which has no pass without a token for a row, raises there. A call that
    ``generate`` or ADMS refuses stores nothing.

    Args:
        model: an enabled model.
        cache: its cache, empty or used.
        new_ids: ``[B, Q]`` ids that follow what the cache has seen.
        attention_mask: ``[B, Q]``, 0 for padding; None where there is none.
        **arguments: of ``model.generate``, such as ``max_new_tokens``. ``max_length`` counts the
            new ids and what is generated. Where neither these nor a generation config give a
            length, 20 tokens are generated at most.

    Returns:
        ``[B, Q + generated]``: the new ids and what was generated.

    Raises:
        ADMSTypeError: ``cache`` is no ``ADMSKVCache`` or ``new_ids`` no matrix of integers.
        ADMSValueError: there are no new ids, ``max_length`` leaves room for no more, or a decoding
            method that cannot work.
    """
    if not isinstance(cache, ADMSKVCache):
        raise ADMSTypeError(f"cache must be an ADMSKVCache, got {type(cache).__name__}")
    if not isinstance(new_ids, torch.Tensor) or new_ids.dim() != 2 or new_ids.is_floating_point():
        raise ADMSTypeError("new_ids must be a [rows, tokens] tensor of integers")
    if new_ids.shape[1] == 0:
        raise ADMSValueError("new_ids holds no tokens; give at least one")
    if asked(model, arguments, "max_new_tokens") is None:
        arguments["max_new_tokens"] = _room(model, arguments, new_ids.shape[1])
    mask = torch.ones_like(new_ids) if attention_mask is None else attention_mask
    seen = cache.get_seq_length()
    # A mask of the whole length tells generate that the id is a new one alone. It is given the last
    # one, since transformers before 5.21 miscounts a longer input; the others go in with its first
    # pass, after all its checks. What the mask says of the past is never read: padding there was
    # not stored.
    past = torch.ones(len(new_ids), seen, dtype=mask.dtype, device=mask.device)
    turn = _TURN.set(Turn(cache, new_ids, mask, asked(model, arguments, "eos_token_id")))
    try:
        produced = model.generate(
            new_ids[:, -1:],
            attention_mask=torch.cat([past, mask], dim=1),
            past_key_values=cache,
            **arguments,
        )
        sequences = produced if isinstance(produced, torch.Tensor) else produced.sequences
        fresh = sequences[:, 1:]
        missing = fresh[:, cache.get_seq_length() - seen - new_ids.shape[1] :]
        if missing.shape[1]:
            model(missing, past_key_values=cache, logits_to_keep=1)
    finally:
        _TURN.reset(turn)
    return torch.cat([new_ids, fresh], dim=1)


def _room(model: Any, arguments: dict[str, Any], columns: int) -> int:
    """How many tokens may follow ``columns`` new ids where nothing gives ``max_new_tokens``."""
    longest = asked(model, arguments, "max_length")
    # generate is given one id, and would count from there.
    arguments.pop("max_length", None)
    if longest is None:
        return DEFAULT_NEW_TOKENS
    if longest <= columns:
        raise ADMSValueError(
            f"max_length={longest} leaves no room after {columns} new ids; give max_new_tokens"
        )
    return int(longest) - columns
