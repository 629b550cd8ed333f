"""``ADMSConfig``: what a user decides, and ``resolve_sizes``: what fits a given model."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from adms.errors import ADMSTypeError, ADMSValueError

logger = logging.getLogger("adms")

ANCHOR_MODES = ("grid", "mean", "hybrid", "near")
# 1% of the longest context, rounded down: 2048 -> 20, 8192 -> 81, 16384 -> 163, 32768 -> 327.
DYNAMIC_SINK_DIVISOR = 100
MIN_RECENT = 1
# What decides how many sinks there are.
SINK_PARAMETERS = frozenset({"start_size", "enable_dynamic_sink", "max_seq_length"})


@dataclass(frozen=True, kw_only=True)
class ADMSConfig:
    """The parameters of one cache. Immutable; every value is checked on construction.

    Sizes are in tokens. ``compressed_budget`` is memory, not a count: the bytes of that many exact
    16-bit tokens per KV head, in which a compressor may hold many more tokens.

    Attributes:
        start_size: attention sinks, the first tokens of the stream, kept exactly; where it is left
            at its default, a family of models may have a better one (ALiBi: 8).
        max_seq_length: longest context expected; only sizes the dynamic sink.
        enable_dynamic_sink: use 1% of ``max_seq_length`` (rounded down, at least ``start_size``)
            as the number of sinks.
        recent_size: recent tokens kept exactly.
        compressed_budget: memory of the middle, in exact 16-bit tokens per KV head; 0 is
            StreamingLLM.
        compressor_type: name of a registered compressor.
        rank: channels per KV head that ``low_rank`` may code; None lets the budget decide.
        num_clusters: centroids per block of ``vq``.
        compression_interval: tokens that leave the recent tier together when decoding one by one.
        svd_max_tokens: most tokens that a basis or codebook is fitted on.
        importance_ratio: share of the budget's bytes that keeps chosen tokens exactly.
        importance_metric: name of a registered importance metric.
        min_importance_tokens: least number of exactly kept tokens where ``importance_ratio`` > 0.
        use_adaptive_budget: each KV head chooses its own landmarks, more of them where its codes
            are worse, in the same bytes.
        coverage_segments: equal spans of the text over which coverage is spread.
        coverage_priority: share of the exactly kept tokens that is spread over the segments.
        anchor_mode: where an entry sits that is older than the coded tokens or stands for several
            tokens: "grid" (evenly spaced), "mean" (in proportion to the text), "hybrid" (halfway),
            "near" ("mean", but what is older than the coded tokens sits between them and the recent
            ones: far facts are recalled much better, for a little perplexity).
        enable_pos_shift: positions inside the cache (True) or of the text (False; a stream must
            then stay inside the trained length, except with ALiBi).
        prefill_chunk_size: most tokens of one forward pass through the layers; longer inputs are
            split.
    """

    start_size: int = 4
    max_seq_length: int = 32768
    enable_dynamic_sink: bool = False
    recent_size: int = 2000
    compressed_budget: int = 128
    compressor_type: str | Any = "low_rank"
    rank: int | None = None
    num_clusters: int = 64
    compression_interval: int = 8
    svd_max_tokens: int = 512
    importance_ratio: float = 0.1
    importance_metric: str = "rarity"
    min_importance_tokens: int = 4
    use_adaptive_budget: bool = False
    coverage_segments: int = 4
    coverage_priority: float = 0.3
    anchor_mode: str = "near"
    enable_pos_shift: bool = True
    prefill_chunk_size: int = 64

    def __new__(cls, *args: Any, **kwargs: Any) -> "ADMSConfig":
        # Which values the caller gave decides whether a value that does not fit a model is
        # lowered with a notice or refused, so it is recorded before the defaults are filled in.
        self = super().__new__(cls)
        object.__setattr__(self, "_explicit", frozenset(kwargs))
        return self

    def __post_init__(self) -> None:
        _check_int(self, "start_size", low=0)
        _check_int(self, "max_seq_length", low=1)
        _check_int(self, "recent_size", low=MIN_RECENT)
        _check_int(self, "compressed_budget", low=0)
        _check_int(self, "num_clusters", low=1)
        _check_int(self, "compression_interval", low=1)
        _check_int(self, "svd_max_tokens", low=16)
        _check_int(self, "min_importance_tokens", low=0)
        _check_int(self, "coverage_segments", low=1)
        _check_int(self, "prefill_chunk_size", low=1)
        if self.rank is not None:
            _check_int(self, "rank", low=1)
        _check_bool(self, "enable_dynamic_sink")
        _check_bool(self, "use_adaptive_budget")
        _check_bool(self, "enable_pos_shift")
        _check_fraction(self, "importance_ratio")
        _check_fraction(self, "coverage_priority")
        if self.anchor_mode not in ANCHOR_MODES:
            raise ADMSValueError(
                f"anchor_mode must be one of {', '.join(ANCHOR_MODES)}, got {self.anchor_mode!r}"
            )
        if not isinstance(self.importance_metric, str):
            raise ADMSTypeError(
                "importance_metric must be the name of a registered metric, got "
                f"{self.importance_metric!r}"
            )
        if not isinstance(self.compressor_type, str) and not (
            hasattr(self.compressor_type, "compress") or hasattr(self.compressor_type, "bind")
        ):
            raise ADMSTypeError(
                "compressor_type must be the name of a registered compressor or an object with a "
                f"compress method, got {self.compressor_type!r}"
            )

    @property
    def explicit(self) -> frozenset[str]:
        """Names of the parameters that were given rather than left at their defaults."""
        return self._explicit  # type: ignore[attr-defined]

    @property
    def sink_size(self) -> int:
        """Sinks after the dynamic rule is applied."""
        if not self.enable_dynamic_sink:
            return self.start_size
        return max(self.start_size, self.max_seq_length // DYNAMIC_SINK_DIVISOR)

    def to_dict(self) -> dict[str, Any]:
        """Every parameter by name; plain values only, so that JSON can hold them.

        Raises:
            ADMSTypeError: the compressor is an object, which has no name to write down.
        """
        if not isinstance(self.compressor_type, str):
            raise ADMSTypeError(
                f"compressor_type is the object {self.compressor_type!r}; register it under a name "
                "with adms.register_compressor to write this configuration down"
            )
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], explicit: Iterable[str] | None = None
    ) -> "ADMSConfig":
        """The configuration that ``to_dict`` wrote.

        Args:
            values: every parameter by name.
            explicit: names of those that count as given; all of ``values`` if None.

        Raises:
            ADMSTypeError: ``values`` is not a mapping.
            ADMSValueError: a name is no parameter of ``ADMSConfig``.
        """
        if not isinstance(values, Mapping):
            raise ADMSTypeError(f"from_dict expects a mapping, got {type(values).__name__}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ADMSValueError(
                f"unknown parameter {unknown[0]!r}; ADMSConfig has {', '.join(sorted(known))}"
            )
        config = cls(**values)
        if explicit is not None:
            given = list(explicit)
            if not all(isinstance(name, str) and name in values for name in given):
                raise ADMSValueError(f"explicit must name parameters of values, got {given}")
            object.__setattr__(config, "_explicit", frozenset(given))
        return config

    def replace(self, **changes: Any) -> "ADMSConfig":
        """A copy with ``changes``; only what was given before or is given now counts as given."""
        kept = {name: getattr(self, name) for name in self.explicit}
        return type(self)(**{**kept, **changes})

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {name: getattr(self, name) for name in self.explicit}
        return _rebuild, (type(self), kept)


def _rebuild(cls: type[ADMSConfig], kept: dict[str, Any]) -> ADMSConfig:
    return cls(**kept)


def _check_int(config: ADMSConfig, name: str, *, low: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ADMSTypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ADMSValueError(f"{name} must be at least {low}, got {value}; use {low} or more")


def _check_bool(config: ADMSConfig, name: str) -> None:
    if not isinstance(getattr(config, name), bool):
        raise ADMSTypeError(f"{name} must be True or False, got {getattr(config, name)!r}")


def _check_fraction(config: ADMSConfig, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ADMSTypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= value <= 1.0:
        raise ADMSValueError(f"{name} must lie in 0..1, got {value}")


@dataclass(frozen=True)
class Sizes:
    """The sizes of one cache on one model, in tokens; see ``resolve_sizes``."""

    sink: int
    recent: int
    budget: int
    interval: int
    chunk: int
    max_positions: int | None

    @property
    def ring(self) -> int:
        """Slots of the recent tier: the window, the waiting tokens and the one in flight."""
        return self.recent + self.interval

    @property
    def waiting(self) -> int:
        """Tokens that may wait beyond the window; charged to the budget."""
        return self.interval - 1

    @property
    def middle_positions(self) -> int | None:
        """Positions that sink, recent tier and one chunk leave to the middle; None: unlimited."""
        if self.max_positions is None:
            return None
        return self.max_positions - self.sink - self.ring - self.chunk


def resolve_sizes(
    config: ADMSConfig,
    max_positions: int | None,
    block: int = 1,
    default_sinks: int | None = None,
) -> Sizes:
    """Fits a configuration to a trained length.

    Args:
        config: the configuration.
        max_positions: positions the model was trained on; None where any distance works (ALiBi).
        block: tokens that the compressor codes together.
        default_sinks: sinks where none were asked for; None: the configuration's default.

    Returns:
        Sizes whose sink, recent tier, middle (at least one position per budgeted token) and chunk
        fit ``max_positions`` together. Defaults are lowered to fit and a notice is logged.

    Raises:
        ADMSValueError: values that were given cannot fit.
    """
    # Without a middle nothing is coded in groups, so nothing needs to wait.
    interval = 1
    if config.compressed_budget:
        # What waits is charged to the budget, so it can never be more than that.
        interval = min(max(config.compression_interval, block), config.compressed_budget)
    sinks = config.sink_size
    if default_sinks is not None and not config.explicit & SINK_PARAMETERS:
        sinks = default_sinks
        logger.info(
            "start_size resolves to %d instead of the default %d, which serves this family better "
            "in a stream",
            sinks,
            config.sink_size,
        )
    values = {
        "sink": sinks,
        "recent": config.recent_size,
        "budget": config.compressed_budget,
        "chunk": config.prefill_chunk_size,
    }
    if max_positions is not None:
        given = {
            "sink": bool(config.explicit & SINK_PARAMETERS),
            "recent": "recent_size" in config.explicit,
            "budget": "compressed_budget" in config.explicit,
            "chunk": "prefill_chunk_size" in config.explicit,
        }
        values = _lower_defaults(values, given, interval, max_positions)
    if 0 < values["budget"] < block:
        raise ADMSValueError(
            f"the compressor codes {block} tokens together, and what waits for that is charged to "
            f"compressed_budget, {values['budget']} tokens here; raise compressed_budget or choose "
            "smaller blocks (for vq, num_clusters) or another compressor"
        )
    return Sizes(interval=interval, max_positions=max_positions, **values)


def _lower_defaults(
    values: dict[str, int], given: dict[str, bool], interval: int, max_positions: int
) -> dict[str, int]:
    """Lowers defaults, the recent tier first, until everything fits ``max_positions``."""

    def excess(sizes: dict[str, int]) -> int:
        return sum(sizes.values()) + interval - max_positions

    lowered = dict(values)
    # Least values that leave a working cache: a window of an eighth of what was trained, a small
    # chunk, and any budget or sink at all.
    floors = {"recent": max(1, max_positions // 4), "chunk": min(8, max_positions // 8)}
    floors |= {"budget": min(8, max_positions // 8), "sink": 1}
    for name in ("recent", "chunk", "budget", "sink"):
        if excess(lowered) > 0 and not given[name]:
            lowered[name] = min(lowered[name], max(floors[name], lowered[name] - excess(lowered)))
    if excess(lowered) > 0:
        asked = ", ".join(f"{name} {value}" for name, value in values.items())
        raise ADMSValueError(
            f"{asked} and compression_interval {interval} need {sum(values.values()) + interval} "
            f"positions, but the model was trained on {max_positions}; lower recent_size, "
            "compressed_budget, prefill_chunk_size or start_size, or leave them at their defaults"
        )
    for name in values:
        if lowered[name] != values[name]:
            logger.warning(
                "%s resolves to %d instead of the default %d: the model was trained on %d "
                "positions",
                _PARAMETER[name],
                lowered[name],
                values[name],
                max_positions,
            )
    return lowered


_PARAMETER = {
    "sink": "start_size",
    "recent": "recent_size",
    "budget": "compressed_budget",
    "chunk": "prefill_chunk_size",
}


def check_layer_config(value: object, expected: type, name: str) -> None:
    """Raises ``ADMSTypeError`` unless ``value`` is None or an ``expected`` instance."""
    if value is not None and not isinstance(value, expected):
        raise ADMSTypeError(f"{name} must be a {expected.__name__} or None, got {value!r}")


def config_from(config: ADMSConfig | None, parameters: dict[str, Any]) -> ADMSConfig:
    """The configuration of a call that takes either a config or single parameters.

    Raises:
        ADMSTypeError: both were given, ``config`` is no ``ADMSConfig``, or a parameter is unknown.
    """
    if config is not None and not isinstance(config, ADMSConfig):
        raise ADMSTypeError(f"config must be an ADMSConfig, got {config!r}")
    if config is not None and parameters:
        names = ", ".join(sorted(parameters))
        raise ADMSTypeError(
            f"give either config or single parameters, not both (got config and {names}); use "
            "config.replace(...) to change a configuration"
        )
    if config is not None:
        return config
    known = {field.name for field in dataclasses.fields(ADMSConfig)}
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise ADMSTypeError(
            f"unknown parameter {unknown[0]!r}; the parameters are {', '.join(sorted(known))}"
        )
    return ADMSConfig(**parameters)
