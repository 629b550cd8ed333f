"""``generate`` on every architecture: all its ways of decoding, or a clear error."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from adms import enable_adms_llm, generate_turn
from adms.errors import ADMSValueError, CacheStateError, UnsupportedModelError
from tests.patches.tiny import NAMES, ids, tiny
from tests.test_architectures import ALL, SMALL, STATIC, padded, run

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def theirs(model: PreTrainedModel, inputs: torch.Tensor, **arguments: object) -> torch.Tensor:
    """What ``generate`` returns with transformers' own cache."""
    cache = DynamicCache(config=model.config)
    return model.generate(inputs, past_key_values=cache, use_cache=True, **{**GREEDY, **arguments})


def ours(
    model: PreTrainedModel, inputs: torch.Tensor, config: object = ALL, **arguments: object
) -> torch.Tensor:
    """What it returns with a new ADMS cache."""
    cache = enable_adms_llm(model, config)
    return model.generate(inputs, past_key_values=cache, **{**GREEDY, **arguments})


@pytest.mark.parametrize("name", STATIC)
def test_greedy_batched_beam_and_sampling_equal_dynamic_cache(name: str) -> None:
    model = tiny(name)
    batch, mask = padded([ids(1, 20, seed=1), ids(1, 1, seed=2), ids(1, 13, seed=3)])
    for arguments in (
        {},
        {"num_beams": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
    ):
        torch.manual_seed(0)
        expected = theirs(model, batch, attention_mask=mask, **arguments)
        torch.manual_seed(0)
        actual = ours(model, batch, attention_mask=mask, **arguments)
        assert actual.tolist() == expected.tolist(), arguments


@pytest.mark.parametrize("name", NAMES)
def test_generate_equals_step_by_step_under_eviction(name: str) -> None:
    model, inputs = tiny(name), ids(1, 40)
    produced = ours(model, inputs, SMALL, max_new_tokens=20)
    cache = enable_adms_llm(model, SMALL)
    logits = run(model, inputs, cache)[:, -1]
    for token in produced[0, 40:]:
        assert logits.argmax().item() == token
        logits = run(model, token[None, None], cache)[:, -1]


@pytest.mark.parametrize("name", NAMES)
def test_beams_under_eviction_follow_their_own_rows(name: str) -> None:
    """Every beam's score is that of its own text streamed alone."""
    model, inputs = tiny(name), ids(1, 30)
    result = ours(
        model,
        inputs,
        SMALL,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=16,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
    )
    for sequence, score in zip(result.sequences, result.sequences_scores, strict=True):
        cache = enable_adms_llm(model, SMALL)
        text = sequence[None]
        logits = torch.cat(
            [run(model, text[:, :30], cache), run(model, text[:, 30:-1], cache, 1)], dim=1
        )
        logp = logits.log_softmax(-1)[0, 29:].gather(1, text[0, 30:, None]).sum()
        torch.testing.assert_close(logp, score, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_two_turns_each_way(name: str) -> None:
    model = tiny(name)
    first, second = ids(1, 20, seed=1), ids(1, 7, seed=2)
    # The two ways cut the text at other tokens; only single tokens make that the same.
    settings = SMALL.replace(prefill_chunk_size=1)
    cache = enable_adms_llm(model, settings)
    answer = model.generate(first, past_key_values=cache, **GREEDY)
    with pytest.raises(CacheStateError, match="generate_turn"):
        model.generate(second, past_key_values=cache, **GREEDY)
    whole = torch.cat([answer, second], dim=1)
    again = model.generate(whole, past_key_values=cache, **GREEDY)
    cache = enable_adms_llm(model, settings)
    generate_turn(model, cache, first, **GREEDY)
    turned = generate_turn(model, cache, second, **GREEDY)
    assert turned[:, second.shape[1] :].tolist() == again[:, whole.shape[1] :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_what_rewinds_a_cache_is_refused(name: str) -> None:
    model, inputs = tiny(name), ids(1, 12)
    for arguments in (
        {"assistant_model": tiny(name)},
        {"prompt_lookup_num_tokens": 3},
    ):
        with pytest.raises(ADMSValueError, match="rewinds"):
            ours(model, inputs, **arguments)
    with pytest.raises(ADMSValueError, match="cache_implementation"):
        ours(model, inputs, cache_implementation="static")
    with pytest.raises(ADMSValueError, match="use_cache"):
        ours(model, inputs, use_cache=False)
    cache = enable_adms_llm(model, SMALL)
    with pytest.raises(ADMSValueError, match="use_cache"):
        model(inputs, past_key_values=cache, use_cache=False)


def test_mpt_generates_with_its_own_defaults() -> None:
    """Its configuration says ``use_cache=False``; nothing of it is changed for other callers."""
    model, inputs = tiny("mpt", use_cache=False), ids(1, 20)
    assert model.generation_config.use_cache is False
    expected = theirs(model, inputs)
    assert ours(model, inputs).tolist() == expected.tolist()
    assert model.generation_config.use_cache is False
    assert model.config.use_cache is False


def test_mpt_streams_past_its_alibi_table() -> None:
    model = tiny("mpt")
    longer = tiny("mpt", max_seq_len=256)
    longer.load_state_dict(model.state_dict())
    inputs = ids(1, 200)
    cache = enable_adms_llm(model, start_size=2, recent_size=210, compressed_budget=0)
    expected = longer(inputs, use_cache=False).logits
    torch.testing.assert_close(run(model, inputs, cache, 50), expected, atol=2e-5, rtol=0)


def test_phi3_keeps_the_cache_across_its_shorter_length() -> None:
    model, inputs = tiny("phi3-long"), ids(1, 20)
    cache = enable_adms_llm(model, ALL)
    widths = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    produced = model.generate(inputs, past_key_values=cache, **{**GREEDY, "max_new_tokens": 12})
    assert produced.shape[1] == 32
    assert cache.get_seq_length() == 31
    # The text was read once; Phi3's own method would have dropped the cache at token 25.
    assert widths == [20] + [1] * 11


def test_dynamic_rotary_buffers_of_the_model_stay() -> None:
    model = tiny("llama-dynamic")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    run(model, ids(1, 400), enable_adms_llm(model, SMALL))
    assert before
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before[name], atol=0, rtol=0)
    assert model.base_model.rotary_emb.max_seq_len_cached == model.config.max_position_embeddings


def test_an_unsupported_model_is_told_what_is_supported() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2))
    before = set(model.__dict__)
    with pytest.raises(UnsupportedModelError, match=r"gpt2.*falcon.*gpt_neox.*CONTRIBUTING"):
        enable_adms_llm(model)
    assert set(model.__dict__) == before


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = tiny("gemma3", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModelError, match="causal"):
        enable_adms_llm(model)


def test_an_unknown_kind_of_layer_is_refused() -> None:
    model = tiny("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        enable_adms_llm(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_ends_early_stores_nothing_after_it(name: str) -> None:
    model, batch = tiny(name), ids(2, 20, seed=1)
    dry = generate_turn(model, enable_adms_llm(model, SMALL), batch, **GREEDY)[:, 20:].tolist()
    ends = [next((at for at, token in enumerate(row) if token == dry[0][0]), 7) for row in dry]
    cache = enable_adms_llm(model, SMALL)
    generate_turn(model, cache, batch, **{**GREEDY, "eos_token_id": dry[0][0]})
    assert cache.timeline is not None
    assert ends[0] == 0 and cache.timeline.seen == [21 + at for at in ends]
