"""Layers that are alike are committed together: the same as one by one, in few operations."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import adms.commit
import adms.compressors.codebooks
from adms import ADMSKVCache
from adms.layer import ADMSLayer
from adms.stack import lay_together, side_by_side, tensors_of
from adms.tiers.landmarks import LandmarkStore
from tests.streams import feed, random_ids, reachable_bytes, small_cache, tiny_llama

LAYERS = 4
# Turns to codes within the first two hundred tokens, and codes on every eighth token after.
CODED: dict[str, Any] = {"recent_size": 24, "compression_interval": 8}


def padded(model: Any, cache: ADMSKVCache) -> None:
    """Three rows of other lengths, so that they turn in different passes."""
    ids = random_ids(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :37] = mask[2, :9] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    feed(model, random_ids(3, 260, seed=1), cache, 13)
    feed(model, random_ids(3, 40, seed=2), cache, 1)


def one_row(model: Any, cache: ADMSKVCache) -> None:
    feed(model, random_ids(1, 400), cache)
    feed(model, random_ids(1, 40, seed=2), cache, 1)


def reordered(model: Any, cache: ADMSKVCache) -> None:
    one_row(model, cache)
    cache.batch_repeat_interleave(3)
    feed(model, random_ids(3, 30, seed=3), cache, 1)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    feed(model, random_ids(3, 30, seed=4), cache, 1)
    cache.batch_select_indices(torch.tensor([1]))
    feed(model, random_ids(1, 100, seed=5), cache, 10)


def run(together: int, monkeypatch: pytest.MonkeyPatch, use: Callable[..., None], **changes: Any):  # type: ignore[no-untyped-def]
    """A cache after ``use``, with at most ``together`` tokens committed at once."""
    monkeypatch.setattr(adms.commit, "TOKENS_TOGETHER", together)
    model = tiny_llama(layers=LAYERS, trained=2048)
    cache = small_cache(model, **{**CODED, **changes})
    use(model, cache)
    return cache


def without_scores(layer: ADMSLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The middle's bytes with those of scores blank, the landmarks' scores and the last ones.

    They are sums, which are rounded by the shapes of what is summed.
    """
    middle = layer.middle
    assert middle is not None
    arena, store = middle.arena.clone(), middle.plan.store
    if store is None:
        return arena, torch.zeros(0), torch.zeros(0)
    single, data = getattr(store, "single", store), middle.landmark_bytes()
    start, last = middle.plan.landmark_offset, torch.zeros(0)
    end = store.nbytes
    if isinstance(store, LandmarkStore):
        last, end = store.read_context(data), store.slots_end
        arena[:, start + end : start + store.nbytes] = 0
    slots = arena[:, start + store.header_bytes : start + end]
    slots = slots.unflatten(1, (-1, single.slot_bytes))
    at = single.record_bytes + 4
    scores = slots[..., at : at + 4].clone().view(torch.float32)[..., 0]
    slots[..., at : at + 4] = 0
    assert middle.plan.coder is not None
    return arena, scores, last


def assert_alike(cache: ADMSKVCache, other: ADMSKVCache) -> None:
    assert cache.timeline == other.timeline
    for own, twin in zip(cache.layers, other.layers, strict=True):
        for part, expected in zip(own.exact.tensors(), twin.exact.tensors(), strict=True):
            assert torch.equal(part, expected), own.layer_idx
        if own.middle is not None:
            arena, scores, last = without_scores(own)
            expected, wanted, context = without_scores(twin)
            assert torch.equal(arena, expected), own.layer_idx
            torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-5)
            # Float16: what is rounded otherwise may fall to the next number.
            torch.testing.assert_close(last, context, atol=1e-3, rtol=1e-3)


def lies_together(cache: ADMSKVCache) -> bool:
    tiers = [tensors_of(layer) for layer in cache.layers]
    return all(side_by_side(parts) is not None for parts in zip(*tiers, strict=True))


@pytest.mark.parametrize("use", [one_row, reordered])
def test_together_is_one_by_one(use: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    found, twin = (run(together, monkeypatch, use) for together in (10**6, 1))
    assert_alike(found, twin)
    assert lies_together(found) and lies_together(twin)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compressor_type": "auto"},
        {"compressor_type": "quantized"},
        {"compressor_type": "pq"},
        {"compressor_type": "vq"},
        {"importance_ratio": 0.0},
        {"importance_metric": "coding_error"},
        {"importance_metric": "attention"},
        {"use_adaptive_budget": True},
        {"compressed_budget": 0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "default",
)
def test_rows_of_other_lengths(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """They turn to codes in different passes."""
    found, twin = (run(together, monkeypatch, padded, **changes) for together in (10**6, 1))
    assert_alike(found, twin)
    stackable = changes.get("compressor_type") != "vq"
    assert lies_together(found) == stackable
    assert found.nbytes == twin.nbytes == reachable_bytes(found) - found.shared_nbytes


def test_in_pieces_that_leave_a_remainder(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three of the four layers at a time.
    found, twin = (run(together, monkeypatch, one_row) for together in (24, 1))
    assert_alike(found, twin)


def test_copies_and_files_lie_together_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adms.commit, "TOKENS_TOGETHER", 10**6)
    model = tiny_llama(layers=LAYERS, trained=2048)
    cache = small_cache(model, **CODED)
    padded(model, cache)
    cache.save(tmp_path / "one.adms")
    others = [copy.deepcopy(cache), ADMSKVCache.load(tmp_path / "one.adms", model=model)]
    for other in others:
        assert lies_together(other)
        mine, theirs = (
            {part.untyped_storage().data_ptr() for part in tensors_of(one.layers[0])}
            for one in (cache, other)
        )
        assert not mine & theirs
        assert other.nbytes == reachable_bytes(other) - other.shared_nbytes
    more = random_ids(3, 30, seed=7)
    expected = feed(model, more, cache, 1)
    for other in others:
        assert torch.equal(feed(model, more, other, 1), expected)
        assert_alike(other, cache)


def test_layers_that_were_moved_are_laid_together_again() -> None:
    model = tiny_llama(layers=LAYERS, trained=2048)
    found, twin = small_cache(model, **CODED), small_cache(model, **CODED)
    for cache in (found, twin):
        one_row(model, cache)
    # As a move to another device leaves them: some on their own.
    for layer in found.layers[1:3]:
        layer.exact.keys, layer.middle.arena = layer.exact.keys.clone(), layer.middle.arena.clone()
    assert not lies_together(found)
    for cache in (found, twin):
        feed(model, random_ids(1, 20, seed=9), cache, 1)
    assert lies_together(found)
    assert_alike(found, twin)
    assert found.nbytes == reachable_bytes(found) - found.shared_nbytes


def test_layers_that_differ_are_apart() -> None:
    """A layer of another dtype, and one whose coder cannot be stacked."""
    model = tiny_llama(layers=LAYERS, trained=2048)
    cache = small_cache(model, **CODED)
    feed(model, random_ids(1, 40), cache)
    odd: ADMSLayer = cache.layers[1]
    assert odd.exact is not None
    odd.exact.keys = odd.exact.keys.double()
    kinds = lay_together(cache.layers)
    assert [[one.layer_idx for one in kind.layers] for kind in kinds] == [[0, 2, 3], [1]]
    other = small_cache(model, compressor_type="vq", **CODED)
    feed(model, random_ids(1, 40), other)
    assert [len(kind.layers) for kind in lay_together(other.layers)] == [1] * LAYERS


def test_side_by_side_is_one_storage_in_order() -> None:
    whole = torch.arange(24).view(4, 2, 3)
    found = side_by_side(list(whole))
    assert found is not None and torch.equal(found, whole)
    assert found.data_ptr() == whole.data_ptr()
    assert side_by_side(list(whole[1:])) is not None
    assert side_by_side([whole[0], whole[2]]) is None
    assert side_by_side([whole[1], whole[0]]) is None
    assert side_by_side([part.T for part in whole]) is None
    assert side_by_side([whole[0], whole[1].clone()]) is None


VIEWS = (
    *("view", "_unsafe_view", "slice", "select", "expand", "permute", "transpose", "unsqueeze"),
    *("squeeze", "as_strided", "t.", "detach", "alias", "split", "unbind", "lift_fresh", "empty"),
)


class Kernels(TorchDispatchMode):
    """Counts the operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func).removeprefix("aten.")
        if not name.startswith(VIEWS):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def most_kernels(layers: int, step: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Operations of the longest commit of a coded stream."""
    model = tiny_llama(layers=layers, trained=2048)
    cache = small_cache(model, **CODED)
    feed(model, random_ids(1, 400), cache)
    commit, counted = ADMSKVCache.commit, []

    def counting(self: ADMSKVCache) -> None:
        with Kernels() as kernels:
            commit(self)
        counted.append(kernels.found)

    with monkeypatch.context() as patch:
        patch.setattr(ADMSKVCache, "commit", counting)
        feed(model, random_ids(1, 64, seed=1), cache, step)
    longest = max(counted, key=lambda found: found.total())
    # What the device knows is not asked for: it would be waited for.
    assert longest["_local_scalar_dense.default"] == 0
    return longest.total()


@pytest.mark.parametrize("step", [1, 64])
def test_a_commit_takes_as_many_operations_for_any_number_of_layers(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adms.commit, "TOKENS_TOGETHER", 10**6)
    # A CPU looks for codewords in pieces that stay in its cache.
    monkeypatch.setattr(adms.compressors.codebooks, "SEARCHED_TOGETHER", 10**9)
    few, many = (most_kernels(layers, step, monkeypatch) for layers in (2, 12))
    # 320 without the search for codewords, which is many small operations on a CPU; a hundred are
    # of the one layer in ten that compares tokens with what the stream holds.
    assert few == many <= 510
