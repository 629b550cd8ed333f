"""Turning ADMS on and off leaves no trace, and touches nothing but what it is asked for."""

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, DynamicCache, StaticCache

import adms
from adms import (
    ADMSTypeError,
    ADMSValueError,
    CacheStateError,
    ForwardError,
    UnsupportedModelError,
    disable_adms,
    enable_adms_llm,
    enable_streaming_llm,
    is_enabled,
)
from tests.streams import feed, random_ids, small_cache, tiny_llama


def traces(model: nn.Module) -> list[object]:
    """What enabling could leave behind on a model's modules."""
    found: list[object] = []
    for module in model.modules():
        found += [name for name in ("forward", "generate") if name in module.__dict__]
        found += list(module._forward_pre_hooks.values()) + list(module._forward_hooks.values())
    return found


def test_disabling_restores_the_model_to_the_bit() -> None:
    model = tiny_llama()
    ids = random_ids(2, 100)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before, text = feed(model, ids, DynamicCache()), model.config.to_json_string()
    attributes = set(model.__dict__)
    cache = small_cache(model)
    feed(model, ids, cache)
    assert model.config.to_json_string() == text
    assert "adms" not in text
    disable_adms(model)
    assert not is_enabled(model) and traces(model) == []
    assert set(model.__dict__) == attributes
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(feed(model, ids, DynamicCache()), before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    disable_adms(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_caches_and_training_are_untouched(attention: str) -> None:
    model = tiny_llama()
    model.set_attn_implementation(attention)
    ids = random_ids(2, 60)
    static = StaticCache(config=model.config, max_cache_len=80)
    expected = [feed(model, ids, cache, 20) for cache in (DynamicCache(), static)]
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    small_cache(model)
    static = StaticCache(config=model.config, max_cache_len=80)
    for cache, before in zip((DynamicCache(), static), expected, strict=True):
        assert torch.equal(feed(model, ids, cache, 20), before)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight.grad, gradient)


def test_a_second_call_gives_an_independent_cache() -> None:
    model = tiny_llama()
    ids = random_ids(1, 400)
    first = small_cache(model)
    expected = feed(model, ids, first)
    second = small_cache(model, recent_size=32)
    feed(model, ids[:, :100], second)
    third = small_cache(model)
    assert torch.equal(feed(model, ids, third), expected)
    assert (first.tokens_seen, second.tokens_seen) == (400, 100)


def test_a_copy_of_an_enabled_model_is_its_own() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    twin = copy.deepcopy(model)
    ids = random_ids(1, 50)
    with pytest.raises(CacheStateError, match="copy of an enabled one"):
        feed(twin, ids, cache)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(2)
    assert not torch.equal(feed(twin, ids, DynamicCache()), feed(model, ids, DynamicCache()))


def test_caches_do_not_keep_a_model_alive_nor_modules_a_cache() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    feed(model, random_ids(1, 100), cache)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    kept, model_gone = small_cache(model), weakref.ref(model)
    del model
    gc.collect()
    assert model_gone() is None
    with pytest.raises(CacheStateError, match="was disabled"):
        kept.begin(1, 1, None, torch.device("cpu"))


def test_no_cache_stays_referenced_after_an_exception() -> None:
    model = tiny_llama()
    cache = small_cache(model)

    def fail(*_: object) -> None:
        raise RuntimeError("a hook failed")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ForwardError, match="0 of the call's 10 tokens per row were stored"):
        feed(model, random_ids(1, 10), cache)
    handle.remove()
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_importing_changes_nothing_in_transformers() -> None:
    code = (
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as a\n"
        "before = sorted(a)\n"
        "import adms\n"
        "assert sorted(a) == before, sorted(a)\n"
    )
    root = str(Path(adms.__file__).parents[1])
    finder = f"import sys; sys.path.insert(0, {root!r}); import conftest\n"
    subprocess.run([sys.executable, "-c", finder + code], check=True, timeout=120)


def test_what_cannot_be_enabled_says_why() -> None:
    bert = BertModel(
        BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    with pytest.raises(UnsupportedModelError, match="'bert'.*supported model types are.*llama"):
        enable_adms_llm(bert)
    with pytest.raises(ADMSTypeError, match="must be a transformers model"):
        enable_adms_llm("gpt2")  # type: ignore[arg-type]
    with pytest.raises(ADMSTypeError, match="unknown parameter 'recent'"):
        enable_adms_llm(tiny_llama(), recent=5)
    with pytest.raises(ADMSTypeError, match="has no compressed_budget"):
        enable_streaming_llm(tiny_llama(), compressed_budget=5)


def test_a_refused_call_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    with pytest.raises(ADMSValueError, match="the model was trained on 512"):
        enable_adms_llm(model, recent_size=600)
    with pytest.raises(ADMSValueError, match="did you mean 'low_rank'"):
        enable_adms_llm(model, compressor_type="lowrank")
    with pytest.raises(ADMSValueError, match="num_clusters was given, but compressor 'low_rank'"):
        enable_adms_llm(model, num_clusters=5)
    assert not is_enabled(model) and traces(model) == []


def test_defaults_resolve_to_what_fits_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(trained=256)
    cache = enable_adms_llm(model)
    assert "recent_size resolves to" in caplog.text and "trained on 256 positions" in caplog.text
    sizes = cache.sizes
    assert sizes.sink + sizes.ring + sizes.budget + sizes.chunk <= 256
    logits = feed(model, random_ids(1, 1000), cache)
    assert bool(logits.isfinite().all())
