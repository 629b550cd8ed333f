"""What is around a cache in use: modes and dtypes of torch, and what is done to models."""

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

import adms.commit
from adms import ADMSKVCache, disable_adms, enable_adms_llm
from adms.errors import ADMSValueError, CacheStateError, ForwardError
from adms.places import Places
from adms.timeline import Timeline
from tests.patches.tiny import ids as small_ids
from tests.patches.tiny import tiny
from tests.streams import feed, random_ids, small_cache, tiny_llama

# --- modes of torch ------------------------------------------------------------------------------


def test_what_inference_mode_allocated_is_written_outside_of_it(tmp_path: Path) -> None:
    model, ids = tiny_llama(), random_ids(2, 330)
    cache, plain = small_cache(model, recent_size=24), small_cache(model, recent_size=24)
    with torch.inference_mode():
        model(ids[:, :300], past_key_values=cache)
        cache.reorder_cache(torch.tensor([0, 1]))
        cache.save(tmp_path / "s.adms")
        loaded = ADMSKVCache.load(tmp_path / "s.adms", model=model)
    feed(model, ids[:, :300], plain)
    expected = feed(model, ids[:, 300:], plain, step=5)
    for one in (copy.deepcopy(cache), cache, loaded):
        assert torch.equal(feed(model, ids[:, 300:], one, step=5), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_products_and_not_what_is_held(dtype: torch.dtype) -> None:
    model, ids = tiny_llama().to(dtype), random_ids(1, 420)
    cache, plain = small_cache(model, recent_size=24), small_cache(model, recent_size=24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.cat(
            [feed(model, ids[:, :400], cache), feed(model, ids[:, 400:], cache, 1)], 1
        )
    exact = cache.layers[0].exact
    assert exact.keys.dtype == exact.values.dtype == dtype
    assert cache.nbytes <= cache.max_nbytes
    assert_close(found.float(), feed(model, ids, plain).float(), atol=0.06, rtol=0)


def test_the_default_dtype_is_no_dtype_of_positions() -> None:
    model, ids = tiny_llama(trained=4096), random_ids(1, 1500)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        cache = small_cache(model)
        torch.set_default_dtype(dtype)
        try:
            results.append(
                torch.cat([feed(model, ids, cache), feed(model, ids[:, :9], cache, 1)], 1)
            )
        finally:
            torch.set_default_dtype(torch.float32)
    assert_close(results[1], results[0], atol=1e-6, rtol=0)


# --- how long a stream is ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["grid", "mean", "hybrid", "near"])
@pytest.mark.parametrize("tokens", [10**6, 2 * 10**7, 10**12])
def test_positions_are_as_fine_however_long_the_stream(tokens: int, mode: str) -> None:
    model = tiny_llama()
    cache = small_cache(model)
    feed(model, random_ids(1, 3000), cache)
    timeline, geometry = cache.timeline, cache.layers[0].middle.plan.geometry
    assert isinstance(timeline, Timeline) and geometry.is_coded(timeline.middle_tokens(0))
    period = math.lcm(geometry.whole_records * geometry.block_tokens, cache.sizes.ring)
    near, far = (
        Places(
            cache.sizes,
            geometry,
            torch.tensor([timeline.evicted[0] + shift]),
            text_positions=False,
            anchor_mode=mode,
        ).middle(geometry.num_entries(2**62))
        for shift in (0, tokens // period * period)
    )
    assert torch.equal(near.positions, far.positions)
    assert torch.equal(near.tokens, far.tokens) and torch.equal(near.order, far.order)


# --- what is done to a model ---------------------------------------------------------------------


def test_attention_that_was_changed_after_enabling_is_refused() -> None:
    model, ids = tiny_llama(), random_ids(1, 60)
    cache = small_cache(model)
    feed(model, ids, cache)
    model.set_attn_implementation("eager")
    with pytest.raises(CacheStateError, match="changed to 'eager'"):
        feed(model, ids, cache)
    assert cache.tokens_seen == 60
    disable_adms(model)
    assert model.config._attn_implementation == "eager"
    cache = small_cache(model)
    plain = tiny_llama()
    assert_close(feed(model, ids, cache), plain(ids).logits.detach(), atol=1e-5, rtol=1e-5)


def test_models_of_one_config() -> None:
    first = tiny_llama()
    second = LlamaForCausalLM(first.config).eval()
    ids = random_ids(1, 60)
    with torch.no_grad():
        expected = second(ids).logits
    small_cache(first)
    cache = small_cache(second)
    disable_adms(first)
    assert_close(feed(second, ids, cache), expected, atol=1e-5, rtol=1e-5)
    disable_adms(second)
    assert second.config._attn_implementation == "sdpa"


def test_a_decoder_is_enabled_once() -> None:
    model = tiny_llama()
    small_cache(model)
    with pytest.raises(CacheStateError, match="enabled already"):
        enable_adms_llm(model.model)
    disable_adms(model)
    small_cache(model)


def test_a_head_that_writes_no_tokens() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_llama().config).eval()
    cache = enable_adms_llm(model, start_size=4, recent_size=64, compressed_budget=160)
    with torch.no_grad():
        model(random_ids(1, 400), past_key_values=cache)
    assert cache.tokens_seen == 400


# --- what a step does not do ---------------------------------------------------------------------


def stepped(model: Any, ids: torch.Tensor, kernel: Any) -> tuple[torch.Tensor, ADMSKVCache]:
    cache = enable_adms_llm(
        model, start_size=4, recent_size=32, compressed_budget=64, kernel=kernel
    )
    return torch.cat(
        [feed(model, ids[:, :-5], cache), feed(model, ids[:, -5:], cache, 1)], 1
    ), cache


def test_capped_scores() -> None:
    changes = {"head_dim": 16, "max_position_embeddings": 512, "attn_logit_softcapping": 2.0}
    model = tiny("gemma2", layer_types=["full_attention"] * 2, **changes)
    ids = small_ids(1, 300)
    found, cache = stepped(model, ids, "auto")
    assert cache.step is None and cache.step_obstacle == "the model caps its scores"
    assert_close(found, stepped(model, ids, "torch")[0], atol=1e-5, rtol=1e-5)


def test_hidden_states_that_a_config_asks_for() -> None:
    model = tiny_llama()
    cache = small_cache(model, recent_size=24)
    feed(model, random_ids(1, 300), cache)
    model.config.output_hidden_states = True
    with torch.no_grad():
        for _ in range(2):
            output = model(random_ids(1, 1), past_key_values=cache)
            assert len(output.hidden_states) == 3


@pytest.mark.parametrize(
    "asked",
    [{"output_attentions": True}, {"output_hidden_states": True, "return_dict": False}],
)
def test_what_chunks_cannot_give_is_refused_before_anything_is_stored(asked: Any) -> None:
    model = tiny_llama()
    cache = small_cache(model, prefill_chunk_size=32)
    with pytest.raises(ADMSValueError, match="prefill_chunk_size"):
        model.model(random_ids(1, 100), past_key_values=cache, **asked)
    assert cache.tokens_seen == 0


# --- state that must not be lost, or come back ---------------------------------------------------


def test_rows_of_a_broken_cache_cannot_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_llama(), random_ids(2, 340)
    cache = small_cache(model, recent_size=24)
    feed(model, ids[:, :300], cache)

    def fail(*_: Any) -> None:
        raise RuntimeError("in this test")

    with monkeypatch.context() as patch:
        patch.setattr(adms.commit.Commit, "apply", fail)
        patch.setattr(adms.commit.Commit, "take_back", fail)
        with contextlib.suppress(ForwardError, RuntimeError):
            feed(model, ids[:, 300:], cache)
    for change in (
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: feed(model, ids[:, 300:], cache),
    ):
        with pytest.raises(CacheStateError, match="holds nothing reliable"):
            change()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_of_a_loaded_session_keep_their_precision(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny("opt", max_position_embeddings=512)
    sizes = {"start_size": 2, "recent_size": 16, "compressed_budget": 8, "prefill_chunk_size": 8}
    cache = enable_adms_llm(model, **sizes)
    with torch.no_grad():
        model(small_ids(1, 400), past_key_values=cache)
    cache.save(tmp_path / "s.adms")
    disable_adms(model.to(dtype))
    loaded = ADMSKVCache.load(tmp_path / "s.adms", model=model)
    assert torch.equal(loaded.layers[-1].values, cache.layers[-1].values)
    with torch.no_grad():
        model(small_ids(1, 3), past_key_values=loaded)
    assert loaded.tokens_seen == 403


@pytest.mark.parametrize("budget", range(8, 24))
def test_auto_codes_every_small_budget(budget: int) -> None:
    model = tiny_llama()
    cache = small_cache(model, recent_size=16, compressed_budget=budget, compressor_type="auto")
    feed(model, random_ids(1, 300), cache)
    assert cache.nbytes <= cache.max_nbytes


def test_windows_alone_stay_within_their_bound() -> None:
    model = tiny("mistral-window")
    cache = enable_adms_llm(model, start_size=2, recent_size=12, compressed_budget=12)
    seen: list[int] = []
    look = model.base_model.layers[-1].register_forward_hook(
        lambda *_: seen.append(cache.nbytes - cache.max_nbytes)
    )
    with torch.no_grad():
        for size in (cache.chunk_tokens, 1, 80):
            model(small_ids(1, size), past_key_values=cache)
    look.remove()
    assert max(seen[1:]) <= 0
    assert cache.num_entries(0) <= cache.layers[0].slots
