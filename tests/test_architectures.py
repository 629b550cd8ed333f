"""What must hold for every architecture, on tiny random models.

The numbers in the names of sections are those of the checklist the project began with.
"""

import copy
import json
from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from adms import disable_adms, enable_adms_llm
from adms.config import ADMSConfig
from adms.errors import CacheStateError, ForwardError
from tests.patches.tiny import (
    ALIBI,
    LEARNED,
    MOVABLE,
    NAMES,
    TRAINED,
    WINDOWED,
    ids,
    tiny,
)

# Holds everything that the tests below call "all": no eviction before 42 tokens.
ALL = ADMSConfig(start_size=2, recent_size=40, compressed_budget=0, prefill_chunk_size=16)
# Evicts early: sinks, a small exact middle, and a window.
SMALL = ADMSConfig(
    start_size=2,
    recent_size=12,
    compressed_budget=8,
    compression_interval=2,
    prefill_chunk_size=8,
)
LENGTH = 36
# The frequencies of longrope change within that length; see test_longrope.
STATIC = tuple(name for name in NAMES if name != "phi3-long")


@pytest.fixture(scope="session", autouse=True)
def _version(record_testsuite_property: Callable[[str, object], None]) -> None:
    """For the README's table, which is made from the reports of runs."""
    record_testsuite_property("transformers", transformers.__version__)


def dense(model: PreTrainedModel, inputs: torch.Tensor, step: int | None = None) -> torch.Tensor:
    """Logits with transformers' own cache, in one shot or ``step`` tokens at a time."""
    cache = DynamicCache(config=model.config)
    return run(model, inputs, cache, step)


@torch.no_grad()
def run(
    model: PreTrainedModel, inputs: torch.Tensor, cache: object, step: int | None = None
) -> torch.Tensor:
    """Logits of ``inputs``, ``step`` tokens a call."""
    return torch.cat(
        [
            model(part, past_key_values=cache, use_cache=True).logits
            for part in inputs.split(step or inputs.shape[1], dim=1)
        ],
        dim=1,
    )


# --- 1: a budget that holds everything ----------------------------------------------------------


@pytest.mark.parametrize("name", STATIC)
def test_equals_dynamic_cache_when_everything_fits(name: str) -> None:
    model, inputs = tiny(name), ids(2, LENGTH)
    expected = dense(model, inputs)
    for step in (None, 1, 7):
        cache = enable_adms_llm(model, ALL)
        actual = run(model, inputs, cache, step)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
        assert cache.get_seq_length() == LENGTH


# torch's grouped matrix product, which Mixtral calls, has no float64.
@pytest.mark.parametrize("name", [name for name in STATIC if name != "mixtral"])
def test_equals_dynamic_cache_in_float64(name: str) -> None:
    # In float32 rounding hides errors of 1e-5; what remains here is what models round themselves:
    # softmax in float32, and cosines and sines.
    model, inputs = tiny(name).double(), ids(2, LENGTH)
    expected = dense(model, inputs)
    actual = run(model, inputs, enable_adms_llm(model, ALL), 5)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", STATIC)
def test_bfloat16_is_as_near_to_float32_as_dynamic_cache(name: str) -> None:
    model, inputs = tiny(name).bfloat16(), ids(2, LENGTH)
    reference = dense(copy.deepcopy(model).float(), inputs)
    theirs = (dense(model, inputs).float() - reference).norm()
    ours = (run(model, inputs, enable_adms_llm(model, ALL), 9).float() - reference).norm()
    # Mixtral may send a token to another expert for a rounding; the others only round.
    allowed = 2.0 if name == "mixtral" else 1.25
    assert ours <= allowed * theirs
    assert theirs > 0


def test_longrope() -> None:
    """Exact within the shorter length, and past it for what one pass holds."""
    model, inputs = tiny("phi3-long"), ids(2, LENGTH)
    short = inputs[:, :24]
    for step in (None, 1, 7):
        actual = run(model, short, enable_adms_llm(model, ALL), step)
        torch.testing.assert_close(actual, dense(model, short), atol=2e-5, rtol=0)
    whole = ALL.replace(recent_size=21, prefill_chunk_size=LENGTH + 2)
    actual = run(model, inputs, enable_adms_llm(model, whole))
    torch.testing.assert_close(actual, dense(model, inputs), atol=2e-5, rtol=0)


# --- 2: the one-layer oracle --------------------------------------------------------------------


def retained(seen: int, config: ADMSConfig) -> list[int]:
    """Tokens that a cache without a middle attends to at a chunk's start."""
    evicted = max(0, seen - config.recent_size)
    sinks = range(min(evicted, config.start_size))
    return [*sinks, *range(evicted, seen)]


@pytest.mark.parametrize("name", MOVABLE)
@pytest.mark.parametrize("chunk", [1, 4])
def test_one_layer_equals_dense_over_what_is_retained(name: str, chunk: int) -> None:
    layers = {"n_layers": 1} if name.startswith("mpt") else {"num_hidden_layers": 1}
    model = tiny(name, **layers)
    inputs = ids(1, 60)
    config = ADMSConfig(start_size=3, recent_size=8, compressed_budget=0, prefill_chunk_size=chunk)
    actual = run(model, inputs, enable_adms_llm(model, config), chunk)
    expected = []
    for start in range(0, 60, chunk):
        kept = retained(start, config)
        tokens = torch.cat([inputs[:, kept], inputs[:, start : start + chunk]], dim=1)
        with torch.no_grad():
            expected.append(model(tokens, use_cache=False).logits[:, -chunk:])
    torch.testing.assert_close(actual, torch.cat(expected, dim=1), atol=2e-5, rtol=0)


# --- 3: left padding ----------------------------------------------------------------------------


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one batch, padded on the left, and its mask."""
    width = max(row.shape[1] for row in rows)
    batch = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for index, row in enumerate(rows):
        batch[index, width - row.shape[1] :] = row
        mask[index, width - row.shape[1] :] = 1
    return batch, mask


@pytest.mark.parametrize("name", STATIC)
def test_padded_rows_equal_the_rows_alone_over_two_turns(name: str) -> None:
    """With eviction, and with a row of fewer tokens than there are sinks."""
    model = tiny(name)
    turns = [
        [ids(1, 40, seed=1), ids(1, 1, seed=2), ids(1, 23, seed=3)],
        [ids(1, 3, seed=4), ids(1, 30, seed=5), ids(1, 17, seed=6)],
    ]
    together = enable_adms_llm(model, SMALL)
    outputs = []
    for rows in turns:
        batch, mask = padded(rows)
        with torch.no_grad():
            outputs.append(model(batch, attention_mask=mask, past_key_values=together).logits)
    for index in range(3):
        alone = enable_adms_llm(model, SMALL)
        for turn, rows in enumerate(turns):
            # Chunks begin at other tokens in a padded batch, which matters once tokens leave; in
            # single steps they begin everywhere.
            width = outputs[turn].shape[1]
            row, mask = padded([rows[index], ids(1, width)])
            with torch.no_grad():
                expected = model(row[:1], attention_mask=mask[:1], past_key_values=alone).logits
            count = rows[index].shape[1]
            torch.testing.assert_close(
                outputs[turn][index, -count:], expected[0, -count:], atol=3e-5, rtol=0
            )


@pytest.mark.parametrize("name", STATIC)
def test_a_padded_row_equals_the_unpadded_row(name: str) -> None:
    model, row, other = tiny(name), ids(1, 20, seed=1), ids(1, 28, seed=2)
    batch, mask = padded([row, other])
    cache = enable_adms_llm(model, ALL)
    with torch.no_grad():
        actual = model(batch, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(actual[0, 8:], dense(model, row)[0], atol=2e-5, rtol=0)
    following = ids(2, 6, seed=3)
    more = run(model, following, cache, 1)
    expected = dense(model, torch.cat([row, following[:1]], dim=1))[:, 20:]
    torch.testing.assert_close(more[:1], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", STATIC)
def test_padded_rows_alone_without_padding_under_eviction(name: str) -> None:
    """Step by step, rows that began apart equal rows that never saw padding."""
    model = tiny(name)
    first = [ids(1, 9, seed=1), ids(1, 4, seed=2)]
    batch, mask = padded(first)
    cache = enable_adms_llm(model, SMALL)
    with torch.no_grad():
        model(batch, attention_mask=mask, past_key_values=cache)
    following = ids(2, 40, seed=3)
    together = run(model, following, cache, 1)
    for index, row in enumerate(first):
        alone = enable_adms_llm(model, SMALL)
        run(model, row, alone)
        expected = run(model, following[index : index + 1], alone, 1)
        torch.testing.assert_close(together[index], expected[0], atol=3e-5, rtol=0)


# --- 4: ten times the trained length ------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_ten_times_the_trained_length_stays_bounded(name: str) -> None:
    model, length = tiny(name), 10 * TRAINED
    cache = enable_adms_llm(model, SMALL)
    bound = cache.max_nbytes * 2
    logits = []
    for part in ids(2, length - 24).split(100, dim=1):
        logits.append(run(model, part, cache))
        assert cache.nbytes <= bound
    for part in ids(2, 24, seed=1).split(1, dim=1):
        logits.append(run(model, part, cache))
        assert cache.nbytes <= bound
    assert cache.max_nbytes == bound
    assert cache.get_seq_length() == cache.tokens_seen == length
    assert torch.cat(logits, dim=1).isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALIBI])
def test_positions_stay_inside_the_trained_length(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    cache = enable_adms_llm(model, SMALL)
    seen: list[float] = []
    if name in LEARNED:
        table = model.base_model.decoder.embed_positions
        table.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(float(kwargs["position_ids"].max())),
            with_kwargs=True,
        )
    else:
        for kind in cache.binding_for_use.kinds:
            whole = kind.scheme.tables

            def spy(positions: torch.Tensor, *rest: torch.Tensor, whole: object = whole) -> object:
                seen.append(float(positions.max()))
                seen.append(-float(positions.min()))
                return whole(positions, *rest)  # type: ignore[operator]

            monkeypatch.setattr(kind.scheme, "tables", spy)
    run(model, ids(1, 300), cache)
    run(model, ids(1, 20), cache, 1)
    assert len(seen) > 20
    assert max(seen) < TRAINED


# --- 11: reset, copies, embeddings as input -----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_reset_copy_and_embeddings(name: str) -> None:
    model, inputs = tiny(name), ids(2, 50)
    cache = enable_adms_llm(model, SMALL)
    first = run(model, inputs, cache)
    twin = copy.deepcopy(cache)
    following = run(model, ids(2, 9, seed=1), cache, 1)
    torch.testing.assert_close(run(model, ids(2, 9, seed=1), twin, 1), following, atol=0, rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(run(model, inputs, cache), first, atol=0, rtol=0)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(inputs)
        cache = enable_adms_llm(model, SMALL)
        actual = model(inputs_embeds=embeddings, past_key_values=cache).logits
    torch.testing.assert_close(actual, first, atol=1e-5, rtol=0)


# --- 12, 13, 18: what is left as it was ---------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_other_caches_training_and_configuration_are_untouched(name: str) -> None:
    model, inputs = tiny(name), ids(2, 20)
    before = dense(model, inputs)
    without = model(inputs, use_cache=False).logits.detach()
    written = model.config.to_json_string(use_diff=False)
    forwards = {key: dict(module.__dict__) for key, module in model.named_modules()}

    def train() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()
        model(inputs, labels=inputs, use_cache=False).loss.backward()
        model.eval()
        return {
            key: parameter.grad.clone()
            for key, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    gradients = train()
    enable_adms_llm(model, SMALL)
    enable_adms_llm(model, ALL)
    torch.testing.assert_close(dense(model, inputs), before, atol=0, rtol=0)
    torch.testing.assert_close(
        model(inputs, use_cache=False).logits.detach(), without, atol=0, rtol=0
    )
    torch.testing.assert_close(train(), gradients, atol=0, rtol=0)
    assert json.loads(model.config.to_json_string(use_diff=False)) == json.loads(written)
    disable_adms(model)
    for key, module in model.named_modules():
        now = {name: part for name, part in module.__dict__.items() if not name.startswith("_")}
        then = {name for name in forwards[key] if not name.startswith("_")}
        assert set(now) == then
        assert not module._forward_pre_hooks
    torch.testing.assert_close(dense(model, inputs), before, atol=0, rtol=0)
    assert model.config._attn_implementation == tiny(name).config._attn_implementation


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_pass_leaves_cache_and_modules_as_they_were(name: str) -> None:
    model, inputs = tiny(name), ids(2, 30)
    cache, other = enable_adms_llm(model, SMALL), enable_adms_llm(model, SMALL)
    run(model, inputs, cache)
    run(model, inputs, other)
    # The last layer's values are worked out after every layer but its own has taken its tokens.
    last = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    last = last or [module for module in model.modules() if "Norm" in type(module).__name__]

    def fail(*_: object) -> None:
        raise MemoryError("pretended")

    for count in (1, 5):
        handle = last[-1].register_forward_pre_hook(fail)
        with pytest.raises(ForwardError, match="pretended"):
            run(model, ids(2, count, seed=2), cache)
        handle.remove()
    assert cache.nbytes == other.nbytes
    for module in model.modules():
        assert not any(isinstance(part, type(cache)) for part in module.__dict__.values())
    for count in (1, 6, 20):
        following = ids(2, count, seed=3)
        torch.testing.assert_close(
            run(model, following, cache), run(model, following, other), atol=0, rtol=0
        )


@pytest.mark.parametrize("name", ["llama", "falcon", "mpt", "opt", "gemma2"])
def test_not_a_number_is_refused_and_leaves_no_trace(name: str) -> None:
    model, inputs = tiny(name), ids(1, 30)
    cache, other = enable_adms_llm(model, SMALL), enable_adms_llm(model, SMALL)
    run(model, inputs, cache)
    run(model, inputs, other)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids(1, 4))
        with pytest.raises(ValueError, match="NaN or infinity"):
            model(inputs_embeds=embeddings * torch.nan, past_key_values=cache)
    torch.testing.assert_close(
        run(model, inputs, cache, 1), run(model, inputs, other, 1), atol=0, rtol=0
    )


@pytest.mark.parametrize("name", ["falcon", "mpt", "phi3", "gpt-neox", "opt"])
def test_a_copied_model_is_told_to_be_enabled_itself(name: str) -> None:
    model = tiny(name)
    cache = enable_adms_llm(model, SMALL)
    twin = copy.deepcopy(model)
    inputs = ids(1, 8)
    torch.testing.assert_close(dense(twin, inputs), dense(model, inputs), atol=0, rtol=0)
    with pytest.raises(CacheStateError, match="copy"):
        run(twin, inputs, cache)


# --- 15, 16: sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_every_tensor_held(name: str) -> None:
    model = tiny(name)
    cache = enable_adms_llm(model, SMALL)
    run(model, ids(2, 70), cache)
    found: dict[int, int] = {}
    waiting: list[object] = [cache.layers, cache.timeline, cache.view]
    visited: set[int] = set()
    while waiting:
        part = waiting.pop()
        if id(part) in visited:
            continue
        visited.add(id(part))
        if isinstance(part, torch.Tensor):
            found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        elif isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part
        elif hasattr(part, "__dict__") and part is not cache.binding:
            waiting += [
                value
                for key, value in vars(part).items()
                if key not in ("cache", "plan", "binding")
            ]
    assert cache.nbytes == sum(found.values())


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_layer_holds_its_window_and_no_more(name: str) -> None:
    model = tiny(name)
    cache = enable_adms_llm(model, SMALL)
    run(model, ids(3, 200), cache)
    layer, config = cache.layers[0], model.config
    heads, size = config.num_key_value_heads, getattr(config, "head_dim", None) or 8
    expected = 3 * heads * (config.sliding_window - 1) * size * 2 * 4
    assert sum(part.untyped_storage().nbytes() for part in layer.tensors()) == expected


@pytest.mark.parametrize(("name", "heads"), [("falcon", 1), ("falcon-new", 2), ("falcon-alibi", 4)])
def test_falcon_caches_its_kv_heads_once(name: str, heads: int) -> None:
    model = tiny(name)
    cache = enable_adms_llm(model, SMALL)
    run(model, ids(1, 30), cache)
    assert {layer.exact.keys.shape[1] for layer in cache.layers} == {heads}
