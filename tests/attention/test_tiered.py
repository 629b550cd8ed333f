"""Attention over coded tiers against a dense computation in float64, entry by entry."""

import pytest
import torch

from adms.cache import ADMSKVCache
from adms.layer import ADMSLayer
from tests.streams import feed, random_ids, small_cache, tiny_llama


def retained(cache: ADMSKVCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values ``[K, N, D]`` and text positions ``[N]`` of what a one-row layer retains."""
    layer, timeline = cache.layers[0], cache.timeline
    assert isinstance(layer, ADMSLayer) and timeline is not None
    assert layer.exact is not None and layer.middle is not None
    sizes, seen, evicted = timeline.sizes, timeline.seen[0], timeline.evicted[0]
    slots = list(range(sizes.sink)) + [sizes.sink + t % sizes.ring for t in range(evicted, seen)]
    places = list(range(sizes.sink)) + list(range(evicted, seen))
    keys, values = [layer.exact.keys[0, :, slots]], [layer.exact.values[0, :, slots]]
    total = timeline.middle_tokens(0)
    entries = layer.middle.read([total])
    assert entries is not None
    geometry = layer.middle.plan.geometry
    assert geometry.is_coded(total) and geometry.held(total) == total
    whole = min(total, geometry.whole_records)
    middle = [max(t for t in range(total) if t % whole == slot) for slot in range(whole)]
    if total > whole:
        cut = geometry.capacity - geometry.whole_records
        older = range(total - whole)
        middle += [max(t for t in older if t % cut == slot) for slot in range(len(older))]
    landmarks: list[int] = []
    if layer.middle.plan.store is not None:
        marks, marked = layer.middle.landmarks([total])
        chosen = [slot for slot, token in enumerate(marked[0].tolist()) if token >= 0]
        landmarks = marked[0, chosen].tolist()
        keys.append(marks.keys[0][:, chosen])
        values.append(marks.values[0][:, chosen])
        places += landmarks
    kept = [slot for slot, token in enumerate(middle) if token + sizes.sink not in landmarks]
    keys.append(entries.keys[0][:, kept])
    values.append(entries.values[0][:, kept])
    places += [middle[slot] + sizes.sink for slot in kept]
    return torch.cat(keys, dim=1), torch.cat(values, dim=1), torch.tensor(places)


# Few enough that nothing is forgotten, so that positions in the cache are those of the text.
SEEN = 700
NEW = torch.arange(SEEN, SEEN + 20)


@pytest.mark.parametrize("compressor", ["low_rank", "auto", "quantized"])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_one_layer_equals_dense_attention_over_decoded_entries(
    compressor: str, ratio: float
) -> None:
    model = tiny_llama(layers=1, trained=2048).double()
    cache = small_cache(model, compressor_type=compressor, importance_ratio=ratio)
    feed(model, random_ids(1, SEEN), cache)
    keys, values, places = retained(cache)
    assert len(places) == len(set(places.tolist())) == SEEN
    ids = random_ids(1, 20, seed=3)
    actual = feed(model, ids, cache)

    decoder, block = model.model, model.model.layers[0]
    attention = block.self_attn
    with torch.no_grad():
        hidden = decoder.embed_tokens(ids)
        normed = block.input_layernorm(hidden)
        heads = [
            project(normed).view(20, -1, 16).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        everything = torch.cat([places, NEW])
        inverse = decoder.rotary_emb.inv_freq.double()

        def rotate(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            angle = positions.double()[:, None] * inverse
            turn = torch.polar(torch.ones_like(angle), angle)
            plane = torch.complex(states[..., :8], states[..., 8:]) * turn
            return torch.cat([plane.real, plane.imag], dim=-1)

        query = rotate(heads[0], NEW)
        all_keys = rotate(torch.cat([keys, heads[1]], dim=1), everything)
        all_values = torch.cat([values, heads[2]], dim=1)
        scores = query @ all_keys.repeat_interleave(2, dim=0).transpose(1, 2) / 4
        future = everything[None, :] > NEW[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed = (
            (weights @ all_values.repeat_interleave(2, dim=0)).transpose(0, 1).reshape(1, 20, -1)
        )
        hidden = hidden + attention.o_proj(mixed)
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        expected = model.lm_head(decoder.norm(hidden))
    # The model's own rotary embedding computes its angles in float32.
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
