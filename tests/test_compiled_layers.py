"""Layers compiled for a capture, run on the CPU without one; the compiler is dynamo's tracer."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

import adms.compiled_layers
import adms.decode
import adms.step
from adms import ADMSKVCache
from adms.compiled_layers import compiled_layers, step_attention
from adms.errors import ADMSValueError
from tests.streams import feed, random_ids, small_cache, tiny_llama


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on the CPU whose layers run compiled, as those of a capture do."""
    monkeypatch.setattr(adms.decode, "PHASES", {"cpu": ("empty", "exact", "coded")})
    monkeypatch.setattr(adms.compiled_layers, "BACKEND", "eager")
    uncompiled = adms.step.DecodeStep._pass

    def run(step: Any, forward: Any, arguments: Any) -> Any:
        with compiled_layers(step.decoder(), step.attend):
            return uncompiled(step, forward, arguments)

    monkeypatch.setattr(adms.step.DecodeStep, "_pass", run)
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_one_form_serves_all_layers_tokens_and_caches(compiled: None) -> None:
    model, ids = tiny_llama(layers=4), random_ids(1, 220)

    def stream(cache: ADMSKVCache) -> torch.Tensor:
        """From an empty to an exact to a coded middle, with commits and a chunk in between."""
        parts = [feed(model, ids[:, :2], cache, step=1), feed(model, ids[:, 2:180], cache)]
        return torch.cat([*parts, feed(model, ids[:, 180:], cache, step=1)], dim=1)

    expected = stream(small_cache(model, recent_size=24, kernel="torch"))
    for _ in range(2):
        cache = small_cache(model, recent_size=24)
        assert_close(stream(cache), expected, atol=2e-5, rtol=2e-5)
        assert cache.step is not None and cache.step.phase == "coded"
        assert graphs() == 1
    # Another number of rows is another shape.
    feed(model, random_ids(2, 3), small_cache(model), step=1)
    assert graphs() == 2


def test_layers_are_left_as_they_were(compiled: None) -> None:
    model = tiny_llama()
    wrapped = model.model.layers[1]
    own = wrapped.forward
    calls = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return own(*args, **kwargs)

    # As accelerate's hooks leave a layer.
    wrapped.forward = forward
    cache = small_cache(model)
    feed(model, random_ids(1, 3), cache, step=1)
    assert calls and cache.step is not None
    assert "forward" not in model.model.layers[0].__dict__
    assert wrapped.__dict__["forward"] is forward


def test_attention_of_a_compiled_layer_needs_one() -> None:
    one = torch.zeros(1, 2, 1, 16)
    with pytest.raises(RuntimeError, match="outside of a compiled layer"):
        step_attention(one, one, one, 1.0)


def test_other_shapes_in_mid_stream_are_refused(compiled: None) -> None:
    model = tiny_llama()
    cache = small_cache(model)
    feed(model, random_ids(1, 2), cache, step=1)
    model.double()
    with pytest.raises(ADMSValueError, match="to change a model's dtype in mid-stream"):
        feed(model, random_ids(1, 1), cache)
