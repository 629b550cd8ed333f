"""Gates inside a cache: a tiny Llama, every architecture, every compressor."""

import dataclasses
from unittest import mock

import pytest
import torch

from adms import ADMSKVCache, disable_adms, enable_adms_llm
from adms.attention import tiered
from adms.compressors.low_rank import LowRankCoder
from adms.errors import ADMSValueError, SessionFileError
from adms.gates import AdaptiveUpdateConfig, UpdateGates
from tests.compressors.material import NAMES
from tests.patches import tiny as architectures
from tests.streams import check_padded_row, feed, random_ids, reachable_bytes, tiny_llama

SIZES = {"start_size": 4, "recent_size": 64, "compressed_budget": 160}


def trained(model: torch.nn.Module, seed: int = 0) -> UpdateGates:
    """Gates with random weights, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    gates = UpdateGates.untrained(model)
    weights = tuple(
        torch.randn(weight.shape, generator=generator) * 0.1 for weight in gates.weights
    )
    return dataclasses.replace(gates, weights=weights, admissions=(0.5, 1.0)[: len(weights)])


@pytest.mark.parametrize("kind", ["all admitted", "untrained"])
def test_the_identity(kind: str) -> None:
    model = tiny_llama(trained=4096)
    if kind == "untrained":
        update = AdaptiveUpdateConfig(policy="learned", gates=UpdateGates.untrained(model))
    else:
        update = AdaptiveUpdateConfig(admission=1.0)
    ids = random_ids(1, 900)
    expected = feed(model, ids, enable_adms_llm(model, **SIZES))
    got = feed(model, ids, enable_adms_llm(model, **SIZES, adaptive_update=update))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_compressor_holds_more_within_the_bound(name: str) -> None:
    model = tiny_llama(trained=4096)
    plain = enable_adms_llm(model, **SIZES, compressor_type=name)
    update = AdaptiveUpdateConfig(block_tokens=16)
    gated = enable_adms_llm(model, **SIZES, compressor_type=name, adaptive_update=update)
    ids = random_ids(2, 900)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    for start in range(0, 900, 180):
        part = ids[:, start : start + 180]
        with torch.no_grad():
            for cache in (plain, gated):
                logits = model(
                    part, past_key_values=cache, attention_mask=mask[:, : start + 180]
                ).logits
                assert logits.isfinite().all()
                assert cache.nbytes <= cache.max_nbytes
    assert gated.nbytes + gated.shared_nbytes == reachable_bytes(gated)
    assert gated.max_nbytes <= plain.max_nbytes + 2 * 24 * 2 * 32 * 4 * 2, "what waits is charged"
    own, other = (cache.layers[0].middle.plan.geometry for cache in (gated, plain))
    assert own.capacity > 1.3 * other.capacity
    # One token at a time, as generate does.
    for step in range(40):
        assert feed(model, random_ids(2, 1, seed=step), gated).isfinite().all()


@pytest.mark.parametrize("policy", ["similarity", "learned"])
def test_a_padded_row_is_the_row_alone_and_chunks_change_nothing(policy: str) -> None:
    model = tiny_llama(trained=4096)
    update = AdaptiveUpdateConfig()
    if policy == "learned":
        update = AdaptiveUpdateConfig(policy="learned", gates=trained(model))
    together, alone = (enable_adms_llm(model, **SIZES, adaptive_update=update) for _ in range(2))
    check_padded_row(model, together, alone, total=832)
    assert "gates" in alone.layers[0].cache.binding.compressor.name


def test_a_budget_that_waiting_tokens_would_use_up_stays_exact() -> None:
    model = tiny_llama(trained=256)
    sizes = {"start_size": 4, "recent_size": 32, "compressed_budget": 64, "prefill_chunk_size": 16}
    update = AdaptiveUpdateConfig(block_tokens=63)
    cache = enable_adms_llm(model, **sizes, adaptive_update=update)
    assert feed(model, random_ids(1, 300), cache).isfinite().all()
    assert cache.summary()["middle"]["form"] == "exact"
    assert cache.nbytes <= cache.max_nbytes


@pytest.mark.parametrize("budget", [116, 120, 160])
def test_rows_turn_to_codes_one_after_another(budget: int) -> None:
    """A row that still holds exact tokens has no records, whatever its bytes look like."""
    model = tiny_llama(trained=4096)
    sizes = {**SIZES, "compressed_budget": budget}
    together, alone = (
        enable_adms_llm(model, **sizes, adaptive_update=AdaptiveUpdateConfig(block_tokens=16))
        for _ in range(2)
    )
    check_padded_row(model, together, alone, total=320)


@pytest.mark.parametrize("name", architectures.NAMES)
def test_every_architecture(name: str) -> None:
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
    )
    ids = architectures.ids(2, 150)
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits
    assert logits.isfinite().all()
    assert cache.nbytes <= cache.max_nbytes


def layers_of(model: torch.nn.Module, shares: tuple[float, ...]) -> AdaptiveUpdateConfig:
    gates = dataclasses.replace(UpdateGates.untrained(model), admissions=shares)
    return AdaptiveUpdateConfig(policy="learned", gates=gates)


@pytest.mark.parametrize("parameters", [{}, {"use_adaptive_budget": True}])
def test_layers_have_bytes_in_proportion_to_what_they_admit(parameters: dict) -> None:
    """All reach as far back, in the bytes of layers that are alike."""
    model = tiny_llama(trained=4096, layers=3)
    sizes = {**SIZES, "compressed_budget": 200, "compressor_type": "quantized", **parameters}
    alike, own = (
        enable_adms_llm(model, **sizes, adaptive_update=layers_of(model, shares))
        for shares in ((0.5,) * 3, (1.0, 0.5, 0.125))
    )
    ids = random_ids(1, 256)
    phases = []
    for cache in (alike, own):
        for start in range(0, 256, 64):
            logits = feed(model, ids[:, start : start + 64], cache)
            assert logits.isfinite().all()
            assert cache.nbytes <= cache.max_nbytes
            total = cache.timeline.middle_tokens(0)
            coded = [layer.middle.plan.geometry.is_coded(total) for layer in cache.layers]
            assert len(set(coded)) == 1, "landmarks are settled in all layers together"
            phases += coded
    assert not phases[0]
    assert phases[-1]
    assert own.max_nbytes <= alike.max_nbytes
    assert own.nbytes + own.shared_nbytes == reachable_bytes(own)
    geometries = [layer.middle.plan.geometry for layer in own.layers]
    assert len({geometry.landmarks for geometry in geometries}) == 1
    # The last has the least bytes that a layer gets, and reaches farther for them.
    reach = [geometry.capacity for geometry in geometries]
    assert max(reach[:2]) < 1.2 * min(reach[:2])
    assert max(reach[:2]) < reach[2]
    arenas = [layer.middle.plan.arena_bytes for layer in own.layers]
    assert arenas[0] > arenas[1] > arenas[2] > arenas[0] // 4


@pytest.mark.parametrize("policy", ["similarity", "learned"])
def test_a_session_goes_on_with_the_same_gates_only(policy: str, tmp_path) -> None:
    model = tiny_llama(trained=4096)
    gates = trained(model)

    def update() -> AdaptiveUpdateConfig:
        if policy == "learned":
            return AdaptiveUpdateConfig(policy="learned", gates=gates)
        return AdaptiveUpdateConfig()

    cache = enable_adms_llm(model, **SIZES, adaptive_update=update())
    feed(model, random_ids(1, 700), cache)
    path = tmp_path / "stream.adms"
    cache.save(path)
    given = {} if policy == "similarity" else {"adaptive_update": update()}
    again = ADMSKVCache.load(path, model=model, **given)
    more = random_ids(1, 100, seed=1)
    assert torch.equal(feed(model, more, again), feed(model, more, cache))
    with pytest.raises(SessionFileError, match="codes were made with"):
        ADMSKVCache.load(path, model=model, adaptive_update=None)
    if policy == "learned":
        with pytest.raises(SessionFileError, match="gates, which belong to the model"):
            ADMSKVCache.load(path, model=model)
        gates = trained(model, seed=1)
        with pytest.raises(SessionFileError, match="codes were made with compressor"):
            ADMSKVCache.load(path, model=model, adaptive_update=update())


def test_gates_of_another_model_and_a_missing_middle_are_refused() -> None:
    model, other, narrow = (
        tiny_llama(),
        tiny_llama(seed=1),
        tiny_llama(layers=3),
    )
    update = AdaptiveUpdateConfig(policy="learned", gates=trained(model))
    with pytest.raises(ADMSValueError, match=r"other weights \(.* differs\)"):
        enable_adms_llm(other, adaptive_update=update)
    with pytest.raises(ADMSValueError, match="another model"):
        enable_adms_llm(narrow, adaptive_update=update)
    with pytest.raises(ADMSValueError, match="compressed_budget=0 leaves none"):
        enable_adms_llm(model, compressed_budget=0, adaptive_update=AdaptiveUpdateConfig())
    enable_adms_llm(model.to(torch.bfloat16), adaptive_update=update)
    disable_adms(model)


@pytest.mark.parametrize("chunk", [1, 64])
def test_every_token_of_the_middle_weighs_once(chunk: int) -> None:
    """Landmarks count one, and the entries that they were folded into so much less."""
    model = tiny_llama(trained=4096)
    cache = enable_adms_llm(
        model,
        **SIZES,
        compressor_type="quantized",
        importance_ratio=0.3,
        adaptive_update=AdaptiveUpdateConfig(),
    )
    feed(model, random_ids(2, 800), cache)
    found: list[float] = []
    original = tiered.without_landmarks

    def spy(entries, landmarks, there, places, *rest):
        result = original(entries, landmarks, there, places, *rest)
        kept = torch.ones_like(result.log_weight[:, 0]) if result.valid is None else result.valid
        mass = (result.log_weight[:, 0].exp() * kept).sum(1)
        first = places.min().floor()
        found.extend((mass + (landmarks >= first).sum(1)).tolist())
        assert not torch.equal(result.log_weight, entries.log_weight)
        return result

    geometry = cache.layers[0].middle.plan.geometry
    held = geometry.held(cache.timeline.middle_tokens(0))
    with mock.patch.object(tiered, "without_landmarks", spy):
        feed(model, random_ids(2, chunk, seed=1), cache)
    assert geometry.landmarks > 10
    assert found == pytest.approx([held] * 4, abs=1e-2)


def test_layers_that_are_coded_together_are_what_each_alone_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Landmarks too, whose codes come from the coder of their own layer."""
    model, ids = tiny_llama(layers=3, trained=2048), random_ids(2, 500)
    logits = []
    for together in (True, False):
        monkeypatch.setattr(LowRankCoder, "is_stackable", together)
        cache = enable_adms_llm(
            model,
            start_size=2,
            recent_size=16,
            compressed_budget=96,
            importance_ratio=0.3,
            adaptive_update=AdaptiveUpdateConfig(),
        )
        logits.append(feed(model, ids, cache))
    plan = cache.layers[0].middle.plan
    assert plan.coder is not None and plan.geometry.landmarks
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
