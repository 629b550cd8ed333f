"""Decode attention over exact and coded entries, plain and fused, against a float64 oracle."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from adms.kernels import has_triton
from adms.kernels.decode_attention import decode_attention
from adms.kernels.parts import CodedPart, ExactPart, decode
from tests.kernels.material import (
    DEVICE,
    RUNS_TRITON,
    blocked_part,
    coded_part,
    draw,
    exact_part,
    moved,
    rotations,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = [False] + [True] * RUNS_TRITON


def attend(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    exact: list[ExactPart],
    coded: list[CodedPart],
    scaling: float,
    fused: bool,
) -> torch.Tensor:
    """The kernel in question, on a GPU where there is one and it is fused."""
    given = moved([query, cos, sin, exact, coded], DEVICE if fused else torch.device("cpu"))
    return decode_attention(*given, scaling=scaling, fused=fused).cpu()


def turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair of channels as a complex number, multiplied by its rotation."""
    half = states.shape[-1] // 2
    number = torch.complex(states[..., :half], states[..., half:])
    number = number * torch.complex(cos[..., :half], sin[..., :half])
    return torch.cat([number.real, number.imag], dim=-1)


def oracle(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    parts: list[ExactPart | CodedPart],
    states: list[tuple[torch.Tensor, torch.Tensor]],
    scaling: float,
) -> torch.Tensor:
    """Row by row and head by head, over what is visible only."""
    out = torch.zeros_like(query, dtype=torch.float64)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            kv = head * states[0][0].shape[1] // query.shape[1]
            asked = turn(query[row, head].double(), cos.double()[0], sin.double()[0])
            scores, values = [], []
            for part, (keys, own) in zip(parts, states, strict=True):
                shown = part.valid.expand(query.shape[0], -1)[row]
                turned = turn(keys[row, kv].double(), part.cos.double()[0], part.sin.double()[0])
                score = turned @ asked * scaling
                if isinstance(part, ExactPart) and part.log_weight is not None:
                    score = score + part.log_weight[row, kv].double()
                if isinstance(part, CodedPart) and part.tables.log_weight is not None:
                    score = score + part.tables.log_weight[row, kv].double()
                scores.append(score[shown])
                values.append(own[row, kv].double()[shown])
            out[row, head] = torch.cat(scores).softmax(0) @ torch.cat(values)
    return out


@pytest.mark.parametrize("fused", KERNELS)
@pytest.mark.parametrize("rows, heads, kv_heads, size", [(2, 4, 2, 16), (1, 3, 1, 64)])
@pytest.mark.parametrize("name", ["low_rank", "quantized", None])
def test_equals_dense_attention_over_what_the_coder_decodes(
    name: str | None, rows: int, heads: int, kv_heads: int, size: int, fused: bool
) -> None:
    query = draw(rows, heads, size, seed=1)
    cos, sin = (table[:, 0] for table in rotations(1, 1, size, 8))
    exact = [
        exact_part(rows, kv_heads, 21, size),
        exact_part(rows, kv_heads, 70, size, 30, weighted=True),
    ]
    states = [(part.keys, part.values) for part in exact]
    coded = []
    if name is not None:
        part, decoded = coded_part(name, rows, kv_heads, 75, size)
        marks, marked = coded_part("quantized", rows, kv_heads, 5, size, 7)
        coded = [part, marks]
        states += [(one.keys, one.values) for one in (decoded, marked)]
    expected = oracle(query, cos, sin, [*exact, *coded], states, 0.3)
    found = attend(query, cos, sin, exact, coded, 0.3, fused)
    assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("fused", KERNELS)
@pytest.mark.parametrize("marks", [1, 33])
def test_finer_records_of_the_same_tables(marks: int, fused: bool) -> None:
    """Which one launch reads: they go on where the others end, and weigh otherwise."""
    rows, kv_heads, size = 2, 4, 16
    part = blocked_part(rows, kv_heads, 40, size, 2)
    finer = blocked_part(rows, kv_heads, marks, size, 2)
    whole = part.tables.record_bytes
    weights = torch.rand(2, rows, kv_heads, generator=torch.Generator().manual_seed(3))
    shown = torch.arange(marks) != 2
    part = dataclasses.replace(part, tables=part.tables.cut(whole // 3, weights[0]))
    finer = dataclasses.replace(
        finer,
        tables=part.tables.cut(whole, weights[1]),
        cos=finer.cos.flip(1),
        valid=shown[None].repeat(rows, 1),
    )
    query = draw(rows, 8, size, seed=2)
    cos, sin = (table[:, 0] for table in rotations(1, 1, size, 8))
    exact = [exact_part(rows, kv_heads, 9, size)]
    coded = [part, finer]
    states = [(exact[0].keys, exact[0].values), *(decode(one, kv_heads) for one in coded)]
    expected = oracle(query, cos, sin, [*exact, *coded], states, 0.25)
    found = attend(query, cos, sin, exact, coded, 0.25, fused)
    assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("fused", KERNELS)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_basis_per_block_of_heads(blocks: int, fused: bool) -> None:
    rows, kv_heads, size = 2, 4, 16
    part = blocked_part(rows, kv_heads, 40, size, blocks)
    query = draw(rows, 8, size, seed=2)
    cos, sin = (table[:, 0] for table in rotations(1, 1, size, 8))
    exact = [exact_part(rows, kv_heads, 9, size)]
    states = [(exact[0].keys, exact[0].values), decode(part, kv_heads)]
    expected = oracle(query, cos, sin, [*exact, part], states, 0.25)
    found = attend(query, cos, sin, exact, [part], 0.25, fused)
    assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(not RUNS_TRITON, reason="needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("weight", [0.001, 1.0, 10_000.0])
def test_keys_in_float16_bear_every_weight(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are worked out for bfloat16: how strongly queries read channels does not matter."""
    import triton.language as tl

    from adms.kernels import decode_attention_triton as host

    class InFloat16:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *given, **named: self.kernel[grid](
                *given, **{**named, "KEY_KIND": tl.float16}
            )

    monkeypatch.setattr(host.kernels, "coded_tiles", InFloat16(host.kernels.coded_tiles))
    part = blocked_part(1, 2, 40, 16, 2)
    keys = part.tables.keys
    keys = dataclasses.replace(
        keys,
        weight=torch.full_like(keys.weight, weight),
        deviation=(keys.deviation.float() * 20 * weight).clamp(max=65504).half(),
    )
    part = dataclasses.replace(part, tables=dataclasses.replace(part.tables, keys=keys))
    query = draw(1, 4, 16, seed=2).half()
    cos, sin = (table[:, 0] for table in rotations(1, 1, 16, 8))
    exact = exact_part(1, 2, 9, 16)
    exact = dataclasses.replace(exact, keys=exact.keys.half(), values=exact.values.half())
    states = [(exact.keys, exact.values), decode(part, 2)]
    expected = oracle(query, cos, sin, [exact, part], states, 0.25)
    found = attend(query, cos, sin, [exact], [part], 0.25, True)
    assert_close(found.double(), expected, atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("name", ["low_rank", "quantized"])
def test_tables_decode_what_the_coder_decodes(name: str) -> None:
    part, decoded = coded_part(name, 2, 2, 30, 16)
    shown = part.valid.all(0)
    for found, expected in zip(decode(part, 2), (decoded.keys, decoded.values), strict=True):
        assert_close(found[:, :, shown], expected[:, :, shown], atol=1e-5, rtol=1e-5)


def test_a_row_without_any_code_decodes_to_means() -> None:
    part, decoded = coded_part("low_rank", 2, 2, 30, 16)
    offsets = part.tables.offsets.clone()
    offsets[1] = -1
    bare = dataclasses.replace(part, tables=dataclasses.replace(part.tables, offsets=offsets))
    shown = part.valid[0]
    sides = (part.tables.keys, part.tables.values)
    coded = (decoded.keys, decoded.values)
    for found, expected, side in zip(decode(bare, 2), coded, sides, strict=True):
        assert_close(found[0][:, shown], expected[0][:, shown], atol=1e-5, rtol=1e-5)
        mean = side.mean[1].float().view(2, 1, 16).expand(2, 30, 16)
        assert_close(found[1], mean, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("fused", KERNELS)
def test_bytes_that_are_not_read_may_be_anything(fused: bool) -> None:
    part, decoded = coded_part("quantized", 1, 2, 30, 16)
    query = draw(1, 4, 16, seed=1)
    cos, sin = (table[:, 0] for table in rotations(1, 1, 16, 8))
    exact = [exact_part(1, 2, 9, 16)]
    states = [(exact[0].keys, exact[0].values), (decoded.keys.clone(), decoded.values.clone())]
    expected = oracle(query, cos, sin, [*exact, part], states, 0.25)
    # As float16, all ones is NaN.
    part.records[:, -1] = 255
    found = attend(query, cos, sin, exact, [part], 0.25, fused)
    assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests above run the kernels themselves")
@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_fused_kernels_in_the_interpreter() -> None:
    """Triton reads the variable once, so the tests above run again in a process of their own."""
    root = Path(__file__).parents[2]
    names = ("test_write_token.py", "test_codewords.py", "test_chunk_attention.py")
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in names)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *files],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
