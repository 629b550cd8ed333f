"""Reading through a cache: losses, bytes, answers; needles; equal memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from adms import ADMSConfig, ADMSValueError, enable_adms_llm, enable_streaming_llm
from adms.evaluation import needles
from adms.evaluation.methods import open_method, require_equal_memory, tokens_held
from adms.evaluation.models import load_model
from adms.evaluation.speed import measure_speed
from adms.evaluation.stream import answer, check_length, read
from adms.evaluation.texts import encode_text

CONFIG = ADMSConfig(start_size=2, compressed_budget=24, recent_size=16, prefill_chunk_size=8)


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path):  # type: ignore[no-untyped-def]
    return load_model(tiny_model_folder)


def test_the_fit_to_the_model_is_no_reading(tiny_model_folder: Path, slow_fit: list[float]) -> None:
    ids = torch.randint(0, 256, (1, 200))
    config = CONFIG.replace(compressed_budget=40)

    def speed(name: str) -> dict[str, Any]:
        with open_method(model, name, config) as method:
            return measure_speed(model, method, ids, chunk=8, decode_tokens=4)[0]

    model, _ = load_model(tiny_model_folder)
    assert speed("streaming")["fit_s"] is None and not slow_fit[0]
    first, again = speed("adms"), speed("adms")
    assert first["fit_s"] > 1000 and again["fit_s"] is None
    assert max(first["first_token_ms"], first["token_ms_p99"]) < 1e6

    model, _ = load_model(tiny_model_folder)
    with open_method(model, "adms", config) as method:
        # Too few for the middle to be coded: nothing is fitted.
        assert read(model, method, ids[:, :20], chunk=8).fit_seconds is None
        trace = read(model, method, ids[:, 20:], chunk=8)
    assert trace.seconds < 1000 < (trace.fit_seconds or 0)


def test_losses_are_those_of_one_dense_pass(loaded) -> None:  # type: ignore[no-untyped-def]
    model, _ = loaded
    ids = torch.randint(0, 256, (1, 50))
    with torch.no_grad():
        logits = model(ids).logits[0]
    expected = cross_entropy(logits[:-1].double(), ids[0, 1:], reduction="none")
    seen: list[int] = []
    with open_method(model, "full", CONFIG) as method:
        trace = read(model, method, ids, chunk=8, on_chunk=seen.append)
    np.testing.assert_allclose(trace.losses[0], expected.numpy(), atol=1e-5)
    assert trace.tokens == [8, 16, 24, 32, 40, 48, 50] and sum(seen) == 50
    # Two layers, keys and values, one head of 16 numbers in float32.
    assert trace.nbytes[-1] == 2 * 2 * 50 * 16 * 4
    torch.testing.assert_close(trace.last_logits[0], logits[-1])


def test_streaming_reads_any_length_in_bounded_bytes(loaded) -> None:  # type: ignore[no-untyped-def]
    model, _ = loaded
    ids = torch.randint(0, 256, (1, 600))
    for name in ("streaming", "adms"):
        with open_method(model, name, CONFIG) as method:
            trace = read(model, method, ids, chunk=8)
        assert method.max_nbytes is not None and max(trace.nbytes) <= method.max_nbytes
        assert np.isfinite(trace.losses).all() and trace.losses.shape == (1, 599)


def test_full_cache_is_refused_beyond_its_positions(loaded) -> None:  # type: ignore[no-untyped-def]
    with (
        open_method(loaded[0], "full", CONFIG) as method,
        pytest.raises(ADMSValueError, match="trained on 256"),
    ):
        check_length(method, 257)


@pytest.mark.parametrize("ids", [torch.zeros(1, 1).long(), torch.zeros(8).long()])
def test_reading_needs_rows_of_two_tokens(loaded, ids) -> None:  # type: ignore[no-untyped-def]
    with (
        open_method(loaded[0], "full", CONFIG) as method,
        pytest.raises(ADMSValueError, match=r"\[B, N\]"),
    ):
        read(loaded[0], method, ids, chunk=8)


def test_answers_are_greedy(loaded) -> None:  # type: ignore[no-untyped-def]
    model, _ = loaded
    ids = torch.randint(0, 256, (1, 30))
    expected = ids
    with torch.no_grad():
        for _ in range(5):
            following = model(expected).logits[0, -1].argmax().view(1, 1)
            expected = torch.cat([expected, following], dim=1)
    with open_method(model, "full", CONFIG) as method:
        produced = answer(model, method, ids, chunk=8, max_new_tokens=5)
    assert produced.tolist() == expected[:, 30:].tolist()


def test_equal_memory_holds_and_is_checked(loaded) -> None:  # type: ignore[no-untyped-def]
    model, _ = loaded
    adms = enable_adms_llm(model, CONFIG)
    require_equal_memory(adms, enable_streaming_llm(model, 2, 40, prefill_chunk_size=8))
    with pytest.raises(ADMSValueError, match="bytes"):
        require_equal_memory(adms, enable_streaming_llm(model, 2, 39, prefill_chunk_size=8))
    with pytest.raises(ADMSValueError, match="sinks"):
        require_equal_memory(adms, enable_streaming_llm(model, 3, 60, prefill_chunk_size=8))
    with open_method(model, "streaming", CONFIG) as method:
        assert method.max_nbytes == adms.max_nbytes


def test_window_holds_as_many_tokens_as_adms(loaded) -> None:  # type: ignore[no-untyped-def]
    model, _ = loaded
    adms = enable_adms_llm(model, CONFIG)
    with torch.no_grad():
        model(torch.randint(0, 256, (1, 200)), past_key_values=adms)
    what = adms.summary()
    with open_method(model, "window", CONFIG) as method:
        sizes = method.cache.sizes
    assert sizes.sink + sizes.recent == tokens_held(adms)
    assert tokens_held(adms) == 2 + what["middle"]["capacity_tokens"] + 16


@pytest.mark.parametrize("kind", needles.KINDS)
def test_trials_hide_the_answer_at_its_depth(loaded, text_file: Path, kind: str) -> None:  # type: ignore[no-untyped-def]
    _, tokenizer = loaded
    filler = encode_text(tokenizer, text_file.read_text())
    for depth in (0.0, 0.5, 1.0):
        trial = needles.make_trial(tokenizer, filler, kind, length=2000, depth=depth, seed=3)
        assert trial.text.shape[1] + trial.question.shape[1] == 2000
        text = tokenizer.decode(trial.text[0])
        question = tokenizer.decode(trial.question[0])
        facts = needles.make_facts(kind, 3)
        assert text.count(facts.sentences[facts.asked]) == 1
        assert trial.answer in text and trial.answer not in question
        at = text.index(facts.sentences[facts.asked]) / len(text)
        assert abs(at - depth) < 0.25
        for sentence in facts.sentences:
            assert sentence in text


def test_trials_follow_from_their_seed() -> None:
    assert needles.make_facts("passkey", 1) == needles.make_facts("passkey", 1)
    assert needles.make_facts("passkey", 1) != needles.make_facts("passkey", 2)
    asked = {needles.make_facts("multikey", seed).asked for seed in range(20)}
    assert asked == {0, 1, 2, 3}


def test_answers_are_judged_by_their_beginning(loaded) -> None:  # type: ignore[no-untyped-def]
    _, tokenizer = loaded

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"])

    assert needles.is_correct(tokenizer, ids(" 12345. And"), "12345")
    assert not needles.is_correct(tokenizer, ids(" 12354"), "12345")
    assert not needles.is_correct(tokenizer, ids("not 12345"), "12345")
    assert needles.answer_tokens(tokenizer, "12345") == 7


def test_trial_errors(loaded) -> None:  # type: ignore[no-untyped-def]
    _, tokenizer = loaded
    filler = torch.zeros(1, 50, dtype=torch.long)
    with pytest.raises(ADMSValueError, match="leaves no room"):
        needles.make_trial(tokenizer, filler, "passkey", length=60, depth=0.5, seed=0)
    with pytest.raises(ADMSValueError, match="filler text has 50"):
        needles.make_trial(tokenizer, filler, "passkey", length=600, depth=0.5, seed=0)
    with pytest.raises(ADMSValueError, match="depth"):
        needles.make_trial(tokenizer, filler, "passkey", length=600, depth=1.5, seed=0)
    with pytest.raises(ADMSValueError, match="unknown kind"):
        needles.make_facts("riddle", 0)
