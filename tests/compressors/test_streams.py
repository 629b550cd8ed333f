"""Every compressor inside a cache: 2000 tokens of a tiny Llama."""

import pytest
import torch

from adms import enable_adms_llm
from tests.compressors.material import NAMES
from tests.compressors.tiny import feed, random_ids, tiny_llama
from tests.streams import check_padded_row

SIZES = {"start_size": 4, "recent_size": 64, "compressed_budget": 160}
EVERY = pytest.mark.parametrize("name", NAMES)


def held(cache: object) -> int:
    """Bytes of the cache's layers, summed over the tensors' storages, which layers may share."""
    layers = cache.layers  # type: ignore[attr-defined]
    storages = [part.untyped_storage() for layer in layers for part in layer.tensors()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@EVERY
def test_the_bound_holds_in_a_padded_batch(name: str) -> None:
    model = tiny_llama()
    cache = enable_adms_llm(model, **SIZES, compressor_type=name)
    ids = random_ids(2, 2000)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    for start in range(0, 2000, 200):
        part = slice(start, start + 200)
        logits = feed(model, ids[:, part], cache, mask[:, : start + 200])
        assert logits[mask[:, part].bool()].isfinite().all()
        assert held(cache) <= cache.nbytes <= cache.max_nbytes
    plan = cache.layers[0].middle.plan
    assert plan.coder is not None, "the middle was never coded"
    assert plan.coder.nbytes <= plan.arena_bytes
    assert cache.summary()["middle"]["tokens"] > SIZES["compressed_budget"]
    # One token at a time, as generate does.
    for step in range(40):
        token = random_ids(2, 1, seed=step)
        assert feed(model, token, cache).isfinite().all()
        assert cache.nbytes <= cache.max_nbytes


@EVERY
def test_a_padded_row_is_the_row_alone(name: str) -> None:
    """Batched with padding on its left, a row gets the logits it gets by itself."""
    model = tiny_llama()
    together = enable_adms_llm(model, **SIZES, compressor_type=name)
    alone = enable_adms_llm(model, **SIZES, compressor_type=name)
    check_padded_row(model, together, alone, total=832)
    assert alone.summary()["middle"]["form"] == name


@EVERY
def test_a_budget_for_everything_changes_nothing(name: str) -> None:
    model = tiny_llama()
    ids = random_ids(1, 300)
    cache = enable_adms_llm(
        model, start_size=4, recent_size=64, compressed_budget=400, compressor_type=name
    )
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(feed(model, ids, cache), expected, atol=1e-5, rtol=1e-5)
    assert cache.summary()["middle"]["form"] == "exact"


def test_a_block_that_cannot_wait_in_the_budget_is_refused() -> None:
    from adms.config import ADMSConfig, resolve_sizes
    from adms.errors import ADMSValueError

    with pytest.raises(ADMSValueError, match="codes 64 tokens together.*32 tokens here"):
        resolve_sizes(ADMSConfig(compressed_budget=32), None, block=64)
    assert resolve_sizes(ADMSConfig(compressed_budget=64), None, block=64).waiting == 63
