"""Adaptive update: an oracle in float64, gates, caches of other lengths, masks, errors."""

import copy
import math

import pytest
import torch
from torch import Tensor

from adms.attention.adaptive_update import AdaptiveUpdateAttention
from adms.attention.projections import (
    AttentionCombiner,
    KeyModule,
    ProjectionModule,
    QueryModule,
    ValueModule,
    calculate_attention,
    prepare_mask_for_attention,
)
from adms.errors import ADMSTypeError, ADMSValueError

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


def make_layer(dims: int = 16, heads: int = 4, dtype=torch.float64, **arguments):
    torch.manual_seed(0)
    layer = AdaptiveUpdateAttention(dims, heads, **arguments).to(dtype)
    with torch.no_grad():
        # Weights of the size trained layers have; the initial ones make attention near uniform.
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    return layer.eval()


def decide(layer) -> None:
    """Make the predictors read each row's decision off features 0 (keys) and 1 (values)."""
    with torch.no_grad():
        for feature, predictor in enumerate(
            (layer.key_update_predictor, layer.value_update_predictor)
        ):
            predictor[0].weight.zero_()
            predictor[0].bias.zero_()
            predictor[0].weight[0, feature] = 1.0
            predictor[2].weight.zero_()
            predictor[2].weight[0, 0] = 4.0
            predictor[2].bias.fill_(-2.0)


def chunk(rows: list[tuple[bool, bool]], tokens: int, seed: int, dtype=torch.float64) -> Tensor:
    """Random tokens whose rows ask (key, value) for a refresh as given, see `decide`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(rows), tokens, 16, generator=generator, dtype=torch.float64)
    x[:, :, :2] = torch.tensor(rows, dtype=torch.float64)[:, None]
    return x.to(dtype)


@torch.no_grad()
def oracle(layer, x: Tensor, keys_from: Tensor, values_from: Tensor, allowed: Tensor) -> Tensor:
    """Attention of one row by loops over heads and queries, in float64."""

    def project(module, data):
        return data.double() @ module.proj.weight.double().T + module.proj.bias.double()

    q, k = project(layer.query_module, x), project(layer.key_module, keys_from)
    v = project(layer.value_module, values_from)
    size = layer.head_dim
    out = torch.zeros_like(q)
    for head in range(layer.head):
        part = slice(head * size, (head + 1) * size)
        for query in range(q.shape[0]):
            seen = allowed[query].nonzero().squeeze(1).tolist()
            scores = [float(q[query, part] @ k[key, part]) / math.sqrt(size) for key in seen]
            top = max(scores, default=0.0)
            weights = [math.exp(score - top) for score in scores]
            for key, weight in zip(seen, weights, strict=True):
                out[query, part] += weight / sum(weights) * v[key, part]
    return out @ layer.combiner.out.weight.double().T + layer.combiner.out.bias.double()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("cross", [False, True])
def test_first_chunk_equals_the_oracle(dtype, cross):
    layer = make_layer(dtype=dtype)
    x = chunk([(False, False)] * 2, 5, seed=1, dtype=dtype)
    xa = chunk([(False, False)] * 2, 7, seed=2, dtype=dtype) if cross else None
    output, caches = layer(x, xa)
    source = xa if cross else x
    allowed = torch.ones(5, source.shape[1], dtype=torch.bool)
    expected = torch.stack(
        [oracle(layer, x[b], source[b], source[b], allowed) for b in range(2)]
    ).to(dtype)
    torch.testing.assert_close(output, expected, **TOLERANCE[dtype])
    assert list(caches) == ["key_cache", "value_cache", "key_updated", "value_updated"]
    assert caches["key_cache"].shape == (2, 4, source.shape[1], 4)
    assert caches["key_updated"].tolist() == caches["value_updated"].tolist() == [True, True]
    assert output.dtype == caches["key_cache"].dtype == dtype


def test_keys_and_values_are_refreshed_row_by_row():
    layer = make_layer()
    decide(layer)
    rows = [(True, True), (True, False), (False, True), (False, False)]
    old, new = chunk(rows, 6, seed=1), chunk(rows, 6, seed=2)
    _, caches = layer(old)
    output, updated = layer(new, key_cache=caches["key_cache"], value_cache=caches["value_cache"])
    assert updated["key_updated"].tolist() == [True, True, False, False]
    assert updated["value_updated"].tolist() == [True, False, True, False]
    allowed = torch.ones(6, 6, dtype=torch.bool)
    for row, (key, value) in enumerate(rows):
        keys_from, values_from = (new if key else old)[row], (new if value else old)[row]
        expected = oracle(layer, new[row], keys_from, values_from, allowed)
        torch.testing.assert_close(output[row], expected, **TOLERANCE[torch.float64])
    assert torch.equal(updated["key_cache"][2:], caches["key_cache"][2:])
    assert not torch.equal(updated["key_cache"][:2], caches["key_cache"][:2])


def test_inference_projects_only_rows_that_update(monkeypatch):
    layer = make_layer()
    decide(layer)
    projected = {"key": [], "value": []}
    forward = ProjectionModule.forward

    def counting(self, x):
        if self.proj_type in projected and x.shape[1] > 1:  # One token is the drift's own.
            projected[self.proj_type].append(x.shape[0])
        return forward(self, x)

    first = chunk([(True, True)] * 4, 6, seed=1)
    _, caches = layer(first)
    given = {name: caches[name] for name in ("key_cache", "value_cache")}
    monkeypatch.setattr(ProjectionModule, "forward", counting)
    layer(chunk([(True, False)] + [(False, False)] * 3, 6, seed=2), **given)
    assert projected == {"key": [1], "value": []}
    _, kept = layer(chunk([(False, False)] * 4, 6, seed=3), **given)
    assert projected == {"key": [1], "value": []}
    assert kept["key_cache"] is given["key_cache"]
    layer(chunk([(True, True)] * 4, 6, seed=3), **given)
    assert projected == {"key": [1, 4], "value": [4]}


def test_the_given_cache_is_left_as_it_was():
    layer = make_layer()
    decide(layer)
    _, caches = layer(chunk([(True, True)] * 2, 4, seed=1))
    before = caches["key_cache"].clone()
    layer(
        chunk([(True, True), (False, False)], 4, seed=2),
        key_cache=caches["key_cache"],
        value_cache=caches["value_cache"],
    )
    assert torch.equal(caches["key_cache"], before)


@pytest.mark.parametrize("tokens", [3, 9])
def test_a_chunk_of_another_length_refreshes_every_row(tokens):
    layer = make_layer()
    decide(layer)
    _, caches = layer(chunk([(True, True)] * 2, 6, seed=1))
    new = chunk([(False, False)] * 2, tokens, seed=2)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    given = {name: caches[name] for name in ("key_cache", "value_cache")}
    output, updated = layer(new, mask=mask, **given)
    expected, fresh = layer(new, mask=mask)
    assert torch.equal(output, expected)
    assert updated["key_updated"].all() and updated["value_updated"].all()
    assert torch.equal(updated["key_cache"], fresh["key_cache"])


def test_training_and_inference_decide_and_compute_alike():
    layer = make_layer()
    decide(layer)
    rows = [(True, False), (False, True), (False, False)]
    _, caches = layer(chunk(rows, 5, seed=1))
    given = {name: caches[name].detach() for name in ("key_cache", "value_cache")}
    new = chunk(rows, 5, seed=2)
    with torch.no_grad():
        expected, decided = layer(new, **given)
    output, trained = layer.train()(new, **given)
    torch.testing.assert_close(output, expected, **TOLERANCE[torch.float64])
    assert torch.equal(trained["key_updated"], decided["key_updated"])


def test_the_gate_is_straight_through():
    """The gradient of a gate is that of mixing new and cached keys by the probability."""
    layer = make_layer().train()
    x, old = chunk([(True, True)], 5, seed=1), chunk([(True, True)], 5, seed=2)
    with torch.no_grad():
        _, caches = layer(old)
    given = {name: caches[name] for name in ("key_cache", "value_cache")}
    output, updated = layer(x, **given)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights).sum().backward()
    step = 1e-6

    def mixed(share):
        fresh = layer.key_module(x)
        hard = updated["key_updated"].double()
        keys = (hard + share) * fresh + (1 - hard - share) * given["key_cache"]
        values = layer.value_module(x) if updated["value_updated"] else given["value_cache"]
        return (layer.combiner(layer.query_module(x), keys, values) * weights).sum()

    with torch.no_grad():
        slope = float(mixed(step) - mixed(-step)) / (2 * step)
    copied = copy.deepcopy(layer)
    copied.zero_grad()
    copied.key_update_probability(x, given["key_cache"]).sum().backward()
    pairs = zip(
        layer.key_update_predictor.parameters(),
        copied.key_update_predictor.parameters(),
        strict=True,
    )
    for got, probability in pairs:
        torch.testing.assert_close(got.grad, slope * probability.grad, rtol=1e-5, atol=1e-9)
    assert layer.key_drift_weight.grad != 0
    assert layer.value_drift_weight.grad != 0


def test_update_cost_trains_the_gates_to_reuse():
    layer = make_layer().train()
    x = chunk([(False, False)] * 3, 4, seed=1)
    with torch.no_grad():
        _, caches = layer(x)
    assert layer.update_cost is None
    given = {name: caches[name] for name in ("key_cache", "value_cache")}
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    costs = []
    for _ in range(20):
        layer(x, **given)
        costs.append(layer.update_cost.item())
        optimizer.zero_grad()
        layer.update_cost.backward()
        optimizer.step()
    assert costs[-1] < 0.2 < costs[0]
    assert not layer.should_update_key(x, caches["key_cache"]).any()


def test_an_untrained_layer_refreshes_and_so_is_exact():
    torch.manual_seed(0)
    layer = AdaptiveUpdateAttention(32, 4).eval()
    old, new = torch.randn(2, 8, 6, 32).unbind(0)
    _, caches = layer(old)
    output, updated = layer(new, key_cache=caches["key_cache"], value_cache=caches["value_cache"])
    assert updated["key_updated"].all() and updated["value_updated"].all()
    assert torch.equal(output, layer(new)[0])


def test_drift_weight_makes_the_gate_see_what_is_cached():
    layer = make_layer()
    decide(layer)
    with torch.no_grad():
        layer.key_drift_weight.fill_(50.0)
    old = chunk([(False, False)] * 2, 5, seed=1)
    _, caches = layer(old)
    new = old.clone()
    new[1] += 1.0
    new[1, :, :2] = 0.0
    assert layer.should_update_key(new, caches["key_cache"]).tolist() == [False, True]
    assert layer.should_update_key(new).tolist() == [False, False]


def test_threshold_moves_the_decision():
    layer = make_layer()
    x = chunk([(False, False)] * 3, 4, seed=1)
    for threshold, expected in ((0.0, True), (1.0, False)):
        layer.update_threshold = threshold
        assert layer.should_update_key(x).tolist() == [expected] * 3
        assert layer.should_update_value(x).tolist() == [expected] * 3


@pytest.mark.parametrize("kind", ["2d", "3d", "4d", "float"])
def test_masks_equal_the_oracle(kind):
    layer = make_layer()
    x = chunk([(False, False)] * 2, 6, seed=1)
    generator = torch.Generator().manual_seed(5)
    allowed = torch.rand(2, 6, 6, generator=generator) > 0.5
    allowed[:, :, 0] = True
    mask = {
        "2d": allowed[0],
        "3d": allowed,
        "4d": allowed[:, None],
        "float": torch.zeros(2, 1, 6, 6).masked_fill(~allowed[:, None], -torch.inf),
    }[kind]
    output, _ = layer(x, mask=mask)
    for row in range(2):
        seen = allowed[0] if kind == "2d" else allowed[row]
        expected = oracle(layer, x[row], x[row], x[row], seen)
        torch.testing.assert_close(output[row], expected, **TOLERANCE[torch.float64])


def test_a_query_with_nothing_to_see_gets_zeros_and_finite_gradients():
    layer = make_layer().train()
    x = chunk([(False, False)], 4, seed=1).requires_grad_()
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    output, _ = layer(x, mask=mask)
    torch.testing.assert_close(output[0, 2], layer.combiner.out.bias)
    output.sum().backward()
    assert x.grad.isfinite().all()


def test_max_dist_limits_self_attention():
    layer = make_layer(max_dist=3)
    x = chunk([(False, False)], 8, seed=1)
    at = torch.arange(8)
    near = (at[:, None] - at).abs() < 3
    torch.testing.assert_close(layer(x)[0][0], oracle(layer, x[0], x[0], x[0], near))
    causal = near & (at[:, None] >= at)
    torch.testing.assert_close(
        layer(x, is_causal=True)[0][0], oracle(layer, x[0], x[0], x[0], causal)
    )


def test_causal_outputs_do_not_depend_on_later_tokens_even_through_the_gate():
    layer = make_layer()
    decide(layer)
    with torch.no_grad():
        layer.key_drift_weight.fill_(0.3)
    _, caches = layer(chunk([(True, True)] * 2, 6, seed=1), is_causal=True)
    given = {name: caches[name] for name in ("key_cache", "value_cache")}
    new = chunk([(False, False), (True, False)], 6, seed=2)
    changed = new.clone()
    changed[:, 3:] = 50.0
    first, decided = layer(new, is_causal=True, **given)
    second, decided_too = layer(changed, is_causal=True, **given)
    torch.testing.assert_close(first[:, :3], second[:, :3], **TOLERANCE[torch.float64])
    assert torch.equal(decided["key_updated"], decided_too["key_updated"])
    assert not torch.allclose(first[:, 3:], second[:, 3:])


def test_a_row_does_not_depend_on_its_batch():
    layer = make_layer()
    decide(layer)
    rows = [(True, False), (False, True), (False, False)]
    old, new = chunk(rows, 5, seed=1), chunk(rows, 5, seed=2)
    _, caches = layer(old)
    together, _ = layer(new, key_cache=caches["key_cache"], value_cache=caches["value_cache"])
    for row in range(3):
        one = slice(row, row + 1)
        alone, _ = layer(
            new[one], key_cache=caches["key_cache"][one], value_cache=caches["value_cache"][one]
        )
        torch.testing.assert_close(together[one], alone, **TOLERANCE[torch.float64])


def test_autocast_keeps_its_dtype_from_chunk_to_chunk():
    layer = make_layer(dtype=torch.float32)
    decide(layer)
    x = chunk([(False, True), (True, False)], 4, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, caches = layer(x)
        output, again = layer(x, key_cache=caches["key_cache"], value_cache=caches["value_cache"])
    assert again["key_cache"].dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x)[0], **TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_sdpa_equals_its_plain_twin(causal, with_mask):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7, generator=generator) > 0.6 if with_mask else None
    fast, none = calculate_attention(q, k, v, mask, 0.7, is_causal=causal)
    plain, weights = calculate_attention(q, k, v, mask, 0.7, use_sdpa=False, is_causal=causal)
    torch.testing.assert_close(fast, plain, **TOLERANCE[torch.float64])
    assert none is None
    sums = weights.sum(-1)
    assert torch.all(torch.isclose(sums, torch.ones_like(sums)) | (sums == 0))
    if causal:
        assert weights[:, :, 0, 3:].abs().max() == 0


def test_combiner_takes_unscaled_dims_or_scaled_heads():
    torch.manual_seed(0)
    combiner = AttentionCombiner(16, 4).double()
    query, key, value = (module(16, 4).double() for module in (QueryModule, KeyModule, ValueModule))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    by_heads = combiner(query(x), key(x), value(x))
    by_dims = combiner(query.proj(x), key.proj(x), value.proj(x))
    torch.testing.assert_close(by_heads, by_dims, **TOLERANCE[torch.float64])


def test_prepare_mask_leaves_the_scores_alone():
    scores = torch.zeros(1, 2, 3, 3)
    masked = prepare_mask_for_attention(scores, torch.eye(3, dtype=torch.bool))
    assert scores.abs().max() == 0
    assert torch.equal(masked[0, 0] == 0, torch.eye(3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4), "multiple of heads"),
        ((0, 1), "dims must be at least 1"),
        ((8, 0), "heads must be at least 1"),
        ((8, 2, 0), "max_dist must be at least 1"),
    ],
)
def test_bad_sizes_raise(arguments, message):
    with pytest.raises(ADMSValueError, match=message):
        AdaptiveUpdateAttention(*arguments)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_bad_thresholds_raise(threshold):
    layer = make_layer()
    with pytest.raises(ADMSValueError, match="update_threshold must be within 0..1"):
        layer.update_threshold = threshold
    assert layer.update_threshold == 0.5


def test_bad_inputs_raise():
    layer = make_layer()
    x = chunk([(True, True)] * 2, 4, seed=1)
    _, caches = layer(x)
    keys = caches["key_cache"]
    with pytest.raises(ADMSTypeError, match="floating-point"):
        layer(torch.ones(2, 4, 16, dtype=torch.long))
    with pytest.raises(ADMSValueError, match=r"\[batch, length, 16\]"):
        layer(x[0])
    with pytest.raises(ADMSValueError, match="no empty dimension"):
        layer(x[:, :0])
    with pytest.raises(ADMSValueError, match="batch of x"):
        layer(x, x[:1])
    with pytest.raises(ADMSValueError, match="is_causal must be False with xa"):
        layer(x, x, is_causal=True)
    with pytest.raises(ADMSValueError, match="key_cache must be"):
        layer(x, key_cache=keys[:1], value_cache=keys)
    with pytest.raises(ADMSTypeError, match="value_cache must be torch.float64"):
        layer(x, key_cache=keys, value_cache=keys.float())
    with pytest.raises(ADMSTypeError, match="mask must be boolean"):
        layer(x, mask=torch.ones(4, 4, dtype=torch.long))
    with pytest.raises(ADMSValueError, match="mask must be"):
        layer(x, mask=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ADMSValueError, match="temperature must be above 0"):
        calculate_attention(keys, keys, keys, temperature=0.0)


def test_a_layer_can_be_copied_right_after_training_on_it():
    layer = make_layer().train()
    x = chunk([(True, True)], 4, seed=1)
    _, caches = layer(x)
    layer(x, key_cache=caches["key_cache"], value_cache=caches["value_cache"])
    assert layer.update_cost is not None
    assert torch.equal(copy.deepcopy(layer)(x)[0], layer(x)[0])
