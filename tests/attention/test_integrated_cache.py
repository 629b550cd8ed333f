"""Spans over the recent tier inside a cache: identity, oracle, bound, architectures, sessions."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from adms import ADMSKVCache, enable_adms_llm
from adms.attention import IntegratedAttentionConfig, SparsePrefillConfig
from adms.attention.grouped import attention_weights, grouped_attention
from adms.errors import ADMSTypeError
from adms.gates import AdaptiveUpdateConfig, UpdateGates
from tests.patches import tiny as architectures
from tests.streams import check_padded_row, feed, random_ids, reachable_bytes, tiny_llama

SIZES: dict[str, Any] = {
    "start_size": 4,
    "recent_size": 32,
    "compressed_budget": 64,
    "prefill_chunk_size": 16,
    "compressor_type": "quantized",
}
EAGER = IntegratedAttentionConfig(mass_bound=0.3, min_span=4, learning_rate=5.0)


def set_spans(cache: ADMSKVCache, steps: int) -> None:
    """The same span in every layer, kept."""
    assert cache.spans is not None
    cache.spans.steps = [steps] * len(cache.spans.steps)


def frozen(model: torch.nn.Module, steps: int, **changes: Any) -> ADMSKVCache:
    config = IntegratedAttentionConfig(learn=False)
    cache = enable_adms_llm(model, **{**SIZES, **changes}, integrated_attention=config)
    set_spans(cache, steps)
    return cache


def test_a_whole_span_is_the_identity() -> None:
    model = tiny_llama()
    ids = random_ids(2, 200)
    expected = feed(model, ids, enable_adms_llm(model, **SIZES))
    for config in (
        IntegratedAttentionConfig(learn=False),
        IntegratedAttentionConfig(mass_bound=0.0),
    ):
        cache = enable_adms_llm(model, **SIZES, integrated_attention=config)
        torch.testing.assert_close(feed(model, ids, cache), expected, atol=1e-5, rtol=1e-5)
        assert cache.summary()["integrated_attention"]["recent_entries_read"] == 1.0


def test_one_softmax_is_two_attentions_merged_by_log_sum_exp() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 8, generator=generator, dtype=torch.float64)
    keys = torch.randn(2, 2, 20, 8, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 2, 20, 6, generator=generator, dtype=torch.float64)
    whole = grouped_attention(query, keys, values, None, is_causal=False, scaling=0.3)
    outputs, logs = [], []
    for part in (slice(0, 7), slice(7, 20)):
        scores = query.unflatten(1, (2, 2)) @ keys[:, :, None, part].transpose(-1, -2) * 0.3
        logs.append(scores.logsumexp(-1))
        outputs.append(scores.softmax(-1) @ values[:, :, None, part])
    share = torch.stack(logs).softmax(0)[..., None]
    merged = (share[0] * outputs[0] + share[1] * outputs[1]).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(whole, merged)
    weights = attention_weights(query, keys, None, is_causal=False, scaling=0.3)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("step", [1, 16])
def test_a_span_reads_what_masking_the_rest_would_leave(step: int) -> None:
    """One layer, a span of half the tier: as if older recent tokens had left the ring."""
    model = tiny_llama(layers=1)
    ids = random_ids(1, 96)
    cache = frozen(model, 8, compressed_budget=0)
    feed(model, ids[:, :80], cache)
    twin = copy.deepcopy(cache)
    got = feed(model, ids[:, 80 : 80 + step], cache)
    # Without a middle, the ring's other tokens can be hidden by hand.
    layer, timeline = twin.layers[0], twin.timeline
    set_spans(twin, 16)
    old = torch.arange(timeline.seen[0] - 32, timeline.seen[0] - 16) % twin.sizes.ring
    layer.exact.keys[:, :, 4 + old] = 0
    layer.exact.values[:, :, 4 + old] = 0
    shown = feed(model, ids[:, 80 : 80 + step], copy.deepcopy(twin))
    assert not torch.allclose(got, shown), "zeros still take part in the softmax"
    hidden = hide(twin, 4 + old)
    with hidden:
        expected = feed(model, ids[:, 80 : 80 + step], twin)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def hide(cache: ADMSKVCache, slots: torch.Tensor) -> Any:
    """Masks slots of the exact tiers, whatever the counts say."""
    from unittest import mock

    from adms.positions import ForwardView

    original = ForwardView.exact_tokens

    def exact_tokens(view: ForwardView) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, valid = original(view)
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid.clone()
        valid[:, slots] = False
        return tokens, valid

    return mock.patch.object(ForwardView, "exact_tokens", exact_tokens)


def test_spans_shrink_in_a_stream_within_the_bound() -> None:
    model = tiny_llama()
    cache = enable_adms_llm(model, **SIZES, integrated_attention=EAGER)
    ids = random_ids(2, 400)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    for start in range(0, 400, 80):
        with torch.no_grad():
            part = ids[:, start : start + 80]
            logits = model(part, past_key_values=cache, attention_mask=mask[:, : start + 80]).logits
        assert logits.isfinite().all()
        assert reachable_bytes(cache) <= cache.nbytes <= cache.max_nbytes
    for step in range(20):
        assert feed(model, random_ids(2, 1, seed=step), cache).isfinite().all()
    report = cache.summary()["integrated_attention"]
    assert report["recent_entries_read"] < 0.95
    assert 0 < report["mass_given_up"] <= report["mass_given_up_worst_layer"] <= 0.3
    cache.reset()
    assert cache.summary()["tokens_seen"] == 0
    assert set(cache.spans.steps) == {16}


def test_a_failed_pass_teaches_nothing() -> None:
    model = tiny_llama()
    cache = enable_adms_llm(model, **SIZES, integrated_attention=EAGER)
    feed(model, random_ids(1, 120), cache)
    before = cache.spans.tensors()
    with pytest.raises(ValueError, match="no tokens"):
        model(torch.zeros(1, 0, dtype=torch.long), past_key_values=cache)
    bad = torch.full((1, 8, 64), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model(inputs_embeds=bad, past_key_values=cache)
    after = cache.spans.tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_padded_row_is_the_row_alone() -> None:
    model = tiny_llama()
    together, alone = frozen(model, 8), frozen(model, 8)
    check_padded_row(model, together, alone, total=160, padding=11, chunk=16)


@pytest.mark.parametrize("name", architectures.NAMES)
def test_every_architecture_with_both_layers(name: str) -> None:
    model = architectures.tiny(name)
    cache = enable_adms_llm(
        model,
        start_size=2,
        recent_size=16,
        compressed_budget=16,
        prefill_chunk_size=8,
        compressor_type="quantized",
        importance_ratio=0.0,
        adaptive_update=AdaptiveUpdateConfig(block_tokens=4),
        integrated_attention=EAGER,
    )
    for part in architectures.ids(2, 120).split([100, 16, 1, 1, 1, 1], dim=1):
        with torch.no_grad():
            assert model(part, past_key_values=cache).logits.isfinite().all()
        assert cache.nbytes <= cache.max_nbytes


@pytest.mark.parametrize("policy", ["similarity", "learned"])
def test_both_layers_another_compressor_and_sparse_prefill_save_load_and_go_on(
    policy: str, tmp_path: Any
) -> None:
    model = tiny_llama()
    sparse = SparsePrefillConfig(min_tokens=32, block_size=8, query_block_size=8)
    update = AdaptiveUpdateConfig(admission=0.75, block_tokens=8)
    given: dict[str, Any] = {"sparse_prefill": sparse}
    if policy == "learned":
        untrained = UpdateGates.untrained(model, block_tokens=8)
        # One layer admits every token, the other a quarter.
        gates = dataclasses.replace(untrained, admissions=(1.0, 0.25))
        update = AdaptiveUpdateConfig(policy="learned", gates=gates)
        given["adaptive_update"] = update
    cache = enable_adms_llm(
        model,
        **SIZES | {"compressor_type": "pq", "compressed_budget": 160},
        adaptive_update=update,
        integrated_attention=EAGER,
        sparse_prefill=sparse,
    )
    feed(model, random_ids(2, 420), cache)
    assert cache.summary()["middle"]["form"] == "pq"
    assert min(cache.spans.steps) < 16
    reach = [layer.middle.plan.geometry.capacity for layer in cache.layers]
    # Bytes follow the shares, down to half of an equal part.
    assert (reach[0] != reach[1]) == (policy == "learned")
    path = tmp_path / "stream.adms"
    cache.save(path)
    # The session brings the rest; sparse prefill and gates are no part of it.
    again = ADMSKVCache.load(path, model=model, **given)
    assert again.spans.report() == cache.spans.report()
    for part in random_ids(2, 60, seed=1).split([40, 1, 1, 18], dim=1):
        assert torch.equal(feed(model, part, again), feed(model, part, cache))
    assert again.spans.report() == cache.spans.report()
    assert cache.nbytes <= cache.max_nbytes


def test_a_wrong_type_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ADMSTypeError, match="integrated_attention must be an? Integrated"):
        enable_adms_llm(model, integrated_attention={"mass_bound": 0.1})  # type: ignore[arg-type]
    with pytest.raises(ADMSTypeError, match="adaptive_update must be an? AdaptiveUpdate"):
        enable_adms_llm(model, adaptive_update=True)  # type: ignore[arg-type]
