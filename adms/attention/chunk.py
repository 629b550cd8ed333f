"""Attention of a chunk: over what the tiers hold, and among its own tokens.

The mask of what the tiers hold is the same for every query of a chunk, and the chunk's own is
causal; so neither needs a number for each pair, as a mask over both would. One kernel takes both
where it can, else two do, whose results are merged. On a GPU, where launches cost more than the
work they start, tiers of several layers are read at once; nothing in them changes before the pass
is committed.

``applies`` says which passes this is for; others go the general way (``tiered``).

Shapes: ``L`` layers read at once, ``B`` rows, ``R`` rows or 1 where all agree, ``H`` query heads,
``K`` KV heads, ``Q`` new tokens, ``N`` entries, ``D``/``E`` head sizes of keys/values.
"""

from dataclasses import dataclass
from typing import Any

import torch

from adms.attention.merged import attend_in_two, causal_bias
from adms.binding import PositionScheme
from adms.cache import ADMSKVCache
from adms.entries import Entries
from adms.kernels.chunk_attention import attends_at_once, chunk_attention
from adms.kernels.states import decodes_by_tables
from adms.layer import ADMSLayer
from adms.places import MiddleGeometry
from adms.positions import ForwardView
from adms.stack import run_of
from adms.tiers.head_landmarks import HeadLandmarkStore
from adms.tiers.middle import MiddleTier

# Bytes of decoded entries, in float32, that are read for several layers at once; a CPU gains
# nothing by it.
READ_AHEAD_BYTES = {"cuda": 2**27}


@dataclass(frozen=True)
class _Places:
    """What all layers of one kind share in a pass.

    Attributes:
        tables: rotate the held entries.
        query_tables: rotate the pass's tokens.
        shown: ``[R, 1, N]`` which entries are there and not hidden by a landmark; None: all.
    """

    tables: Any
    query_tables: Any
    shown: torch.Tensor | None


@dataclass(frozen=True)
class _Held:
    """What some layers hold, as attention reads it; heads of all of them are side by side.

    Attributes:
        first: number of the first layer among the cache's.
        count: how many.
        keys: ``[B, L * K, N, D]`` at their positions.
        values: ``[B, L * K, N, E]``.
        bias: ``[R, L * K or 1, 1, N]`` added to scores, or None.
    """

    first: int
    count: int
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None

    def of(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys, values and bias of one layer."""
        heads = self.keys.shape[1] // self.count
        own = slice((index - self.first) * heads, (index - self.first + 1) * heads)
        bias = self.bias
        if bias is not None and bias.shape[1] > 1:
            bias = bias[:, own]
        return self.keys[:, own], self.values[:, own], bias


def applies(cache: ADMSKVCache, layer: ADMSLayer, scheme: PositionScheme) -> bool:
    """Whether the pass under way is one that this file is for; asked once per kind of layer."""
    view = cache.require_view()
    geometry = None if layer.middle is None else layer.middle.plan.geometry
    key = ("is a chunk", geometry, id(scheme))
    if key not in view.shared:
        view.shared[key] = _applies(cache, layer, scheme, view)
    return bool(view.shared[key])


def _applies(
    cache: ADMSKVCache, layer: ADMSLayer, scheme: PositionScheme, view: ForwardView
) -> bool:
    if view.columns == 1 or view.column_valid is not None or view.forgotten is not None:
        return False
    if cache.spans is not None:
        return False
    sparse, entries = cache.binding_for_use.sparse_prefill, cache.num_entries(layer.layer_idx)
    if sparse is not None and sparse.applies(view.columns, entries + view.columns):
        return False
    start, stop = view.exact_slice
    if stop <= start or scheme.weighs_sinks or scheme.adds_bias:
        return False
    coded = set(_coded(view, layer))
    if len(coded) > 1:
        return False
    if layer.middle is not None and True in coded:
        plan = layer.middle.plan
        if isinstance(plan.store, HeadLandmarkStore):
            return False
        geometry = plan.geometry
        return not geometry.landmarks or geometry.entries_per_record == geometry.block_tokens
    # While everything is exact, logits equal those of a full cache, on a CPU to the last bit.
    return view.device.type == "cuda"


def attend_chunk(
    cache: ADMSKVCache,
    layer: ADMSLayer,
    scheme: PositionScheme,
    query: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention ``[B, Q, H, E]`` of a chunk's queries ``[B, H, Q, D]`` before positions."""
    view, staged = cache.require_view(), layer.staged
    if staged is None:
        raise RuntimeError("attention of a chunk before the layer received its tokens")
    layer.keep_queries(query)
    held = view.shared.get("held")
    if not isinstance(held, _Held) or not 0 <= layer.layer_idx - held.first < held.count:
        # Let go of before its like is made.
        view.shared.pop("held", None)
        del held
        held = _read(cache, layer, scheme, view, query)
        view.shared["held"] = held
    keys, values, bias = held.of(layer.layer_idx)
    tables = _places(cache, layer, scheme, view, query).query_tables
    heads = query.shape[1]
    rotated = scheme.rotate(torch.cat([query, staged.keys], dim=1), tables)
    asked, new_keys, new_values = rotated[:, :heads], rotated[:, heads:], staged.values
    if attends_at_once(cache.binding_for_use.kernel, asked, values):
        return chunk_attention(asked, keys, values, bias, new_keys, new_values, scaling)
    group = heads // staged.keys.shape[1]
    key = ("causal", group, query.device, query.dtype)
    causal = view.shared.get(key)
    if not isinstance(causal, torch.Tensor):
        causal = view.shared[key] = causal_bias(view.columns, group, query.device, query.dtype)
    return attend_in_two(asked, keys, values, bias, new_keys, new_values, causal, scaling)


def _coded(view: ForwardView, layer: ADMSLayer) -> list[bool]:
    """Which rows of the layer are coded."""
    if layer.middle is None:
        return [False]
    geometry = layer.middle.plan.geometry
    return [geometry.is_coded(total) for total in view.middle_totals]


# --- what all layers of a kind share -------------------------------------------------------------


def _places(
    cache: ADMSKVCache,
    layer: ADMSLayer,
    scheme: PositionScheme,
    view: ForwardView,
    like: torch.Tensor,
) -> _Places:
    geometry = None if layer.middle is None else layer.middle.plan.geometry
    key = ("places", geometry, id(scheme), like.device)
    if key not in view.shared:
        view.shared[key] = _make_places(cache, layer, scheme, view, geometry, like)
    return view.shared[key]  # type: ignore[return-value]


def _make_places(
    cache: ADMSKVCache,
    layer: ADMSLayer,
    scheme: PositionScheme,
    view: ForwardView,
    geometry: MiddleGeometry | None,
    like: torch.Tensor,
) -> _Places:
    """Positions and validity of exact tokens, the middle's entries and landmarks, in this order."""
    tokens, valid = view.exact_tokens()
    positions = [view.exact_positions(tokens, geometry)]
    shown = [valid]
    totals = view.middle_totals
    if layer.middle is not None and geometry is not None and any(totals):
        middle = view.middle(geometry)
        positions.append(middle.positions)
        seen = middle.valid
        if geometry.landmarks and geometry.is_coded(totals[0]):
            # The same in all layers, which choose them together.
            marks = layer.middle.landmark_tokens().to(view.device)
            there = marks >= 0
            positions.append(view.places(geometry).landmarks(marks))
            shown += [seen & ~middle.hidden(marks, view.places(geometry).first), there]
        else:
            shown.append(seen)
    rows = max(part.shape[0] for part in [*positions, *shown] if part is not None)
    held = torch.cat([part.expand(rows, -1) for part in positions], dim=1)
    mask = None
    if any(part is not None for part in shown):
        whole = [
            torch.ones_like(place, dtype=torch.bool) if part is None else part
            for part, place in zip(shown, positions, strict=True)
        ]
        mask = torch.cat([part.expand(rows, -1) for part in whole], dim=1)
        mask = mask[:, None].to(like.device)
    queries = view.query_positions(geometry).to(like.device)
    held = held.to(like.device)
    return _Places(scheme.tables(held, like, queries), scheme.tables(queries, like, queries), mask)


# --- what layers hold ----------------------------------------------------------------------------


def _read(
    cache: ADMSKVCache,
    layer: ADMSLayer,
    scheme: PositionScheme,
    view: ForwardView,
    query: torch.Tensor,
) -> _Held:
    """What the layer holds, and some that follow it."""
    first, kinds = layer.layer_idx, cache.binding_for_use.kinds
    end = first + 1
    while end < len(kinds) and kinds[end].scheme is scheme and kinds[end].plain is None:
        end += 1
    stack = run_of(cache.layers[first:end][: _most(layer, view)])
    start, stop = view.exact_slice
    parts = [Entries(*(_beside(part[..., start:stop, :]) for part in stack.exact.tensors()))]
    totals = view.middle_totals
    if stack.reader is not None and any(totals):
        by_tables = decodes_by_tables(cache.binding_for_use.kernel, query)
        held = view.records_held(stack.reader.plan.geometry)
        parts += _of_middle(stack.reader, totals, len(stack.layers), by_tables, held)
    keys = torch.cat([part.keys for part in parts], dim=2) if len(parts) > 1 else parts[0].keys
    values = torch.cat([part.values for part in parts], dim=2)
    places = _places(cache, layer, scheme, view, query)
    bias = _bias(parts, places.shown, query.dtype)
    return _Held(first, len(stack.layers), scheme.rotate(keys, places.tables), values, bias)


def _most(layer: ADMSLayer, view: ForwardView) -> int:
    """How many layers are read at once."""
    if layer.exact is None:
        raise RuntimeError("attention before the layer received its tokens")
    room = READ_AHEAD_BYTES.get(layer.exact.keys.device.type, 0)
    rows, heads, _, size = layer.exact.keys.shape
    start, stop = view.exact_slice
    entries, total = stop - start, max(view.middle_totals)
    if layer.middle is not None:
        geometry = layer.middle.plan.geometry
        entries += geometry.num_entries(total)
        entries += geometry.landmarks if geometry.is_coded(total) else 0
    return max(1, room // (4 * rows * heads * entries * (size + layer.exact.values.shape[3])))


def _of_middle(
    reader: MiddleTier,
    totals: list[int],
    layers: int,
    by_tables: bool,
    held: torch.Tensor | None,
) -> list[Entries]:
    """The middle's entries and landmarks of several layers.

    ``held [R, 1]`` says how many records are there where ``totals`` do not.
    """
    geometry, of_layers = reader.plan.geometry, totals * layers
    if held is not None:
        held = held.expand(len(totals), -1).repeat(layers, 1)
    coded = geometry.is_coded(totals[0])
    whole, fine = reader.tables() if by_tables and coded else (None, None)
    entries = reader.read(of_layers, whole, held)
    if entries is None:
        return []
    found = [entries]
    if geometry.landmarks and coded:
        found.append(reader.landmarks(of_layers, fine)[0])
    return [
        Entries(
            *(
                None if part is None else _beside(part.unflatten(0, (layers, -1)))
                for part in (one.keys, one.values, one.log_weight)
            )  # type: ignore[arg-type]
        )
        for one in found
    ]


def _beside(states: torch.Tensor) -> torch.Tensor:
    """``[L, B, K, ...]`` -> ``[B, L * K, ...]``."""
    return states.transpose(0, 1).flatten(1, 2)


def _bias(
    parts: list[Entries], shown: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Log-weights where entries are shown, ``[R, L * K or 1, 1, N]``.

    Rows start aligned, as fused kernels want them.
    """
    weights = [part.log_weight for part in parts]
    total = sum(part.num_entries for part in parts)
    missing = -total % 8
    if all(weight is None for weight in weights):
        if shown is None:
            return None
        whole = torch.zeros(1, 1, 1, device=shown.device, dtype=dtype)
    else:
        like = next(weight for weight in weights if weight is not None)
        pieces = [
            like.new_zeros(1, 1, 1).expand(*like.shape[:2], part.num_entries)
            if weight is None
            else weight
            for part, weight in zip(parts, weights, strict=True)
        ]
        whole = torch.cat(pieces, dim=2).to(dtype)
    if shown is not None:
        whole = whole.where(shown, torch.finfo(dtype).min)
    if missing and whole.shape[2] > 1:
        whole = torch.nn.functional.pad(whole, (0, missing))[..., :total]
    return whole[:, :, None]
