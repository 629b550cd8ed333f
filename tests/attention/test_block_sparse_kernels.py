"""Tests of block-sparse kernels, selection and layout against dense float64 oracles."""

import copy
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adms.attention.block_sparse import (
    BlockLayout,
    ImportanceScorer,
    block_mean_scores,
    block_sparse_attention,
    get_adaptive_sparsity,
    gumbel_softmax_topk,
    hard_topk,
    soft_block_attention,
    summarize_blocks,
)
from adms.attention.block_sparse.flex import flex_block_mask
from adms.attention.block_sparse.scorer import block_mean_squares
from adms.errors import ADMSTypeError, ADMSValueError

ROOT = Path(__file__).parents[2]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def token_mask(blocks: Tensor, size: int, queries: int, keys: int, is_causal: bool) -> Tensor:
    """bool [B, H, Q, N], written out token by token."""
    rows = torch.arange(queries) // size
    columns = torch.arange(keys) // size
    mask = blocks[..., rows, :][..., columns]
    if is_causal:
        positions = torch.arange(keys)
        mask = mask & (positions <= positions[keys - queries :, None])
    return mask


def oracle(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float | None = None) -> Tensor:
    """Attention with each exponential times weights [B, H, Q, N], in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    terms = (q.double() @ k.transpose(-1, -2) * scale).exp() * weights
    return terms / terms.sum(-1, keepdim=True) @ v


def random_blocks(batch: int, heads: int, layout: BlockLayout, share: float, seed: int) -> Tensor:
    shape = (batch, heads, layout.query_blocks, layout.key_blocks)
    chosen = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share
    chosen[..., 0] = True
    return chosen | layout.own()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    keys=st.integers(1, 40),
    missing=st.integers(0, 39),
    size=st.sampled_from([1, 4, 8, 16]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    is_causal=st.booleans(),
    biased=st.booleans(),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_gathered_equals_masked_dense(
    keys: int,
    missing: int,
    size: int,
    heads: tuple[int, int],
    is_causal: bool,
    biased: bool,
    share: float,
    dtype: torch.dtype,
) -> None:
    queries = max(1, keys - missing)
    q = draw(2, heads[0], queries, 8, dtype=dtype)
    k, v = draw(2, heads[1], keys, 8, seed=1, dtype=dtype), draw(2, heads[1], keys, 5, dtype=dtype)
    layout = BlockLayout(queries, keys, size, is_causal)
    blocks = random_blocks(2, heads[0], layout, share, keys)
    weights = token_mask(blocks, size, queries, keys, is_causal).double()
    bias = draw(2, heads[1], keys, seed=2, dtype=dtype) if biased else None
    if bias is not None:
        weights = weights * bias.double().exp().repeat_interleave(
            heads[0] // heads[1], 1
        ).unsqueeze(-2)
    got = block_sparse_attention(
        q, k, v, blocks, size, is_causal=is_causal, key_bias=bias, kernel="gathered"
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = oracle(q, k, v, weights)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_density_one_is_dense_attention_and_hidden_keys_do_not_count() -> None:
    q, k, v = draw(1, 4, 24, 8), draw(1, 2, 50, 8, seed=1), draw(1, 2, 50, 8, seed=2)
    every = torch.ones(1, 1, 2, 4, dtype=torch.bool)
    bias = torch.zeros(1, 2, 50, dtype=torch.float64)
    bias[..., 3:7] = -math.inf
    got = block_sparse_attention(q, k, v, every, 16, is_causal=True, key_bias=bias, scale=0.3)
    mask = token_mask(every, 16, 24, 50, True) & (bias[0, 0] == 0)
    torch.testing.assert_close(got, oracle(q, k, v, mask.double(), 0.3), rtol=1e-12, atol=1e-12)


def test_gathered_gradients_equal_masked_dense() -> None:
    q, k, v = (draw(2, 2, 20, 4, seed=seed).requires_grad_() for seed in range(3))
    blocks = random_blocks(2, 2, BlockLayout(20, 20, 8, True), 0.5, 0)
    mask = token_mask(blocks, 8, 20, 20, True).double()
    ours = block_sparse_attention(q, k, v, blocks, 8, is_causal=True).square().sum()
    theirs = oracle(q, k, v, mask).square().sum()
    for got, expected in zip(
        torch.autograd.grad(ours, (q, k, v)), torch.autograd.grad(theirs, (q, k, v)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_soft_attention_and_its_gradients_equal_the_oracle(is_causal: bool) -> None:
    q, k, v = (draw(2, 3, 20, 4, seed=seed).requires_grad_() for seed in range(3))
    weights = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(3)).double()
    # A weight of exactly 0 must receive its gradient too.
    weights[..., 1:, 0] = 0.0
    weights.requires_grad_()
    tokens = weights.repeat_interleave(8, -2).repeat_interleave(8, -1)[..., :20, :20]
    if is_causal:
        tokens = tokens * torch.ones(20, 20).tril()
    expected = oracle(q, k, v, tokens)
    got = soft_block_attention(q, k, v, weights, 8, is_causal=is_causal)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    inputs = (q, k, v, weights)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert (
        torch.autograd.grad(soft_block_attention(q, k, v, weights, 8).square().sum(), weights)[0][
            ..., 1:, 0
        ]
        .abs()
        .min()
        > 0
    )


def test_soft_attention_survives_large_scores_outside_the_pattern() -> None:
    q, k, v = (draw(1, 1, 8, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    k[:, :, 4:] *= 1e4
    weights = torch.zeros(1, 1, 2, 2)
    weights[..., 0] = 1.0
    weights.requires_grad_()
    got = soft_block_attention(q, k, v, weights, 4)
    torch.testing.assert_close(
        got.double(), oracle(q, k[:, :, :4], v[:, :, :4], torch.ones(8, 4)), rtol=1e-5, atol=1e-6
    )
    (grad,) = torch.autograd.grad(got.sum(), weights)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize(("queries", "is_causal"), [(20, False), (40, True), (19, True)])
def test_flex_mask_says_what_the_oracle_says(queries: int, is_causal: bool) -> None:
    """The kernel reads full blocks whole and partial blocks through mask_mod."""
    keys, size = 40, 16
    layout = BlockLayout(queries, keys, size, is_causal)
    blocks = random_blocks(2, 2, layout, 0.3, 1) & layout.allowed()
    mask = flex_block_mask(blocks, size, queries, keys, is_causal)
    assert torch.equal(mask.to_dense().bool(), blocks)
    got = torch.zeros(2, 2, queries, keys, dtype=torch.bool)
    rows, columns = torch.arange(queries)[:, None], torch.arange(keys)
    visible = mask.mask_mod(0, 0, rows, columns)
    kinds = (
        (mask.kv_num_blocks, mask.kv_indices, visible),
        (mask.full_kv_num_blocks, mask.full_kv_indices, torch.ones_like(visible)),
    )
    for counts, indices, shown in kinds:
        chosen = torch.zeros_like(blocks)
        filled = torch.arange(layout.key_blocks) < counts.unsqueeze(-1)
        chosen.scatter_(-1, indices.long(), filled)
        got |= token_mask(chosen, size, queries, keys, False) & shown
    assert torch.equal(got, token_mask(blocks, size, queries, keys, is_causal))
    assert (mask.full_kv_num_blocks > 0).any(), "no block is read without a mask"


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None,
    reason="compiling flex_attention needs CUDA or a C++ compiler",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_flex_equals_gathered() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = draw(1, 4, 100, 32, dtype=torch.float32).to(device)
    k, v = (draw(1, 2, 200, 32, seed=n, dtype=torch.float32).to(device) for n in (1, 2))
    layout = BlockLayout(100, 200, 32, True)
    blocks = (random_blocks(1, 4, layout, 0.4, 1) & layout.allowed()).to(device)
    bias = draw(1, 2, 200, seed=3, dtype=torch.float32).to(device)
    got, expected = (
        block_sparse_attention(q, k, v, blocks, 32, is_causal=True, key_bias=bias, kernel=kernel)
        for kernel in ("flex", "gathered")
    )
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


# Queries, keys, block size, query and KV heads, key and value size, causal, bias.
TRITON_CASES = [
    (40, 40, 16, 2, 2, 16, 16, True, False),
    (19, 70, 16, 4, 2, 24, 20, True, True),
    (130, 200, 64, 2, 1, 64, 32, False, True),
    (150, 150, 128, 2, 2, 64, 64, True, False),
]


def check_triton(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compares the kernel with its plain twin in float64, empty rows and strides included."""
    from adms.attention.block_sparse.triton_kernel import attend_blocks

    for queries, keys, size, heads, kv_heads, inner, outer, is_causal, biased in TRITON_CASES:
        # As the module passes them: heads and tokens exchanged, so not contiguous.
        q = draw(2, queries, heads, inner, dtype=dtype).transpose(1, 2)
        k = draw(2, keys, kv_heads, inner, seed=1, dtype=dtype).transpose(1, 2)
        v = draw(2, keys, kv_heads, outer, seed=2, dtype=dtype).transpose(1, 2)
        bias = draw(2, kv_heads, keys, seed=3, dtype=dtype) if biased else None
        if bias is not None:
            bias[..., 5] = -math.inf
        layout = BlockLayout(queries, keys, size, is_causal)
        blocks = random_blocks(2, heads, layout, 0.4, keys)
        expected = block_sparse_attention(
            *(x.double() for x in (q, k, v)),
            blocks,
            size,
            is_causal=is_causal,
            key_bias=None if bias is None else bias.double(),
            kernel="gathered",
        )
        blocks[0, 0, 0] = False
        expected[0, 0, :size] = 0.0
        inputs = [None if x is None else x.to(device) for x in (q, k, v, blocks, bias)]
        got = attend_blocks(*inputs[:4], size, is_causal, inner**-0.5, inputs[4])
        assert got.dtype == dtype
        torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def check_selection(device: str) -> None:
    """Compares the choice of blocks in one launch with its plain twin in float64."""
    from adms.attention.block_sparse.selection_triton import choose_blocks
    from adms.attention.block_sparse.summaries_triton import block_summaries

    # Rows and columns of blocks, head size, width, patterns.
    cases = [(5, 5, 8, 16, 2), (1, 37, 64, 40, 1), (9, 70, 20, 128, 3)]
    for rows, columns, size, hidden, patterns in cases:
        scorer = ImportanceScorer(size, patterns, hidden).requires_grad_(False)
        scorer.gain.normal_(generator=torch.Generator().manual_seed(4))
        of_queries, of_keys = (
            draw(2, patterns, count, size, seed=seed, dtype=torch.float32)
            for seed, count in enumerate((rows, columns))
        )
        # Blocks that are alike have equal scores; the first of them are to be taken.
        of_keys[:, :, columns // 2 :] = of_keys[:, :, :1]
        local = torch.rand(rows, columns, generator=torch.Generator().manual_seed(2)) < 0.2
        candidates = ~local & (torch.arange(columns) <= torch.arange(rows).unsqueeze(-1) + 30)
        candidates[0] = False
        wanted = draw(2, patterns, rows, seed=3, dtype=torch.float32).abs() * columns / 4
        # Halves are rounded to even.
        wanted = torch.where(wanted > columns / 5, wanted, wanted.round() + 0.5)
        scores = copy.deepcopy(scorer).double()(of_queries.double(), of_keys.double(), candidates)
        allowed = candidates.expand(scores.shape)
        least = wanted.minimum(allowed.sum(-1))
        expected = hard_topk(scores, least.round().long(), allowed) | local
        inputs = [x.to(device) for x in (of_queries, of_keys, wanted, candidates, local)]
        got, shares = choose_blocks(scorer.to(device), *inputs, 50.0)
        got = got.cpu()
        assert torch.equal(got.sum(-1), expected.sum(-1))
        torch.testing.assert_close(shares.cpu(), expected.sum(-1) / 50.0)
        # Only scores that are equal in float32 may change places.
        worst = scores.masked_fill(~(expected & ~local), math.inf).amin(-1, keepdim=True)
        differ = got != expected
        assert ((scores - worst).abs()[differ] < 1e-5).all()
        assert differ.float().mean() < 0.001
    for tokens, size in ((70, 20), (64, 16)):
        x = draw(2, tokens, 3, size, dtype=torch.float32).transpose(1, 2)
        means, squares = block_summaries(x.to(device), 16, True)
        torch.testing.assert_close(means.cpu(), summarize_blocks(x, 16))
        torch.testing.assert_close(squares.cpu(), block_mean_squares(x, 16))
        assert block_summaries(x.to(device), 16, False)[1].numel() == 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_triton_kernel_interpreted_equals_gathered() -> None:
    """The kernel's own code, run by Triton's interpreter, which an environment variable selects."""
    code = (
        "import conftest, torch\n"
        "from tests.attention.test_block_sparse_kernels import check_selection, check_triton\n"
        "check_selection('cpu')\n"
        "check_triton('cpu', torch.float32, 1e-5)\n"
        "check_triton('cpu', torch.float16, 4e-3)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
)
def test_triton_kernel_on_cuda_equals_gathered(dtype: torch.dtype, tolerance: float) -> None:
    check_triton("cuda", dtype, tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_selection_on_cuda_equals_its_plain_twin() -> None:
    check_selection("cuda")


# torch's compiler looks at the gradient of what it is given and hides its own warning of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gradients_on_cuda_choose_a_kernel_that_has_them() -> None:
    q, k, v = (draw(1, 2, 64, 16, seed=n, dtype=torch.float32).cuda() for n in range(3))
    every = torch.ones(1, 1, 4, 4, dtype=torch.bool, device="cuda")
    with pytest.raises(ADMSValueError, match="inputs without gradients"):
        block_sparse_attention(q.requires_grad_(), k, v, every, 16, kernel="triton")
    block_sparse_attention(q, k, v, every, 16).sum().backward()
    assert q.grad is not None and q.grad.abs().max() > 0


@pytest.mark.measured
@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True])
def test_cost_falls_with_sparsity(is_causal: bool) -> None:
    """At 90% sparsity and 8192 tokens, 3 times faster than dense SDPA; 4 times at 95%."""
    q, k, v = (draw(1, 2, 8192, 64, seed=seed, dtype=torch.float32) for seed in range(3))
    layout = BlockLayout(8192, 8192, 64, is_causal)
    order = torch.rand(1, 2, 128, 128).masked_fill(~layout.allowed(), math.inf) - 9 * layout.own()

    def seconds(sparsity: float) -> float:
        count = torch.full((1, 2, 128), layout.connections(sparsity))
        blocks = hard_topk(-order, count, layout.allowed())
        return _best_seconds(
            lambda: block_sparse_attention(q, k, v, blocks, 64, is_causal=is_causal)
        )

    dense = _best_seconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    )
    assert 3 * seconds(0.9) < dense
    assert 4 * seconds(0.95) < dense


@pytest.mark.parametrize("temperature", [0.05, 1.0, 5.0])
def test_soft_topk_sums_to_k_and_becomes_hard(temperature: float) -> None:
    logits = draw(3, 4, 20)
    for k in (0, 1, 7, 20):
        soft = gumbel_softmax_topk(logits, k, temperature, noise=False)
        torch.testing.assert_close(soft.sum(-1), torch.full((3, 4), float(k)).double())
        assert soft.min() >= 0 and soft.max() <= 1
    cold = gumbel_softmax_topk(logits, 7, 1e-4, noise=False)
    hard = gumbel_softmax_topk(logits, 7, 1e-4, hard=True, noise=False)
    top = torch.zeros_like(logits).scatter(-1, logits.topk(7).indices, 1.0)
    torch.testing.assert_close(hard, top, rtol=0, atol=0)
    torch.testing.assert_close(cold, top, rtol=0, atol=1e-3)


@pytest.mark.parametrize("hard", [False, True])
def test_selection_gradients(hard: bool) -> None:
    """Of logits, fractional k and temperature, against finite differences of the soft selection."""
    logits = draw(2, 9).requires_grad_()
    k = torch.tensor([2.5, 4.0], dtype=torch.float64).requires_grad_()
    temperature = torch.tensor(0.7, dtype=torch.float64).requires_grad_()
    allowed = torch.ones(2, 9, dtype=torch.bool)
    allowed[0, 3] = False

    def soft(logits: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
        return gumbel_softmax_topk(logits, k, temperature, allowed=allowed, noise=False)

    assert torch.autograd.gradcheck(soft, (logits, k, temperature), atol=1e-5)
    weight = draw(2, 9, seed=1)
    inputs = (logits, k, temperature)
    expected = torch.autograd.grad((soft(*inputs) * weight).sum(), inputs)
    chosen = gumbel_softmax_topk(*inputs, hard=hard, allowed=allowed, noise=False)
    for got, wanted in zip(
        torch.autograd.grad((chosen * weight).sum(), inputs), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted)
    assert not hard or bool(((chosen == 0) | (chosen == 1)).all())


def test_gumbel_noise_samples_in_proportion() -> None:
    """For k = 1 the hard selection is a draw from softmax(logits)."""
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20000, 3)
    generator = torch.Generator().manual_seed(0)
    share = gumbel_softmax_topk(logits, 1, hard=True, generator=generator).mean(0)
    torch.testing.assert_close(share, logits[0].softmax(-1), rtol=0, atol=0.015)


def test_disallowed_are_never_chosen() -> None:
    logits = draw(2, 6)
    allowed = torch.tensor([[True, True, False, False, False, False], [False] * 6])
    for hard in (False, True):
        chosen = gumbel_softmax_topk(logits, 4, 0.5, hard, allowed=allowed)
        expected = allowed.double()
        torch.testing.assert_close(chosen, expected, rtol=0, atol=1e-9)


def test_layout_budget_and_own_blocks() -> None:
    """Against counting in Python."""
    for queries, keys, size in ((40, 40, 8), (13, 40, 8), (1, 33, 4)):
        layout = BlockLayout(queries, keys, size, True)
        allowed, own = layout.allowed(), layout.own()
        for row in range(layout.query_blocks):
            first = keys - queries + row * size
            last = min(first + size, keys) - 1
            for column in range(layout.key_blocks):
                sees_any = column * size <= last
                sees_all = column * size + size - 1 < first
                assert allowed[row, column].item() == sees_any
                assert own[row, column].item() == (sees_any and not sees_all)
        for sparsity in (0.0, 0.3, 0.5, 0.9):
            count = layout.connections(sparsity)
            counts = allowed.sum(-1)
            density = counts.clamp(max=count).sum() / counts.sum()
            more = counts.clamp(max=count + 1).sum() / counts.sum()
            assert density <= 1 - sparsity + 1e-6 or count == 1
            assert more > 1 - sparsity + 1e-6 or count == layout.key_blocks


def test_local_pattern_reaches_by_dilation_and_keeps_to_segments() -> None:
    layout = BlockLayout(128, 128, 4, False)
    ranks = layout.local_ranks((32, 64, 128), (1, 2, 4))[16]
    # Block 16 begins a segment of 8 and one of 16 blocks, and lies within one of 32.
    assert ranks.argsort(stable=True)[:8].tolist() == [16, 17, 18, 12, 20, 8, 24, 19]
    unreached = [n for n in range(16) if n % 4]
    assert ranks[unreached].isinf().all()
    assert ranks[[0, 4, 8, 12]].isfinite().all()


def test_adaptive_sparsity_by_length() -> None:
    lengths = (1, 1023, 1024, 4095, 4096, 100000)
    assert [get_adaptive_sparsity(n) for n in lengths] == [0.8, 0.8, 0.9, 0.9, 0.95, 0.95]
    with pytest.raises(ADMSValueError, match="seq_len must be at least 1, got 0"):
        get_adaptive_sparsity(0)


def test_summaries_and_training_free_scores() -> None:
    x = draw(2, 4, 11, 3)
    summary = summarize_blocks(x, 4)
    expected = torch.stack([x[:, :, a : a + 4].mean(2) for a in (0, 4, 8)], 2)
    torch.testing.assert_close(summary, expected)
    keys = draw(2, 2, 5, 3, seed=1)
    scores = block_mean_scores(summary, keys)
    assert scores.shape == (2, 4, 3, 5)
    torch.testing.assert_close(scores[1, 3, 2, 4], summary[1, 3, 2] @ keys[1, 1, 4] / math.sqrt(3))


def test_bad_arguments_say_what_was_expected() -> None:
    q, k, v = (draw(2, 4, 8, 4, seed=seed) for seed in range(3))
    every = torch.ones(2, 4, 2, 2, dtype=torch.bool)
    with pytest.raises(ADMSTypeError, match="block_mask must be bool, got torch.float32"):
        block_sparse_attention(q, k, v, every.float(), 4)
    with pytest.raises(ADMSValueError, match=r"block_mask must be \[2 or 1, 4 or 1, 2, 2\]"):
        block_sparse_attention(q, k, v, every[..., :1], 4)
    with pytest.raises(ADMSValueError, match=r"k must be \[2, K dividing 4, N >= 8, 4\]"):
        block_sparse_attention(q, k[:, :3], v[:, :3], every, 4)
    with pytest.raises(
        ADMSValueError, match="kernel must be 'auto', 'gathered', 'flex' or 'triton'"
    ):
        block_sparse_attention(q, k, v, every, 4, kernel="fast")  # type: ignore[arg-type]
    with pytest.raises(ADMSValueError, match="power of two from 16 on, got 4"):
        block_sparse_attention(q, k, v, every, 4, kernel="flex")
    with pytest.raises(ADMSValueError, match="'triton' needs CUDA tensors, got q on cpu"):
        block_sparse_attention(q, k, v, every, 4, kernel="triton")
    with pytest.raises(ADMSValueError, match=r"key_bias must be \[2, 4, 8\], got \[2, 8\]"):
        block_sparse_attention(q, k, v, every, 4, key_bias=k[:, 0, :, 0])
    with pytest.raises(ADMSValueError, match="expected 1 to 4 .* got 8"):
        BlockLayout(8, 4, 4, False)
    with pytest.raises(ADMSValueError, match="temperature must be above 0, got 0"):
        gumbel_softmax_topk(q, 2, 0.0)
    with pytest.raises(ADMSTypeError, match="logits must be floating point"):
        gumbel_softmax_topk(q.long(), 2)


def _best_seconds(call, count: int = 3) -> float:  # type: ignore[no-untyped-def]
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
