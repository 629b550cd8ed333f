"""Values, defaults and refusals of ``ADMSConfig``."""

import copy
import json
import pickle

import pytest

from adms import ADMSConfig, ADMSTypeError, ADMSValueError
from adms.config import resolve_sizes


@pytest.mark.parametrize(
    ("longest", "sinks"), [(2048, 20), (8192, 81), (16384, 163), (32768, 327), (100, 4)]
)
def test_the_dynamic_sink_is_one_percent_rounded_down(longest: int, sinks: int) -> None:
    config = ADMSConfig(enable_dynamic_sink=True, max_seq_length=longest)
    assert config.sink_size == sinks
    assert ADMSConfig(max_seq_length=longest).sink_size == 4


def test_a_configuration_survives_json_copy_and_pickle() -> None:
    config = ADMSConfig(recent_size=100, compressor_type="quantized", enable_dynamic_sink=True)
    again = ADMSConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace()):
        assert twin == config and twin.explicit == config.explicit
    assert config.replace(recent_size=5).explicit == config.explicit
    with pytest.raises(AttributeError):
        config.recent_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recent_size": 0}, ADMSValueError, "recent_size must be at least 1, got 0"),
        ({"recent_size": 1.5}, ADMSTypeError, "recent_size must be an integer"),
        ({"recent_size": True}, ADMSTypeError, "recent_size must be an integer"),
        ({"start_size": -1}, ADMSValueError, "start_size must be at least 0"),
        ({"compressed_budget": "128"}, ADMSTypeError, "compressed_budget must be an integer"),
        ({"importance_ratio": 1.5}, ADMSValueError, "importance_ratio must lie in 0..1"),
        ({"coverage_priority": None}, ADMSTypeError, "coverage_priority must be a number"),
        ({"anchor_mode": "middle"}, ADMSValueError, "anchor_mode must be one of grid, mean"),
        ({"enable_pos_shift": 1}, ADMSTypeError, "enable_pos_shift must be True or False"),
        ({"compressor_type": 3}, ADMSTypeError, "compressor_type must be the name"),
        ({"rank": 0}, ADMSValueError, "rank must be at least 1"),
        ({"prefill_chunk_size": 0}, ADMSValueError, "prefill_chunk_size must be at least 1"),
    ],
)
def test_bad_values_say_what_is_wrong(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ADMSConfig(**changes)  # type: ignore[arg-type]


def test_unknown_names_and_odd_arguments_are_refused() -> None:
    with pytest.raises(ADMSValueError, match="unknown parameter 'window'"):
        ADMSConfig.from_dict({"window": 3})
    with pytest.raises(ADMSTypeError, match="expects a mapping"):
        ADMSConfig.from_dict([1])  # type: ignore[arg-type]


def test_sizes_that_were_given_and_cannot_fit_raise() -> None:
    config = ADMSConfig(recent_size=500, compressed_budget=100)
    with pytest.raises(ADMSValueError, match="the model was trained on 512"):
        resolve_sizes(config, 512)
    sizes = resolve_sizes(config, 1024)
    assert (sizes.sink, sizes.recent, sizes.budget, sizes.chunk) == (4, 500, 100, 64)
    assert sizes.ring == 508 and sizes.waiting == 7
    assert resolve_sizes(config, None).middle_positions is None


def test_defaults_are_lowered_the_recent_tier_first() -> None:
    sizes = resolve_sizes(ADMSConfig(), 512)
    assert sizes.budget == 128 and sizes.recent == 512 - 4 - 128 - 64 - 8
    tiny = resolve_sizes(ADMSConfig(), 32)
    assert tiny.sink + tiny.ring + tiny.budget + tiny.chunk <= 32
    streaming = resolve_sizes(ADMSConfig(compressed_budget=0, recent_size=10), 512)
    assert streaming.waiting == 0 and streaming.ring == 11
