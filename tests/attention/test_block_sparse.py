"""Tests of the adaptive block-sparse modules, their training and their analysis."""

import copy
import dataclasses
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from adms.attention.block_sparse import (
    AdaptiveConfig,
    AdaptiveSparsityTrainer,
    BlockLayout,
    BlockSparseAdaptive,
    create_adaptive_block_sparse,
    plot_patterns,
)
from adms.attention.block_sparse.replay import Replay
from adms.errors import ADMSTypeError, ADMSValueError, CacheStateError

MODES = {"soft": {"hard_sparsity": False}, "straight-through": {"hard_sparsity": True}}


def make(heads: int = 2, size: int = 4, **fields: Any) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    settings = {"base_sparsity": 0.5, "block_size": 4, "hidden_dim": 8, **fields}
    return BlockSparseAdaptive([16, 32], [1, 2], heads, size, AdaptiveConfig(**settings))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(queries: int = 64, keys: int = 64, heads: int = 2, size: int = 4) -> tuple[Tensor, ...]:
    return tuple(draw(2, n, heads, size, seed=i) for i, n in enumerate((queries, keys, keys)))


def oracle(
    q: Tensor, k: Tensor, v: Tensor, patterns: list[Tensor], size: int, is_causal: bool
) -> Tensor:
    """Float64 attention with each exponential times its block's weight, [B, Q, H, D]."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = torch.stack(patterns, 1).double()
    weights = weights.repeat_interleave(size, -2)[..., : q.shape[2], :]
    weights = weights.repeat_interleave(size, -1)[..., : k.shape[2]]
    if is_causal:
        weights = weights * torch.ones(k.shape[2], k.shape[2]).tril()[-q.shape[2] :]
    terms = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).exp() * weights
    return (terms / terms.sum(-1, keepdim=True) @ v).transpose(1, 2)


@pytest.mark.parametrize("mode", ["eval", "soft", "straight-through", "hard"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries", [64, 61, 5])
@pytest.mark.parametrize("fields", [{}, {"share_across_heads": True}, {"coarse_factor": 2}])
def test_output_is_attention_under_the_returned_pattern(
    mode: str, is_causal: bool, queries: int, fields: dict[str, Any]
) -> None:
    hard = {"hard_sparsity": mode in ("straight-through", "hard")}
    module = make(**hard, straight_through=mode != "hard", **fields).train(mode != "eval")
    q, k, v = inputs(queries)
    output, info = module(q, k, v, is_causal, return_pattern=True)
    assert len(info["patterns"]) == 2
    assert (info["patterns"][0].dtype == torch.bool) == (mode != "soft")
    expected = oracle(q, k, v, info["patterns"], 4, is_causal)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    assert output.requires_grad == (mode in MODES)
    allowed = BlockLayout(queries, 64, 4, is_causal).allowed()
    density = torch.stack(info["patterns"], 1).double().sum((-1, -2)) / allowed.sum()
    torch.testing.assert_close(info["sparsity"].double(), 1 - density, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, None])
def test_hard_patterns_are_as_sparse_as_asked(is_causal: bool, sparsity: float | None) -> None:
    module = make(base_sparsity=sparsity, budget_range=0.0).eval()
    q, k, v = inputs(256, 256)
    _, info = module(q, k, v, is_causal, return_pattern=True)
    layout = BlockLayout(256, 256, 4, is_causal)
    asked = 0.8 if sparsity is None else sparsity
    pattern = torch.stack(info["patterns"], 1)
    assert not (pattern & ~layout.allowed()).any()
    assert (pattern & layout.own()).sum() == 4 * layout.own().sum()
    assert (info["sparsity"] >= asked - 1e-6).all()
    # One block more a row would be too many.
    assert (info["sparsity"] <= asked + 1 / layout.allowed().sum(-1).float().mean()).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fields", [{}, {"coarse_factor": 2}, {"share_across_heads": True}])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_reach_every_parameter(
    mode: str, fields: dict[str, Any], is_causal: bool
) -> None:
    module = make(learnable_temperature=True, **MODES[mode], **fields).train()
    q, k, v = (x.requires_grad_() for x in inputs())
    module(q, k, v, is_causal).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    assert v.grad is not None and v.grad.abs().min() > 0
    for x in (q, k):
        # The first causal query has one key, whose weight is 1 whatever the scores.
        assert x.grad is not None and x.grad[:, 1:-1].abs().min() > 0


def test_training_moves_the_pattern_to_where_the_answer_is() -> None:
    """The gradient has the right sign: only block 9 holds what the loss asks for."""
    for mode in MODES:
        module = make(heads=1, local_fraction=0.0, base_sparsity=0.9, **MODES[mode]).train()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
        q, k = torch.zeros(1, 64, 1, 4), torch.zeros(1, 64, 1, 4)
        k[0, 36:40, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
        k += 0.1 * draw(1, 64, 1, 4)
        v = torch.zeros(1, 64, 1, 4)
        v[0, 36:40] = 1.0
        for _ in range(60):
            loss = (module(q, k, v) - 1.0).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _, info = module.eval()(q, k, v, return_pattern=True)
        assert info["patterns"][0][0, :, 9].all(), mode


def test_hard_without_straight_through_leaves_the_scorer_alone() -> None:
    module = make(hard_sparsity=True, straight_through=False).train()
    q, k, v = (x.requires_grad_() for x in inputs())
    module(q, k, v).sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert v.grad is not None and v.grad.abs().max() > 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fields", [{}, {"coarse_factor": 2}, {"hard_sparsity": True}])
def test_causal_outputs_ignore_later_tokens(training: bool, fields: dict[str, Any]) -> None:
    """To the last bit, at every position, selection and budget included."""
    module = make(**fields).train(training)
    q, k, v = inputs()
    torch.manual_seed(1)
    before = module(q, k, v, is_causal=True)
    for position in (0, 3, 4, 30, 62):
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, position + 1 :] = 5.0 * draw(*x[:, position + 1 :].shape, seed=9)
        torch.manual_seed(1)
        after = module(*later, is_causal=True)
        assert torch.equal(before[:, : position + 1], after[:, : position + 1]), position
        assert not torch.equal(before, after)


def test_means_judge_blocks_where_causality_need_not_be_strict() -> None:
    """With strict_causal=False the last queries of a block have a say in its pattern."""
    patterns = {}
    for strict in (True, False):
        module = make(strict_causal=strict, budget_range=0.0, local_fraction=0.0).eval()
        q, k, v = inputs()
        _, first = module(q, k, v, True, return_pattern=True)
        q = q.clone()
        q[:, 3::4] *= -20.0
        _, second = module(q, k, v, True, return_pattern=True)
        patterns[strict] = torch.equal(first["patterns"][0], second["patterns"][0])
    assert patterns == {True: True, False: False}


def test_budget_moves_connections_within_its_range() -> None:
    module = make(budget_range=0.5, base_sparsity=0.75, local_fraction=0.0).eval()
    assert module.budget is not None and module.budget.last.bias is not None
    q, k, v = inputs()
    for bias, count in ((-20.0, 2), (20.0, 6)):
        with torch.no_grad():
            module.budget.last.bias.fill_(bias)
        _, info = module(q, k, v, return_pattern=True)
        assert (torch.stack(info["patterns"]).sum(-1) == count).all()


def test_multi_scale_takes_whole_coarse_blocks_beyond_the_segment() -> None:
    module = make(
        base_sparsity=0.5,
        coarse_factor=4,
        budget_range=0.0,
        local_fraction=0.0,
        coarse_fraction=0.75,
    ).eval()
    q, k, v = inputs(128, 128)
    _, info = module(q, k, v, return_pattern=True)
    pattern = torch.stack(info["patterns"], 1)
    assert (pattern.sum(-1) == 16).all()
    beyond = pattern & ~BlockLayout(128, 128, 4, False).segments(32)
    groups = beyond.unflatten(-1, (-1, 4)).sum(-1)
    # Outside the own segment of 8 blocks: 3 whole groups of 4. Within it: 4 single ones.
    assert ((groups == 4).sum(-1) == 3).all() and (groups.sum(-1) == 12).all()


def test_heads_share_patterns_only_when_told() -> None:
    q, k, v = inputs()
    for share in (True, False):
        _, info = make(share_across_heads=share).eval()(q, k, v, return_pattern=True)
        assert torch.equal(*info["patterns"]) == share


def test_a_fixed_pattern_ignores_content() -> None:
    module = make(local_fraction=1.0).eval()
    first, second = (
        module(*(x * factor for x in inputs()), return_pattern=True)[1]["patterns"]
        for factor in (1.0, -3.0)
    )
    assert torch.equal(first[0], second[0]) and first[0].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("fields", [{}, {"share_across_heads": True}, {"coarse_factor": 2}])
def test_recorded_selection_is_the_selection(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any mode, for lengths in turns, after weights have changed, and in a module of its own."""

    def chosen(module: BlockSparseAdaptive, replayed: bool, *x: Tensor) -> tuple[Tensor, Tensor]:
        with monkeypatch.context() as patch:
            if not replayed:
                patch.setattr(Replay, "applies", staticmethod(lambda like: False))
            return module.block_weights(*x)

    for _ in range(2):
        module = make(**fields).cuda().eval()
        kept = []
        for step in range(6):
            x = [part.transpose(1, 2).cuda() for part in inputs(64 - 24 * (step % 2), 64)[:2]]
            with torch.inference_mode() if step % 3 else torch.no_grad():
                (got, sparsity), (expected, other) = (chosen(module, r, *x) for r in (True, False))
                kept.append((got, expected))
                assert torch.equal(sparsity, other)
                for parameter in module.parameters():
                    parameter.mul_(1.1)
        assert all(torch.equal(got, expected) for got, expected in kept)
        assert len(module._replay._recordings) == 2
        assert not copy.deepcopy(module)._replay._recordings


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_recorded_call_is_the_call(is_causal: bool) -> None:
    """Selection and attention within a CUDA graph, as servers run them, on new inputs."""
    module = make(block_size=16).cuda().eval()
    held = [x.cuda().float() for x in inputs(128, 128)]
    with torch.inference_mode():
        module(*held, is_causal)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = module(*held, is_causal)
        for factor in (0.5, -2.0):
            for x in held:
                x.mul_(factor)
            graph.replay()
            expected = module(*held, is_causal)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_annealing_ends_where_asked() -> None:
    for learnable in (False, True):
        module = make(learnable_temperature=learnable, min_temperature=0.05)
        trainer = AdaptiveSparsityTrainer(module, 2.0, 0.07, annealing_steps=50)
        temperatures = [module.temperature] + [trainer.step() for _ in range(50)]
        assert temperatures[0] == pytest.approx(2.0)
        assert temperatures[25] == pytest.approx((2.0 * 0.07) ** 0.5)
        assert all(a > b for a, b in zip(temperatures, temperatures[1:], strict=False))
        assert module.temperature == pytest.approx(0.07)
        assert trainer.step() == 0.07
        module.temperature = 0.5
        trainer.step()
        assert module.temperature == pytest.approx(0.5), "it goes on after the end"
        with torch.no_grad():
            module.log_temperature.fill_(-50.0)
        assert module.temperature == pytest.approx(0.05)


def test_sparsity_loss_pulls_density_to_what_was_asked() -> None:
    module = make(budget_range=0.5, base_sparsity=0.75).train()
    assert module.budget is not None and module.budget.last.bias is not None
    with pytest.raises(CacheStateError, match="call the module first"):
        module.get_sparsity_loss()
    with torch.no_grad():
        module.budget.last.bias.fill_(1.5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        module(*inputs())
        losses.append(module.get_sparsity_loss())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.05 and losses[-1] < 1e-3


def test_constant_input_becomes_sparser_than_random_input() -> None:
    """The task: be dense attention, at few connections. For constant input any pattern is."""
    module = make(base_sparsity=0.75, budget_range=0.6, min_temperature=0.05).train()
    trainer = AdaptiveSparsityTrainer(module, 1.0, 0.05, annealing_steps=150)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)

    def batch() -> Tensor:
        x = torch.randn(8, 64, 2, 4, generator=generator)
        x[:4] = torch.randn(4, 1, 2, 4, generator=generator)
        return x

    for _ in range(150):
        x = batch()
        heads = x.transpose(1, 2)
        dense = scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)
        error = (module(x, x, x) - dense).square().mean() / dense[4:].square().mean()
        # Every connection has a price, whether or not the target density is met.
        loss = error + 0.5 * module.get_sparsity_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trainer.step()
    x = batch()
    _, info = module.eval()(x, x, x, return_pattern=True)
    constant, random = info["sparsity"][:4], info["sparsity"][4:]
    assert constant.min() > random.max() + 0.05, (constant, random)


def test_analysis_of_patterns() -> None:
    model = create_adaptive_block_sparse(8, 2, [16], [1], block_size=4, base_sparsity=0.5)
    model.train()
    model.core.scorer.eval()
    trainer = AdaptiveSparsityTrainer(model)
    x = draw(3, 64, 8)
    result = trainer.analyze_patterns([x, x[:1]], num_samples=4)
    assert {name: len(values) for name, values in result.items()} == {
        "sparsity_ratios": 4,
        "pattern_diversity": 4,
        "input_diversity": 3,
    }
    assert model.training and not model.core.scorer.training
    _, info = model.eval()(x, return_pattern=True)
    first, second = (pattern.bool() for pattern in info["patterns"])
    union, common = (first | second).sum((1, 2)), (first & second).sum((1, 2))
    expected = (1 - common / union).tolist()
    assert result["pattern_diversity"] == pytest.approx([*expected, expected[0]])
    sparsity = info["sparsity"].mean(1).tolist()
    assert result["sparsity_ratios"] == pytest.approx([*sparsity, sparsity[0]])
    assert trainer.analyze_patterns([{"query": x}, (x, x)], 5)["sparsity_ratios"] == pytest.approx(
        [*sparsity, *sparsity[:2]]
    )
    same = trainer.analyze_patterns([x[:1], x[:1]], forward=lambda module, batch: module(batch))
    assert same["input_diversity"] == [0.0]
    with pytest.raises(ADMSValueError, match="at least one batch, got none"):
        trainer.analyze_patterns([])
    with pytest.raises(ADMSTypeError, match="got str; pass forward"):
        trainer.analyze_patterns(["x"])


def test_modules_copy_pickle_and_load() -> None:
    module = make().train()
    q, k, v = inputs()
    module(q, k, v)
    expected = module.eval()(q, k, v)
    module.train()(q, k, v)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin.eval()(q, k, v), expected)
    fresh = make(temperature=0.5)
    fresh.load_state_dict(module.state_dict())
    assert fresh.temperature == pytest.approx(1.0)


def test_half_precision_keeps_its_dtype() -> None:
    q, k, v = (x.bfloat16() for x in inputs())
    for training in (False, True):
        module = make().train(training)
        output, info = module(q, k, v, return_pattern=True)
        assert output.dtype == torch.bfloat16
        expected = oracle(q, k, v, info["patterns"], 4, False)
        torch.testing.assert_close(output.double(), expected, rtol=3e-2, atol=3e-2)


def test_embedding_module_is_its_core_between_projections() -> None:
    model = create_adaptive_block_sparse(8, 2, [16], [1], block_size=4).eval()
    x, memory = draw(2, 20, 8), draw(2, 24, 8, seed=1)
    q = model.q_proj(x).view(2, 20, 2, 4)
    k, v = (layer(memory).view(2, 24, 2, 4) for layer in (model.k_proj, model.v_proj))
    expected = model.out_proj(model.core(q, k, v).flatten(2))
    torch.testing.assert_close(model(x, memory), expected)


def test_patterns_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, info = make().eval()(*inputs(), return_pattern=True)
    figure = plot_patterns(info["patterns"], tmp_path / "patterns.png")
    assert (tmp_path / "patterns.png").stat().st_size > 1000
    shown = figure.axes[1].images[0].get_array()
    assert shown is not None
    assert torch.equal(torch.tensor(shown.tolist()), info["patterns"][1][0].float())


def test_config_round_trips_and_says_what_is_wrong() -> None:
    config = AdaptiveConfig(base_sparsity=0.7, coarse_factor=4)
    assert AdaptiveConfig.from_dict(config.to_dict()) == config
    bad: dict[str, Any]
    for bad, message in (
        ({"base_sparsity": 1.0}, "base_sparsity must be at least 0.0 and below 1.0, got 1.0"),
        ({"temperature": 0.01}, "temperature must be at least 0.1"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"coarse_factor": 1}, "coarse_factor must be at least 2, got 1"),
    ):
        with pytest.raises(ADMSValueError, match=message):
            AdaptiveConfig(**bad)
    with pytest.raises(ADMSTypeError, match="hard_sparsity must be a bool, got int"):
        AdaptiveConfig(hard_sparsity=1)  # type: ignore[arg-type]
    with pytest.raises(ADMSTypeError, match="num_layers must be an int, got float"):
        AdaptiveConfig(num_layers=2.0)  # type: ignore[arg-type]
    with pytest.raises(ADMSValueError, match="no field 'sparsity'"):
        AdaptiveConfig.from_dict({"sparsity": 0.5})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 3  # type: ignore[misc]


def test_bad_arguments_say_what_was_expected() -> None:
    module = make()
    q, k, v = inputs()
    with pytest.raises(ADMSValueError, match=r"k must be \[batch, tokens, 2, 4\].* got \[2, 64, 1"):
        module(q, k[:, :, :1], v)
    with pytest.raises(ADMSValueError, match="v must have the shape of k"):
        module(q, k, v[:, :5])
    with pytest.raises(ADMSTypeError, match="q must be a floating-point tensor, got torch.int64"):
        module(q.long(), k, v)
    with pytest.raises(ADMSValueError, match="as many entries"):
        BlockSparseAdaptive([16], [1, 2], 2, 4)
    with pytest.raises(ADMSValueError, match="multiples of block_size 64, got"):
        BlockSparseAdaptive([100], [1], 2, 4)
    with pytest.raises(ADMSTypeError, match="must be an AdaptiveConfig, got dict"):
        BlockSparseAdaptive([64], [1], 2, 4, {})  # type: ignore[arg-type]
    with pytest.raises(ADMSValueError, match="exclude each other"):
        create_adaptive_block_sparse(8, 2, [64], [1], AdaptiveConfig(), block_size=4)
    with pytest.raises(ADMSValueError, match="multiple of num_heads, got 9 and 2"):
        create_adaptive_block_sparse(9, 2, [64], [1])
    with pytest.raises(ADMSValueError, match=r"query must be \[batch, tokens, 8\]"):
        create_adaptive_block_sparse(8, 2, [64], [1])(draw(2, 8))
    with pytest.raises(ADMSValueError, match="must contain a BlockSparseAdaptive, got Linear"):
        AdaptiveSparsityTrainer(nn.Linear(1, 1))
    with pytest.raises(ADMSValueError, match="final_temperature must be at least .* 0.1, got 0.01"):
        AdaptiveSparsityTrainer(module, 1.0, 0.01)


@pytest.mark.measured
@pytest.mark.slow
def test_recall_over_1024_tokens_beats_the_fixed_pattern() -> None:
    """The example, as it is: both patterns attend to the same share of blocks."""
    pytest.importorskip("matplotlib")
    path = Path(__file__).parents[2] / "examples" / "block_sparse_recall.py"
    spec = importlib.util.spec_from_file_location("block_sparse_recall", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    _, adaptive, sparsity = example.train("adaptive", 0.0, 300)
    _, fixed, fixed_sparsity = example.train("fixed", 1.0, 300)
    assert sparsity == pytest.approx(fixed_sparsity) and sparsity >= 0.9
    assert adaptive > 3 * fixed
