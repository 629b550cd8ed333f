"""A conversation piece by piece: the template's text, and a memory that is always exactly known."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

import adms
from adms.cli.conversation import Conversation, Detokenizer, Sampler, TurnTemplate
from adms.cli.stream import cuts_cleanly, pieces
from adms.session import load_session, save_session

pytestmark = pytest.mark.smollm2

SETTINGS: dict[str, Any] = {
    "recent_size": 64,
    "compressed_budget": 32,
    "prefill_chunk_size": 16,
}
TURNS = [("Hello there!", "Hi. How are you?"), ("Fine\n\n  thanks", "Good."), ("4 + 4?", "8")]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Any) -> Any:
    return smollm2[1]


@pytest.fixture
def model(tokenizer: Any) -> Any:
    """Tiny and random, with the real tokenizer's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("system", [None, "You are terse."])
def test_pieces_are_the_template_of_the_whole(tokenizer: Any, system: str | None) -> None:
    template = TurnTemplate(tokenizer)
    messages = [] if system is None else [{"role": "system", "content": system}]
    text, ids = "", []
    for number, (question, answer) in enumerate(TURNS):
        first = number == 0
        piece = template.first_turn(question, system) if first else template.next_turn(question)
        for part in (piece, answer, template.closing):
            text += part
            ids += template.encode(part)
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == whole
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_templates_that_cannot_grow(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", None)
        with pytest.raises(adms.ADMSValueError, match="no chat template"):
            TurnTemplate(tokenizer)
        only_last = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"
        patch.setattr(tokenizer, "chat_template", only_last)
        with pytest.raises(adms.ADMSValueError, match="rewrites earlier turns"):
            TurnTemplate(tokenizer)


@pytest.mark.parametrize("text", ["Gr\u00fc\u00dfe \u4f60\u597d \U0001f389 ok\n  two", "", "a b"])
def test_text_as_tokens_come(tokenizer: Any, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    shown = [detokenizer.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(shown) == text
    assert not any("\ufffd" in part for part in shown)


class Recorder:
    """What a model was fed, token by token."""

    def __init__(self, model: Any) -> None:
        self.ids: list[int] = []
        model.model.embed_tokens.register_forward_pre_hook(self._note)

    def _note(self, module: Any, arguments: Any) -> None:
        self.ids += arguments[0][0].tolist()


def talk(model: Any, tokenizer: Any, **more: Any) -> Conversation:
    cache = more.pop("cache", None) or adms.enable_adms_llm(model, **SETTINGS)
    return Conversation(model, tokenizer, cache, Sampler(0, 1, None), **more)


def turn(conversation: Conversation, text: str, limit: int = 5) -> str:
    list(conversation.read(text))
    return "".join(conversation.answer(limit))


def test_nothing_is_encoded_twice(model: Any, tokenizer: Any) -> None:
    conversation = talk(model, tokenizer)
    binding = conversation.cache.binding_for_use
    # The model reads texts of its own once; they are no part of the talk.
    binding.fit(binding.calibration)
    fed = Recorder(model)
    template, expected = conversation.template, []
    for number in range(4):
        question = f"question {number} " + "word " * 30 * number
        turn(conversation, question)
        expected += template.encode(
            template.next_turn(question) if number else template.first_turn(question)
        )
        expected += [*conversation._answer, *template.encode(template.closing)]
    # The last answer's end comes with the next question.
    assert fed.ids == expected[: -len(template.encode(template.closing))]
    assert conversation.cache.tokens_seen == len(fed.ids)


@pytest.mark.parametrize("after", [0, 1, 2, 5, 100])
def test_an_interrupted_message(model: Any, tokenizer: Any, after: int) -> None:
    conversation, fed = talk(model, tokenizer), Recorder(model)
    turn(conversation, "first")
    passes = iter(range(10_000))

    def interrupt(*_: Any) -> None:
        if next(passes) == after:
            raise KeyboardInterrupt

    template = conversation.template
    long = "many words " * 60
    ids = [*conversation.pending, *template.encode(template.next_turn(long))]
    begun = conversation.cache.tokens_seen
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        list(conversation.read(long))
        assert after == 100
    except KeyboardInterrupt:
        stored, whole = conversation.settle()
        assert whole == len(ids) and stored == conversation.cache.tokens_seen - begun
        assert (stored == 0) == (after == 0)
    finally:
        handle.remove()
    # What is in memory is a whole conversation again, with an empty answer.
    kept = conversation.cache.tokens_seen - begun
    stream = tokenizer.decode([*ids[:kept], *conversation.pending])
    assert stream.endswith(template.closing)
    # One end more than starts: the first answer's, which came with this message.
    assert stream.count("<|im_start|>") == stream.count("<|im_end|>") - 1
    del fed.ids[:]
    list(conversation.read("next"))
    assert tokenizer.decode(fed.ids).endswith(template.next_turn("next"))


def test_an_interrupted_answer(model: Any, tokenizer: Any) -> None:
    conversation = talk(model, tokenizer)
    list(conversation.read("question"))
    begun, shown = conversation.cache.tokens_seen, ""
    with pytest.raises(KeyboardInterrupt):
        for number, piece in enumerate(conversation.answer(50)):
            shown += piece
            if number == 6:
                raise KeyboardInterrupt
    shown += conversation.unshown()
    assert conversation.cache.tokens_seen - begun == 7
    assert shown == tokenizer.decode(conversation._answer[:7])
    assert conversation.pending == conversation.template.encode(conversation.template.closing)


@pytest.mark.parametrize("cut", [False, True])
def test_a_session_goes_on_where_it_was(
    model: Any, tokenizer: Any, cut: bool, tmp_path: Path
) -> None:
    conversation, path = talk(model, tokenizer), tmp_path / "a.adms"
    turn(conversation, "first")
    reading = conversation.read("second " * 600)
    next(reading)
    if not cut:
        list(reading)
        list(conversation.answer(3))
    save_session(conversation.cache, path, notes=conversation.notes())
    loaded = load_session(path, model)
    other = talk(model, tokenizer, cache=loaded.cache, stored=loaded.notes)
    if cut:
        conversation.settle()
    assert other.pending == conversation.pending
    assert turn(other, "third") == turn(conversation, "third")
    with pytest.raises(adms.SessionFileError, match="not made by adms chat"):
        talk(model, tokenizer, cache=loaded.cache, stored={})


def test_a_text_in_pieces_encodes_as_the_whole(tokenizer: Any) -> None:
    from adms.evaluation.texts import load_text

    assert cuts_cleanly(tokenizer)
    text = load_text("pydoc")[:60_000]
    parts = list(pieces(io.BytesIO(text.encode())))
    assert len(parts) > 10 and "".join(parts) == text
    ids = [token for part in parts for token in tokenizer(part)["input_ids"]]
    assert ids == tokenizer(text, verbose=False)["input_ids"]
