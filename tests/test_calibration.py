"""The bases that are fitted once per model."""

from pathlib import Path

import pytest
import torch

import adms
from adms import ADMSKVCache, ADMSTypeError, ADMSValueError, Calibration, enable_adms_llm
from adms.calibration import LayerCalibration
from adms.entries import TokenShape
from adms.moments import Moments
from tests.streams import feed, random_ids, small_cache, tiny_llama

SHAPE = TokenShape(2, 16, 8)


def test_bases_are_orthonormal_and_sort_what_varies_most() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator)
    keys = (torch.randn(1, 600, 32, generator=generator) * torch.logspace(1, -1, 32)) @ mixing
    values = torch.randn(1, 600, 16, generator=generator)
    moments = Moments(SHAPE, 2)
    moments.add(
        keys.unflatten(2, (2, 16)).transpose(1, 2), values.unflatten(2, (2, 8)).transpose(1, 2)
    )
    tensors = moments.fit(1)
    basis = tensors["key_basis"].double() * tensors["key_scale"].double()[..., None]
    torch.testing.assert_close(
        basis[0] @ basis[0].T, torch.eye(32, dtype=torch.float64), atol=0.03, rtol=0
    )
    power = (keys[0].double() - keys[0].double().mean(0)) @ basis[0].T
    power = power.square().mean(0)
    # int8 rows let strong directions leak into weak ones, so only the strong ones are compared.
    assert (power[:12].diff() < 0).all()
    exact = torch.linalg.eigvalsh(torch.cov(keys[0].double().T)).flip(0)
    torch.testing.assert_close(power[:6], exact[:6], rtol=0.05, atol=0)


def test_queries_weigh_the_channels_they_read() -> None:
    generator = torch.Generator().manual_seed(1)
    moments = Moments(SHAPE, 1)
    moments.add(
        torch.randn(1, 2, 300, 16, generator=generator),
        torch.randn(1, 2, 300, 8, generator=generator),
    )
    queries = torch.randn(1, 4, 300, 16, generator=generator)
    queries[:, :, :, 3] *= 10
    moments.add_queries(queries)
    weight = moments.fit(2)["key_weight"]
    assert weight.shape == (2, 16)
    assert (weight.argmax(1) == 3).all()


def test_a_plan_keeps_to_its_share_of_the_model() -> None:
    shapes = {0: TokenShape(8, 32, 32), 1: TokenShape(8, 32, 32)}
    generous = Calibration.planned(shapes, 10**9)
    assert {layer.block_heads for layer in generous.layers.values()} == {8}
    tight = Calibration.planned(shapes, 5 * 10**6)
    assert {layer.block_heads for layer in tight.layers.values()} == {2}
    planned = sum(layer.nbytes(shapes[index]) for index, layer in tight.layers.items())
    assert planned <= 0.02 * 5 * 10**6
    wide = Calibration.planned({0: TokenShape(32, 128, 128)}, 10**12)
    assert wide.layers[0].block_heads == 2


def test_the_first_stream_that_needs_it_fits_it_and_others_share_it() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    feed(model, random_ids(1, 60), cache)
    assert cache.shared_nbytes == 0
    state = torch.get_rng_state()
    feed(model, random_ids(1, 500, seed=1), cache)
    assert torch.equal(torch.get_rng_state(), state)
    assert cache.summary()["middle"]["form"] == "low_rank"
    assert cache.shared_nbytes > 0
    other = small_cache(model)
    assert other.binding_for_use.calibration is cache.binding_for_use.calibration
    assert sum(module.training for module in model.modules()) == 0


def test_calibrate_saves_and_is_taken_as_object_or_path(tmp_path: Path) -> None:
    model = tiny_llama()
    before = model.config.to_json_string()
    texts = [random_ids(1, 400, seed=seed)[0] for seed in range(2)]
    path = tmp_path / "bases.safetensors"
    found = adms.calibrate(model, texts, path)
    assert not adms.is_enabled(model) and model.config.to_json_string() == before
    assert "800 tokens" in found.source
    ids = random_ids(1, 500, seed=5)
    outputs = []
    for given in (found, path, str(path)):
        cache = enable_adms_llm(
            model, start_size=4, recent_size=64, compressed_budget=160, calibration=given
        )
        outputs.append(feed(model, ids, cache))
        assert cache.binding_for_use.calibration is not None
        assert cache.binding_for_use.calibration.equals(found)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], feed(model, ids, small_cache(model)))


def test_a_path_that_cannot_be_written_is_refused_before_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adms.fit.fit_to_texts", lambda *_: pytest.fail("fitted"))
    (tmp_path / "file").touch()
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "b", "cannot write")):
        with pytest.raises(ADMSValueError, match=message):
            adms.calibrate(tiny_llama(), [random_ids(1, 300)[0]], path)


def test_two_fits_with_one_seed_agree() -> None:
    first, second = adms.calibrate(tiny_llama()), adms.calibrate(tiny_llama())
    assert first.equals(second)
    assert not first.equals(adms.calibrate(tiny_llama(), seed=1))


def test_a_session_brings_the_bases_of_its_codes(tmp_path: Path) -> None:
    model = tiny_llama()
    own = adms.calibrate(model, [random_ids(1, 300)[0]])
    cache = enable_adms_llm(
        model, start_size=4, recent_size=64, compressed_budget=160, calibration=own
    )
    feed(model, random_ids(1, 500), cache)
    cache.save(tmp_path / "stream.adms")
    expected = feed(model, random_ids(1, 80, seed=3), cache)
    again = ADMSKVCache.load(tmp_path / "stream.adms", model=model)
    assert torch.equal(feed(model, random_ids(1, 80, seed=3), again), expected)
    other = adms.calibrate(model, [random_ids(1, 300, seed=9)[0]])
    with pytest.raises(adms.SessionFileError, match="another calibration"):
        ADMSKVCache.load(tmp_path / "stream.adms", model=model, calibration=other)


def test_wrong_calibrations_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ADMSTypeError, match="calibration must be"):
        enable_adms_llm(model, calibration=3)  # type: ignore[arg-type]
    with pytest.raises(ADMSValueError, match="not a readable calibration"):
        enable_adms_llm(model, calibration=tmp_path / "none.safetensors")
    unfitted = Calibration({0: LayerCalibration(1)}, {0: SHAPE})
    with pytest.raises(ADMSValueError, match="not one of this model"):
        enable_adms_llm(model, calibration=unfitted)
    with pytest.raises(ADMSValueError, match="not fitted"):
        unfitted.save(tmp_path / "none.safetensors")
    fitted = adms.calibrate(model)
    with pytest.raises(ADMSValueError, match="makes no use"):
        enable_adms_llm(model, compressor_type="quantized", calibration=fitted)
    for texts, error in (("a text", ADMSTypeError), ([], ADMSValueError), ([3], ADMSTypeError)):
        with pytest.raises(error, match="texts"):
            adms.calibrate(model, texts)  # type: ignore[arg-type]
    with pytest.raises(ADMSValueError, match="no tokens"):
        adms.calibrate(model, [torch.zeros(0, dtype=torch.long)])
    assert not adms.is_enabled(model)
