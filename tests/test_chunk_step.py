"""Static chunks: uncaptured on the CPU and captured on a GPU, the same as those that are not."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import adms.attention.chunk
import adms.attention.tiered
import adms.chunk_step
import adms.compiled_layers
import adms.step
import adms.step_capture
from adms import ADMSKVCache
from adms.attention import SparsePrefillConfig
from adms.chunk_step import ChunkStep
from adms.decode import has_hooks
from adms.errors import ADMSValueError, ForwardError
from adms.step_capture import capturing, first_cause
from tests.streams import feed, random_ids, small_cache, tiny_llama
from tests.test_commit import assert_alike

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CODED: dict[str, Any] = {"prefill_chunk_size": 16}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[ChunkStep]:
    """The static chunks that ran; a CPU runs them too."""
    monkeypatch.setattr(adms.chunk_step, "DEVICES", ("cuda", "cpu"))
    # Short calls too, which would not be worth a capture.
    monkeypatch.setattr(adms.chunk_step, "WORTH", 1)
    monkeypatch.setattr(adms.compiled_layers, "BACKEND", None)
    run, steps = ChunkStep.run, []

    def counting(self: ChunkStep, arguments: dict[str, Any]) -> Any:
        result = run(self, arguments)
        steps.append(self)
        return result

    monkeypatch.setattr(ChunkStep, "run", counting)
    return steps


@contextlib.contextmanager
def only_general() -> Iterator[None]:
    """Has every chunk read as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adms.chunk_step, "DEVICES", ())
        yield


def both_ways() -> list[contextlib.AbstractContextManager[None]]:
    return [only_general(), contextlib.nullcontext()]


def assert_close(cache: ADMSKVCache, other: ADMSKVCache) -> None:
    """Alike but for rounding: what is read at once is added up in another order."""
    assert cache.timeline == other.timeline
    for own, twin in zip(cache.layers, other.layers, strict=True):
        for part, expected in zip(own.exact.tensors(), twin.exact.tensors(), strict=True):
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)
        differ = own.middle.arena != twin.middle.arena
        # A gain or a code at the edge between two.
        assert differ.float().mean() < 1e-3


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 1),
        ({}, 3),
        ({"compressor_type": "quantized"}, 2),
        ({"compressor_type": "pq"}, 1),
        ({"compressor_type": "auto"}, 2),
        ({"importance_ratio": 0.0}, 1),
        ({"enable_pos_shift": False}, 1),
        ({"anchor_mode": "grid"}, 1),
        ({"anchor_mode": "mean"}, 2),
        ({"compression_interval": 1, "prefill_chunk_size": 13}, 1),
        ({"prefill_chunk_size": 64}, 1),
    ],
)
def test_static_chunks_are_chunks(changes: Any, rows: int, ran: list[ChunkStep]) -> None:
    """While the middle fills, while it is full, and for single tokens after them."""
    model = tiny_llama(layers=3, trained=4096)
    caches, logits = [], []
    for way in both_ways():
        with way:
            # A middle that is soon coded, and full before the end.
            cache = small_cache(model, **{**CODED, "compressed_budget": 64, **changes})
            found = [feed(model, random_ids(rows, 400), cache)]
            found.append(feed(model, random_ids(rows, 30, seed=1), cache, 1))
            found.append(feed(model, random_ids(rows, 400, seed=2), cache))
            caches.append(cache)
            logits.append(torch.cat(found, dim=1))
    chunk = changes.get("prefill_chunk_size", 16)
    assert len({id(step) for step in ran}) == 2 and len(ran) > 500 // chunk
    geometry = caches[0].layers[0].middle.plan.geometry
    assert caches[0].timeline.middle_totals[0] > geometry.capacity
    assert_close(*caches)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=2e-5)


def test_rows_of_other_lengths(ran: list[ChunkStep]) -> None:
    model = tiny_llama(trained=2048)
    ids, caches, logits = random_ids(3, 300), [], []
    mask = torch.ones_like(ids)
    mask[1, :37] = mask[2, :9] = 0
    for way in both_ways():
        with way, torch.no_grad():
            cache = small_cache(model, **CODED)
            model(ids, attention_mask=mask, past_key_values=cache)
            logits.append(feed(model, random_ids(3, 400, seed=1), cache))
            caches.append(cache)
    assert len(ran) >= 20 and not caches[0].timeline.is_uniform
    assert_close(*caches)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=2e-5)


def test_the_bound_holds_and_nothing_stays(
    ran: list[ChunkStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(trained=2048)
    cache = small_cache(model, **CODED)
    commit = ADMSKVCache.commit

    def bounded(self: ADMSKVCache) -> None:
        assert self.nbytes <= self.max_nbytes
        commit(self)
        assert self.nbytes <= self.max_nbytes

    monkeypatch.setattr(ADMSKVCache, "commit", bounded)
    feed(model, random_ids(2, 600), cache)
    assert ran and all(layer.staged is None for layer in cache.layers)
    assert cache.view is None and cache.step is None


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["work_out", "put_in_place", "count_on"])
def test_a_failed_one_changes_nothing(
    name: str, error: BaseException, ran: list[ChunkStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks before it are stored, and the stream goes on from there."""
    model, ids = tiny_llama(trained=2048), random_ids(1, 400)
    more = random_ids(1, 160, seed=2)
    cache, twin = (small_cache(model, **CODED) for _ in range(2))
    for one in (cache, twin):
        feed(model, ids, one)
    owner: Any = ChunkStep if name == "count_on" else adms.chunk_step._ChunkCommit
    real, calls = getattr(owner, name), []

    def half_way(self: Any, *count: int) -> None:
        real(self, *count)
        calls.append(self)
        if len(calls) == 3:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, half_way)
        with pytest.raises(ForwardError if isinstance(error, RuntimeError) else type(error)):
            feed(model, more, cache)
    feed(model, more[:, :32], twin)
    assert cache.timeline == twin.timeline
    assert_alike(cache, twin)
    own, other = (feed(model, more[:, 32:], one) for one in (cache, twin))
    assert torch.equal(own, other)
    assert_alike(cache, twin)


def test_what_is_not_finite_is_not_stored(ran: list[ChunkStep]) -> None:
    model, ids = tiny_llama(trained=2048), random_ids(1, 400)
    more = random_ids(1, 160, seed=2)
    cache, twin = (small_cache(model, **CODED) for _ in range(2))
    for one in (cache, twin):
        feed(model, ids, one)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        before = embedding[1].clone()
        embedding[1] = torch.nan
        bad = more.clone()
        bad[0, 70] = 1
        with pytest.raises(ADMSValueError, match="64 of the call's 160 tokens"):
            feed(model, bad, cache)
        embedding[1] = before
    feed(model, more[:, :64], twin)
    assert_alike(cache, twin)
    own, other = (feed(model, more[:, 64:], one) for one in (cache, twin))
    assert torch.equal(own, other)


def test_a_model_that_cannot_be_captured_is_read_as_it_is(
    ran: list[ChunkStep], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = tiny_llama(trained=2048), random_ids(1, 600)
    with only_general():
        twin = small_cache(model, **CODED)
        expected = feed(model, ids, twin)

    def refuse(self: ChunkStep, view: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(ChunkStep, "_pass", refuse)
    cache = small_cache(model, **CODED)
    assert torch.equal(feed(model, ids, cache), expected)
    assert "without a CUDA graph" in caplog.text and len(caplog.records) == 1
    assert not ran
    assert_alike(cache, twin)


@pytest.mark.parametrize("changes", [{"importance_metric": "attention"}, {"compressor_type": "vq"}])
def test_what_asks_for_queries_is_read_as_it_is(changes: Any, ran: list[ChunkStep]) -> None:
    model = tiny_llama(trained=2048)
    feed(model, random_ids(1, 600), small_cache(model, **{**CODED, **changes}))
    assert not ran


@pytest.mark.parametrize("padding", [slice(500, 507), slice(0, 40)])
def test_padding_within_a_call(padding: slice, ran: list[ChunkStep]) -> None:
    """Rows that agree until a chunk with padding, or from a chunk on."""
    model, ids = tiny_llama(trained=2048), random_ids(2, 900)
    mask = torch.ones_like(ids)
    mask[1, padding] = 0
    caches, logits = [], []
    for way in both_ways():
        with way, torch.no_grad():
            cache = small_cache(model, **CODED)
            found = model(ids, attention_mask=mask, past_key_values=cache).logits
            caches.append(cache)
            logits.append(found[mask.bool()])
    assert ran
    assert_close(*caches)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=2e-5)


def test_it_ends_with_the_call(ran: list[ChunkStep]) -> None:
    """Without the help of the garbage collector: what it holds is memory of a GPU."""
    model = tiny_llama(trained=2048)
    cache = small_cache(model, **CODED)
    gc.collect()
    gc.disable()
    try:
        feed(model, random_ids(1, 600), cache)
        kept = {weakref.ref(step) for step in ran} | {weakref.ref(step.commit) for step in ran}
        ran.clear()
        assert kept and not any(one() for one in kept)
    finally:
        gc.enable()


def test_sparse_prefill_begins_in_mid_call(
    ran: list[ChunkStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_llama(trained=2048), random_ids(1, 1400)
    calls: list[int] = []
    real = adms.attention.tiered.attend_sparsely

    def counting(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return real(*given, **named)

    monkeypatch.setattr(adms.attention.tiered, "attend_sparsely", counting)
    sparse, logits, counts = SparsePrefillConfig(density=0.5, min_tokens=900), [], []
    for way in both_ways():
        with way:
            cache = small_cache(model, sparse_prefill=sparse, **CODED)
            logits.append(feed(model, ids, cache))
            counts.append(len(calls))
            calls.clear()
    assert ran and counts[0] == counts[1] > 0
    torch.testing.assert_close(*logits, atol=2e-5, rtol=2e-5)


def test_router_logits_are_not_lost(ran: list[ChunkStep]) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        num_local_experts=4, sliding_window=None, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    cache = small_cache(model, **CODED)
    with torch.no_grad():
        output = model.model(random_ids(1, 600), past_key_values=cache)
    assert not ran and [one.shape for one in output.router_logits] == [(600, 4)] * 2


def test_hooks_of_the_user_are_told_from_those_of_the_library() -> None:
    """A replay calls none, so that a model with any is read as it is where there are replays."""
    model = tiny_llama()
    small_cache(model)
    with torch.no_grad():
        model(random_ids(1, 4), output_hidden_states=True)
    assert not has_hooks(model.model)
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert has_hooks(model.model)
    hook.remove()
    model.model.layers[1].mlp.register_forward_pre_hook(print)
    assert has_hooks(model.model)


def test_read_ahead_stays_within_its_room(
    ran: list[ChunkStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a middle that is read whole holds little yet."""
    room, found = 2**19, []
    monkeypatch.setattr(adms.attention.chunk, "READ_AHEAD_BYTES", {"cpu": room})
    real = adms.attention.chunk._read

    def noting(*given: Any) -> Any:
        held = real(*given)
        found.append((held.count, held.keys.nbytes + held.values.nbytes))
        return held

    monkeypatch.setattr(adms.attention.chunk, "_read", noting)
    model = tiny_llama(layers=8, trained=2048)
    feed(model, random_ids(1, 400), small_cache(model, **{**CODED, "compressed_budget": 64}))
    assert ran and max(count for count, _ in found) > 1
    assert all(count == 1 or nbytes <= room for count, nbytes in found)


def test_an_error_of_the_moment_is_of_one_call(
    ran: list[ChunkStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_llama(trained=2048), random_ids(1, 600)
    cache = small_cache(model, **CODED)

    def no_room(self: ChunkStep, view: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(ChunkStep, "_pass", no_room)
        feed(model, ids, cache)
    assert not ran
    feed(model, ids, cache)
    assert ran
    cache.chunk_refused = "it cannot be captured"
    cache.reset()
    assert cache.chunk_refused is None


def test_the_rest_of_a_prompt_makes_no_step(
    ran: list[ChunkStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's buffers take the place of tokens of a chunk; the call's chunks are there already."""
    monkeypatch.setattr(adms.step.DecodeStep, "captures", True)
    model = tiny_llama(layers=3, trained=4096)
    cache = small_cache(model)
    feed(model, random_ids(2, 640), cache)
    ran.clear()
    feed(model, random_ids(2, 9 * 64 + 1, seed=2), cache)
    assert cache.step is None and len(ran) == 8
    assert cache.nbytes <= cache.max_nbytes


def test_a_capture_that_fails_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[object] = ["before"]

    class Failing:
        def __init__(self, *given: Any, **named: Any) -> None:
            pass

        def __enter__(self) -> None:
            current.append("apart")

        def __exit__(self, *error: Any) -> None:
            raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(adms.step_capture, "capture_stream", lambda _: "apart")
    graph: Any = None
    with (
        pytest.raises(RuntimeError, match="invalidated") as caught,
        capturing(graph, torch.device("cuda")),
    ):
        raise ValueError("a number was asked of the device\nwhile capturing")
    assert current[-1] == "before"
    assert first_cause(caught.value) == (
        "its capture failed (ValueError: a number was asked of the device)"
    )


def test_a_short_call_is_read_as_it_is(
    ran: list[ChunkStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture takes as long as some chunks."""
    monkeypatch.setattr(adms.chunk_step, "WORTH", 6)
    model = tiny_llama(trained=2048)
    cache = small_cache(model, **CODED)
    feed(model, random_ids(1, 400), cache, 50)
    assert not ran
    # Behind the first of full size, which also sends on what waited.
    feed(model, random_ids(1, 7 * 16 + 5), cache)
    assert len(ran) == 6


def test_plain_torch_replays_nothing(ran: list[ChunkStep]) -> None:
    model = tiny_llama(trained=2048)
    feed(model, random_ids(1, 600), small_cache(model, kernel="torch", **CODED))
    assert not ran


@CUDA
@pytest.mark.parametrize("compressor", ["low_rank", "quantized", "auto"])
@pytest.mark.parametrize("rows", [1, 3])
def test_captured_chunks_are_those_that_are_not(
    compressor: str, rows: int, ran: list[ChunkStep]
) -> None:
    model = tiny_llama(layers=3, trained=2048).to("cuda")
    caches, logits = [], []
    for way in both_ways():
        with way:
            cache = small_cache(model, compressor_type=compressor, **CODED)
            found = [feed(model, random_ids(rows, 900).cuda(), cache)]
            found.append(feed(model, random_ids(rows, 10, seed=1).cuda(), cache, 1))
            found.append(feed(model, random_ids(rows, 300, seed=2).cuda(), cache))
            caches.append(cache)
            logits.append(torch.cat(found, dim=1))
    assert ran and all(step.commit.graphs is not None for step in ran)
    assert_close(*caches)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@CUDA
def test_an_interrupt_after_a_replay_is_taken_back(
    ran: list[ChunkStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_llama(trained=2048).to("cuda"), random_ids(1, 400).cuda()
    more = random_ids(1, 160, seed=2).cuda()
    cache, twin = (small_cache(model, **CODED) for _ in range(2))
    for one in (cache, twin):
        feed(model, ids, one)
    apply, calls = adms.chunk_step._ChunkCommit.apply, []

    def interrupted(self: Any) -> None:
        apply(self)
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adms.chunk_step._ChunkCommit, "apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            feed(model, more, cache)
    feed(model, more[:, :32], twin)
    assert_alike(cache, twin)
    own, other = (feed(model, more[:, 32:], one) for one in (cache, twin))
    torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_that_is_not_on_the_current_device(ran: list[ChunkStep]) -> None:
    """Chunks, steps and their commits, each captured on the model's own device."""
    ids, caches, logits = random_ids(1, 600), [], []
    for device in ("cuda:0", "cuda:1"):
        model = tiny_llama(trained=2048).to(device)
        cache = small_cache(model, kernel="triton")
        found = [feed(model, ids.to(device), cache), feed(model, ids[:, :30].to(device), cache, 1)]
        assert cache.step is not None and torch.cuda.current_device() == 0
        caches.append(cache)
        logits.append(torch.cat(found, dim=1).cpu())
    assert ran
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
