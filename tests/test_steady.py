"""The static commit of steady decoding, uncaptured on the CPU and captured on a GPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import adms.commit
import adms.compiled_layers
import adms.compressors.low_rank
import adms.step
from adms import ADMSKVCache
from adms.errors import ADMSValueError
from adms.steady import SteadyCommit
from tests.streams import feed, random_ids, small_cache, tiny_llama
from tests.test_commit import Kernels, assert_alike

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CODED: dict[str, Any] = {"recent_size": 24, "compression_interval": 8}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[SteadyCommit]:
    """The static commits that were made; a CPU makes them too."""
    monkeypatch.setattr(adms.step, "STEADY_DEVICES", ("cuda", "cpu"))
    apply, commits = SteadyCommit.apply, []

    def counting(self: SteadyCommit) -> None:
        apply(self)
        commits.append(self)

    monkeypatch.setattr(SteadyCommit, "apply", counting)
    return commits


@contextlib.contextmanager
def only_general() -> Iterator[None]:
    """Has every commit made in the general way, after steps that read as much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SteadyCommit, "makes", lambda *_: False)
        yield


def both_ways() -> list[contextlib.AbstractContextManager[None]]:
    return [only_general(), contextlib.nullcontext()]


def three_rows(model: Any, cache: ADMSKVCache) -> None:
    """Of other lengths, all of them coded, and losing tokens in the same passes."""
    ids = random_ids(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :37] = mask[2, :9] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    feed(model, random_ids(3, 260, seed=1), cache, 52)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("compressor", ["low_rank", "quantized", "pq", "auto"])
def test_steady_commits_are_commits(compressor: str, rows: int, made: list[SteadyCommit]) -> None:
    model = tiny_llama(layers=3, trained=2048)
    caches, logits = [], []
    for way in both_ways():
        with way:
            cache = small_cache(model, compressor_type=compressor, **CODED)
            if rows == 1:
                feed(model, random_ids(1, 400), cache)
            else:
                three_rows(model, cache)
            logits.append(feed(model, random_ids(rows, 60, seed=2), cache, 1))
            assert cache.step is not None, cache.step_obstacle
            caches.append(cache)
    assert len(made) == 7 and {one.owner for one in made} == {caches[1].step}
    assert_alike(*caches)
    assert torch.equal(*logits)


def test_they_stay_the_same_until_the_oldest_codes_go(made: list[SteadyCommit]) -> None:
    """Where codes lie in rings that are not full, become full and turn over."""
    model = tiny_llama(trained=2048)
    caches = []
    for way in both_ways():
        with way:
            cache = small_cache(model, compressor_type="auto", compressed_budget=64, **CODED)
            for count in (200, 350):
                feed(model, random_ids(1, count), cache)
                feed(model, random_ids(1, 90, seed=1), cache, 1)
            caches.append(cache)
    geometry = cache.layers[0].middle.plan.geometry
    # Both rings fill while single tokens come.
    assert 180 < geometry.whole_records < 250 and 620 < 20 + geometry.capacity < 700
    assert len(made) > 20
    assert_alike(*caches)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["work_out", "put_in_place", "count_on"])
def test_a_failed_one_changes_nothing(
    name: str, error: BaseException, made: list[SteadyCommit], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_llama(trained=2048), random_ids(1, 40, seed=2)
    cache, twin = (small_cache(model, **CODED) for _ in range(2))
    for one in (cache, twin):
        feed(model, random_ids(1, 400), one)
        # The next token's commit moves tokens.
        feed(model, ids[:, :7], one, 1)
    assert not made
    owner: Any = adms.step.DecodeStep if name == "count_on" else SteadyCommit
    real = getattr(owner, name)

    def half_way(self: Any, *count: int) -> None:
        real(self, *count)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, half_way)
        with pytest.raises(type(error)):
            feed(model, ids[:, 7:8], cache)
    assert cache.timeline == twin.timeline
    for own, other in zip(cache.layers, twin.layers, strict=True):
        assert torch.equal(own.middle.arena, other.middle.arena)
    assert torch.equal(feed(model, ids[:, 7:], cache, 1), feed(model, ids[:, 7:], twin, 1))
    assert made
    assert_alike(cache, twin)


def test_nothing_is_coded_of_a_token_that_is_not_finite(made: list[SteadyCommit]) -> None:
    model, ids = tiny_llama(trained=2048), random_ids(1, 20, seed=2)
    cache, twin = (small_cache(model, **CODED) for _ in range(2))
    for one in (cache, twin):
        feed(model, random_ids(1, 400), one)
        feed(model, ids[:, :7], one, 1)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        before = embedding[ids[0, 7]].clone()
        embedding[ids[0, 7]] = torch.nan
    with pytest.raises(ADMSValueError, match="not stored"):
        feed(model, ids[:, 7:8], cache)
    assert not made
    with torch.no_grad():
        embedding[ids[0, 7]] = before
    assert torch.equal(feed(model, ids[:, 7:], cache, 1), feed(model, ids[:, 7:], twin, 1))


def test_what_the_step_holds_is_what_the_host_would_say(made: list[SteadyCommit]) -> None:
    model = tiny_llama(trained=2048)
    cache = small_cache(model, **CODED)
    feed(model, random_ids(1, 400), cache)
    for token in random_ids(1, 20, seed=2).split(1, dim=1):
        feed(model, token, cache)
        step = cache.step
        assert step is not None and step.held is not None
        if not made or step.stale:
            continue
        cache.begin(1, 1, None, torch.device("cpu"))
        expected = step._held(cache.require_view())
        cache.rollback()
        step.stale = False
        for own, wanted in zip(step.held.tensors(), expected.tensors(), strict=True):
            assert own.dtype == wanted.dtype
            torch.testing.assert_close(own, wanted)
    assert len(made) == 2


def test_another_way_of_committing_in_between(made: list[SteadyCommit]) -> None:
    """Chunks, other rows, and a step that is made anew."""
    model = tiny_llama(trained=2048)
    caches, logits = [], []
    for way in both_ways():
        with way:
            cache = small_cache(model, **CODED)
            feed(model, random_ids(2, 400), cache)
            found = [feed(model, random_ids(2, 20, seed=2), cache, 1)]
            found.append(feed(model, random_ids(2, 21, seed=3), cache))
            found.append(feed(model, random_ids(2, 20, seed=4), cache, 1))
            cache.reorder_cache(torch.tensor([1, 0]))
            found.append(feed(model, random_ids(2, 20, seed=5), cache, 1))
            cache.batch_select_indices(torch.tensor([1]))
            found.append(feed(model, random_ids(1, 20, seed=6), cache, 1))
            logits.append(found)
            caches.append(cache)
    assert len(made) >= 8 and len(set(made)) > 1
    assert_alike(*caches)
    for own, other in zip(*logits, strict=True):
        assert torch.equal(own, other)


def kernels_of(layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Operations of a static commit that are no views."""
    model = tiny_llama(layers=layers, trained=2048)
    cache = small_cache(model, **CODED)
    feed(model, random_ids(1, 400), cache)
    counted = Kernels()
    for name in ("prepare", "apply"):
        real = getattr(SteadyCommit, name)

        def counting(self: SteadyCommit, real: Any = real) -> None:
            with counted:
                real(self)

        monkeypatch.setattr(SteadyCommit, name, counting)
    feed(model, random_ids(1, 8, seed=1), cache, 1)
    # Nothing comes from the host or waits for the device, or it could not be captured.
    assert not counted.found["_local_scalar_dense.default"]
    return counted.found.total()


def test_a_commit_takes_as_many_operations_for_any_number_of_layers(
    made: list[SteadyCommit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adms.commit, "TOKENS_TOGETHER", 10**6)
    # The search for codewords is one kernel where commits are captured.
    monkeypatch.setattr(adms.compressors.low_rank, "assign", one_kernel)
    with pytest.MonkeyPatch.context() as patch:
        few = kernels_of(2, patch)
    with pytest.MonkeyPatch.context() as patch:
        many = kernels_of(12, patch)
    # Twenty of them put scores beside the last ones, keep those, and look at landmarks again; a
    # hundred are of the one layer in ten that compares tokens with what the stream holds.
    assert few == many <= 465


def one_kernel(vectors: torch.Tensor, kept: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    rows, groups, count, _ = vectors.shape
    return torch.zeros(rows, 6, groups, count, dtype=torch.uint8)


@CUDA
@pytest.mark.parametrize("compressor", ["low_rank", "quantized", "auto"])
@pytest.mark.parametrize("rows", [1, 3])
def test_captured_commits_are_those_that_are_not(
    compressor: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adms.compiled_layers, "BACKEND", None)
    model = tiny_llama(layers=3, trained=2048).to("cuda")
    caches, logits = [], []
    for way in both_ways():
        with way:
            cache = small_cache(model, compressor_type=compressor, **CODED)
            feed(model, random_ids(rows, 400).cuda(), cache)
            logits.append(feed(model, random_ids(rows, 100, seed=2).cuda(), cache, 1))
            caches.append(cache)
    steady = caches[1].step.steady
    assert steady is not None and steady.graphs is not None
    assert_alike(*caches)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@CUDA
def test_an_interrupt_after_a_replay_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adms.compiled_layers, "BACKEND", None)
    model, ids = tiny_llama(trained=2048).to("cuda"), random_ids(1, 40, seed=2).cuda()
    cache, twin = (small_cache(model, **CODED) for _ in range(2))
    for one in (cache, twin):
        feed(model, random_ids(1, 400).cuda(), one)
        feed(model, ids[:, :7], one, 1)
    apply = SteadyCommit.apply

    def interrupted(self: SteadyCommit) -> None:
        apply(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SteadyCommit, "apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            feed(model, ids[:, 7:8], cache)
    for own, other in zip(cache.layers, twin.layers, strict=True):
        assert torch.equal(own.middle.arena, other.middle.arena)
    assert torch.equal(feed(model, ids[:, 7:], cache, 1), feed(model, ids[:, 7:], twin, 1))
    assert_alike(cache, twin)
