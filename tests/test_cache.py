"""Identity, the bound, and the cache contract of transformers."""

import copy
import gc
import re
import resource

import pytest
import torch
from transformers import DynamicCache

from adms import (
    ADMSConfig,
    ADMSKVCache,
    ADMSTypeError,
    ADMSValueError,
    CacheStateError,
    disable_adms,
    enable_adms_llm,
    enable_streaming_llm,
)
from adms.layer import ADMSLayer
from tests.streams import feed, random_ids, reachable_bytes, small_cache, tiny_llama


@pytest.mark.parametrize("step", [0, 1, 7, 64, 100])
def test_a_budget_that_holds_everything_is_the_identity(step: int) -> None:
    model = tiny_llama()
    ids = random_ids(2, 220)
    expected = feed(model, ids, DynamicCache())
    cache = small_cache(model)
    torch.testing.assert_close(feed(model, ids, cache, step), expected, atol=1e-5, rtol=0)
    assert cache.summary()["middle"]["form"] == "exact"


def test_identity_in_bfloat16() -> None:
    model = tiny_llama().bfloat16()
    ids = random_ids(1, 200)
    expected = feed(model, ids, DynamicCache(), 50)
    actual = feed(model, ids, small_cache(model, prefill_chunk_size=50), 50)
    # Masks and layouts choose other kernels, which round bf16 sums otherwise: a few of its steps.
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=0)


def test_smollm2_sized_chunks_do_not_change_what_a_stream_says() -> None:
    """Chunk ends are counted from the end, so the same calls give the same logits."""
    model = tiny_llama()
    ids = random_ids(1, 900)
    whole, cache = feed(model, ids, small_cache(model)), small_cache(model)
    remainder = 900 % 64
    parts = [feed(model, ids[:, :remainder], cache), feed(model, ids[:, remainder:], cache, 64)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


def test_the_bound_holds_at_every_step_over_20000_tokens() -> None:
    model = tiny_llama(layers=1, trained=64, heads=2, kv_heads=1)
    cache = enable_adms_llm(
        model, start_size=4, recent_size=16, compressed_budget=20, prefill_chunk_size=16
    )
    ids = random_ids(1, 20_000)
    start, step = 0, 0
    steps = (1, 1, 1, 16, 3, 1, 64, 1)
    halfway = 0
    while start < ids.shape[1]:
        size = steps[step % len(steps)]
        logits = feed(model, ids[:, start : start + size], cache)
        assert cache.nbytes <= cache.max_nbytes
        assert bool(logits.isfinite().all())
        start, step = start + size, step + 1
        if start > 10_000 and not halfway:
            gc.collect()
            halfway = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cache.get_seq_length() == cache.tokens_seen == 20_000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - halfway
    assert grown < 20 * 1024, f"the process grew by {grown} KiB over the second half"


def test_positions_stay_inside_the_trained_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from adms.patches.base import RotaryScheme

    largest = []
    tables = RotaryScheme.tables

    def spy(self: RotaryScheme, positions: torch.Tensor, *args: object) -> object:
        largest.append(float(positions.max()))
        assert float(positions.min()) >= 0
        return tables(self, positions, *args)

    monkeypatch.setattr(RotaryScheme, "tables", spy)
    model = tiny_llama(trained=64)
    cache = enable_adms_llm(
        model, start_size=4, recent_size=16, compressed_budget=20, prefill_chunk_size=16
    )
    feed(model, random_ids(1, 640), cache, 10)
    assert 32 < max(largest) < 64
    assert cache.get_seq_length() == 640


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 160])
def test_nothing_uncounted_hides_behind_the_cache(dtype: torch.dtype, budget: int) -> None:
    model = tiny_llama().to(dtype)
    cache = small_cache(model, compressed_budget=budget, compression_interval=4)
    for size in (30, 200, 1, 1, 1, 1, 1, 64, 300, 1):
        feed(model, random_ids(2, size), cache)
        assert reachable_bytes(cache) == cache.nbytes + cache.shared_nbytes
        assert cache.nbytes <= cache.max_nbytes


def test_bytes_are_counted_while_a_pass_is_under_way() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    feed(model, random_ids(1, 500), cache)
    resting = cache.nbytes
    during = []

    def look(*_: object) -> None:
        during.append((cache.nbytes, reachable_bytes(cache), cache.max_nbytes))

    handle = model.model.norm.register_forward_hook(look)
    feed(model, random_ids(1, 64), cache)
    handle.remove()
    nbytes, reachable, most = during[0]
    assert resting < nbytes <= most
    assert reachable == nbytes + cache.shared_nbytes
    assert cache.nbytes == resting


def test_equal_memory_with_streaming_llm() -> None:
    model = tiny_llama().bfloat16()
    for budget, recent in ((160, 64), (8, 100), (100, 30)):
        ours = small_cache(model, compressed_budget=budget, recent_size=recent)
        theirs = enable_streaming_llm(model, start_size=4, recent_size=budget + recent)
        assert ours.max_nbytes <= theirs.max_nbytes


def test_float32_codes_take_no_more_than_16_bit_tokens() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    feed(model, random_ids(1, 1500), cache)
    layer = cache.layers[0]
    assert isinstance(layer, ADMSLayer) and layer.middle is not None
    plan = layer.middle.plan
    assert plan.coder is not None
    used = plan.landmark_offset + (plan.store.nbytes if plan.store else 0)
    assert used <= (160 - cache.sizes.waiting) * plan.shape.num_elements * 2


def test_padded_rows_equal_the_rows_alone_over_two_turns() -> None:
    model = tiny_llama()
    rows = [random_ids(1, count, seed=count) for count in (900, 500, 2)]
    width = 900
    padded = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros(3, width, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, width - row.shape[1] :] = row
        mask[index, width - row.shape[1] :] = 1
    second = random_ids(3, 90, seed=9)
    cache = small_cache(model)
    with torch.no_grad():
        first = model(padded, attention_mask=mask, past_key_values=cache).logits
        whole = torch.cat([mask, torch.ones_like(second)], dim=1)
        later = model(second, attention_mask=whole, past_key_values=cache).logits
    for index, row in enumerate(rows):
        alone = small_cache(model)
        expected = feed(model, row, alone)
        torch.testing.assert_close(
            first[index : index + 1, width - row.shape[1] :], expected, atol=1e-5, rtol=0
        )
        expected = feed(model, second[index : index + 1], alone)
        torch.testing.assert_close(later[index : index + 1], expected, atol=1e-5, rtol=0)


def test_rows_can_be_reordered_repeated_and_selected() -> None:
    model = tiny_llama()
    ids = random_ids(3, 700)
    cache = small_cache(model)
    feed(model, ids, cache)
    new = random_ids(1, 40, seed=5)
    expected = feed(model, new.expand(3, -1), copy.deepcopy(cache))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    actual = feed(model, new.expand(3, -1), copy.deepcopy(cache))
    torch.testing.assert_close(actual, expected[[2, 0, 0]], atol=1e-5, rtol=0)
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2
    actual = feed(model, new.expand(2, -1), cache)
    torch.testing.assert_close(actual, expected[[2, 2]], atol=1e-5, rtol=0)
    with pytest.raises(ADMSValueError, match="row indices must lie in 0..1"):
        cache.reorder_cache(torch.tensor([0, 2]))


def test_a_deep_copy_is_independent_and_equal() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    feed(model, random_ids(1, 600), cache)
    twin = copy.deepcopy(cache)
    feed(model, random_ids(1, 100, seed=1), twin)
    assert cache.tokens_seen == 600 and twin.tokens_seen == 700
    new = random_ids(1, 50, seed=2)
    fresh = small_cache(model)
    feed(model, random_ids(1, 600), fresh)
    torch.testing.assert_close(feed(model, new, cache), feed(model, new, fresh), atol=0, rtol=0)


def test_reset_starts_afresh_with_another_batch() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    feed(model, random_ids(2, 500), cache)
    cache.reset()
    assert cache.tokens_seen == cache.nbytes == 0
    ids = random_ids(1, 300)
    expected = feed(model, ids, small_cache(model))
    torch.testing.assert_close(feed(model, ids, cache), expected, atol=0, rtol=0)


def test_another_batch_size_is_refused() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    feed(model, random_ids(2, 50), cache)
    with pytest.raises(CacheStateError, match="holds 2 rows, the input has 1"):
        feed(model, random_ids(1, 5), cache)
    feed(model, random_ids(2, 5), cache)


def test_crop_and_recording_are_refused() -> None:
    cache = small_cache(tiny_llama())
    with pytest.raises(CacheStateError, match="cannot be cropped"):
        cache.crop(1)
    with pytest.raises(CacheStateError, match="cannot record its past"):
        cache.activate_past_recording()


def test_a_cache_made_alone_binds_on_first_use() -> None:
    model = tiny_llama()
    cache = ADMSKVCache(ADMSConfig(recent_size=64, compressed_budget=160))
    with pytest.raises(CacheStateError, match="not bound to a model yet"):
        _ = cache.max_nbytes
    with pytest.raises(CacheStateError, match="works only through a model enabled"):
        feed(model, random_ids(1, 5), cache)
    enabled = small_cache(model)
    ids = random_ids(1, 500)
    torch.testing.assert_close(feed(model, ids, cache), feed(model, ids, enabled), atol=0, rtol=0)
    with pytest.raises(CacheStateError, match="bound to another model"):
        other = tiny_llama(seed=1)
        small_cache(other)
        feed(other, ids, cache)


def test_configuration_and_parameters_together_are_refused() -> None:
    with pytest.raises(ADMSTypeError, match="not both"):
        enable_adms_llm(tiny_llama(), ADMSConfig(), recent_size=5)


def test_summary_and_repr_tell_what_each_tier_holds() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    assert "empty" in repr(cache)
    feed(model, random_ids(1, 1000), cache)
    text = repr(cache)
    assert re.search(r"1000 tokens seen.*sink 4 \| middle 9\d\d low_rank \| recent 6\d", text)
    what = cache.summary()
    tiers = what["sink"]["tokens"] + what["middle"]["tokens"] + what["recent"]["tokens"]
    assert tiers == 1000 - what["middle"]["forgotten_tokens"]
    disable_adms(model)
    with pytest.raises(CacheStateError):
        feed(model, random_ids(1, 5), cache)
