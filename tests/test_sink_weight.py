"""The weight of an ALiBi model's sinks in a stream (docs/alibi-streams.md)."""

import math
from typing import Any

import pytest
import torch

import adms.positions as positions
from adms import enable_adms_llm, enable_streaming_llm
from adms.patches.falcon import FalconAlibi
from adms.patches.mpt import MptAlibi
from tests.patches.tiny import ids, tiny
from tests.test_architectures import dense, padded, run

SCHEMES = {"falcon-alibi": FalconAlibi, "mpt": MptAlibi}
SINKS, RECENT = 2, 12


@pytest.fixture(autouse=True)
def _few_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "SINK_ENTRIES", 4)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_sinks_weigh_as_much_as_the_tokens_that_left(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny(name), ids(1, 60)
    sizes: Any = {"start_size": SINKS, "recent_size": RECENT, "prefill_chunk_size": 8}
    found = run(model, inputs, enable_streaming_llm(model, **sizes))
    scheme = SCHEMES[name]
    plain = scheme.bias
    monkeypatch.setattr(scheme, "weighs_sinks", False)
    unweighed = run(model, inputs, enable_streaming_llm(model, **sizes))
    assert (found - unweighed).abs().max() > 1e-3

    def weighed(
        self: Any, queries: torch.Tensor, keys: torch.Tensor, num_heads: int
    ) -> torch.Tensor:
        bias: torch.Tensor = plain(self, queries, keys, num_heads)
        seen = cache.tokens_seen
        held = min(seen, SINKS + RECENT)
        gone = max(0, seen - SINKS - RECENT)
        weight = math.log(max(1.0, min((held / 4) ** 1.25, 1 + gone / SINKS)))
        return bias + weight * (keys < SINKS)[:, None, None] if gone else bias

    monkeypatch.setattr(scheme, "bias", weighed)
    cache = enable_streaming_llm(model, **sizes)
    torch.testing.assert_close(found, run(model, inputs, cache), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_nothing_is_weighed_while_everything_is_exact(name: str) -> None:
    model, inputs = tiny(name), ids(1, 60)
    cache = enable_adms_llm(model, start_size=SINKS, recent_size=RECENT, compressed_budget=64)
    torch.testing.assert_close(
        run(model, inputs, cache, 4), dense(model, inputs), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_row_weighs_its_sinks_by_itself(name: str) -> None:
    model = tiny(name)
    rows = [ids(1, 50), ids(1, 19, seed=1)]
    sizes: Any = {"start_size": SINKS, "recent_size": RECENT, "prefill_chunk_size": 64}
    inputs, mask = padded(rows)
    both = enable_streaming_llm(model, **sizes)
    follow = ids(2, 6, seed=2)
    with torch.no_grad():
        model(inputs, attention_mask=mask, past_key_values=both)
        together = model(
            follow,
            attention_mask=torch.cat([mask, torch.ones_like(follow)], dim=1),
            past_key_values=both,
        ).logits
        for index, row in enumerate(rows):
            alone = enable_streaming_llm(model, **sizes)
            model(row, past_key_values=alone)
            expected = model(follow[index : index + 1], past_key_values=alone).logits
            torch.testing.assert_close(together[index : index + 1], expected, atol=2e-5, rtol=0)
