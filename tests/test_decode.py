"""The static one-token pass, run on the CPU without a capture, against the eager one."""

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import adms.decode
import adms.step
from adms import ADMSKVCache, enable_adms_llm, enable_streaming_llm
from adms.errors import ADMSValueError
from adms.step_buffers import planned_bytes
from tests.streams import feed, random_ids, reachable_bytes, small_cache, tiny_llama

# Steps are made for no device, or for the CPU in every phase.
EAGER: dict[str, tuple[str, ...]] = {}
STATIC = {"cpu": ("empty", "exact", "coded")}


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets steps be made on the CPU, where they cannot be captured but can be run."""
    monkeypatch.setattr(adms.decode, "PHASES", STATIC)


def both(model: Any, ids: torch.Tensor, first: int, monkeypatch: Any, **changes: Any) -> Any:
    """Logits token by token after ``first`` tokens at once: eager, static, and both caches."""
    results, caches = [], []
    for phases in (EAGER, STATIC):
        monkeypatch.setattr(adms.decode, "PHASES", phases)
        cache = small_cache(model, **changes)
        feed(model, ids[:, :first], cache)
        results.append(feed(model, ids[:, first:], cache, step=1))
        caches.append(cache)
    eager, stepped = caches
    assert eager.step is None and stepped.step is not None, stepped.step_obstacle
    return results, caches


@pytest.mark.parametrize("first", [1, 90])
@pytest.mark.parametrize("compressor", ["low_rank", "quantized", "pq", "auto", "low_rank_text"])
def test_static_equals_eager_through_every_phase(
    compressor: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(trained=2048)
    changes: dict[str, Any] = {"compressor_type": compressor, "recent_size": 24}
    if compressor == "low_rank_text":
        changes |= {"compressor_type": "low_rank", "enable_pos_shift": False}
    ids = random_ids(1, 420)
    (eager, static), caches = both(model, ids, first, monkeypatch, **changes)
    assert caches[1].summary()["middle"]["form"] == changes["compressor_type"]
    assert_close(static, eager, atol=2e-5, rtol=2e-5)


def test_static_equals_eager_where_rows_have_other_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_llama(), random_ids(3, 400)
    mask = torch.ones_like(ids[:, :40])
    mask[1, :11] = mask[2, :3] = 0
    results = []
    for phases in (EAGER, STATIC):
        monkeypatch.setattr(adms.decode, "PHASES", phases)
        cache = small_cache(model, recent_size=24)
        with torch.no_grad():
            model(ids[:, :40], attention_mask=mask, past_key_values=cache)
        results.append(feed(model, ids[:, 40:], cache, step=1))
    assert cache.step is not None
    assert_close(results[1], results[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("budget", [0, 160])
def test_passes_of_other_lengths_in_between(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_llama(), random_ids(2, 500)
    parts = ids.split([3, 1, 1, 200, 1, 7, 1, 1, 120, *[1] * 165], dim=1)
    results = []
    for phases in (EAGER, STATIC):
        monkeypatch.setattr(adms.decode, "PHASES", phases)
        cache = small_cache(model, compressed_budget=budget, recent_size=40)
        results.append(torch.cat([feed(model, one, cache) for one in parts], dim=1))
        assert reachable_bytes(cache) == cache.nbytes + cache.shared_nbytes
        assert cache.nbytes <= cache.max_nbytes
    assert cache.step is not None
    assert_close(results[1], results[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("moved", ["all", "the last"])
def test_weights_that_moved_are_read_where_they_are(moved: str, static: None) -> None:
    """A graph would go on reading the memory that they left."""
    model = tiny_llama()
    cache = small_cache(model, recent_size=40)
    feed(model, random_ids(1, 40), cache)
    feed(model, random_ids(1, 4), cache, step=1)
    before = cache.step
    feed(model, random_ids(1, 4), cache, step=1)
    assert before is not None and cache.step is before
    # Held, so that the weights cannot come back to where they were.
    left = [weight.data for weight in model.parameters()]
    if moved == "all":
        model.to(torch.float64).to(torch.float32)
    else:
        last = list(model.model.parameters())[-1]
        last.data = last.data.clone()
    feed(model, random_ids(1, 1), cache)
    assert cache.step is not None and cache.step is not before
    del left


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("budget", [0, 160])
def test_bytes_stay_within_a_plan_that_never_grows(
    budget: int, captures: bool, static: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured step keeps its buffers while chunks pass, another one does not."""
    monkeypatch.setattr(adms.step.DecodeStep, "captures", captures)
    model = tiny_llama()
    cache = small_cache(model, compressed_budget=budget, recent_size=40)
    theirs = enable_streaming_llm(model, start_size=4, recent_size=budget + 40)
    feed(model, random_ids(3, 40), cache)
    feed(model, random_ids(3, 1), theirs)
    bound, seen, widths = theirs.max_nbytes, [], []

    def look(_: Any, args: Any, output: torch.Tensor) -> None:
        seen.append(cache.nbytes)
        widths.append(output.shape[1])

    handle = model.model.norm.register_forward_hook(look)
    for size in (1, 1, 200, 1, 300, *[1] * 12, 130):
        feed(model, random_ids(3, size), cache, step=1 if size == 1 else 0)
        step = cache.step
        if step is not None:
            geometry = cache.layers[0].middle.plan.geometry if budget else None
            planned = planned_bytes(
                cache.sizes, geometry, batch=3, layers=2, elements=64, hidden_bytes=64 * 4
            )
            held = sum(part.untyped_storage().nbytes() for part in step.tensors())
            assert held <= planned
        seen.append(cache.nbytes)
        assert cache.max_nbytes <= bound
    handle.remove()
    assert max(seen) <= bound
    assert (cache.step is not None) == captures
    assert (max(widths) < cache.sizes.chunk) == captures


def test_a_step_needs_the_place_of_a_chunk(static: None) -> None:
    model = tiny_llama()
    cache = small_cache(model, prefill_chunk_size=4)
    feed(model, random_ids(1, 400), cache)
    feed(model, random_ids(1, 1), cache)
    assert cache.step is None
    assert cache.step_obstacle is not None and "raise prefill_chunk_size" in cache.step_obstacle


def test_generate_with_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_llama(), random_ids(1, 150)
    found = []
    for phases in (EAGER, STATIC):
        monkeypatch.setattr(adms.decode, "PHASES", phases)
        cache = small_cache(model, recent_size=24)
        found.append(
            model.generate(
                ids, past_key_values=cache, max_new_tokens=60, num_beams=3, do_sample=False
            )
        )
    assert cache.step is not None
    assert torch.equal(found[0], found[1])


def test_rows_change_places_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has headers of its own, and with them other places of codes in a record."""
    model, ids = tiny_llama(), random_ids(2, 320)
    # Other tokens, other channels that vary most.
    ids[1] = 3 + ids[1] % 4
    results = []
    for phases in (EAGER, STATIC):
        monkeypatch.setattr(adms.decode, "PHASES", phases)
        cache = small_cache(model, recent_size=24)
        feed(model, ids[:, :300], cache)
        feed(model, ids[:, 300:310], cache, step=1)
        cache.reorder_cache(torch.tensor([1, 0]))
        results.append(feed(model, ids[:, 310:], cache, step=1))
    assert cache.step is not None and cache.step.phase == "coded"
    tables = cache.step.tables[0][0]
    assert tables is not None and not torch.equal(tables.offsets[0], tables.offsets[1])
    assert_close(results[1], results[0], atol=2e-5, rtol=2e-5)


def test_a_token_that_is_not_finite_is_taken_back(static: None) -> None:
    model, ids = tiny_llama(), random_ids(1, 60)
    cache, alone = (small_cache(model, recent_size=24) for _ in range(2))
    feed(model, ids[:, :50], cache, step=1)
    feed(model, ids[:, :50], alone, step=1)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        before = embedding[ids[0, 50]].clone()
        embedding[ids[0, 50]] = torch.nan
    with pytest.raises(ADMSValueError, match="layer 0 hold NaN.*last token was not stored"):
        feed(model, ids[:, 50:51], cache)
    with torch.no_grad():
        embedding[ids[0, 50]] = before
    assert cache.tokens_seen == 50
    assert_close(feed(model, ids[:, 50:], cache, step=1), feed(model, ids[:, 50:], alone, step=1))


def test_copies_and_reset(static: None) -> None:
    model, ids = tiny_llama(), random_ids(1, 300)
    cache = small_cache(model, recent_size=24)
    feed(model, ids[:, :250], cache, step=1)
    twin = copy.deepcopy(cache)
    assert twin.step is None
    assert_close(feed(model, ids[:, 250:], cache, step=1), feed(model, ids[:, 250:], twin, step=1))
    cache.reset()
    fresh = small_cache(model, recent_size=24)
    assert_close(feed(model, ids, cache, step=1), feed(model, ids, fresh, step=1))


def test_streaming_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_llama(), random_ids(1, 200)
    results = []
    for phases in (EAGER, STATIC):
        monkeypatch.setattr(adms.decode, "PHASES", phases)
        cache = enable_streaming_llm(model, start_size=4, recent_size=30)
        results.append(feed(model, ids, cache, step=1))
    assert cache.step is not None
    assert_close(results[1], results[0], atol=2e-5, rtol=2e-5)


def test_streaming_llm_is_stepped_on_a_cpu_once_it_forgets() -> None:
    """Before, its logits equal a full cache's to the last bit."""
    model, ids = tiny_llama(), random_ids(1, 90)
    cache = enable_streaming_llm(model, start_size=4, recent_size=30)
    plain = enable_streaming_llm(model, start_size=4, recent_size=30, kernel="torch")
    found = [feed(model, ids[:, :20], cache, step=1)]
    assert cache.step is None
    found.append(feed(model, ids[:, 20:70], cache, step=1))
    assert cache.step is not None
    # A chunk in between, which takes the place of the step's buffers.
    found += [feed(model, ids[:, 70:75], cache), feed(model, ids[:, 75:], cache, step=1)]
    assert cache.nbytes <= cache.max_nbytes
    expected = [feed(model, ids[:, :70], plain, step=1), feed(model, ids[:, 70:75], plain)]
    expected.append(feed(model, ids[:, 75:], plain, step=1))
    assert_close(torch.cat(found, dim=1), torch.cat(expected, dim=1), atol=2e-5, rtol=2e-5)


def test_an_explicit_kernel_never_falls_back() -> None:
    pytest.importorskip("triton")
    model, ids = tiny_llama(), random_ids(1, 3)
    cache = enable_adms_llm(model, kernel="triton", start_size=4, recent_size=64)
    feed(model, ids[:, :2], cache)
    with pytest.raises(ADMSValueError, match=r"kernel='triton' cannot be used: .*cpu"):
        feed(model, ids[:, 2:], cache)
    with pytest.raises(ADMSValueError, match="kernel must be one of auto, torch, triton"):
        enable_adms_llm(model, kernel="cuda")


def test_plain_kernel_makes_no_step(static: None) -> None:
    model, ids = tiny_llama(), random_ids(1, 5)
    cache = small_cache(model, kernel="torch")
    feed(model, ids, cache, step=1)
    assert isinstance(cache, ADMSKVCache) and cache.step is None


def test_steps_that_are_not_wanted(static: None, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_llama(), random_ids(1, 400)
    cache = small_cache(model)
    feed(model, ids[:, :380], cache)
    feed(model, ids[:, 380:390], cache, step=1)
    assert cache.step is not None
    cache.refuse_steps("answers are short")
    feed(model, ids[:, 390:], cache, step=1)
    assert cache.step is None and cache.step_obstacle == "answers are short"
    assert not caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Inductor recommends TF32 to models in float32, whose exactness is what is tested here.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("rows", [1, 3])
# With no middle there is no spare slot in the ring that a rehearsal could write to.
@pytest.mark.parametrize("budget", [160, 0])
def test_a_graph_is_captured_once_and_replayed(rows: int, budget: int) -> None:
    model, ids = tiny_llama().to("cuda"), random_ids(rows, 420).to("cuda")
    cache, plain = (
        small_cache(model, kernel=kernel, compressed_budget=budget)
        for kernel in ("triton", "torch")
    )
    feed(model, ids[:, :300], cache)
    feed(model, ids[:, :300], plain)
    first = feed(model, ids[:, 300:301], cache)
    assert cache.step is not None and cache.step.phase == ("coded" if budget else "empty")
    graph, counters = cache.step.graph, torch._dynamo.utils.counters
    before = {name: dict(counts) for name, counts in counters.items()}
    rest = feed(model, ids[:, 301:], cache, step=1)
    assert cache.step.graph is graph
    assert {name: dict(counts) for name, counts in counters.items()} == before
    assert not counters["graph_break"]
    found = torch.cat([first, rest], dim=1)
    # Where two codewords are as near, a code may fall the other way.
    assert_close(found, feed(model, ids[:, 300:], plain, step=1), atol=5e-4, rtol=1e-3)


def test_a_capture_that_fails_is_said_and_not_tried_again(
    static: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_llama(), random_ids(1, 30)
    cache, plain = small_cache(model), small_cache(model, kernel="torch")
    feed(model, ids[:, :10], cache)
    tries = []

    def refuse(*args: Any) -> None:
        tries.append(args)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(adms.step.DecodeStep, "_prepare", refuse)
    monkeypatch.setattr(adms.step.DecodeStep, "captures", True)
    found = feed(model, ids[:, 10:], cache, step=1)
    assert len(tries) == 1
    assert cache.step_obstacle == (
        "its capture failed (RuntimeError: operation not permitted when stream is capturing)"
    )
    assert_close(found, feed(model, ids, plain, step=0)[:, 10:], atol=2e-5, rtol=2e-5)
