"""What a cache holds, in words and numbers: ``ADMSKVCache.summary()`` and its ``repr``."""

from typing import TYPE_CHECKING, Any

from adms.layer import ADMSLayer

if TYPE_CHECKING:
    from adms.cache import ADMSKVCache


def summarize(cache: "ADMSKVCache") -> dict[str, Any]:
    """What each tier holds, as plain values (of the fullest row and the first ADMS layer)."""
    timeline = cache.timeline
    if timeline is None or cache.binding is None:
        return {"tokens_seen": 0, "nbytes": cache.nbytes, "config": repr(cache.config)}
    sizes = cache.sizes
    row = max(range(timeline.batch_size), key=lambda index: timeline.seen[index])
    seen, evicted = timeline.seen[row], timeline.evicted[row]
    optional = {}
    if cache.spans is not None:
        optional["integrated_attention"] = cache.spans.report()
    return {
        **optional,
        "tokens_seen": seen,
        "batch_size": timeline.batch_size,
        "sink": {"tokens": min(evicted, sizes.sink), "capacity": sizes.sink},
        "middle": _middle(cache, timeline.middle_tokens(row)),
        "recent": {"tokens": seen - evicted, "capacity": sizes.recent + sizes.waiting},
        "nbytes": cache.nbytes,
        "max_nbytes": cache.max_nbytes,
        "shared_nbytes": cache.shared_nbytes,
    }


def in_one_line(cache: "ADMSKVCache") -> str:
    """The same, shorter."""
    if cache.timeline is None or cache.binding is None:
        return f"ADMSKVCache(empty, {cache.config})"
    what = summarize(cache)
    middle = what["middle"]
    form = f" {middle['form']}" if middle["tokens"] else ""
    return (
        f"ADMSKVCache({what['tokens_seen']} tokens seen, {what['batch_size']} row(s): "
        f"sink {what['sink']['tokens']} | middle {middle['tokens']}{form} | "
        f"recent {what['recent']['tokens']}; {what['nbytes']:,} of at most "
        f"{what['max_nbytes']:,} bytes)"
    )


def _middle(cache: "ADMSKVCache", total: int) -> dict[str, Any]:
    """The middle of the first layer that has one, after ``total`` tokens."""
    layer = next((one for one in cache.layers if isinstance(one, ADMSLayer)), None)
    if layer is None or layer.middle is None:
        return {"tokens": 0}
    geometry = layer.middle.plan.geometry
    coded = geometry.is_coded(total)
    return {
        "tokens": geometry.held(total),
        "entries": geometry.num_entries(total),
        "form": _compressor_name(cache) if coded else "exact",
        "capacity_tokens": max(geometry.capacity, geometry.raw_tokens),
        "forgotten_tokens": total - geometry.held(total),
        "landmarks": geometry.landmarks if coded else 0,
        "bytes_per_layer_and_row": layer.middle.plan.arena_bytes,
    }


def _compressor_name(cache: "ADMSKVCache") -> str:
    chosen = cache.config.compressor_type
    if isinstance(chosen, str):
        return chosen
    compressor = cache.binding_for_use.compressor
    return type(chosen).__name__ if compressor is None else compressor.name
