"""Attention over the tiers of one layer: what transformers calls in place of its own attention.

Keys are rotated here, at their positions in the cache, every time they are read; what scores get
beside that is in ``bias``.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``G = H / K``, ``Q`` new tokens, ``N``
entries, ``D``/``E`` head sizes of keys/values.
"""

from typing import Any

import torch

from adms.attention.bias import Part, attention_bias, blocks_of_text, causal
from adms.attention.grouped import grouped_attention
from adms.attention.span_measure import recent_mass
from adms.attention.sparse_prefill import attend_sparsely
from adms.binding import PositionScheme
from adms.cache import ADMSKVCache
from adms.entries import Entries
from adms.kernels.states import decodes_by_tables
from adms.layer import ADMSLayer
from adms.places import MiddleGeometry
from adms.positions import ForwardView
from adms.tiers.middle import MiddleTier


def attend(
    cache: ADMSKVCache,
    layer: ADMSLayer,
    scheme: PositionScheme,
    query: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of the pass's queries over everything the layer retains.

    Args:
        cache: the cache, with a pass under way.
        layer: the layer, which has received the pass's keys and values.
        scheme: how positions enter.
        query: ``[B, H, Q, D]`` before positions.
        scaling: factor of the scores.
        dropout: probability of dropping an attention weight.
        softcap: bound of the scores by tanh, or None.

    Returns:
        ``[B, Q, H, E]``.
    """
    view = cache.require_view()
    layer.keep_queries(query)
    geometry = layer.middle.plan.geometry if layer.middle is not None else None
    span = cache.span(layer.layer_idx)
    parts = _parts(cache, layer, scheme, view, geometry, query, span)
    query_positions, query_tables = _shared(
        view, "query", geometry, lambda: view.query_positions(geometry), scheme, query
    )
    keys = [scheme.rotate(part.entries.keys, part.tables) for part in parts]
    values = [part.entries.values for part in parts]
    rotated = scheme.rotate(query, query_tables)
    bias = attention_bias(scheme, view, geometry, parts, query_positions, query, span)
    if view.measures_spans:
        whole = [_exact_part(layer, scheme, view, geometry, query, None), *parts[1:]]
        layer.recent_mass = recent_mass(
            view,
            view.exact_tokens()[0],
            rotated,
            torch.cat([scheme.rotate(whole[0].entries.keys, whole[0].tables), *keys[1:]], dim=2),
            attention_bias(scheme, view, geometry, whole, query_positions, query, None),
            scaling,
            softcap,
        )
    # One softmax over local and global entries is their two attentions, merged by log-sum-exp.
    all_keys = keys[0] if len(keys) == 1 else torch.cat(keys, dim=2)
    all_values = values[0] if len(values) == 1 else torch.cat(values, dim=2)
    sparse = cache.binding_for_use.sparse_prefill
    if sparse is not None and sparse.applies(query.shape[2], all_keys.shape[2]):
        if bias is None:
            shown = torch.zeros(1, device=query.device, dtype=query.dtype)
            lowest = torch.finfo(query.dtype).min
            bias = torch.where(causal(view, query.device), shown, lowest)
        return attend_sparsely(
            sparse,
            layer.layer_idx,
            blocks_of_text(view, geometry, parts, query, sparse.block_size, span),
            rotated,
            all_keys,
            all_values,
            bias,
            sinks=view.sizes.sink,
            scaling=scaling,
            dropout=dropout,
            softcap=softcap,
        )
    return grouped_attention(
        rotated,
        all_keys,
        all_values,
        bias,
        is_causal=bias is None and query.shape[2] > 1,
        scaling=scaling,
        dropout=dropout,
        softcap=softcap,
    )


def _shared(
    view: ForwardView,
    part: object,
    geometry: MiddleGeometry | None,
    positions: Any,
    scheme: PositionScheme,
    like: torch.Tensor,
) -> tuple[torch.Tensor, Any]:
    """Positions and tables that all layers of one kind share within a pass."""
    # A model split over devices needs the tables on each of them.
    full_key = (part, geometry, id(scheme), like.device)
    if full_key not in view.shared:
        found = positions().to(like.device)
        queries = view.query_positions(geometry).to(like.device)
        view.shared[full_key] = (found, scheme.tables(found, like, queries))
    return view.shared[full_key]  # type: ignore[return-value]


def _parts(
    cache: ADMSKVCache,
    layer: ADMSLayer,
    scheme: PositionScheme,
    view: ForwardView,
    geometry: MiddleGeometry | None,
    like: torch.Tensor,
    span: int | None,
) -> list[Part]:
    """The layer's tiers in the order attention lays them out."""
    parts = []
    start, stop = view.exact_slice
    if stop > start:
        parts.append(_exact_part(layer, scheme, view, geometry, like, span))
    if layer.middle is not None and geometry is not None:
        parts += _middle_parts(cache, layer, scheme, view, geometry, like)
    if layer.staged is not None:
        positions, tables = _shared(
            view, "query", geometry, lambda: view.query_positions(geometry), scheme, like
        )
        parts.append(Part(layer.staged, positions, tables))
    return parts


def _exact_part(
    layer: ADMSLayer,
    scheme: PositionScheme,
    view: ForwardView,
    geometry: MiddleGeometry | None,
    like: torch.Tensor,
    span: int | None,
) -> Part:
    """Sinks and recent tokens, of which a ``span`` reads only the newest."""
    exact = layer.exact
    if exact is None:
        raise RuntimeError("attention before the layer received its tokens")
    if span is None:
        start, stop = view.exact_slice
        entries = Entries(exact.keys[:, :, start:stop], exact.values[:, :, start:stop])
        tokens = view.exact_tokens()[0]
    else:
        key = ("newest", span, like.device)
        if key not in view.shared:
            view.shared[key] = [
                part if part is None else part.to(like.device) for part in view.newest_slots(span)
            ]
        newest: Any = view.shared[key]
        slots, tokens, valid = newest
        if len(slots) == 1:
            parts = [part.index_select(2, slots[0]) for part in exact.tensors()]
        else:
            rows = torch.arange(len(slots), device=like.device)[:, None]
            parts = [part[rows, :, slots].transpose(1, 2) for part in exact.tensors()]
        entries = Entries(parts[0], parts[1], valid=valid)
    positions, tables = _shared(
        view,
        ("exact", span),
        geometry,
        lambda: view.exact_positions(tokens.to(view.device), geometry),
        scheme,
        like,
    )
    return Part(entries, positions, tables)


def _middle_parts(
    cache: ADMSKVCache,
    layer: ADMSLayer,
    scheme: PositionScheme,
    view: ForwardView,
    geometry: MiddleGeometry,
    like: torch.Tensor,
) -> list[Part]:
    if layer.middle is None or cache.timeline is None:
        return []
    timeline = cache.timeline
    totals = timeline.middle_totals
    whole = fine = None
    if decodes_by_tables(cache.binding_for_use.kernel, like) and all(
        map(geometry.is_coded, totals)
    ):
        whole, fine = layer.middle.tables()
    entries = layer.middle.read(totals, whole)
    if entries is None:
        return []
    middle, first = view.middle(geometry), view.places(geometry).first
    known = view.middle_valid(geometry)
    if view.forgotten is not None:
        remembered = middle.tokens >= view.forgotten[:, None] - first
        known = remembered if known is None else known & remembered
    positions, tables = _shared(view, "middle", geometry, lambda: middle.positions, scheme, like)
    parts = [Part(_with_valid(entries, known, like.device), positions, tables)]
    if geometry.landmarks and any(geometry.is_coded(total) for total in totals):
        marks, marked = layer.middle.landmarks(totals, fine)
        tokens = marked
        if not all(geometry.is_coded(total) for total in totals):
            tokens = torch.where(_coded_rows(geometry, totals, like.device), marked, -1)
        if view.forgotten is not None:
            tokens = torch.where(tokens >= view.forgotten.to(like.device)[:, None], tokens, -1)
        there = (tokens >= 0)[:, None]
        if marks.valid is not None:
            there = there & marks.valid
        parts[0].entries = without_landmarks(
            parts[0].entries,
            torch.where(tokens >= 0, tokens - first.to(like.device), -1),
            there,
            middle.tokens.to(like.device),
            geometry,
            layer.middle,
            totals,
        )
        places = view.places(geometry).landmarks(tokens)
        exact = _with_valid(marks, there, like.device)
        tables = scheme.tables(places, like, view.query_positions(geometry).to(like.device))
        parts.append(Part(exact, places, tables))
    return parts


def without_landmarks(
    entries: Entries,
    landmarks: torch.Tensor,
    there: torch.Tensor,
    places: torch.Tensor,
    geometry: MiddleGeometry,
    middle: MiddleTier,
    totals: list[int],
) -> Entries:
    """Codes without the tokens that are landmarks too, which would count twice.

    A code for one token is masked. One for several weighs that much less, if its coder knows which
    tokens those are; else it stays, since the others have nothing else.

    Args:
        entries: the codes, ``N`` of them.
        landmarks: ``[B, L]`` text positions, counted as ``places`` are; negative where there is
            none, or none of these codes is its.
        there: ``[B, 1 or K, L]`` the heads that have each of them.
        places: ``[B or 1, N]`` text positions of the codes; see ``MiddleView.tokens``.
        geometry: of the middle.
        middle: the middle.
        totals: tokens that have entered it, per row.
    """
    held, device = entries.valid, places.device
    if geometry.entries_per_record == geometry.block_tokens:
        same = places[:, None, :, None] == landmarks[:, None, None, :]
        is_coarse = ~(same & there[:, :, None]).any(3)
        valid = is_coarse if held is None else held[:, None] & is_coarse
        return _with_valid(entries, valid, device)
    members = middle.members(totals)
    if members is None or entries.log_weight is None:
        return entries
    per_record, block = geometry.entries_per_record, geometry.block_tokens
    rows, records = members.shape[:2]
    # Where a record's first entry sits says where its first token does.
    first = places[:, : records * per_record : per_record] - 0.5 * block / per_record + 0.5
    tokens = first.round()[..., None] + torch.arange(block, device=device)
    is_mark = (tokens[..., None] == landmarks[:, None, None, :]).any(3).expand(rows, -1, -1)
    empty = torch.zeros(rows, records, per_record, device=device)
    counts = empty.scatter_add(2, members, torch.ones_like(is_mark, dtype=empty.dtype))
    left = counts - empty.scatter_add(2, members, is_mark.to(empty.dtype))
    share = (left / counts.clamp(min=1)).flatten(1)
    if not all(geometry.is_coded(total) for total in totals):
        # Rows that hold exact tokens still have no records, whatever their bytes say, and may have
        # more entries than the others have codes.
        share = torch.where(_coded_rows(geometry, totals, device), share, 1.0)
    share = torch.nn.functional.pad(share, (0, entries.num_entries - share.shape[1]), value=1.0)
    weight = entries.log_weight + share.clamp(min=1e-6).log()[:, None]
    kept = share > 0 if held is None else held & (share > 0)
    return Entries(entries.keys, entries.values, weight, entries.positions, kept)


def _coded_rows(geometry: MiddleGeometry, totals: list[int], device: torch.device) -> torch.Tensor:
    """``[B, 1]`` which rows are coded by now; where all are, no device needs to be told."""
    return torch.tensor([[geometry.is_coded(total)] for total in totals], device=device)


def _with_valid(entries: Entries, valid: torch.Tensor | None, device: torch.device) -> Entries:
    if valid is None:
        return entries
    return Entries(
        entries.keys, entries.values, entries.log_weight, entries.positions, valid.to(device)
    )
