"""``generate`` with a bounded cache: every way of decoding, second turns, and clear refusals."""

from threading import Thread
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

from adms import ADMSTypeError, ADMSValueError, CacheStateError, disable_adms, generate_turn
from tests.streams import VOCABULARY, feed, random_ids, small_cache, tiny_llama

# Greedy decoding of random models ends at random otherwise.
LONG: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 0}


class EndsRow(LogitsProcessor):
    """Has one row of a batch, and no other, draw ``eos`` as its token number ``after``."""

    def __init__(self, row: int, after: int, eos: int) -> None:
        self.row, self.after, self.eos = row, after, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.eos] = -torch.inf
        if self.after == 0:
            scores[self.row] = -torch.inf
            scores[self.row, self.eos] = 0.0
        self.after -= 1
        return scores


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        f"w{index}": index for index in range(3, VOCABULARY)
    }
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "sampling", "beam"],
)
def test_generate_equals_dynamic_cache_while_everything_fits(how: dict[str, Any]) -> None:
    model = tiny_llama()
    ids = random_ids(2, 150)
    torch.manual_seed(3)
    expected = model.generate(ids, past_key_values=DynamicCache(), **LONG, **how)
    cache = small_cache(model)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, past_key_values=cache, **LONG, **how), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_under_eviction_equals_stepwise_decoding(beams: int) -> None:
    model = tiny_llama()
    ids = random_ids(1, 700)
    cache = small_cache(model)
    out = model.generate(ids, past_key_values=cache, num_beams=beams, do_sample=False, **LONG)
    assert out.shape == (1, 724) and cache.tokens_seen == 723
    if beams == 1:
        again = small_cache(model)
        logits = feed(model, ids, again)[:, -1]
        for column in range(700, 724):
            logits[:, 2] = -torch.inf
            assert int(logits.argmax()) == int(out[0, column])
            logits = feed(model, out[:, column : column + 1], again)[:, -1]


def test_a_left_padded_batch_generates_what_its_rows_do_alone() -> None:
    model = tiny_llama()
    rows = [random_ids(1, count, seed=count) for count in (600, 350)]
    padded, mask = torch.zeros(2, 600, dtype=torch.long), torch.zeros(2, 600, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, 600 - row.shape[1] :] = row
        mask[index, 600 - row.shape[1] :] = 1
    out = model.generate(
        padded, attention_mask=mask, past_key_values=small_cache(model), do_sample=False, **LONG
    )
    for index, row in enumerate(rows):
        alone = model.generate(row, past_key_values=small_cache(model), do_sample=False, **LONG)
        assert torch.equal(out[index, 600:], alone[0, row.shape[1] :])


def test_return_sequences_and_embeddings_as_input() -> None:
    model = tiny_llama()
    ids = random_ids(1, 300)
    torch.manual_seed(0)
    out = model.generate(
        ids, past_key_values=small_cache(model), do_sample=True, num_return_sequences=3, **LONG
    )
    assert out.shape == (3, 324)
    embeds = model.get_input_embeddings()(ids)
    greedy = model.generate(
        inputs_embeds=embeds, past_key_values=small_cache(model), do_sample=False, **LONG
    )
    expected = model.generate(ids, past_key_values=small_cache(model), do_sample=False, **LONG)
    assert torch.equal(greedy, expected[:, 300:])


def test_text_iterator_streamer_and_pipeline() -> None:
    model, tokenizer = tiny_llama(), word_tokenizer()
    prompt = " ".join(f"w{index}" for index in random_ids(1, 300)[0].tolist())
    inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    arguments = dict(**inputs, past_key_values=small_cache(model), streamer=streamer)
    thread = Thread(target=model.generate, kwargs={**arguments, **LONG, "do_sample": False})
    thread.start()
    streamed = "".join(streamer).split()
    thread.join()
    assert 20 <= len(streamed) <= 24
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    told = pipe(
        prompt,
        past_key_values=small_cache(model),
        return_full_text=False,
        do_sample=False,
        generation_config=GenerationConfig(**LONG),
    )
    assert told[0]["generated_text"].split() == streamed


def test_a_second_turn_with_the_whole_conversation_or_the_new_ids_alone() -> None:
    model = tiny_llama()
    first, second = random_ids(1, 400), random_ids(1, 120, seed=1)
    cache = small_cache(model)
    told = model.generate(first, past_key_values=cache, do_sample=False, **LONG)
    everything = torch.cat([told, second], dim=1)
    whole = model.generate(everything, past_key_values=cache, do_sample=False, **LONG)

    turns = small_cache(model)
    one = generate_turn(model, turns, first, do_sample=False, **LONG)
    assert one.shape == told.shape and turns.tokens_seen == 424
    two = generate_turn(model, turns, second, do_sample=False, **LONG)
    assert two.shape == (1, 144) and turns.tokens_seen == 424 + 144
    assert whole.shape == (1, 424 + 120 + 24)

    # Chunks end elsewhere in the two, so only what does not depend on them is compared: nothing is
    # evicted differently while all fits.
    roomy = {"compressed_budget": 300, "recent_size": 128}
    a, b = small_cache(model, **roomy), small_cache(model, **roomy)
    short, more = random_ids(1, 100), random_ids(1, 60, seed=1)
    told = model.generate(short, past_key_values=a, do_sample=False, **LONG)
    whole = model.generate(
        torch.cat([told, more], dim=1), past_key_values=a, do_sample=False, **LONG
    )
    generate_turn(model, b, short, do_sample=False, **LONG)
    two = generate_turn(model, b, more, do_sample=False, **LONG)
    assert torch.equal(two[:, 60:], whole[:, -24:])


def test_generate_turn_in_a_padded_batch() -> None:
    model = tiny_llama()
    rows = [random_ids(1, count, seed=count) for count in (300, 200)]
    padded, mask = torch.zeros(2, 300, dtype=torch.long), torch.zeros(2, 300, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, 300 - row.shape[1] :] = row
        mask[index, 300 - row.shape[1] :] = 1
    cache = small_cache(model)
    generate_turn(model, cache, padded, attention_mask=mask, do_sample=False, **LONG)
    out = generate_turn(model, cache, random_ids(2, 30, seed=7), do_sample=False, **LONG)
    for index, row in enumerate(rows):
        alone = small_cache(model)
        generate_turn(model, alone, row, do_sample=False, **LONG)
        new = random_ids(2, 30, seed=7)[index : index + 1]
        assert torch.equal(
            out[index : index + 1], generate_turn(model, alone, new, do_sample=False, **LONG)
        )


def test_new_ids_alone_on_a_used_cache_raise() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    feed(model, random_ids(1, 300), cache)
    with pytest.raises(CacheStateError, match="has seen 300 tokens and generate was given 20"):
        model.generate(random_ids(1, 20), past_key_values=cache, **LONG)
    assert cache.tokens_seen == 300


@pytest.mark.parametrize(
    "arguments",
    [
        {"assistant_model": "itself"},
        {"prompt_lookup_num_tokens": 3},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
    ],
    ids=["assisted", "lookup", "lookup-in-config"],
)
def test_decoding_that_rewinds_is_refused(arguments: dict[str, Any]) -> None:
    model = tiny_llama()
    if "assistant_model" in arguments:
        arguments = {"assistant_model": tiny_llama(layers=1)}
    cache = small_cache(model)
    with pytest.raises(ADMSValueError, match="rewinds the cache"):
        model.generate(random_ids(1, 20), past_key_values=cache, **arguments)
    assert cache.tokens_seen == 0


def test_a_second_kind_of_cache_is_refused() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    with pytest.raises(ADMSValueError, match="cache_implementation has nothing to choose"):
        model.generate(random_ids(1, 20), past_key_values=cache, cache_implementation="static")


def test_generate_turn_refuses_what_it_cannot_do() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    with pytest.raises(ADMSTypeError, match="must be an ADMSKVCache"):
        generate_turn(model, DynamicCache(), random_ids(1, 5))
    with pytest.raises(ADMSTypeError, match="tensor of integers"):
        generate_turn(model, cache, torch.zeros(1, 5))
    with pytest.raises(ADMSValueError, match="holds no tokens"):
        generate_turn(model, cache, random_ids(1, 0))
    with pytest.raises(ADMSValueError, match="max_length=5 leaves no room after 5 new ids"):
        generate_turn(model, cache, random_ids(1, 5), max_length=5)


@pytest.mark.parametrize(
    ("length", "of_model", "expected"),
    [
        ({}, {}, 20),
        ({"max_new_tokens": 7}, {"max_new_tokens": 33}, 7),
        ({"generation_config": GenerationConfig(max_new_tokens=50)}, {}, 50),
        ({}, {"max_new_tokens": 33}, 33),
        ({"max_length": 60}, {}, 50),
        ({"generation_config": GenerationConfig(max_length=60)}, {}, 50),
        ({}, {"max_length": 60}, 50),
    ],
    ids=["default", "call", "config", "model", "length", "length-in-config", "length-of-model"],
)
def test_generate_turn_keeps_the_length_that_was_asked_for(
    length: dict[str, Any], of_model: dict[str, int], expected: int
) -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    for name, value in of_model.items():
        setattr(model.generation_config, name, value)
    cache = small_cache(model)
    out = generate_turn(model, cache, random_ids(1, 10), do_sample=False, **length)
    assert out.shape == (1, 10 + expected) and cache.tokens_seen == 10 + expected


@pytest.mark.parametrize(
    ("arguments", "of_model", "match"),
    [
        ({"num_beams": 2}, {}, "one stream per row"),
        ({"generation_config": GenerationConfig(num_beams=2)}, {}, "one stream per row"),
        ({}, {"num_beams": 2}, "one stream per row"),
        ({"num_return_sequences": 2, "do_sample": True}, {}, "one stream per row"),
        ({"max_new_token": 5}, {}, "max_new_token"),
        ({"max_new_tokens": 0}, {}, "greater than 0"),
        ({"stop_strings": "w5"}, {}, "tokenizer"),
        ({"assistant_model": "itself"}, {}, "rewinds the cache"),
        ({}, {"prompt_lookup_num_tokens": 3}, "rewinds the cache"),
        ({"attention_mask": torch.ones(1, 7)}, {}, "attention_mask has shape"),
    ],
)
def test_a_refused_turn_stores_nothing(
    arguments: dict[str, Any], of_model: dict[str, int], match: str
) -> None:
    model = tiny_llama()
    for name, value in of_model.items():
        setattr(model.generation_config, name, value)
    if "assistant_model" in arguments:
        arguments = {"assistant_model": model}
    cache = small_cache(model)
    feed(model, random_ids(1, 30), cache)
    # ADMSValueError is a ValueError too; transformers has no other.
    with pytest.raises((ValueError, CacheStateError), match=match):
        generate_turn(model, cache, random_ids(1, 10), **arguments)
    assert cache.tokens_seen == 30
    # A refused turn leaves nothing behind that later passes would be taken for.
    feed(model, random_ids(1, 10), cache)
    assert cache.tokens_seen == 40


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_a_row_of_a_batch_stores_nothing_after_its_end(do_sample: bool) -> None:
    model = tiny_llama()
    ids, more = random_ids(2, 300), random_ids(2, 30, seed=5)
    cache = small_cache(model)
    out = generate_turn(
        model,
        cache,
        ids,
        do_sample=do_sample,
        max_new_tokens=40,
        eos_token_id=[VOCABULARY - 1, 2],
        logits_processor=[EndsRow(0, after=5, eos=2)],
        # As tokenizers without a padding token have it.
        pad_token_id=2,
    )
    after = feed(model, more, cache)
    for index, row in enumerate(out[:, 300:].tolist()):
        end = next((at + 1 for at, token in enumerate(row) if token in (VOCABULARY - 1, 2)), 40)
        assert index == 1 or end <= 6
        alone = small_cache(model)
        feed(model, ids[index : index + 1, :-1], alone)
        feed(model, out[index : index + 1, 299 : 300 + end], alone, step=1)
        assert cache.timeline is not None and cache.timeline.seen[index] == 300 + end + 30
        torch.testing.assert_close(
            after[index : index + 1],
            feed(model, more[index : index + 1], alone),
            atol=2e-4,
            rtol=2e-4,
        )


def test_generate_without_an_adms_cache_is_untouched() -> None:
    model = tiny_llama()
    ids = random_ids(1, 50)
    before = model.generate(ids, do_sample=False, **LONG)
    small_cache(model)
    assert torch.equal(model.generate(ids, do_sample=False, **LONG), before)
    lookup = model.generate(ids, prompt_lookup_num_tokens=2, do_sample=False, **LONG)
    assert lookup.shape == before.shape
    disable_adms(model)
    assert torch.equal(model.generate(ids, do_sample=False, **LONG), before)
