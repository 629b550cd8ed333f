"""Codes as keys and values: the kernel against the coders' own decoding."""

import os

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from adms import enable_adms_llm
from adms.entries import TokenShape
from adms.kernels import states as kernel_states
from adms.kernels.parts import decode
from adms.kernels.states import decode_by_tables
from adms.stack import run_of
from tests.kernels.material import (
    DEVICE,
    RUNS_TRITON,
    blocked_part,
    coded_part,
    draw,
    moved,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# By lookups on a CPU; by the kernel on a GPU, or on a CPU in the interpreter.
KERNELS = [False] + [True] * RUNS_TRITON
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def choose(fused: bool, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Has codes decoded by the kernel, or by lookups; and where."""
    monkeypatch.setattr(kernel_states, "KERNEL_DEVICES", (DEVICE.type,) if fused else ())
    return DEVICE if fused else torch.device("cpu")


@pytest.mark.parametrize("fused", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("name", "heads", "size"), [("low_rank", 3, 20), ("low_rank", 2, 32), ("quantized", 3, 16)]
)
def test_codes_are_what_their_coder_decodes(
    name: str,
    heads: int,
    size: int,
    dtype: torch.dtype,
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part, expected = coded_part(name, 2, heads, 45, size)
    records, tables = moved([part.records, part.tables], choose(fused, monkeypatch))
    found = decode_by_tables(tables, records, TokenShape(heads, size, size), dtype)
    tolerance = TOLERANCES[dtype]
    assert found.keys.dtype == found.values.dtype == dtype
    for own, states in ((expected.keys, found.keys), (expected.values, found.values)):
        assert states.shape == own.shape
        assert_close(states.cpu().float(), own.float(), atol=tolerance, rtol=tolerance)
    assert (found.log_weight is None) == (tables.log_weight is None)
    if found.log_weight is not None and expected.log_weight is not None:
        assert_close(found.log_weight.cpu(), expected.log_weight)


@pytest.mark.parametrize("fused", KERNELS)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_blocks_of_heads_with_bases_of_their_own(
    blocks: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that choose their directions, weights, and records cut before their last codes."""
    part = blocked_part(2, 4, 70, 16, blocks)
    expected = decode(part, 4)
    records, tables = moved([part.records, part.tables], choose(fused, monkeypatch))
    found = decode_by_tables(tables, records, TokenShape(4, 16, 16), torch.float32)
    for own, states in zip(expected, (found.keys, found.values), strict=True):
        assert_close(states.cpu(), own, atol=1e-4, rtol=1e-4)
    assert found.log_weight is not None
    assert_close(found.log_weight[:, :, 0].cpu(), part.tables.log_weight.float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU")
@pytest.mark.parametrize("compressor", ["low_rank", "auto", "quantized"])
def test_a_stream_read_through_the_kernel_is_the_plain_one(compressor: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).eval().cuda()
    ids = (draw(2, 700, seed=3) * 30).long().remainder(97).cuda()
    sizes = {"start_size": 4, "compressed_budget": 96, "recent_size": 64}
    logits = []
    for kernel in ("torch", "auto"):
        cache = enable_adms_llm(model, **sizes, compressor_type=compressor, kernel=kernel)
        with torch.no_grad():
            logits.append(model(ids, past_key_values=cache).logits)
    assert_close(*logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fused", KERNELS)
@pytest.mark.parametrize("compressor", ["low_rank", "quantized"])
def test_layers_that_lie_side_by_side_are_read_at_once(
    compressor: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of each layer under its own basis, landmarks too."""
    device = choose(fused, monkeypatch)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).eval().to(device)
    sizes = {"start_size": 4, "compressed_budget": 64, "recent_size": 32}
    cache = enable_adms_llm(model, **sizes, compressor_type=compressor, kernel="torch")
    ids = (draw(2, 400, seed=3) * 30).long().remainder(97).to(device)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    stack = run_of(cache.layers)
    assert len(stack.layers) == 3 and stack.reader is not None and cache.timeline is not None
    totals = [cache.timeline.middle_tokens(row) for row in range(2)] * 3
    whole, fine = stack.reader.tables()
    assert whole is not None and fine is not None
    pairs = [
        (stack.reader.read(totals), stack.reader.read(totals, whole)),
        (stack.reader.landmarks(totals)[0], stack.reader.landmarks(totals, fine)[0]),
    ]
    for plain, fused in pairs:
        assert plain is not None and fused is not None
        assert_close(fused.keys, plain.keys, atol=1e-4, rtol=1e-4)
        assert_close(fused.values, plain.values, atol=1e-4, rtol=1e-4)
        if plain.log_weight is not None:
            assert fused.log_weight is not None
            assert_close(fused.log_weight, plain.log_weight)
