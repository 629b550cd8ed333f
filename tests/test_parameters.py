"""Every parameter of the public calls with wrong types and values: an error, nothing changed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import adms
from adms.config import ADMSConfig
from adms.session import load_session, save_session
from tests.test_session import CODED, llama, run, text

Wrong = tuple[type[Exception], list[Any]]
TYPE, VALUE = adms.ADMSTypeError, adms.ADMSValueError
NOT_INTEGERS: list[Any] = [None, "4", 4.0, True, [4], float("nan")]
NOT_BOOLEANS: list[Any] = [None, 0, 1, "yes", []]
NOT_NUMBERS: list[Any] = [None, "0.5", True, [0.5], 1j]
NOT_FRACTIONS: list[Any] = [-0.1, 1.1, float("nan"), float("inf")]
NOT_NAMES: list[Any] = [None, 3, b"mean", ["mean"], {}]


def integers(*wrong: Any, none: bool = False) -> list[Wrong]:
    """Cases of an integer parameter whose wrong values are given."""
    types = [value for value in NOT_INTEGERS if not (none and value is None)]
    return [(TYPE, types), (VALUE, list(wrong))]


# Every parameter of ADMSConfig must be here; a new one fails the first test until it is.
CONFIG: dict[str, list[Wrong]] = {
    "start_size": integers(-1, -(2**70)),
    "max_seq_length": integers(0, -5),
    "enable_dynamic_sink": [(TYPE, NOT_BOOLEANS)],
    "recent_size": integers(0, -1),
    "compressed_budget": integers(-1),
    "compressor_type": [(TYPE, [None, 3, object(), ["vq"]]), (VALUE, ["", "lowrank", "VQ"])],
    "rank": integers(0, -1, none=True),
    "num_clusters": integers(0, -1),
    "compression_interval": integers(0, -1),
    "svd_max_tokens": integers(0, -1),
    "importance_ratio": [(TYPE, NOT_NUMBERS), (VALUE, NOT_FRACTIONS)],
    "importance_metric": [(TYPE, [None, 3, []]), (VALUE, ["", "keydiff"])],
    "min_importance_tokens": integers(-1),
    "use_adaptive_budget": [(TYPE, NOT_BOOLEANS)],
    "coverage_segments": integers(0, -1),
    "coverage_priority": [(TYPE, NOT_NUMBERS), (VALUE, NOT_FRACTIONS)],
    "anchor_mode": [((TYPE, VALUE), NOT_NAMES), (VALUE, ["", "median", "Mean"])],  # type: ignore[list-item]
    "enable_pos_shift": [(TYPE, NOT_BOOLEANS)],
    "prefill_chunk_size": integers(0, -1),
}


def test_no_parameter_is_missing_here() -> None:
    assert {field.name for field in dataclasses.fields(ADMSConfig)} <= set(CONFIG)


CASES = [
    (name, error, value)
    for name, groups in CONFIG.items()
    for error, values in groups
    for value in values
]


@pytest.mark.parametrize(
    ("name", "error", "value"), CASES, ids=[f"{name}-{value!r}"[:40] for name, _, value in CASES]
)
def test_configuration(name: str, error: Any, value: Any, model: Any) -> None:
    with pytest.raises(error) as raised:
        adms.enable_adms_llm(model, **{name: value})
    assert name.split("_")[0] in str(raised.value)
    assert not adms.is_enabled(model)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"recent_size": 300}, VALUE, "trained on 256"),
        ({"compressed_budget": 300}, VALUE, "trained on 256"),
        ({"start_size": 300}, VALUE, "trained on 256"),
        ({"prefill_chunk_size": 300}, VALUE, "trained on 256"),
        ({"num_clusters": 3, "compressor_type": "low_rank"}, VALUE, "does not use it"),
        ({"colour": 3}, TYPE, "unknown parameter 'colour'"),
        ({"config": {}}, TYPE, "config must be"),
        ({"config": ADMSConfig(), "recent_size": 5}, TYPE, "not both"),
    ],
)
def test_what_does_not_fit_together(
    settings: dict[str, Any], error: type[Exception], named: str, model: Any
) -> None:
    with pytest.raises(error, match=named):
        adms.enable_adms_llm(model, **settings)
    assert not adms.is_enabled(model)


@pytest.mark.parametrize("wrong", [None, "llama", 3, {}, torch.zeros(2)])
def test_models(wrong: Any) -> None:
    for call in (adms.enable_adms_llm, adms.enable_streaming_llm, adms.disable_adms):
        with pytest.raises(TYPE, match="model must be a transformers model"):
            call(wrong)
    with pytest.raises(adms.UnsupportedModelError, match="not supported"):
        adms.enable_adms_llm(torch.nn.Linear(2, 2))


def test_caches_and_streaming_llm(model: Any) -> None:
    for wrong in ({}, 3, "x", [ADMSConfig()]):
        with pytest.raises(TYPE, match="config must be"):
            adms.ADMSKVCache(wrong)  # type: ignore[arg-type]
    for value in NOT_INTEGERS:
        for name in ("start_size", "recent_size"):
            with pytest.raises(TYPE, match=name):
                adms.enable_streaming_llm(model, **{name: value})
    for name in ("compressed_budget", "enable_dynamic_sink"):
        with pytest.raises(TYPE, match=f"has no {name}"):
            adms.enable_streaming_llm(model, **{name: 1})
    assert not adms.is_enabled(model)


def test_config_dictionaries() -> None:
    for wrong in (None, 3, [("recent_size", 3)]):
        with pytest.raises(TYPE, match="expects a mapping"):
            ADMSConfig.from_dict(wrong)  # type: ignore[arg-type]
    with pytest.raises(VALUE, match="unknown parameter 'colour'"):
        ADMSConfig.from_dict({"colour": 1})
    with pytest.raises(VALUE, match="explicit must name"):
        ADMSConfig.from_dict({"recent_size": 3}, explicit=["colour"])
    with pytest.raises(TYPE):
        ADMSConfig().replace(recent_size="3")


@pytest.fixture
def used() -> Any:
    """A model, a cache with a few tokens, and what the next answer must be."""
    model = llama()
    cache = adms.enable_adms_llm(model, **CODED)
    run(model, text(90), cache)
    twin = adms.enable_adms_llm(model, **CODED)
    run(model, text(90), twin)
    return model, cache, run(model, text(5, seed=1), twin)


def unchanged(used: Any) -> None:
    model, cache, expected = used
    assert torch.equal(run(model, text(5, seed=1), cache), expected)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"new_ids": [[1, 2]]}, TYPE),
        ({"new_ids": torch.zeros(3, dtype=torch.long)}, TYPE),
        ({"new_ids": torch.zeros(1, 3)}, TYPE),
        ({"new_ids": torch.zeros(1, 0, dtype=torch.long)}, VALUE),
        ({"cache": None}, TYPE),
        ({"cache": "cache"}, TYPE),
        ({"num_beams": 2}, VALUE),
    ],
)
def test_generate_turn(arguments: dict[str, Any], error: type[Exception], used: Any) -> None:
    model, cache, _ = used
    given = {"cache": cache, "new_ids": text(3), "max_new_tokens": 2, **arguments}
    with pytest.raises(error):
        adms.generate_turn(model, **given)
    unchanged(used)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"assistant_model": "x"}, VALUE),
        ({"prompt_lookup_num_tokens": 3}, VALUE),
        ({"cache_implementation": "static"}, VALUE),
        ({}, adms.CacheStateError),
    ],
)
def test_generate(arguments: dict[str, Any], error: type[Exception], used: Any) -> None:
    model, cache, _ = used
    with pytest.raises(error):
        model.generate(text(3), past_key_values=cache, max_new_tokens=2, **arguments)
    unchanged(used)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, TYPE),
        ({"attention_mask": torch.ones(1, 7)}, adms.CacheStateError),
        ({"attention_mask": torch.ones(2, 3)}, adms.CacheStateError),
        ({"use_cache": False}, VALUE),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, VALUE),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, adms.CacheStateError),
    ],
)
def test_forward(arguments: dict[str, Any], error: type[Exception], used: Any) -> None:
    model, cache, _ = used
    with pytest.raises(error):
        model(**{"input_ids": text(3), "past_key_values": cache, **arguments})
    unchanged(used)


def test_operations_of_a_cache(used: Any) -> None:
    _, cache, _ = used
    for rows in ([], [1], [-1], [0, 5]):
        for call in (cache.reorder_cache, cache.batch_select_indices):
            with pytest.raises(VALUE, match="row indices must lie in 0..0"):
                call(torch.tensor(rows, dtype=torch.long))
    with pytest.raises(adms.CacheStateError, match="cannot be cropped"):
        cache.crop(1)
    with pytest.raises(adms.CacheStateError, match="record its past"):
        cache.activate_past_recording()
    unchanged(used)


def test_registries() -> None:
    for wrong in (None, 3, ["x"]):
        with pytest.raises(TYPE, match="must be a string"):
            adms.register_compressor(wrong, None)  # type: ignore[arg-type]
        with pytest.raises(TYPE, match="must be a string"):
            adms.register_metric(wrong, None)  # type: ignore[arg-type]
    with pytest.raises(VALUE, match="must not be empty"):
        adms.register_metric("", None)  # type: ignore[arg-type]
    with pytest.raises(VALUE, match="registered already"):
        adms.register_metric("key_diff", None)  # type: ignore[arg-type]


def test_sessions(used: Any, tmp_path: Path) -> None:
    model, cache, _ = used
    for path in (None, 3, b"a.adms", ["a"]):
        with pytest.raises(TYPE, match="path must be"):
            cache.save(path)
        with pytest.raises(TYPE, match="path must be"):
            adms.ADMSKVCache.load(path, model=model)
    for wrong in (None, "cache", {}):
        with pytest.raises(TYPE, match="cache must be"):
            save_session(wrong, tmp_path / "a.adms")  # type: ignore[arg-type]
    cache.save(tmp_path / "a.adms")
    for wrong in (None, "llama", 3):
        with pytest.raises(TYPE, match="model must be"):
            load_session(tmp_path / "a.adms", wrong)  # type: ignore[arg-type]
    unchanged(used)
