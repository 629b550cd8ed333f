"""Sessions: saved, loaded and continued; and every file that is not what it should be, refused."""

import json
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adms
from adms import session_file
from adms.compressors import codebooks
from adms.compressors.base import COMPRESSORS
from adms.importance import METRICS
from adms.patches.mpt import MptFamily
from adms.session import load_session, save_session
from tests.patches.tiny import NAMES, ids, tiny

SMALL: dict[str, Any] = {
    "start_size": 2,
    "recent_size": 8,
    "compressed_budget": 12,
    "compression_interval": 2,
    "prefill_chunk_size": 8,
}


def llama(seed: int = 0, **changes: Any) -> Any:
    """A Llama whose codes fit well inside its middle."""
    torch.manual_seed(seed)
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


CODED: dict[str, Any] = {"recent_size": 32, "compressed_budget": 48, "prefill_chunk_size": 32}


@torch.no_grad()
def run(model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits."""
    return model(tokens, past_key_values=cache).logits


def text(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Ids of the Llama above."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(64, (rows, count), generator=generator)


def continues(model: Any, cache: Any, path: Path, more: torch.Tensor) -> None:
    """Saves, disables, loads, and compares with going on."""
    cache.save(path)
    expected = [run(model, more[:, :11], cache), *(run(model, one, cache) for one in singles(more))]
    adms.disable_adms(model)
    loaded = adms.ADMSKVCache.load(path, model=model)
    assert adms.is_enabled(model)
    found = [run(model, more[:, :11], loaded), *(run(model, one, loaded) for one in singles(more))]
    for own, other in zip(expected, found, strict=True):
        assert torch.equal(own, other)
    assert loaded.summary() == cache.summary()
    assert loaded.config == cache.config and loaded.config.explicit == cache.config.explicit


def singles(more: torch.Tensor) -> list[torch.Tensor]:
    return [more[:, at : at + 1] for at in range(11, more.shape[1])]


# --- continuing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_continuing_equals_never_having_stopped(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    tokens = ids(2, 60)
    cache = adms.enable_adms_llm(model, **SMALL)
    run(model, tokens[:, :41], cache)
    continues(model, cache, tmp_path / "a.adms", tokens[:, 41:])


@pytest.mark.parametrize("count", [0, 1, 7, 33, 40, 80, 150, 400])
@pytest.mark.parametrize("ratio", [0.0, 0.2])
def test_at_every_age(count: int, ratio: float, tmp_path: Path) -> None:
    model = llama()
    cache = adms.enable_adms_llm(model, **CODED, importance_ratio=ratio)
    if count:
        run(model, text(count), cache)
    continues(model, cache, tmp_path / "a.adms", text(60, seed=1))


@pytest.mark.parametrize("name", sorted(set(COMPRESSORS)))
def test_every_compressor(name: str, tmp_path: Path) -> None:
    if name.startswith("test_"):
        pytest.skip("another test's own")
    model = llama()
    cache = adms.enable_adms_llm(model, **CODED, compressor_type=name)
    run(model, text(300), cache)
    continues(model, cache, tmp_path / "a.adms", text(60, seed=1))


def test_a_stream_keeps_the_sinks_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the number of sinks was left to the family, and its choice is another one by now."""
    model = tiny("mpt")
    sizes = {name: value for name, value in SMALL.items() if name != "start_size"}
    with monkeypatch.context() as before:
        before.setattr(MptFamily, "default_sinks", lambda self, config: None)
        cache = adms.enable_adms_llm(model, **sizes)
    run(model, ids(1, 70), cache)
    assert cache.sizes.sink == 4
    cache.save(tmp_path / "old.adms")
    expected = run(model, ids(1, 40, seed=1), cache)
    again = adms.ADMSKVCache.load(tmp_path / "old.adms", model=model)
    assert again.sizes == cache.sizes
    assert torch.equal(run(model, ids(1, 40, seed=1), again), expected)
    again.save(tmp_path / "new.adms")
    assert adms.ADMSKVCache.load(tmp_path / "new.adms", model=model).sizes == cache.sizes
    assert adms.enable_adms_llm(model, **sizes).sizes.sink == 8


@pytest.mark.parametrize("name", sorted(set(METRICS)))
def test_every_metric(name: str, tmp_path: Path) -> None:
    model = llama()
    cache = adms.enable_adms_llm(model, **CODED, importance_ratio=0.3, importance_metric=name)
    run(model, text(300), cache)
    continues(model, cache, tmp_path / "a.adms", text(60, seed=1))


def test_rows_of_different_length(tmp_path: Path) -> None:
    model = llama()
    cache = adms.enable_adms_llm(model, **CODED)
    tokens = text(200, rows=3)
    mask = torch.ones_like(tokens)
    mask[1, :150] = 0
    mask[2, :190] = 0
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=cache)
    continues(model, cache, tmp_path / "a.adms", text(60, rows=3, seed=1))


@pytest.mark.parametrize("count", [30, 60, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(
    count: int, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = llama(), tmp_path / "a.adms"
    cache = adms.enable_adms_llm(model, **CODED, importance_ratio=0.1)
    run(model, text(count), cache)
    cache.save(path)
    expected = run(model, text(8, seed=1), cache)
    other = llama().to(dtype)
    loaded = adms.ADMSKVCache.load(path, model=other)
    assert "was saved in torch.float32 and is continued in" in caplog.text
    found = run(other, text(8, seed=1), loaded)
    tolerance = 1e-5 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)
    assert loaded.nbytes <= loaded.max_nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_another_device(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "a.adms"
    cache = adms.enable_adms_llm(model, **CODED)
    run(model, text(300), cache)
    cache.save(path)
    expected = run(model, text(8, seed=1), cache)
    other = llama().cuda()
    loaded = adms.ADMSKVCache.load(path, model=other)
    found = run(other, text(8, seed=1).cuda(), loaded)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compressor", sorted(COMPRESSORS))
def test_there_and_back_in_mid_stream(compressor: str, tmp_path: Path) -> None:
    """CUDA, CPU, CUDA: each part of the stream as if it had always been where it is now."""
    path = tmp_path / "a.adms"
    there, here = llama().cuda(), llama()
    moving, staying = (
        adms.enable_adms_llm(there, compressor_type=compressor, **CODED) for _ in "12"
    )
    for part, model in enumerate((there, here, there)):
        if part:
            moving.save(path)
            moving = adms.ADMSKVCache.load(path, model=model)
        for step, count in enumerate((100, 1, 1)):
            ids = text(count, seed=10 * part + step)
            found = run(model, ids.to(model.device), moving)
            expected = run(there, ids.cuda(), staying)
            # A code may round to its neighbour on another device, seldom.
            close = torch.isclose(found.cpu(), expected.cpu(), atol=1e-3, rtol=1e-3)
            assert close.float().mean() > 0.98
            assert (found.cpu() - expected.cpu()).abs().max() < 0.1
            assert moving.nbytes <= moving.max_nbytes
    assert moving.tokens_seen == staying.tokens_seen == 306


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_offloaded_in_mid_stream_and_fetched_again() -> None:
    """As accelerate and transformers ask a cache to: bit for bit as if it had stayed."""
    model = llama().cuda()
    moved, stayed = (adms.enable_adms_llm(model, **CODED) for _ in "12")
    for step in range(4):
        ids = text(70, seed=step).cuda()
        assert torch.equal(run(model, ids, moved), run(model, ids, stayed))
        for layer in moved.layers:
            layer.offload()
            assert not layer.exact.keys.is_cuda and not layer.middle.arena.is_cuda
            layer.prefetch()
            assert layer.exact.keys.is_cuda and layer.middle.arena.is_cuda


def test_notes_and_ids_come_back(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "a.adms"
    cache = adms.enable_adms_llm(model, **CODED)
    run(model, text(20), cache)
    notes = {"title": 'Gru\u00df "sha256":"' + "0" * 64, "list": [1, 2.5, None, True]}
    save_session(cache, path, last_token_ids=text(20)[:, -3:], notes=notes)
    loaded = load_session(path, model)
    assert loaded.notes == notes
    assert torch.equal(loaded.last_token_ids, text(20)[:, -3:])
    cache.save(path)
    assert load_session(path, model).last_token_ids is None


# --- writing -------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = llama(), tmp_path / "a.adms"
    cache = adms.enable_adms_llm(model, **CODED)
    run(model, text(20), cache)
    cache.save(path)
    before = path.read_bytes()
    run(model, text(20), cache)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(adms.SessionFileError, match="No space left.*unchanged"):
                cache.save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
    cache.save(path)
    assert load_session(path, model).cache.tokens_seen == 40


@pytest.mark.skipif(os.name != "posix", reason="modes and process ids as POSIX has them")
def test_files_are_private_and_leftovers_removed(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "a.adms"
    cache = adms.enable_adms_llm(model, **CODED)
    # A number that no process can have, and this process, whose save could be under way.
    dead = tmp_path / ".a.adms.999999999.x.partial"
    alive = tmp_path / f".a.adms.{os.getpid()}.x.partial"
    other = tmp_path / ".b.adms.999999999.x.partial"
    for leftover in (dead, alive, other):
        leftover.write_bytes(b"part")
    cache.save(path)
    assert not dead.exists() and alive.exists() and other.exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    cache.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    link = tmp_path / "link.adms"
    link.symlink_to(path)
    run(model, text(9), cache)
    cache.save(link)
    assert link.is_symlink() and load_session(path, model).cache.tokens_seen == 9


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "a.adms"
    with pytest.raises(adms.CacheStateError, match="not bound"):
        adms.ADMSKVCache().save(path)
    cache = adms.enable_adms_llm(model, **CODED)
    with pytest.raises(adms.SessionFileError, match="does not exist"):
        cache.save(tmp_path / "missing" / "a.adms")
    with pytest.raises(adms.SessionFileError, match="is a folder"):
        cache.save(tmp_path)
    with pytest.raises(adms.ADMSTypeError, match="path must be"):
        cache.save(3)
    for notes in ([1], {"x": object()}, {"x": float("nan")}):
        with pytest.raises(adms.ADMSTypeError, match="notes must be"):
            cache.save(path, notes=notes)
    for wrong in ("ab", [1, 2], [[1.5]], [[True]]):
        with pytest.raises(adms.ADMSTypeError, match="last_token_ids"):
            cache.save(path, last_token_ids=wrong)
    with pytest.raises(TypeError, match="unexpected keyword"):
        cache.save(path, colour=1)
    assert not path.exists()
    own = adms.enable_adms_llm(model, compressor_type=COMPRESSORS.get("low_rank"))
    with pytest.raises(adms.ADMSTypeError, match="register it under a name"):
        own.save(path)
    with cache.exclusive(), pytest.raises(adms.CacheStateError, match="in use"):
        cache.save(path)


# --- models that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 64}, "hidden_size: 32 in the file, 64 in the model"),
        ({"num_hidden_layers": 3}, "layers"),
        ({"num_key_value_heads": 2}, "layers"),
        ({"vocab_size": 65}, "vocab_size"),
        ({"max_position_embeddings": 512}, "max_positions: 256"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta: 10000"),
    ],
)
def test_another_model(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "a.adms"
    model = llama()
    cache = adms.enable_adms_llm(model, **CODED)
    run(model, text(100), cache)
    cache.save(path)
    other = llama(**changes)
    with pytest.raises(adms.SessionFileError, match=named):
        adms.ADMSKVCache.load(path, model=other)
    assert not adms.is_enabled(other)


def test_the_same_form_with_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.adms"
    model = llama()
    adms.enable_adms_llm(model, **CODED).save(path)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(adms.SessionFileError, match="other weights"):
            adms.ADMSKVCache.load(path, model=llama(seed=1).to(dtype))
    tuned = llama()
    with torch.no_grad():
        tuned.model.layers[1].self_attn.k_proj.weight.mul_(1 + 1e-4)
    with pytest.raises(adms.SessionFileError, match="other weights.*k_proj"):
        cache = adms.enable_adms_llm(model, **CODED)
        run(model, text(4), cache)
        cache.save(path)
        adms.ADMSKVCache.load(path, model=tuned)


def test_another_codebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = llama(), tmp_path / "a.adms"
    cache = adms.enable_adms_llm(model, **CODED)
    run(model, text(200), cache)
    cache.save(path)
    books, errors = codebooks.shipped()
    monkeypatch.setattr("adms.fingerprint.shipped", lambda: (books + 1e-3, errors))
    with pytest.raises(adms.SessionFileError, match="codes were made with codebooks"):
        adms.ADMSKVCache.load(path, model=model)


def test_wrong_arguments_of_load(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "a.adms"
    adms.enable_adms_llm(model, **CODED).save(path)
    adms.disable_adms(model)
    with pytest.raises(adms.ADMSTypeError, match="brings its own configuration"):
        adms.ADMSKVCache.load(path, model=model, recent_size=4)
    with pytest.raises(adms.ADMSTypeError, match="model must be"):
        adms.ADMSKVCache.load(path, model="llama")
    with pytest.raises(TypeError):
        adms.ADMSKVCache.load(path, model=model, colour=3)
    assert not adms.is_enabled(model)


# --- files that are not what they should be ------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, bytes]:
    """A model and the bytes of a session of it."""
    model = llama()
    cache = adms.enable_adms_llm(model, **CODED, importance_ratio=0.2)
    run(model, text(250, rows=2), cache)
    path = tmp_path_factory.mktemp("whole") / "a.adms"
    cache.save(path, notes={"a": "b"})
    adms.disable_adms(model)
    return model, path.read_bytes()


def refused(model: Any, path: Path, data: bytes) -> str:
    """The error that loading ``data`` raises."""
    path.write_bytes(data)
    with pytest.raises(adms.SessionFileError) as raised:
        adms.ADMSKVCache.load(path, model=model)
    assert not adms.is_enabled(model)
    assert str(path) in str(raised.value)
    return str(raised.value)


def test_300_mutated_files(whole: tuple[Any, bytes], tmp_path: Path) -> None:
    model, data = whole
    path = tmp_path / "mutated.adms"
    chooser = random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    mutated: list[bytes] = []
    for index in range(160):
        # Half of them in the header, which is the smaller part.
        place = chooser.randrange(header if index % 2 else len(data))
        flipped = bytearray(data)
        flipped[place] ^= 1 << chooser.randrange(8)
        mutated.append(bytes(flipped))
    mutated += [data[: chooser.randrange(len(data))] for _ in range(50)]
    mutated += [data + os.urandom(chooser.randrange(1, 99)) for _ in range(10)]
    tensors = session_file.load(data)
    metadata = json.loads(data[8:header])["__metadata__"]
    names = sorted(tensors)
    for _ in range(45):
        one, other = chooser.sample(names, 2)
        swapped = {**tensors, one: tensors[other], other: tensors[one]}
        mutated.append(session_file.save(swapped, metadata))
    for _ in range(40):
        info = json.loads(metadata["adms"])
        part = chooser.choice(sorted(info))
        info[part] = chooser.choice([None, 0, 1, "x", [], {}, [[]], -1, 2**70])
        mutated.append(session_file.save(tensors, {**metadata, "adms": json.dumps(info)}))
    mutated = [one for one in mutated if one != data]
    assert len(mutated) >= 300
    for one in mutated:
        refused(model, path, one)
    path.write_bytes(data)
    assert adms.ADMSKVCache.load(path, model=model).tokens_seen == 250
    adms.disable_adms(model)


WRONG: list[Any] = [None, True, -1, 3, 2**70, 1.5, "x", [], {}, [None], [[]], {"x": 1}]
# What only tells about the file; every value of it leaves the stream as it is.
HARMLESS = {"notes"}


def edits(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places inside a JSON value, of which a few of every list."""
    found = [place] if place else []
    if isinstance(value, dict):
        for name in value:
            found += edits(value[name], (*place, name))
    elif isinstance(value, list):
        for index in range(min(2, len(value))):
            found += edits(value[index], (*place, index))
    return found


def test_edited_descriptions_with_a_fitting_checksum(
    whole: tuple[Any, bytes], tmp_path: Path
) -> None:
    """Even forged files never crash, and continue nothing that is not their own stream."""
    model, data = whole
    path = tmp_path / "forged.adms"
    tensors, info = session_file.read(_written(path, data))
    more = text(8, rows=2, seed=1)
    expected = run(model, more, adms.ADMSKVCache.load(path, model=model))
    adms.disable_adms(model)
    places = [place for place in edits(info) if place[0] not in ("format", "version", "weights")]
    accepted = set()
    for number, place in enumerate(places):
        # Every place with three of the values, in turns.
        for offset in range(3):
            wrong = WRONG[(3 * number + offset) % len(WRONG)]
            forged = json.loads(json.dumps(info))
            holder = forged
            for part in place[:-1]:
                holder = holder[part]
            if holder[place[-1]] == wrong:
                continue
            holder[place[-1]] = wrong
            content = session_file.pack(tensors, forged)
            path.write_bytes(content)
            try:
                loaded = adms.ADMSKVCache.load(path, model=model)
            except adms.SessionFileError:
                assert not adms.is_enabled(model)
                continue
            assert torch.equal(run(model, more, loaded), expected), (place, wrong)
            adms.disable_adms(model)
            accepted.add(place[0])
    # A configuration value that this stream makes no use of changes nothing.
    assert accepted <= HARMLESS | {"config", "explicit"}


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_tensors_of_another_form(whole: tuple[Any, bytes], tmp_path: Path) -> None:
    model, data = whole
    path = tmp_path / "forged.adms"
    tensors, info = session_file.read(_written(path, data))
    for name, tensor in tensors.items():
        poisoned = tensor.clone()
        if tensor.is_floating_point():
            poisoned.view(-1)[0] = float("nan")
        for wrong in (
            tensor[:1],
            tensor[:, :-1],
            tensor.double(),
            tensor.flatten(),
            poisoned,
            None,
        ):
            if wrong is not None and wrong.dtype == tensor.dtype and torch.equal(wrong, tensor):
                continue
            forged = {key: value for key, value in tensors.items() if key != name}
            if wrong is not None:
                forged[name] = wrong.contiguous()
            message = refused(model, path, session_file.pack(forged, info))
            assert "layer" in message or "calibration" in message


def test_foreign_new_and_missing_files(whole: tuple[Any, bytes], tmp_path: Path) -> None:
    model, data = whole
    path = tmp_path / "a.adms"
    with pytest.raises(adms.SessionFileError, match="cannot read.*No such file"):
        adms.ADMSKVCache.load(path, model=model)
    assert "no safetensors file" in refused(model, path, b"")
    assert "no safetensors file" in refused(model, path, b"PK\x03\x04" + b"zip" * 100)
    assert "cut short" in refused(model, path, (50).to_bytes(8, "little") + b"{")
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    assert "not a session" in refused(model, path, path.read_bytes())
    tensors, info = session_file.read(_written(path, data))
    newer = {**info, "version": session_file.VERSION + 1}
    described = json.dumps(newer)
    save_file(tensors, path, {"adms": described, "sha256": "0" * 64})
    assert "update adms" in refused(model, path, path.read_bytes())
    deep = "[" * 100_000
    save_file(tensors, path, {"adms": deep, "sha256": "0" * 64})
    assert "damaged" in refused(model, path, path.read_bytes())
    with pytest.raises(adms.SessionFileError, match="cannot read"):
        adms.ADMSKVCache.load(tmp_path, model=model)


def test_files_are_plain_safetensors(whole: tuple[Any, bytes], tmp_path: Path) -> None:
    """Any reader of safetensors opens one; there is nothing to execute in it."""
    _, data = whole
    found = load_file(_written(tmp_path / "a.adms", data))
    assert "layers.0.keys" in found and "layers.1.middle" in found
