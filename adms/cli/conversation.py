"""A conversation in bounded memory: a turn adds its own tokens, and nothing is encoded again."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from adms.cache import ADMSKVCache
from adms.errors import ADMSValueError, SessionFileError

# Tokens of a long message between two reports (and chances to save).
REPORT_TOKENS = 512
# Logits divided by less leave float32, and the likeliest token is sure long before.
LEAST_TEMPERATURE = 1e-6


class TurnTemplate:
    """A chat template taken apart into what each turn adds.

    Args:
        tokenizer: its template is used.

    Raises:
        ADMSValueError: there is no template, or it rewrites what came before, so that a
            conversation cannot grow piece by piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise ADMSValueError(
                "the tokenizer has no chat template; use an instruction-tuned model, or adms "
                "stream for plain text"
            )
        asked = [{"role": "user", "content": "QUESTION"}]
        answered = [*asked, {"role": "assistant", "content": "ANSWER"}]
        prompt, whole = self._render(asked, True), self._render(answered, False)
        head, found, tail = prompt.rpartition("QUESTION")
        if not found or not whole.startswith(prompt + "ANSWER"):
            raise self._refuse()
        self.closing = whole[len(prompt) + len("ANSWER") :]
        self.after_question = tail
        again = [*answered, {"role": "user", "content": "QUESTION"}]
        self._answered = answered
        self._answered_text = whole
        # Three turns through the pieces must be the template of all three.
        if self._render([*again, answered[1]], False) != (
            whole + self.next_turn("QUESTION") + "ANSWER" + self.closing
        ):
            raise self._refuse()

    def first_turn(self, question: str, system: str | None = None) -> str:
        """Everything up to where the first answer begins."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        return self._render([*messages, {"role": "user", "content": question}], True)

    def next_turn(self, question: str) -> str:
        """What follows a closed answer, up to where the next one begins."""
        messages = [*self._answered, {"role": "user", "content": question}]
        text = self._render(messages, True)
        if not text.startswith(self._answered_text):
            raise self._refuse()
        return text[len(self._answered_text) :]

    def encode(self, text: str) -> list[int]:
        """Ids of a piece; the template itself names the special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _render(self, messages: list[dict[str, str]], asks: bool) -> str:
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            messages, tokenize=False, add_generation_prompt=asks
        )

    def _refuse(self) -> ADMSValueError:
        return ADMSValueError(
            "this model's chat template rewrites earlier turns, so a conversation cannot grow "
            "piece by piece; use a model whose template only appends, or adms stream"
        )


class Detokenizer:
    """Text as tokens come; a character whose bytes are not complete waits."""

    # A character has at most four bytes, and a token at least one.
    _MOST_HELD = 4

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # One token before those not shown yet, since some tokenizers drop a leading space.
        self._ids: list[int] = []
        self._context = 0

    def push(self, token: int) -> str:
        """The text that this token completes."""
        before = self._decode(self._ids[: self._context])
        self._ids.append(token)
        after = self._decode(self._ids)
        held = len(self._ids) - self._context
        if after.endswith("\ufffd") and held < self._MOST_HELD:
            return ""
        self._ids = self._ids[-1:]
        self._context = 1
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""  # type: ignore[return-value]


class Sampler:
    """Chooses the next token.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: share of the probability that is sampled from.
        seed: makes sampling repeatable.

    Raises:
        ADMSValueError: a value out of range.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
            raise ADMSValueError(
                f"--temperature must be finite and at least {LEAST_TEMPERATURE:g}, or 0 for the "
                f"likeliest token, got {temperature}"
            )
        if not 0 < top_p <= 1:
            raise ADMSValueError(f"--top-p must lie in 0..1 and above 0, got {top_p}")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ADMSValueError(f"--seed must be of 64 bits, got {seed}; use a smaller number")
        self.warpers: LogitsProcessorList | None = None
        if temperature > 0:
            self.warpers = LogitsProcessorList(
                [TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(float(top_p))]
            )
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """The next id, from ``[1, vocabulary]``."""
        if self.warpers is None:
            return int(logits.argmax())
        scores = self.warpers(None, logits.float().cpu())  # type: ignore[arg-type]
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self.generator))


class Conversation:
    """Turns of one conversation through one cache.

    What is in memory is always exactly known: ``settle`` works it out from the cache's own count
    after an interrupt, wherever it fell.

    Args:
        model: an enabled model.
        tokenizer: its tokenizer.
        cache: a cache of one row.
        sampler: chooses tokens.
        system: a system message for the first turn.
        stored: ``notes()`` of the conversation that the cache holds already.
        after_pass: called after every pass, when the memory is consistent.

    Raises:
        ADMSValueError: the model has no chat template that only appends.
        SessionFileError: ``stored`` is not what ``notes`` gave.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        cache: ADMSKVCache,
        sampler: Sampler,
        *,
        system: str | None = None,
        stored: dict[str, Any] | None = None,
        after_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.template = TurnTemplate(tokenizer)
        self.tokenizer = tokenizer
        self.cache = cache
        self.sampler = sampler
        self.system = system
        self.after_pass = after_pass
        self.pending: list[int] = []
        self._incoming: list[int] = []
        self._incoming_from = 0
        self._header = 0
        self.logits: torch.Tensor | None = None
        self._answer: list[int] = []
        self._answer_from = 0
        self._pushed = 0
        self._detokenizer = Detokenizer(tokenizer)
        self.stops = self._stop_ids()
        if stored is not None:
            self._restore(stored)

    def _stop_ids(self) -> set[int]:
        named = self.model.generation_config.eos_token_id
        found = {*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id}
        closing = self.template.encode(self.template.closing)
        if closing and closing[0] in self.tokenizer.all_special_ids:
            found.add(closing[0])
        return {token for token in found if token is not None}

    # --- what a session keeps --------------------------------------------------------------------

    def notes(self) -> dict[str, Any]:
        """What must be kept beside the cache."""
        pending = self._pending_now()
        return {"chat": {"pending": pending, "template": self.template.closing}}

    def _restore(self, stored: dict[str, Any]) -> None:
        chat = stored.get("chat")
        pending = chat.get("pending") if isinstance(chat, dict) else None
        size = self.model.config.vocab_size
        if not isinstance(pending, list) or not all(
            isinstance(token, int) and not isinstance(token, bool) and 0 <= token < size
            for token in pending
        ):
            raise SessionFileError(
                "this session was not made by adms chat, so it does not say where its turn ends; "
                "continue it with adms stream"
            )
        if chat["template"] != self.template.closing:  # type: ignore[index]
            raise SessionFileError("this session was made with another chat template")
        self.pending = pending

    def forget(self) -> None:
        """Starts afresh."""
        self.cache.reset()
        self.pending, self._incoming = [], []

    # --- a turn ----------------------------------------------------------------------------------

    def read(self, question: str) -> Iterator[tuple[int, int]]:
        """Streams a message into memory.

        Yields:
            Tokens of this turn stored so far, and how many there are.
        """
        self._settle_incoming()
        if self.cache.tokens_seen == 0:
            text = self.template.first_turn(question, self.system)
        else:
            text = self.template.next_turn(question)
        header = text[: text.rindex(question)] if question in text else ""
        ids = [*self.pending, *self.template.encode(text)]
        self._header = len(self.pending) + len(self.template.encode(header))
        self._incoming_from = self.cache.tokens_seen
        self._incoming = ids
        for start in range(0, len(ids), REPORT_TOKENS):
            self.logits = self._forward(ids[start : start + REPORT_TOKENS])
            yield min(start + REPORT_TOKENS, len(ids)), len(ids)
        self._settle_incoming()

    def answer(self, max_new_tokens: int) -> Iterator[str]:
        """Generates; every token is in memory before its text is given out.

        Yields:
            Pieces of text.
        """
        if self.logits is None:
            raise RuntimeError("an answer before a question")
        self._answer, self._pushed = [], 0
        self._answer_from = self.cache.tokens_seen
        self._detokenizer = Detokenizer(self.tokenizer)
        for _ in range(max_new_tokens):
            token = self.sampler(self.logits)
            if token in self.stops:
                return
            self._answer.append(token)
            self.logits = self._forward([token])
            yield self.unshown()

    def unshown(self) -> str:
        """Text of the answer's tokens that are in memory and were not given out yet."""
        stored = self.cache.tokens_seen - self._answer_from
        text = ""
        while self._pushed < min(stored, len(self._answer)):
            text += self._detokenizer.push(self._answer[self._pushed])
            self._pushed += 1
        return text

    def settle(self) -> tuple[int, int]:
        """After an interrupt: how many tokens of the message are in memory, of how many."""
        stored, whole = self.cache.tokens_seen - self._incoming_from, len(self._incoming)
        self._settle_incoming()
        return (stored, whole) if whole else (0, 0)

    def _pending_now(self) -> list[int]:
        """What must come before the next turn, from what the cache has taken in."""
        stored = self.cache.tokens_seen - self._incoming_from
        if not self._incoming or stored == 0:
            return self.pending
        closing = self.template.encode(self.template.closing)
        if stored == len(self._incoming):
            return closing
        # The message was cut: it ends here, and its answer is empty.
        rest = self._incoming[stored : self._header]
        return [*rest, *self.template.encode(self.template.after_question), *closing]

    def _settle_incoming(self) -> None:
        self.pending = self._pending_now()
        self._incoming = []

    @torch.no_grad()
    def _forward(self, ids: list[int]) -> torch.Tensor:
        """Streams ids; the logits after the last one."""
        inputs = torch.tensor([ids], device=self.model.device)
        output = self.model(inputs, past_key_values=self.cache, logits_to_keep=1)
        self.after_pass()
        return output.logits[:, -1]
