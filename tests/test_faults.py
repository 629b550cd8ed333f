"""What goes wrong inside a call leaves the stream as it was, in all layers, and says so."""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import adms
import adms.commit
import adms.step
from adms.compressors.low_rank import LowRankCoder
from adms.layer import ADMSLayer
from adms.steady import SteadyCommit
from adms.tiers.coding import MiddleStack
from adms.tiers.undo import Undo
from adms.timeline import Timeline
from tests.patches.tiny import WINDOWED, ids, tiny
from tests.test_session import CODED, llama, run, text

RATIO = {"importance_ratio": 0.2}
# Tokens before the call that fails: waiting, the step to codes, codes.
AGES = [60, 78, 200]


def state(cache: adms.ADMSKVCache) -> list[Any]:
    """Everything a cache holds that a later call can see."""
    if not cache.is_initialized:
        return []
    held: list[Any] = [cache.timeline]
    for layer in cache.layers:
        held += [part.clone() for part in layer.tensors()]
    return held


def goes_on(model: Any, cache: adms.ADMSKVCache, twin: adms.ADMSKVCache) -> None:
    """Both caches answer alike, bit for bit, from here on."""
    rows = max(1, cache.batch_size)
    assert cache.timeline == twin.timeline or not twin.is_initialized
    for count in (1, 40, 1, 1, 90):
        more = text(count, rows=rows, seed=count)
        assert torch.equal(run(model, more, cache), run(model, more, twin))
    assert cache.nbytes == twin.nbytes <= cache.max_nbytes


def aged(model: Any, age: int) -> tuple[adms.ADMSKVCache, adms.ADMSKVCache]:
    """A cache and its twin after ``age`` tokens."""
    cache = adms.enable_adms_llm(model, **CODED, **RATIO)
    if age:
        run(model, text(age), cache)
        return cache, copy.deepcopy(cache)
    return cache, adms.enable_adms_llm(model, **CODED, **RATIO)


def failing(function: Callable[..., Any], error: BaseException, after: int) -> Callable[..., Any]:
    """``function``, raising instead of its call number ``after``."""
    calls = iter(range(10_000))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == after:
            raise error
        return function(*args, **kwargs)

    return call


ERRORS = [
    torch.linalg.LinAlgError("the SVD did not converge"),
    torch.OutOfMemoryError("out of memory"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("owner", "name", "together", "after"),
    [
        (LowRankCoder, "fit", 1024, 1),
        (LowRankCoder, "decode", 1024, 1),
        (adms.ADMSKVCache, "update", 1024, 1),
        # Layer by layer: the first one was through already.
        (LowRankCoder, "encode", 1, 1),
        (MiddleStack, "prepare", 1, 1),
        (MiddleStack, "apply", 1, 1),
        (adms.commit, "write_moves", 1, 1),
        # All at once: parts of every layer are in place already.
        (LowRankCoder, "encode", 1024, 0),
        (MiddleStack, "apply", 1024, 0),
        (Timeline, "after", 1024, 0),
    ],
)
def test_an_error_half_way(
    owner: Any,
    name: str,
    together: int,
    after: int,
    error: BaseException,
    age: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was done already must be put back."""
    monkeypatch.setattr(adms.commit, "TOKENS_TOGETHER", together)
    model = llama()
    if owner is Timeline:
        # Else the passes that fit the code to the model fail first.
        aged(model, 200)
    cache, twin = aged(model, age)
    fresh = text(1 if name == "update" else 32, seed=5)
    before = state(cache)
    wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else adms.ForwardError
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), error, after=after))
        try:
            run(model, fresh, cache)
        except wanted as raised:
            if wanted is adms.ForwardError:
                assert "0 of the call's" in str(raised) and raised.__cause__ is error
        else:
            # At this age the call never gets there (nothing is coded yet): no fault, no trial.
            assert name in ("fit", "encode", "decode", "prepare", "apply")
            run(model, fresh, twin)
            before = state(cache)
    # A single token passes through a free slot, which nothing reads afterwards.
    now = state(cache) if fresh.shape[1] > 1 else before
    assert len(before) == len(now)
    for old, new in zip(before, now, strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
    goes_on(model, cache, twin)


def test_a_long_call_keeps_the_chunks_before_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    # Another stream first, so that the code is fitted to the model by now.
    aged(model, 200)
    cache, twin = aged(model, 50)
    fresh = text(32 * 4, seed=5)
    with monkeypatch.context() as patch:
        # Two layers a chunk: the third chunk's first layer.
        patch.setattr(ADMSLayer, "update", failing(ADMSLayer.update, RuntimeError("no"), after=4))
        with pytest.raises(adms.ForwardError, match="64 of the call's 128 tokens .* were stored"):
            run(model, fresh, cache)
    run(model, fresh[:, :64], twin)
    goes_on(model, cache, twin)


OWN_FILES = (
    "adms/cache.py",
    "adms/transaction.py",
    "adms/commit.py",
    "adms/stack.py",
    "adms/layer.py",
    "adms/streaming.py",
    "adms/tiers/",
    "adms/positions.py",
    "adms/places.py",
    "adms/steady.py",
    "adms/step.py",
    "adms/step_buffers.py",
)


class InterruptAt:
    """Raises ``KeyboardInterrupt`` at a line of the cache's own code, counted from the start."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.count = 0

    def __enter__(self) -> "InterruptAt":
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def _call(self, frame: Any, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        return self._line if any(part in name for part in OWN_FILES) else None

    def _line(self, frame: Any, event: str, argument: object) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.line:
                sys.settrace(self.before)
                raise KeyboardInterrupt
        return self._line


def interrupts(
    model: Any, age: int, fresh: torch.Tensor, lines: Iterator[int], singles: int = 0
) -> int:
    """Interrupts one call at each of ``lines``; how many fell into it.

    The last ``singles`` tokens before it come one by one.
    """
    cache, _ = aged(model, age - singles)
    for _ in range(singles):
        run(model, text(1), cache)
    done = copy.deepcopy(cache)
    run(model, fresh, done)
    outcomes = {0: 0, fresh.shape[1]: 0}
    for line in lines:
        trial = copy.deepcopy(cache)
        try:
            with InterruptAt(line):
                run(model, fresh, trial)
        except KeyboardInterrupt:
            pass
        else:
            break
        taken = trial.tokens_seen - age
        outcomes[taken] += 1
        # Either as before, or as if nothing had happened; never in between.
        twin = copy.deepcopy(done if taken else cache)
        more = text(41, seed=9)
        assert torch.equal(run(model, more, trial), run(model, more, twin)), line
        assert trial.timeline == twin.timeline
    return sum(outcomes.values())


@pytest.mark.parametrize(("age", "count"), [(33, 1), (60, 30), (78, 1), (200, 32), (207, 1)])
def test_an_interrupt_at_any_line(age: int, count: int) -> None:
    """Every 23rd line here; ``test_an_interrupt_at_every_line`` takes all."""
    assert interrupts(llama(), age, text(count, seed=5), iter(range(1, 100_000, 23))) > 5


def test_an_interrupt_of_a_static_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adms.step, "STEADY_DEVICES", ("cpu",))
    made, apply = [], SteadyCommit.apply
    monkeypatch.setattr(SteadyCommit, "apply", lambda self: made.append(apply(self)))
    lines = iter(range(1, 100_000, 29))
    assert interrupts(llama(), 207, text(1, seed=5), lines, singles=7) > 20
    assert made


@pytest.mark.measured
@pytest.mark.slow
@pytest.mark.parametrize(("age", "count"), [(60, 30), (200, 32), (207, 1)])
def test_an_interrupt_at_every_line(age: int, count: int) -> None:
    assert interrupts(llama(), age, text(count, seed=5), iter(range(1, 100_000))) > 200


@pytest.mark.parametrize("name", WINDOWED)
def test_window_layers_are_put_back_too(name: str) -> None:
    model = tiny(name)
    settings: dict[str, Any] = {
        "start_size": 2,
        "recent_size": 12,
        "compressed_budget": 8,
        "prefill_chunk_size": 8,
    }
    cache = adms.enable_adms_llm(model, **settings)
    run(model, ids(1, 30), cache)
    twin = copy.deepcopy(cache)
    head = model.get_output_embeddings()
    last = model.base_model.layers[-1]
    for count in (1, 8):
        handle = last.mlp.register_forward_pre_hook(_refuse)
        with pytest.raises(adms.ForwardError, match="on purpose"):
            run(model, ids(1, count, seed=3), cache)
        handle.remove()
    assert head is model.get_output_embeddings()
    for count in (1, 8, 3, 1):
        more = ids(1, count, seed=count)
        assert torch.equal(run(model, more, cache), run(model, more, twin))


def _refuse(*_: object) -> None:
    raise RuntimeError("on purpose")


def test_an_update_that_cannot_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    cache, _ = aged(model, 200)
    with monkeypatch.context() as patch:
        patch.setattr(MiddleStack, "apply", failing(MiddleStack.apply, MemoryError("1"), after=0))
        patch.setattr(Undo, "restore", failing(Undo.restore, MemoryError("2"), after=0))
        with pytest.raises(adms.ForwardError):
            run(model, text(32), cache)
    for use in (lambda: run(model, text(1), cache), lambda: copy.deepcopy(cache)):
        with pytest.raises(adms.CacheStateError, match="reset"):
            use()
    with pytest.raises(adms.CacheStateError, match="load a session"):
        cache.save("unused.adms")
    cache.reset()
    fresh = adms.enable_adms_llm(model, **CODED, **RATIO)
    goes_on(model, cache, fresh)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
@pytest.mark.parametrize("count", [1, 32])
def test_values_that_are_not_finite(part: str, value: float, count: int) -> None:
    model = llama()
    cache, twin = aged(model, 78)

    def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, -1, 3] = value
        return output

    projection = getattr(model.model.layers[1].self_attn, part)
    handle = projection.register_forward_hook(poison)
    with pytest.raises(adms.ADMSValueError, match="layer 1 hold NaN or infinity.*not stored"):
        run(model, text(count), cache)
    handle.remove()
    goes_on(model, cache, twin)


# --- threads and models --------------------------------------------------------------------------


def test_two_threads_with_a_cache_each() -> None:
    model = llama()
    expected, found = {}, {}
    for name in (1, 2):
        cache = adms.enable_adms_llm(model, **CODED, **RATIO)
        expected[name] = [run(model, text(17, seed=name + at), cache) for at in range(25)]

    def work(name: int) -> None:
        cache = adms.enable_adms_llm(model, **CODED, **RATIO)
        found[name] = [run(model, text(17, seed=name + at), cache) for at in range(25)]

    threads = [threading.Thread(target=work, args=(name,)) for name in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in (1, 2):
        assert all(map(torch.equal, expected[name], found[name]))


@pytest.mark.parametrize(
    "use", ["stream", "reset", "reorder_cache", "batch_repeat_interleave", "save", "copy"]
)
def test_one_cache_in_two_threads(use: str, tmp_path: Any) -> None:
    """Also between the chunks of one call: the other thread is held in the second of three."""
    model = llama()
    cache, twin = aged(model, 78)
    inside, leave, calls = threading.Event(), threading.Event(), iter(range(1000))

    def hold(*_: object) -> None:
        if next(calls) == 1:
            inside.set()
            assert leave.wait(60)

    handle = model.model.layers[1].register_forward_pre_hook(hold)
    fresh = text(96, seed=4)
    thread = threading.Thread(target=run, args=(model, fresh, cache))
    thread.start()
    assert inside.wait(60)
    try:
        with pytest.raises(adms.CacheStateError, match="in use by another call"):
            match use:
                case "stream":
                    run(model, text(1), cache)
                case "reset":
                    cache.reset()
                case "reorder_cache":
                    cache.reorder_cache(torch.tensor([0]))
                case "batch_repeat_interleave":
                    cache.batch_repeat_interleave(2)
                case "save":
                    cache.save(tmp_path / "a.adms")
                case _:
                    copy.deepcopy(cache)
    finally:
        leave.set()
        thread.join()
        handle.remove()
    run(model, fresh, twin)
    goes_on(model, cache, twin)


def test_a_cache_inside_its_own_call() -> None:
    model = llama()
    cache, twin = aged(model, 78)

    def again(*_: object) -> None:
        run(model, text(1), cache)

    handle = model.model.layers[1].register_forward_pre_hook(again)
    with pytest.raises(adms.CacheStateError, match="in use"):
        run(model, text(3), cache)
    handle.remove()
    goes_on(model, cache, twin)


def test_a_cache_with_another_model() -> None:
    model, other = llama(), llama(seed=1)
    cache, twin = aged(model, 78)
    with pytest.raises(adms.CacheStateError, match="only through a model enabled"):
        run(other, text(1), cache)
    adms.enable_adms_llm(other)
    with pytest.raises(adms.CacheStateError, match="bound to another model"):
        run(other, text(1), cache)
    goes_on(model, cache, twin)


def test_a_cache_of_a_disabled_model() -> None:
    model = llama()
    cache, _ = aged(model, 78)
    adms.disable_adms(model)
    with pytest.raises(adms.CacheStateError, match="only through a model enabled"):
        run(model, text(1), cache)
    adms.enable_adms_llm(model)
    with pytest.raises(adms.CacheStateError, match="was disabled"):
        run(model, text(1), cache)


def test_a_copy_of_an_enabled_model() -> None:
    model = llama()
    cache, twin = aged(model, 78)
    with pytest.raises(adms.CacheStateError, match="copy of an enabled one"):
        run(copy.deepcopy(model), text(1), cache)
    goes_on(model, cache, twin)


def test_another_dtype_in_mid_stream() -> None:
    model = llama()
    cache, _ = aged(model, 78)
    model.bfloat16()
    with pytest.raises(adms.ADMSValueError, match="layer 0 .*bfloat16.*float32.*save the cache"):
        run(model, text(1), cache)


def test_another_number_of_rows() -> None:
    model = llama()
    cache, twin = aged(model, 78)
    with pytest.raises(adms.CacheStateError, match="holds 1 row, the input has 2"):
        run(model, text(3, rows=2), cache)
    goes_on(model, cache, twin)
