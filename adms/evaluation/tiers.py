"""Where every token of the text is in a cache: sinks, middle, recent window, or forgotten."""

from dataclasses import dataclass
from typing import Any

from adms.cache import ADMSKVCache
from adms.errors import ADMSValueError
from adms.layer import ADMSLayer

SINK, MIDDLE, FORGOTTEN, RECENT = "sink", "middle", "forgotten", "recent"


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` (exclusive) of the text, in one tier.

    ``nbytes`` is what the tier takes over all layers.
    """

    tier: str
    start: int
    stop: int
    nbytes: int

    @property
    def tokens(self) -> int:
        """Tokens of the span."""
        return self.stop - self.start


def landmarks(cache: ADMSKVCache) -> list[int]:
    """Tokens of the text that the first layer with landmarks keeps in a fine form, in order.

    By default all layers keep the same. Of a batch, the row that has seen most.
    """
    timeline = cache.timeline
    if timeline is None:
        return []
    totals = timeline.middle_totals
    row = max(range(timeline.batch_size), key=lambda index: timeline.seen[index])
    for layer in cache.layers:
        middle = layer.middle if isinstance(layer, ADMSLayer) else None
        if middle is not None and middle.plan.store is not None:
            if not middle.plan.geometry.is_coded(totals[row]):
                return []
            places = middle.landmarks(totals)[1][row].flatten().tolist()
            return sorted({place for place in places if place >= 0})
    return []


def spans(cache: ADMSKVCache) -> list[Span]:
    """The tiers of a cache over the text, in the order of the text.

    Single tokens that are kept beyond the middle's reach are not spans: see ``landmarks``.

    Raises:
        ADMSValueError: the cache has seen nothing yet.
    """
    what: dict[str, Any] = cache.summary()
    if not what["tokens_seen"]:
        raise ADMSValueError("the cache is empty; read a text first")
    layers = max(1, len(cache.layers))
    seen, recent = what["tokens_seen"], what["recent"]["tokens"]
    sink, middle = what["sink"]["tokens"], what["middle"]
    middle_bytes = middle.get("bytes_per_layer_and_row", 0) * layers
    exact_bytes = max(0, what["nbytes"] - middle_bytes)
    slots = what["sink"]["capacity"] + what["recent"]["capacity"] + 1
    start = seen - recent
    found = [
        Span(SINK, 0, sink, exact_bytes * what["sink"]["capacity"] // slots),
        Span(FORGOTTEN, sink, start - middle["tokens"], 0),
        Span(MIDDLE, start - middle["tokens"], start, middle_bytes),
        Span(RECENT, start, seen, exact_bytes * (slots - what["sink"]["capacity"]) // slots),
    ]
    return [span for span in found if span.stop > span.start]
