"""The other methods: exact while everything fits, bounded and equal in bytes afterwards."""

from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adms import ADMSConfig, ADMSValueError, UnsupportedModelError, enable_adms_llm
from adms.config import Sizes
from adms.entries import TokenShape
from adms.evaluation.baselines import POLICIES, Held, Setting, simulated
from adms.evaluation.baselines.quantized import GROUP, quantize
from adms.evaluation.methods import check_methods, open_method

NAMES = list(POLICIES)
CONFIG = ADMSConfig(start_size=2, compressed_budget=48, recent_size=16, prefill_chunk_size=8)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 96, (1, 200))


def stream(model: PreTrainedModel, cache: object, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    with torch.no_grad():
        parts = [
            model(ids[:, at : at + chunk], past_key_values=cache).logits[0]
            for at in range(0, ids.shape[1], chunk)
        ]
    return torch.cat(parts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_equals_dynamic_cache_while_everything_fits(
    model: PreTrainedModel, ids: torch.Tensor, name: str, chunk: int
) -> None:
    # The quantised windows stay exact until 32 tokens have left the window.
    ids = ids[:, :40]
    expected = stream(model, DynamicCache(), ids, chunk)
    with open_method(model, name, CONFIG) as method:
        got = stream(model, method.cache, ids, chunk)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_never_more_bytes_than_adms(model: PreTrainedModel, ids: torch.Tensor, name: str) -> None:
    most = enable_adms_llm(model, CONFIG).max_nbytes
    with open_method(model, name, CONFIG) as method:
        assert method.max_nbytes == most
        seen = []
        for at in range(0, 200, 8):
            stream(model, method.cache, ids[:, at : at + 8], 8)
            seen.append(method.nbytes)
        limits = [policy.max_entries for policy in method.cache.policies]
        held = [one.num_entries for one in method.cache.held]
    assert max(seen) <= most
    # Far above half, so that no method is compared at a fraction of its memory by mistake.
    assert seen[-1] > 0.5 * most
    assert all(count <= limit for count, limit in zip(held, limits, strict=True))
    assert min(held) >= 60


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_as_before_afterwards(
    model: PreTrainedModel, ids: torch.Tensor, name: str
) -> None:
    before = stream(model, DynamicCache(), ids[:, :32], 32)
    implementation = model.config._attn_implementation
    with open_method(model, name, CONFIG) as method:
        stream(model, method.cache, ids, 8)
    assert model.config._attn_implementation in (implementation, "adms_" + implementation)
    assert torch.equal(stream(model, DynamicCache(), ids[:, :32], 32), before)


@pytest.mark.parametrize("name", ["h2o", "keydiff", "lacache", "tova", "snapkv"])
def test_one_layer_equals_dense_attention_over_what_is_held(name: str) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 120))
    with open_method(model, name, CONFIG) as method:
        stream(model, method.cache, ids[:, :-1], 8)
        held = method.cache.held[0].tokens[0].long()
        got = stream(model, method.cache, ids[:, -1:], 1)
    kept = torch.cat([ids[:, held], ids[:, -1:]], dim=1)
    assert kept.shape[1] < 120
    # One layer's keys depend on the token alone, so the retained text is the whole memory.
    dense = stream(model, DynamicCache(), kept, kept.shape[1])[-1:]
    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5)


def setting(budget: int = 48, layer_idx: int = 0) -> Setting:
    sizes = Sizes(sink=2, recent=4, budget=budget, interval=8, chunk=4, max_positions=None)
    return Setting(sizes, TokenShape(1, 8, 8), layer_idx, 2)


def held(count: int) -> Held:
    tokens = torch.arange(count).float()[None]
    return Held(torch.randn(1, count, 8), torch.randn(1, count, 8), tokens)


def test_h2o_keeps_what_was_attended_to() -> None:
    policy = POLICIES.get("h2o")(setting(budget=4))
    assert policy.slots == 8
    weights = torch.zeros(1, 1, 12)
    weights[0, 0, 5], weights[0, 0, 7] = 0.6, 0.4
    kept = policy.reduce(held(12), weights, 12).tokens[0].tolist()
    assert kept == [0, 1, 5, 7, 8, 9, 10, 11]


def test_tova_has_no_protected_window() -> None:
    policy = POLICIES.get("tova")(setting(budget=2))
    weights = torch.zeros(1, 2, 12)
    weights[0, -1, 2:7] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    kept = policy.reduce(held(12), weights, 2).tokens[0].tolist()
    assert kept == [0, 1, 2, 3, 4, 5, 6, 11]


def test_keydiff_keeps_the_odd_one_out() -> None:
    entries = held(12)
    entries.keys[:] = 1.0
    entries.keys[0, 6] = -1.0
    policy = POLICIES.get("keydiff")(setting(budget=1))
    assert policy.reduce(entries, None, 12).tokens[0].tolist() == [0, 1, 6, 8, 9, 10, 11]


def test_snapkv_keeps_the_neighbours_too() -> None:
    policy = POLICIES.get("snapkv")(setting(budget=9))
    weights = torch.zeros(1, 1, 30)
    weights[0, 0, 15] = 1.0
    kept = policy.reduce(held(30), weights, 30).tokens[0].tolist()
    assert set(range(12, 19)) <= set(kept)


def test_lacache_layers_drop_what_their_neighbours_keep() -> None:
    even = POLICIES.get("lacache")(setting(budget=10, layer_idx=0)).reduce(held(20), None, 4)
    odd = POLICIES.get("lacache")(setting(budget=10, layer_idx=1)).reduce(held(20), None, 4)
    assert even.num_entries == odd.num_entries == 16
    assert set(even.tokens[0].tolist()) | set(odd.tokens[0].tolist()) == set(range(20))


def test_zsmerge_keeps_every_tokens_weight() -> None:
    policy = POLICIES.get("zsmerge")(setting(budget=16))
    entries = held(20)
    for _ in range(6):
        entries = policy.reduce(entries, torch.rand(1, 4, entries.num_entries), 4)
        assert entries.num_entries <= policy.max_entries
        fresh = held(4)
        entries = Held(
            torch.cat([entries.keys, fresh.keys], 1),
            torch.cat([entries.values, fresh.values], 1),
            torch.cat([entries.tokens, fresh.tokens + 20], 1),
            {name: torch.nn.functional.pad(part, (0, 4)) for name, part in entries.fields.items()},
        )
    final = policy.reduce(entries, torch.rand(1, 4, entries.num_entries), 4)
    assert final.fields["count"].sum() == 20 + 6 * 4
    torch.testing.assert_close(final.log_weight, final.fields["count"].log())
    assert torch.isfinite(final.keys).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quantisation_error_is_at_most_half_a_step(bits: int) -> None:
    states = torch.randn(2, GROUP, 8, dtype=torch.float64)
    step = (states.amax(1, keepdim=True) - states.amin(1, keepdim=True)) / (2**bits - 1)
    error = (quantize(states, bits, dim=1) - states).abs()
    # Minimum and step are rounded to bfloat16, which moves levels by up to 1/128 of their size.
    assert (error <= 0.5 * step + 0.02 * states.abs().amax()).all()
    assert len(quantize(states, bits, dim=1)[0, :, 0].unique()) <= 2**bits


def test_quantised_window_forgets_the_oldest_and_keeps_the_rest_in_order() -> None:
    policy = POLICIES.get("int2")(setting(budget=64))
    entries = held(2)
    for at in range(2, 600, 4):
        fresh = held(4)
        entries = policy.reduce(
            Held(
                torch.cat([entries.keys, fresh.keys], 1),
                torch.cat([entries.values, fresh.values], 1),
                torch.cat([entries.tokens, fresh.tokens + at], 1),
            ),
            None,
            4,
        )
    tokens = entries.tokens[0].tolist()
    assert tokens[:2] == [0, 1]
    assert tokens[2:] == list(range(604 - len(tokens), 602))
    assert policy.blocks * GROUP + 4 <= len(tokens) - 2 <= policy.blocks * GROUP + 4 + GROUP


def test_errors_are_clear(model: PreTrainedModel) -> None:
    with pytest.raises(ADMSValueError, match="did you mean 'h2o'"):
        check_methods(["h20"])
    small = CONFIG.replace(compressed_budget=20)
    with (
        pytest.raises(ADMSValueError, match="codes 32 tokens together"),
        open_method(model, "int4", small),
    ):
        pass
    wide = ADMSConfig(compressed_budget=200, recent_size=100, prefill_chunk_size=8)
    with (
        pytest.raises(ADMSValueError, match="trained on 512 positions"),
        open_method(model, "int2", wide),
    ):
        pass
    cache = enable_adms_llm(model, CONFIG)
    with (
        simulated(model, POLICIES.get("h2o"), cache) as twin,
        pytest.raises(ADMSValueError, match="read one row"),
    ):
        model(torch.zeros(2, 4, dtype=torch.long), past_key_values=twin)


def test_models_that_compute_attention_themselves_are_refused() -> None:
    from transformers import FalconConfig, FalconForCausalLM, MptConfig, MptForCausalLM

    mpt = MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=32))
    falcon = FalconForCausalLM(
        FalconConfig(
            hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=32, alibi=False
        )
    )
    for model in (mpt.eval(), falcon.eval()):
        with (
            pytest.raises(UnsupportedModelError, match="rotary positions"),
            open_method(model, "h2o", CONFIG),
        ):
            pass


@pytest.fixture(autouse=True)
def _disabled(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "model" in request.fixturenames:
        from adms import disable_adms

        disable_adms(request.getfixturevalue("model"))
