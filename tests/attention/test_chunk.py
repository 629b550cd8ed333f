"""Attention of a chunk in two parts, against one softmax over everything."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from adms import enable_streaming_llm
from adms.attention import chunk, window
from adms.attention.merged import attend_in_two, causal_bias, partial, plain_partial
from adms.kernels import chunk_attention as kernel_attention
from adms.kernels import states
from tests.kernels.material import DEVICE, RUNS_TRITON
from tests.streams import feed, random_ids, small_cache, tiny_llama


def draw(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def material(bias_heads: int) -> list[torch.Tensor]:
    """Queries, held keys and values with a bias, new keys and values."""
    rows, heads, kv_heads, count, entries, size = 2, 6, 2, 5, 11, 16
    bias = draw(rows, bias_heads, 1, entries, seed=6)
    bias[1, :, :, 3:] = torch.finfo(torch.float32).min
    return [
        draw(rows, heads, count, size, seed=1),
        draw(rows, kv_heads, entries, size, seed=2),
        draw(rows, kv_heads, entries, size, seed=3),
        bias,
        draw(rows, kv_heads, count, size, seed=4),
        draw(rows, kv_heads, count, size, seed=5),
    ]


def oracle(given: list[torch.Tensor], scaling: float) -> torch.Tensor:
    """One softmax over held and new entries, head by head."""
    query, keys, values, bias, new_keys, new_values = given
    group, count = query.shape[1] // keys.shape[1], query.shape[2]
    future = torch.ones(count, count).triu(1).bool()
    heads = []
    for head in range(query.shape[1]):
        kv = head // group
        old = query[:, head] @ keys[:, kv].mT * scaling + bias[:, kv % bias.shape[1]]
        new = query[:, head] @ new_keys[:, kv].mT * scaling
        scores = torch.cat([old, new.masked_fill(future, -torch.inf)], dim=2)
        every = torch.cat([values[:, kv], new_values[:, kv]], dim=1)
        heads.append(scores.softmax(2) @ every)
    return torch.stack(heads, dim=2)


@pytest.mark.parametrize("bias_heads", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 3e-2)]
)
def test_two_parts_are_one_softmax(dtype: torch.dtype, atol: float, bias_heads: int) -> None:
    given = material(bias_heads)
    causal = causal_bias(5, 3, torch.device("cpu"), dtype)
    found = attend_in_two(*(part.to(dtype) for part in given), causal, 0.3)
    assert_close(found.double(), oracle(given, 0.3), atol=atol, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_two_parts_on_a_gpu(dtype: torch.dtype, atol: float) -> None:
    given = material(2)
    # Rows of a bias start aligned.
    wide = torch.zeros(2, 2, 1, 16, dtype=torch.float64)
    wide[..., :11] = given[3]
    moved = [part.to("cuda", dtype) for part in given]
    moved[3] = wide.to("cuda", dtype)[..., :11]
    causal = causal_bias(5, 3, torch.device("cuda"), dtype)
    found = attend_in_two(*moved, causal, 0.3)
    assert_close(found.cpu().double(), oracle(given, 0.3), atol=atol, rtol=0)


def test_the_twin_serves_other_value_sizes() -> None:
    query, keys, _, bias, _, _ = (part.float() for part in material(2))
    values = draw(2, 2, 11, 24, seed=7).float()
    packed = query[:, :2]
    found, total = partial(packed, keys, values, bias, 0.3)
    fused, same = partial(packed, keys, values[..., :16].contiguous(), bias, 0.3)
    assert found.shape == (2, 2, 5, 24)
    assert_close(found[..., :16], fused, atol=1e-6, rtol=0)
    assert_close(total, same, atol=1e-5, rtol=0)
    assert_close(plain_partial(packed, keys, values, bias, 0.3), (found, total))


def run(model: Any, ids: torch.Tensor, monkeypatch: Any, **changes: Any) -> list[torch.Tensor]:
    """Logits in the general way, layer by layer in two parts, and several layers at once."""
    results, real = [], chunk.applies
    with monkeypatch.context() as patch:
        for ahead, applies in ((0, lambda *_: False), (0, real), (2**30, real)):
            patch.setattr(window, "applies", applies)
            patch.setitem(chunk.READ_AHEAD_BYTES, "cpu", ahead)
            cache = small_cache(model, prefill_chunk_size=37, **changes)
            results.append(feed(model, ids, cache))
            assert cache.nbytes <= cache.max_nbytes
    return results


@pytest.mark.skipif(not RUNS_TRITON or DEVICE.type != "cpu", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("compressor", ["low_rank", "quantized"])
def test_the_kernel_decodes_several_layers(
    compressor: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_llama(layers=3, trained=2048), random_ids(rows, 300)
    monkeypatch.setitem(chunk.READ_AHEAD_BYTES, "cpu", 2**30)
    monkeypatch.setattr(states, "KERNEL_DEVICES", ("cpu",))
    found = []
    for by_tables in (False, True):
        monkeypatch.setattr(chunk, "decodes_by_tables", lambda *_, use=by_tables: use)
        cache = small_cache(model, prefill_chunk_size=60, compressor_type=compressor)
        found.append(feed(model, ids, cache))
    assert_close(found[1], found[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("compressor", ["low_rank", "auto", "quantized", "pq"])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_chunks_equal_the_general_way(
    ratio: float, compressor: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_llama(layers=3, trained=2048), random_ids(rows, 420)
    changes = {"compressor_type": compressor, "importance_ratio": ratio}
    general, single, ahead = run(model, ids, monkeypatch, **changes)
    # Two softmaxes that are merged round otherwise than one: some units in the last place. Among
    # the few levels of "quantized", which landmarks of "pq" have too, that is enough for a number
    # to be rounded the other way (in float64 all three are equal to the bit).
    atol = 2e-4 if compressor in ("quantized", "pq") else 5e-6
    assert_close(single, general, atol=atol, rtol=0)
    assert_close(ahead, general, atol=atol, rtol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.skipif(not RUNS_TRITON or DEVICE.type != "cpu", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(("rows", "ratio"), [(1, 0.1), (2, 0.1), (1, 0.0)])
def test_one_kernel_equals_the_two_parts(
    rows: int, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_llama(layers=3, trained=2048), random_ids(rows, 300)
    monkeypatch.setitem(chunk.READ_AHEAD_BYTES, "cpu", 2**30)
    monkeypatch.setattr(kernel_attention, "DTYPES", (torch.float32,))
    found, calls, real = [], [], chunk.chunk_attention
    monkeypatch.setattr(chunk, "chunk_attention", lambda *args: calls.append(1) or real(*args))
    for fused in (False, True):
        assert not calls
        monkeypatch.setattr(chunk, "attends_at_once", lambda *_, use=fused: use)
        cache = small_cache(model, prefill_chunk_size=60, importance_ratio=ratio)
        found.append(feed(model, ids, cache))
    assert calls
    assert_close(found[1], found[0], atol=5e-6, rtol=0)


def test_which_passes_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coded middles of plain rotary models, on a CPU; what is exact stays equal to the last bit."""
    model, ids = tiny_llama(), random_ids(2, 400)
    asked: list[bool] = []
    real = chunk.applies
    monkeypatch.setattr(window, "applies", lambda *args: asked.append(real(*args)) or asked[-1])

    def used(cache: Any, mask: torch.Tensor | None = None) -> bool:
        asked.clear()
        with torch.no_grad():
            model(ids[:, :360], past_key_values=cache)
            model(ids[:, 360:], attention_mask=mask, past_key_values=cache)
        return asked[-1]

    assert used(small_cache(model))
    assert not asked[0]
    padded = torch.ones(2, 40, dtype=torch.long)
    padded[0, :3] = 0
    assert not used(small_cache(model), padded)
    assert not used(enable_streaming_llm(model, start_size=4, recent_size=64))
    assert not used(small_cache(model, use_adaptive_budget=True))
