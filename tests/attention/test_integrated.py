"""Integrated attention: dense oracles for windows and spans, focus, causality, learning, saving."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adms.attention.adaptive_span import AdaptiveSpan, Predictor, soft_span_bias, soft_span_share
from adms.attention.focus import focus
from adms.attention.integrated import IntegratedAttention
from adms.attention.projections import calculate_attention
from adms.attention.span_features import retained_mass, segment_features
from adms.errors import ADMSTypeError, ADMSValueError

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def make_layer(ctx: int = 64, seed: int = 0, **arguments) -> IntegratedAttention:
    torch.manual_seed(seed)
    sizes = {"max_dist": 40, "win_size": 8, "max_span": 12, "ramp": 4} | arguments
    layer = IntegratedAttention(ctx, 16, 4, **sizes).double()
    with torch.no_grad():
        # Weights of the size trained layers have; the initial ones make attention near uniform.
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    return layer.eval()


def tokens(count: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, 16, generator=generator, dtype=torch.float64)


@torch.no_grad()
def span_oracle(layer, x, span, max_dist, causal, mask=None):
    """Adaptive-span attention by loops: Sukhbaatar et al.'s masked softmax, renormalised."""
    size, count = layer.head_dim, x.shape[0]
    q, k, v = (
        x @ m.proj.weight.T + m.proj.bias
        for m in (layer.query_module, layer.key_module, layer.value_module)
    )
    out = torch.zeros_like(q)
    for head in range(layer.head):
        part = slice(head * size, (head + 1) * size)
        for i in range(count):
            s = span[i].item()
            share = s / layer.longest
            temperature = (
                1 + layer.temp_scale * (1 - share)
                if layer.sharpen
                else 0.5 + layer.temp_scale * share
            )
            weights = {}
            for j in range(count):
                far = abs(i - j) >= max_dist or (causal and j > i)
                if far or (mask is not None and not mask[i, j]):
                    continue
                soft = min(max((layer.ramp + s - abs(i - j)) / layer.ramp, 0.0), 1.0)
                score = (q[i, part] @ k[j, part]).item() / math.sqrt(size) / temperature
                weights[j] = soft * math.exp(score)
            total = sum(weights.values())
            for j, weight in weights.items():
                if total > 0:
                    out[i, part] += weight / total * v[j, part]
    return out


def make_span(**arguments) -> AdaptiveSpan:
    torch.manual_seed(0)
    layer = AdaptiveSpan(16, 4, 40, ramp=4, temp_scale=0.4, **arguments).double()
    with torch.no_grad():
        for module in (layer.query_module, layer.key_module):
            module.proj.weight.mul_(15)
    layer.longest = 12
    return layer


@pytest.mark.parametrize("sharpen", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_adaptive_span_equals_the_oracle(sharpen, causal):
    layer = make_span(sharpen=sharpen)
    x = tokens(20)
    scale = torch.rand(2, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(3)) > 0.3
    out, weights = layer(
        x, x, x, max_dist=9, max_span=12, span_scale=scale, mask=mask, is_causal=causal
    )
    assert weights is None and out.shape == x.shape
    for row in range(2):
        expected = span_oracle(layer, x[row], scale[row] * 12, 9, causal, mask[row])
        torch.testing.assert_close(out[row], expected, **EXACT)


def test_the_plain_twin_returns_the_weights(monkeypatch):
    layer = make_span()
    x = tokens(10)
    fast, _ = layer(x, x, x, max_span=3)
    monkeypatch.setattr(AdaptiveSpan, "use_sdpa", False)
    plain, weights = layer(x, x, x, max_span=3)
    torch.testing.assert_close(plain, fast, **EXACT)
    at = torch.arange(10)
    reached = (at[:, None] - at).abs() < 3 + 4
    assert torch.equal((weights > 0).all(dim=(0, 1)), reached)


def test_temperature_and_sharpen_have_an_effect():
    x = tokens(10)
    scale = torch.tensor(0.3, dtype=torch.float64)
    layers = [make_span(sharpen=sharpen) for sharpen in (True, False)]
    assert [layer.temperature(scale).item() for layer in layers] == pytest.approx([1.28, 0.62])
    outs = [layer(x, x, x, span_scale=scale)[0] for layer in layers]
    assert (outs[0] - outs[1]).abs().max() > 1e-3
    layers[0].temp_scale = 0.0
    assert (layers[0](x, x, x, span_scale=scale)[0] - outs[0]).abs().max() > 1e-4


def test_the_learned_scale_serves_where_none_is_given_and_learns():
    layer = make_span()
    x = tokens(20)
    whole, _ = layer(x, x, x, span_scale=torch.tensor(1.0))
    torch.testing.assert_close(layer(x, x, x)[0], whole, **EXACT)
    out, _ = layer(x, x, x, max_span=8)
    out.square().sum().backward()
    assert layer.span_scale.grad.abs() > 0


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, 60), st.floats(0, 40), st.integers(1, 20))
def test_the_soft_edge_and_its_gradient(distance, span, ramp):
    share = min(max((ramp + span - distance) / ramp, 0.0), 1.0)
    z = torch.tensor(span, dtype=torch.float64, requires_grad=True)
    at = torch.tensor(distance, dtype=torch.float64)
    assert soft_span_share(at, z, ramp).item() == pytest.approx(share, abs=1e-12)
    bias = soft_span_bias(at, z, ramp)
    assert bias.exp().item() == pytest.approx(share, abs=1e-12)
    bias.backward()
    assert z.grad.isfinite()
    if 1e-6 < share < 1 - 1e-6:
        assert z.grad.item() == pytest.approx(1 / (ramp * share), rel=1e-6)


def test_predictor_pools_rows_or_reads_tokens():
    predictor = Predictor(16).double()
    x = tokens(6)
    pooled = torch.sigmoid(x.mean(1) @ predictor.linear.weight.T + predictor.linear.bias)
    torch.testing.assert_close(predictor(x), pooled)
    torch.testing.assert_close(predictor(x[:, 0]), predictor(x[:, :1]))
    assert predictor(x, pool=False).shape == (2, 6, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 37])
def test_windows_equal_dense_attention(causal, with_mask, count):
    """One iteration over windows with full overlap is `AdaptiveSpan` over the whole sequence."""
    layer = make_layer(causal=causal, max_iterations=1)
    x = tokens(count)
    mask = None
    if with_mask:
        mask = torch.rand(2, 1, count, count, generator=torch.Generator().manual_seed(4)) > 0.3
    layer(x, mask=mask)
    report = layer.report
    local = layer.ln_a(x)
    got, iterations = layer.slide_win(local, report.win_size, report.reach, report.span_scale, mask)
    expected, _ = layer.attn_local(
        local,
        local,
        local,
        max_span=12,
        span_scale=report.span_scale,
        mask=mask,
        is_causal=causal,
    )
    torch.testing.assert_close(got, expected, **EXACT)
    assert (iterations == 1).all()


def test_the_window_size_does_not_change_the_output():
    layer = make_layer()
    x = layer.ln_a(tokens(30))
    scale = torch.full((2, 30), 0.6, dtype=torch.float64)
    outs = [layer.slide_win(x, size, 11, scale, None)[0] for size in (1, 4, 13, 30)]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], **EXACT)


def test_windows_follow_the_span():
    """Longer spans make a longer reach; keys beyond it would be computed for nothing."""
    layer = make_layer()
    x = tokens(64)
    plans = {}
    for bias in (-20.0, 0.0, 20.0):
        with torch.no_grad():
            layer.span_pred.linear.weight.zero_()
            layer.span_pred.linear.bias.fill_(bias)
        layer(x)
        plans[bias] = (layer.report.reach, layer.report.win_size)
    assert plans == {-20.0: (4, 4), 0.0: (9, 8), 20.0: (15, 8)}


def test_less_overlap_cuts_spans_at_window_borders_and_nowhere_else():
    whole, cut = make_layer(max_iterations=1), make_layer(max_iterations=1, overlap=0.0)
    x = tokens(24)
    whole(x)
    cut(x)
    assert (cut.report.reach, cut.report.win_size) == (0, 8)
    scale = torch.full((2, 24), 0.0, dtype=torch.float64)
    local = whole.ln_a(x)
    full, _ = whole.slide_win(local, 8, 3, scale, None)
    blocks, _ = cut.slide_win(local, 8, 0, scale, None)
    same = (full - blocks).abs().amax(dim=(0, 2)) < 1e-12
    # A span of 0 with a ramp of 4 reaches 3 tokens: positions 3 and 4 of a block see all of it.
    assert same.tolist() == [i < 5 or i > 18 or i % 8 in (3, 4) for i in range(24)]


def test_focus_equals_its_definition():
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(3, 2, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(3, 1, 6, 6, generator=generator) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    out, iterations = focus(q, k, v, mask, 0.8, max_iterations=10, threshold=1e-4, s_factor=0.1)
    for row in range(3):
        for i in range(6):
            query = q[row : row + 1, :, i : i + 1]
            previous, count = torch.zeros_like(query), 0
            while True:
                scores = (query @ k[row : row + 1].transpose(-1, -2)) / 0.8
                scores = scores.masked_fill(~mask[row, 0, i], -math.inf)
                new = scores.softmax(-1) @ v[row : row + 1]
                count += 1
                moved = (new - previous).abs().mean()
                if count == 10 or moved <= 1e-4 + 0.1 * new.abs().mean():
                    break
                previous, query = new, query + new
            assert iterations[row, 0, i, 0] == count
            torch.testing.assert_close(out[row : row + 1, :, i : i + 1], new, **EXACT)
    assert len(iterations.unique()) > 1


def test_focus_stops_by_its_limits():
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 1, 9, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    never = {"threshold": 0.0, "s_factor": 0.0}
    assert (focus(q, k, v, None, 1.0, **never)[1] == 10).all()
    assert (focus(q, k, v, None, 1.0, max_iterations=3, **never)[1] == 3).all()
    assert (focus(q, k, v, None, 1.0, threshold=1e9)[1] == 1).all()
    assert (focus(q, k, v, None, 1.0, s_factor=1.0)[1] == 1).all()
    plain, _ = calculate_attention(q, k, v)
    torch.testing.assert_close(focus(q, k, v, None, 1.0, max_iterations=1)[0], plain)


@pytest.mark.parametrize("overlap", [0.5, 1.0])
def test_causal_outputs_do_not_depend_on_later_tokens(overlap):
    layer = make_layer(causal=True, overlap=overlap)
    table = layer.refiner.table
    table.copy_(torch.rand(table.shape, generator=torch.Generator().manual_seed(7)))
    x, cache = tokens(40), {}
    layer(tokens(40, seed=9), kv_cache=cache)
    layer.attn_global.update_threshold = 1.0
    out = layer(x, kv_cache=dict(cache))
    for cut in (1, 8, 13, 32):
        changed = x.clone()
        changed[:, cut:] = tokens(40, seed=8)[:, cut:] * 3
        got = layer(changed, kv_cache=dict(cache))
        torch.testing.assert_close(got[:, :cut], out[:, :cut], **EXACT)
        assert not torch.allclose(got[:, cut:], out[:, cut:])
        if overlap == 1.0:
            torch.testing.assert_close(layer(x[:, :cut]), layer(x)[:, :cut], **EXACT)


@pytest.mark.parametrize("overlap", [0.5, 1.0])
def test_a_row_does_not_depend_on_its_batch(overlap):
    layer = make_layer(overlap=overlap)
    x = tokens(30, batch=3)
    x[1] *= 4
    together = layer(x)
    for row in range(3):
        torch.testing.assert_close(layer(x[row : row + 1]), together[row : row + 1], **EXACT)


def test_the_whole_layer_is_its_parts():
    layer = make_layer()
    x = tokens(20)
    out = layer(x)
    globe, _ = layer.attn_global(layer.ln_b(x))
    scale = layer.span_pred(globe).expand(2, 20)
    torch.testing.assert_close(layer.report.span_scale, scale)  # No table yet: factor 1.
    assert (layer.report.actions == 9).all()
    local, _ = layer.slide_win(layer.ln_a(x), 8, 15, scale, None)
    torch.testing.assert_close(out, layer.projection(torch.cat([local, globe], -1)), **EXACT)


def test_an_action_scales_the_span_of_its_segment():
    layer = make_layer()
    x = tokens(20)
    layer(x)
    before = layer.report.span_scale
    states = layer.extract(layer.ln_a(x), before)
    layer.refiner.set_value(int(states[0, 1]), 3, 1.0)
    layer(x)
    assert layer.report.actions[0].tolist() == [9, 3, 9]
    torch.testing.assert_close(layer.report.span_scale[0, 8:16], before[0, 8:16] * 3 / 9)
    torch.testing.assert_close(layer.report.span_scale[0, 16:], before[0, 16:])


def test_segment_features_by_hand():
    x = torch.zeros(1, 5, 2, dtype=torch.float64)
    x[0, 0], x[0, 1] = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    x[0, 2:] = torch.tensor([0.0, 2.0])
    scale = torch.tensor([[0.0, 0.5, 1.0, 1.0, 0.2]], dtype=torch.float64)
    got = segment_features(x, scale, 2, 10)[0]
    expected = torch.tensor(
        [[0.0, 1.0, 0.25, 0.0], [1.0, 0.0, 1.0, 0.2], [1.0, 0.0, 0.2, 0.4]], dtype=torch.float64
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_the_reward_is_retained_mass_minus_cost(causal):
    layer = make_layer(causal=causal, cost_weight=0.25)
    x = layer.ln_a(tokens(20))
    scale = torch.rand(2, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    local = layer.attn_local
    q, k = local.query_module(x), local.key_module(x)
    at = torch.arange(20)
    distance = at[:, None] - at
    with torch.no_grad():
        scores = q @ k.transpose(-1, -2) / local.temperature(scale)[:, None, :, None]
        weights = scores.exp() * soft_span_share(distance.abs(), torch.tensor(12.0), 4)
        weights = weights * (distance >= 0) if causal else weights
        weights = weights / weights.sum(-1, keepdim=True)
        kept = soft_span_share(distance.abs(), (scale * 12)[..., None], 4)[:, None]
        mass = (weights * kept).sum(-1).mean(1)
    for segment, part in enumerate((slice(0, 8), slice(8, 16))):
        expected = mass[:, part].mean(1) - 0.25 * scale[:, part].mean(1)
        torch.testing.assert_close(layer.quality(x, scale)[:, segment], expected)
    everything = torch.ones(2, 20, dtype=torch.float64)
    nothing = torch.zeros(20, 20, dtype=torch.bool)[None, None]
    kept = retained_mass(local, x, everything * 0, 8, 12, causal, nothing)
    torch.testing.assert_close(kept, torch.ones_like(kept))


def test_the_refiner_learns_short_spans_where_mass_is_near_and_long_ones_where_it_is_far():
    """Keys and queries that point at a distance, so that the best span is known."""
    chosen = {}
    for offset in (1, 11):
        sizes = {"ctx": 24, "win_size": 24, "max_span": 12, "ramp": 1}
        layer = make_layer(**sizes, cost_weight=0.5, max_iterations=1)
        layer.learn_online = True
        layer.refiner.epsilon, layer.refiner.alpha = 0.5, 0.3
        with torch.no_grad():
            layer.span_pred.linear.weight.zero_()
            layer.span_pred.linear.bias.fill_(20.0)
            local = layer.attn_local
            for module in (local.query_module, local.key_module):
                module.proj.weight.zero_()
                module.proj.bias.zero_()
            angle = torch.tensor(offset * 2 * math.pi / 24)
            turn = torch.tensor([[angle.cos(), angle.sin()], [-angle.sin(), angle.cos()]])
            for head in range(4):
                part = slice(head * 4, head * 4 + 2)
                local.query_module.proj.weight[part, :2] = 20 * turn.double()
                local.key_module.proj.weight[part, :2] = torch.eye(2, dtype=torch.float64)
        at = torch.arange(24) * 2 * math.pi / 24
        x = tokens(24, batch=1) * 0.1
        x[0, :, 0], x[0, :, 1] = at.cos(), at.sin()
        with torch.no_grad():
            for _ in range(60):
                layer(x)
            layer.learn_online = False
            layer(x)
        chosen[offset] = int(layer.report.actions[0, 0])
    assert chosen[1] <= 3 and chosen[11] >= 7


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_reach_predictor_gates_and_input(causal):
    layer = make_layer(causal=causal).train()
    x = tokens(20).requires_grad_()
    cache: dict = {}
    layer(x, kv_cache=cache)
    out = layer(x, kv_cache=cache)
    (out.square().mean() + 0.1 * layer.span_cost + layer.attn_global.update_cost).backward()
    assert x.grad.isfinite().all()
    named = dict(layer.named_parameters())
    assert not named["attn_local.span_scale"].requires_grad
    for name, parameter in named.items():
        if name != "attn_local.span_scale":
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert layer.span_pred.linear.weight.grad.abs().max() > 0
    copy.deepcopy(layer)


def test_the_span_predictor_learns_by_gradient_what_distance_it_needs():
    layer = make_layer(max_iterations=1, temp_scale=0.0)
    layer.train().refiner.epsilon = 0.0
    x = tokens(24, batch=4)
    with torch.no_grad():
        layer.span_pred.linear.bias.fill_(3.0)
        layer.eval()(x)
        start = layer.report.span_scale.mean().item()
    optimizer = torch.optim.SGD(layer.span_pred.parameters(), lr=1.0)
    layer.train()
    for _ in range(30):
        layer(x)
        optimizer.zero_grad()
        layer.span_cost.backward()
        optimizer.step()
    assert layer.report.span_scale.mean().item() < 0.5 * start


def test_inference_changes_nothing_and_training_learns():
    layer = make_layer()
    x = tokens(20)
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert layer.refiner.table.abs().max() == 0 and layer.report.rewards is None
    layer.train()(x)
    assert layer.refiner.table.abs().max() > 0
    assert layer.report.rewards.shape == layer.report.actions.shape == (2, 3)


def test_seeds_give_the_same_decisions_twice():
    runs = []
    for seed in (3, 3, 4):
        layer = make_layer(seed=0).train()
        layer.refiner.generator.manual_seed(seed)
        layer.refiner.epsilon = 0.5
        actions = []
        for i in range(6):
            layer(tokens(30, seed=i))
            actions.append(layer.report.actions)
        runs.append((torch.stack(actions), layer.refiner.table))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_saving_restores_the_q_table_and_its_decisions():
    layer = make_layer().train()
    for i in range(8):
        layer(tokens(40, seed=i))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make_layer(seed=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert layer.refiner.table.abs().max() > 0
    assert torch.equal(other.refiner.table, layer.refiner.table)
    x = tokens(40, seed=50)
    assert torch.equal(other.eval()(x), layer.eval()(x))
    assert torch.equal(other.train()(x), layer.train()(x))
    assert torch.equal(other.report.actions, layer.report.actions)


def test_caches_are_the_callers_and_written_only_on_success():
    layer = make_layer()
    first, second = tokens(12), tokens(12, seed=2)
    cache: dict = {}
    layer(first, kv_cache=cache)
    kept = cache["key_cache"]
    layer.attn_global.update_threshold = 1.0
    reused = layer(second, kv_cache=cache)
    assert cache["key_cache"] is not None and torch.equal(cache["key_cache"], kept)
    assert cache["key_updated"].tolist() == [False, False]
    assert not torch.allclose(reused, layer(second))
    broken = second.clone()
    broken[0, 0, 0] = math.nan
    layer.attn_global.update_threshold = 0.0
    with pytest.raises(ADMSValueError, match="features must be finite"):
        layer(broken, kv_cache=cache)
    assert torch.equal(cache["key_cache"], kept)


def test_cross_attention_feeds_the_global_path_alone():
    layer = make_layer(causal=True)
    x, source = tokens(12), tokens(9, seed=2)
    hidden = torch.ones(12, 9, dtype=torch.bool)
    hidden[:, 5:] = False
    torch.testing.assert_close(layer(x, source, xa_mask=hidden), layer(x, source[:, :5]), **EXACT)
    assert not torch.allclose(layer(x, source), layer(x, source[:, :5]))


def test_masked_padding_changes_nothing_when_causal():
    layer = make_layer(causal=True)
    x = tokens(20)
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[:, 14:] = False
    torch.testing.assert_close(layer(x, mask=mask)[:, :14], layer(x[:, :14]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_follow_float64(dtype):
    layer = make_layer(causal=True, max_iterations=1)
    x = tokens(30)
    expected = layer(x)
    out = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    limit = 1e-4 if dtype == torch.float32 else 6e-2
    assert (out.double() - expected).abs().mean() < limit * expected.abs().mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_span": 0}, "max_span must be at least 1"),
        ({"win_size": 0}, "win_size must be at least 1"),
        ({"max_dist": 0}, "max_dist must be at least 1"),
        ({"ctx": 0}, "ctx must be at least 1"),
        ({"ramp": 0}, "ramp must be at least 1"),
        ({"temp_scale": -1.0}, "temp_scale must be at least 0"),
        ({"overlap": 1.5}, "overlap must be within 0..1"),
        ({"cost_weight": -1.0}, "cost_weight must be at least 0"),
        ({"threshold": math.inf}, "threshold must be at least 0 and finite"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
    ],
)
def test_bad_settings_raise(arguments, message):
    with pytest.raises(ADMSValueError, match=message):
        make_layer(**arguments)


def test_bad_inputs_raise():
    layer, x = make_layer(), tokens(10)
    with pytest.raises(ADMSValueError, match="multiple of heads"):
        IntegratedAttention(64, 10, 4)
    with pytest.raises(ADMSTypeError, match="max_span must be an int"):
        make_layer(max_span=2.5)
    with pytest.raises(ADMSTypeError, match="seed must be an int, got NoneType"):
        IntegratedAttention(64, 4, 4, seed=None)
    with pytest.raises(ADMSValueError, match="seed must be of 64 bits"):
        IntegratedAttention(64, 4, 4, seed=2**64)
    with pytest.raises(ADMSValueError, match="max_iterations must be at least 1, got 0"):
        focus(*torch.ones(3, 1, 1, 2, 4), None, 1.0, max_iterations=0)
    with pytest.raises(ADMSValueError, match="at most ctx = 64 tokens, got 65"):
        layer(tokens(65))
    with pytest.raises(ADMSValueError, match="xa_mask must come with xa"):
        layer(x, xa_mask=torch.ones(10, 10, dtype=torch.bool))
    with pytest.raises(ADMSValueError, match="mask must be"):
        layer(x, mask=torch.ones(9, 10, dtype=torch.bool))
    span = make_span()
    with pytest.raises(ADMSValueError, match="span_scale must be"):
        span(x, x, x, span_scale=torch.ones(3))
    with pytest.raises(ADMSValueError, match="give each query its own token"):
        span(x, x[:, :4], x[:, :4])
    with pytest.raises(ADMSValueError, match="max_span must be at least 1"):
        span(x, x, x, max_span=0)
