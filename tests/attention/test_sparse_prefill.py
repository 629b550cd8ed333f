"""Sparse prefill: dense where it keeps everything, and an oracle for what it keeps otherwise."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from adms import enable_adms_llm
from adms.attention import sparse_prefill
from adms.attention.block_sparse import ImportanceScorer
from adms.attention.sparse_prefill import SparsePrefillConfig, attend_sparsely
from adms.attention.sparse_scores import Blocks, cut_blocks
from adms.config import ADMSConfig
from adms.errors import ADMSTypeError, ADMSValueError
from tests.patches.tiny import NAMES, ids, tiny

# Evicts and codes early; the recent tokens go round their ring.
SMALL = ADMSConfig(
    start_size=2,
    recent_size=12,
    compressed_budget=8,
    compression_interval=2,
    prefill_chunk_size=8,
)
# Kept through the sparse path, all of it.
ALL = {"density": 1 - 1e-9, "block_size": 3, "query_block_size": 5, "min_tokens": 0}
HALF = ALL | {"density": 0.5}
SCORERS = ("sampled_queries", "block_means")
LENGTH = 45


@torch.no_grad()
def logits(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    config: ADMSConfig = SMALL,
    mask: torch.Tensor | None = None,
    **sparse: Any,
) -> torch.Tensor:
    layers = {"sparse_prefill": SparsePrefillConfig(**sparse)} if sparse else {}
    cache = enable_adms_llm(model, config, **layers)
    return model(inputs, attention_mask=mask, past_key_values=cache).logits


# --- nothing changes where nothing is left out --------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_keeping_every_block_is_dense_attention(name: str) -> None:
    model, inputs = tiny(name), ids(2, LENGTH)
    expected = logits(model, inputs)
    # A code or a landmark may flip by rounding.
    torch.testing.assert_close(logits(model, inputs, **ALL), expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mpt", "falcon-alibi", "gemma2"])
def test_keeping_every_block_is_dense_attention_with_padding(name: str) -> None:
    model, inputs = tiny(name), ids(3, LENGTH)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :19] = 0
    mask[2, :40] = 0
    expected = logits(model, inputs, mask=mask)
    actual = logits(model, inputs, mask=mask, **ALL)
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], atol=2e-5, rtol=0)


def test_keeping_every_block_of_a_coded_middle_with_landmarks() -> None:
    model = tiny("llama", max_position_embeddings=512)
    config = ADMSConfig(
        start_size=2,
        recent_size=16,
        compressed_budget=64,
        prefill_chunk_size=32,
        importance_ratio=0.2,
    )
    inputs = ids(2, 300)
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, :70] = 0
    expected = logits(model, inputs, config, mask)
    actual = logits(model, inputs, config, mask, **ALL)
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=0)


def test_density_one_and_short_contexts_are_dense_bit_for_bit() -> None:
    model, inputs = tiny("llama"), ids(2, LENGTH)
    expected = logits(model, inputs)
    assert torch.equal(logits(model, inputs, density=1.0, min_tokens=0, block_size=2), expected)
    assert torch.equal(logits(model, inputs, **HALF | {"min_tokens": 10**6}), expected)
    assert not torch.allclose(logits(model, inputs, **HALF), expected, atol=1e-3)


@torch.no_grad()
def test_single_tokens_attend_to_everything() -> None:
    model, inputs = tiny("llama"), ids(1, LENGTH)
    outputs = []
    for layers in ({}, {"sparse_prefill": SparsePrefillConfig(**HALF)}):
        cache = enable_adms_llm(model, SMALL, **layers)
        steps = [model(token, past_key_values=cache).logits for token in inputs.split(1, 1)]
        outputs.append(torch.cat(steps, 1))
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_blocks_with_ragged_rows_stays_finite(name: str, scorer: str) -> None:
    model, inputs = tiny(name), ids(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :30] = 0
    assert logits(model, inputs, mask=mask, **HALF, scorer=scorer).isfinite().all()


def test_one_cache_is_sparse_and_another_is_not() -> None:
    model, inputs = tiny("llama"), ids(1, LENGTH)
    before = logits(model, inputs)
    sparse = logits(model, inputs, **HALF)
    assert torch.equal(logits(model, inputs), before)
    assert not torch.equal(sparse, before)


# --- an oracle for what is kept -----------------------------------------------------------------


def problem(per_head: bool = False) -> tuple[Blocks, dict[str, torch.Tensor]]:
    """Two rows of 29 entries in a mixed order, some of no use, and 11 new tokens."""
    generator = torch.Generator().manual_seed(4)
    held, new, heads, kv_heads, size = 29, 11, 6, 2, 8

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    positions = torch.rand(2, held, generator=generator).argsort(1).float()
    valid = torch.rand(2, held, generator=generator) > 0.2
    valid[0] = True
    bias = torch.zeros(2, heads if per_head else 1, new, held + new, dtype=torch.float64)
    if per_head:
        bias += normal(2, heads, new, held + new)
    bias[..., :held] += 0.3 * normal(2, 1, 1, held)
    lowest = torch.finfo(torch.float64).min
    bias[..., :held].masked_fill_(~valid[:, None, None], lowest)
    bias[..., held:].masked_fill_(torch.ones(new, new).triu(1).bool(), lowest)
    tensors = {
        "query": 2 * normal(2, heads, new, size),
        "keys": normal(2, kv_heads, held + new, size),
        "values": normal(2, kv_heads, held + new, size),
        "bias": bias,
    }
    return cut_blocks(positions, valid, None, new, 4), tensors


def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What `_choose` will return, call by call."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    choose = sparse_prefill._choose

    def spy(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(choose(*args))
        return calls[-1]

    monkeypatch.setattr(sparse_prefill, "_choose", spy)
    return calls


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_equals_dense_attention_masked_to_the_blocks_kept(
    density: float, per_head: bool, scorer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, tensors = problem(per_head)
    query, keys, values, bias = tensors.values()
    calls = chosen(monkeypatch)
    config = SparsePrefillConfig(density=density, query_block_size=8, min_tokens=0, scorer=scorer)
    output = attend_sparsely(config, 0, blocks, **tensors, sinks=5, scaling=0.4)
    scores = query.unflatten(1, (2, 3)) @ keys[:, :, None].transpose(-1, -2) * 0.4
    scores = scores + (bias.unflatten(1, (2, 3)) if per_head else bias[:, :, None])
    kept = torch.zeros(2, 2, 1, 11, 40, dtype=torch.bool)
    for (index, counts), rows in zip(calls, (slice(0, 8), slice(8, 11)), strict=True):
        for row in range(2):
            for head in range(2):
                picked = index[row, head][counts[row, head]]
                assert len(set(picked.tolist())) == len(picked)
                places = blocks.tokens[row, picked][blocks.filled[row, picked]]
                kept[row, head, 0, rows, places] = True
    weights = scores.masked_fill(~kept, -torch.inf).softmax(-1)
    expected = (weights @ values[:, :, None]).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9])
def test_keeps_sinks_and_own_blocks_and_no_more_than_asked(
    density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, tensors = problem()
    calls = chosen(monkeypatch)
    config = SparsePrefillConfig(density=density, query_block_size=8, min_tokens=0)
    attend_sparsely(config, 0, blocks, **tensors, sinks=5, scaling=0.4)
    # Sinks lie in the first two blocks; the new tokens' blocks follow the eight of the others.
    for (index, counts), own in zip(calls, ({8, 9}, {10}), strict=True):
        for row in range(2):
            held = int(blocks.filled[row, :8].any(1).sum())
            visible = held + max(own) - 7
            for head in range(2):
                picked = set(index[row, head][counts[row, head]].tolist())
                assert {0, 1} | own <= picked
                assert len(picked) == max(int(density * visible), 2 + len(own))


@pytest.mark.parametrize("scorer", SCORERS)
def test_finds_the_block_that_single_queries_look_for(
    scorer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(1, 2, 72, 16, generator=generator) for _ in range(2))
    query = query[:, :, -8:]
    # Entry 21, in the middle of its block, is what one query of the block looks for.
    query[:, :, 4] = 3 * keys[:, :, 21]
    bias = torch.zeros(1, 1, 8, 72)
    bias[..., 64:].masked_fill_(torch.ones(8, 8).triu(1).bool(), torch.finfo(torch.float32).min)
    blocks = cut_blocks(torch.arange(64.0)[None], None, None, 8, 8)
    calls = chosen(monkeypatch)
    config = SparsePrefillConfig(density=0.34, block_size=8, min_tokens=0, scorer=scorer)
    attend_sparsely(config, 0, blocks, query, keys, keys, bias, sinks=4, scaling=0.25)
    assert sorted(calls[0][0][0, 0].tolist()) == [0, 2, 8]
    assert sorted(calls[0][0][0, 1].tolist()) == [0, 2, 8]


def test_blocks_follow_the_text_and_not_the_memory() -> None:
    positions = torch.tensor([[5.0, 6.0, 2.0, 3.0, 4.0, 0.0, 1.0]])
    valid = torch.tensor([[True, True, True, True, False, True, True]])
    blocks = cut_blocks(positions, valid, torch.tensor([[False, True, True]]), 3, 4)
    assert blocks.num_held == 2
    assert blocks.tokens[0, 0].tolist() == [5, 6, 2, 3]
    assert blocks.tokens[0, 1, :3].tolist() == [0, 1, 4]
    assert blocks.tokens[0, 2, :3].tolist() == [7, 8, 9]
    assert blocks.filled[0].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]]


# --- trained scorers ----------------------------------------------------------------------------


@pytest.mark.parametrize("patterns", [1, 4])
def test_a_trained_scorer_chooses(patterns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny("llama"), ids(2, LENGTH)
    scorers = [ImportanceScorer(8, patterns, hidden_dim=4) for _ in range(2)]
    every = logits(model, inputs, **ALL, scorer=scorers[0])
    torch.testing.assert_close(every, logits(model, inputs), atol=2e-5, rtol=0)
    calls = chosen(monkeypatch)
    logits(model, inputs, **HALF, scorer=tuple(scorers))
    before = [index for index, _ in calls]
    calls.clear()
    # Turned round, the scorer of the second layer prefers what it left out.
    with torch.no_grad():
        scorers[1].gain.mul_(-1.0)
    logits(model, inputs, **HALF, scorer=tuple(scorers))
    moved = [not torch.equal(old, new) for old, (new, _) in zip(before, calls, strict=True)]
    # The first chunk's five columns are one block of queries, the others' eight are two.
    assert not any(moved[:1])
    assert any(moved)


def test_scorers_that_do_not_fit_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ADMSValueError, match="head_dim=8, patterns=4 or 1.*head_dim=16"):
        logits(model, ids(1, 3), scorer=ImportanceScorer(16))
    with pytest.raises(ADMSValueError, match="patterns=3"):
        logits(model, ids(1, 3), scorer=ImportanceScorer(8, 3))
    with pytest.raises(ADMSValueError, match="2 attention layers, got 1"):
        logits(model, ids(1, 3), scorer=(ImportanceScorer(8),))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("density", 0.0, ADMSValueError),
        ("density", 1.5, ADMSValueError),
        ("density", "half", ADMSTypeError),
        ("block_size", 0, ADMSValueError),
        ("block_size", 2.0, ADMSTypeError),
        ("query_block_size", True, ADMSTypeError),
        ("min_tokens", -1, ADMSValueError),
        ("sample_every", 0, ADMSValueError),
        ("scorer", "block_maxima", ADMSValueError),
        ("scorer", [1], ADMSTypeError),
    ],
)
def test_bad_values_name_the_field(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        SparsePrefillConfig(**{field: value})


def test_anything_but_a_configuration_is_refused() -> None:
    with pytest.raises(ADMSTypeError, match="sparse_prefill must be a SparsePrefillConfig"):
        enable_adms_llm(tiny("llama"), sparse_prefill=0.5)
