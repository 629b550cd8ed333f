"""How tokens enter the middle: what arrives becomes bytes, for several layers at once.

Layers that are alike are coded together: their rows are to a coder what the rows of one layer are,
and where a token's bytes go (``writes``) is the same in all of them. Everything is worked out first
and written afterwards, so that an error changes nothing. Only the step from exact to coded, once in
a row's life, is made layer by layer.

Nothing here waits for a device: what the host knows is sent there without waiting.

Shapes: ``L`` layers, ``B`` rows, ``H`` query heads, ``K`` KV heads, ``N`` arriving tokens, ``R``
records, ``Q`` queries, ``D`` head size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adms.compressors.base import Coder
from adms.entries import Entries
from adms.importance import Evidence, Others
from adms.tiers.arrivals import Arrivals, Group, gather
from adms.tiers.candidates import Candidates
from adms.tiers.comparing import Window, others_of
from adms.tiers.head_landmarks import Arriving, HeadLandmarkStore
from adms.tiers.landmarks import Landmarks, LandmarkStore
from adms.tiers.middle import MiddlePlan, MiddleTier, as_one, join_entries
from adms.tiers.undo import Undo
from adms.tiers.writes import Slots, Write


class MiddleStack:
    """The middles of layers that are alike, as a commit sees them.

    Args:
        plans: of each layer, with one geometry and one layout.
        arena: ``[L, B, bytes]``.
    """

    def __init__(self, plans: Sequence[MiddlePlan], arena: torch.Tensor) -> None:
        self.plans = plans
        self.plan = as_one(plans)
        self.arena = arena
        self.slots = Slots(arena)
        self.device = arena.device

    def prepare(
        self,
        leaving: Entries,
        arrivals: Arrivals,
        recent: Callable[[int, int], Entries],
        queries: torch.Tensor | None,
        window: Callable[[], Window],
    ) -> tuple[list[Write], list[Candidates]]:
        """Works out what arriving tokens change, without changing anything.

        The landmarks are settled over all layers before ``landmark_writes``.

        Args:
            leaving: tokens that leave the recent tier ``[L, B, K, N, ...]``, rows padded to the
                longest.
            arrivals: which of them enter.
            recent: gives the exact tokens of the window ``[1, K, N, ...]`` of a layer (counted
                within the stack) and a row, in order: more material for a fit.
            queries: ``[L, B, H, Q, D]`` the pass's queries before positions, or None.
            window: gives the ring as it is.
        """
        geometry = self.plan.geometry
        stay_raw, stay_coded, turn = [], [], []
        for row, (count, total) in enumerate(zip(arrivals.counts, arrivals.totals, strict=True)):
            if count == 0:
                continue
            if not geometry.is_coded(total + count):
                stay_raw.append(row)
            elif geometry.is_coded(total):
                stay_coded.append(row)
            else:
                turn.append(row)
        writes: list[Write] = []
        candidates: list[Candidates] = []
        if stay_raw:
            group = gather(leaving, arrivals, stay_raw, None)
            raw = self.plan.raw
            records = self._by_layer(raw.encode(self._bytes(group, 0, 0), group.entries))
            writes.append(self.slots.ring_write(records, arrivals, stay_raw, raw, 0))
        if stay_coded:
            group = gather(leaving, arrivals, stay_coded, queries)
            records = self._append(group, arrivals.sink, window, writes, candidates)
            writes += self.slots.record_writes(self._coder, records, arrivals, stay_coded)
        for row in turn:
            writes += self._turn(leaving, arrivals, row, recent, queries, candidates)
        return writes, candidates

    def prepare_steady(
        self, leaving: Entries, totals: torch.Tensor, sink: int, window: Callable[[], Window]
    ) -> tuple[list[Write], list[Candidates]]:
        """``prepare`` of as many tokens in every row, all of which are coded already.

        Where they go follows from counts on the device, so that a graph can do it for any counts.

        Args:
            leaving: ``[L, B, K, N, ...]``, whole records and no more than there are slots.
            totals: ``[B]`` int64, tokens that have entered before.
            sink: number of sinks.
            window: gives the ring as it is.
        """
        width = leaving.keys.shape[3]
        tokens = sink + totals[:, None] + torch.arange(width, device=self.device)
        entries = Entries(leaving.keys.flatten(0, 1), leaving.values.flatten(0, 1))
        group = Group(list(range(len(totals))), slice(None), tokens, entries, None)
        writes: list[Write] = []
        candidates: list[Candidates] = []
        records = self._append(group, sink, window, writes, candidates)
        return [*writes, *self.slots.steady_writes(self._coder, records, totals)], candidates

    def landmark_writes(self, candidates: list[Candidates]) -> list[Write]:
        """Settled landmarks as bytes to put in place."""
        writes = []
        for settled in candidates:
            if settled.present is None or settled.before is None:
                raise RuntimeError("landmarks were written before they were settled")
            records, layers = settled.present.records, len(self.plans)
            of_layers = Landmarks(
                records.flatten(0, 1),
                settled.present.tokens.repeat(layers, 1),
                settled.present.scores.repeat(layers, 1),
            )
            last = self._store.context(settled.before).repeat(layers, 1)
            data = self._by_layer(torch.cat([self._store.slots(of_layers), last], dim=1))
            writes.append(self._landmark_write(settled.rows, self._store.header_bytes, data))
        return writes

    def keep_overwritten(self, writes: list[Write], undo: Undo) -> None:
        """Keeps what ``apply`` with the same writes overwrites."""
        for write in writes:
            undo.keep(write.slots, slice(None), write.rows, write.places)

    def apply(self, writes: list[Write]) -> None:
        """Puts prepared bytes in place."""
        for write in writes:
            write.slots[:, write.rows, write.places] = write.data

    # --- rows that are coded -----------------------------------------------------------------

    def _append(
        self,
        group: Group,
        sink: int,
        window: Callable[[], Window],
        writes: list[Write],
        candidates: list[Candidates],
    ) -> torch.Tensor:
        """Codes ``[L, B, R, bytes]`` of tokens that arrive where others are coded already.

        Adds what they change of the landmarks to ``writes`` or ``candidates``.
        """
        coder, store = self._coder, self.plan.store
        header = self._bytes(group, 0, coder.header_bytes)
        records = coder.encode(header, group.entries, group.queries)
        by_layer = self._by_layer(records)
        if store is None:
            return by_layer
        start = self.plan.landmark_offset
        present = self._bytes(group, start, start + store.nbytes)
        landmark_header = present[:, : store.header_bytes]
        if isinstance(store, HeadLandmarkStore):
            arriving = _arriving(coder, header, records, group)
            data = store.update(
                landmark_header, present, arriving, self.plan.metric, self.plan.config
            )
            writes.append(
                self._landmark_write(group.rows, store.header_bytes, self._by_layer(data))
            )
            return by_layer
        evidence = _evidence(store, coder, header, records, landmark_header, group.queries)
        scores = self._by_layer(self.plan.metric(group.entries, evidence).float())
        comparing = _comparing(self.plans)
        if comparing:
            by_layers, around = list(scores), window()
            for layer in comparing:
                by_layers[layer] = self._compared(layer, group, sink, around, evidence)
            scores = torch.stack(by_layers)
        # Metrics add up over heads, and heads may lie with several processes.
        scores = self.plan.ranks.total(scores.flatten(0, 1))
        held = store.read(present)
        candidates.append(
            Candidates(
                rows=group.rows,
                records=self._by_layer(
                    store.encode(landmark_header, group.entries, header, records)
                ),
                tokens=group.tokens,
                scores=self._by_layer(store.scaled(landmark_header, scores)),
                # Layers choose together, so what one has says which tokens all of them have.
                present=Landmarks(
                    self._by_layer(held.records),
                    self._by_layer(held.tokens)[0],
                    self._by_layer(held.scores)[0],
                ),
                before=self._by_layer(store.read_context(present))[0],
                comparing=comparing,
            )
        )
        return by_layer

    def _compared(
        self, layer: int, group: Group, sink: int, window: Window, evidence: Evidence
    ) -> torch.Tensor:
        """Scores ``[B, N]`` by one layer, which is shown what the stream holds."""
        plan, data = self.plans[layer], self.arena[layer, group.index]
        count = len(group.tokens)
        own = slice(layer * count, (layer + 1) * count)
        keys, tokens = group.entries.keys[own], group.tokens
        around = window.keys[layer, group.index], window.tokens[group.index]
        shown = dataclasses.replace(
            evidence.of_rows(own),
            tokens=tokens,
            others=lambda: others_of(plan, data, keys, tokens, sink, around),
            ranks=plan.ranks,
        )
        return plan.metric(Entries(keys, group.entries.values[own]), shown).float()

    # --- rows that turn from exact to coded --------------------------------------------------

    def _turn(
        self,
        leaving: Entries,
        arrivals: Arrivals,
        row: int,
        recent: Callable[[int, int], Entries],
        queries: torch.Tensor | None,
        candidates: list[Candidates],
    ) -> list[Write]:
        """One row's step from exact to coded, layer by layer."""
        start, count = arrivals.starts[row], arrivals.counts[row]
        total = arrivals.totals[row]
        size = total + count
        tokens = arrivals.sink + torch.arange(size, device=self.device)[None]
        turned = []
        for layer, plan in enumerate(self.plans):
            part = (slice(layer, layer + 1), row, slice(None), slice(start, start + count))
            arriving = Entries(leaving.keys[part], leaving.values[part])
            held = MiddleTier(plan, self.arena[layer, row : row + 1]).read([total])
            parts = [arriving] if held is None else [held, arriving]
            own = None if queries is None else queries[layer, row : row + 1]
            group = Group([row], slice(None), tokens, join_entries(parts), own)
            turned.append(
                _turned(plan, group, join_entries([*parts, recent(layer, row)]), arrivals.sink)
            )
        writes = [self.slots.constant_write([row], 0, _stack([one.header for one in turned]))]
        records = _stack([one.records for one in turned])
        anew = Arrivals(arrivals.starts, [0] * row + [size], [0] * (row + 1), arrivals.sink)
        writes += self.slots.record_writes(self._coder, records, anew, [row])
        if self.plan.store is None:
            return writes
        landmarks = _stack([one.landmarks for one in turned])
        writes.append(self._landmark_write([row], 0, landmarks))
        if not isinstance(self.plan.store, HeadLandmarkStore):
            arrived = [one.candidates for one in turned if one.candidates is not None]
            candidates.append(
                Candidates(
                    rows=[row],
                    records=torch.cat([one.records for one in arrived]),
                    tokens=tokens,
                    scores=torch.cat([one.scores for one in arrived]),
                    present=None,
                    comparing=_comparing(self.plans),
                )
            )
        return writes

    # --- rows and layers ---------------------------------------------------------------------

    def _landmark_write(self, rows: list[int], offset: int, data: torch.Tensor) -> Write:
        """Bytes ``[L, B, bytes]`` of landmarks, ``offset`` after their start."""
        return self.slots.constant_write(rows, self.plan.landmark_offset + offset, data)

    def _bytes(self, group: Group, start: int, stop: int) -> torch.Tensor:
        """Some bytes of some rows of all layers ``[L * B, bytes]``."""
        return self.arena[:, group.index, start:stop].flatten(0, 1)

    def _by_layer(self, states: torch.Tensor) -> torch.Tensor:
        """``[L * B, ...]`` -> ``[L, B, ...]``."""
        return states.unflatten(0, (len(self.plans), -1))

    @property
    def _coder(self) -> Coder:
        if self.plan.coder is None:
            raise RuntimeError("a middle without a coder was to be coded")
        return self.plan.coder

    @property
    def _store(self) -> LandmarkStore:
        if not isinstance(self.plan.store, LandmarkStore):
            raise RuntimeError("a middle without landmarks of all heads was asked for them")
        return self.plan.store


@dataclass(frozen=True)
class _Turned:
    """One layer's row, coded for the first time.

    Attributes:
        header: ``[1, bytes]``.
        records: ``[1, R, bytes]``.
        landmarks: ``[1, bytes]`` their header, and all of them where heads choose their own.
        candidates: to be settled with those of other layers.
    """

    header: torch.Tensor
    records: torch.Tensor
    landmarks: torch.Tensor
    candidates: Candidates | None


def _turned(plan: MiddlePlan, group: Group, material: Entries, sink: int) -> _Turned:
    """Fits a layer's codes to ``material`` and codes the tokens of one row with them.

    The material are all tokens after the sinks, in order.
    """
    coder, store = plan.coder, plan.store
    if coder is None:
        raise RuntimeError("a middle without a coder was to be coded")
    header = coder.fit(material, group.queries)
    records = coder.encode(header, group.entries, group.queries)
    if store is None:
        return _Turned(header, records, header[:, :0], None)
    if isinstance(store, HeadLandmarkStore):
        arrived = _arriving(coder, header, records, group)
        own = store.fit(arrived)
        chosen = store.update(own, None, arrived, plan.metric, plan.config)
        return _Turned(header, records, torch.cat([own, chosen], dim=1), None)
    own = store.fit(group.entries, plan.ranks)
    evidence = _evidence(store, coder, header, records, own, group.queries)
    if plan.compares:
        places = sink + torch.arange(material.num_entries, device=group.tokens.device)[None]
        evidence = dataclasses.replace(
            evidence,
            tokens=group.tokens,
            others=lambda: Others(material.keys, places),
            ranks=plan.ranks,
        )
    scores = plan.ranks.total(plan.metric(group.entries, evidence).float())
    own = store.with_scale(own, scores)
    candidates = Candidates(
        rows=group.rows,
        records=store.encode(own, group.entries, header, records)[None],
        tokens=group.tokens,
        scores=store.scaled(own, scores)[None],
        present=None,
    )
    return _Turned(header, records, own, candidates)


def _evidence(
    store: LandmarkStore,
    coder: Coder,
    header: torch.Tensor,
    records: torch.Tensor,
    landmark_header: torch.Tensor,
    queries: torch.Tensor | None,
) -> Evidence:
    def decode() -> Entries:
        return coder.decode(header, records[..., : coder.record_bytes])

    return store.evidence(landmark_header, queries, decode, coder.block_tokens)


def _arriving(coder: Coder, header: torch.Tensor, records: torch.Tensor, group: Group) -> Arriving:
    layers = len(records) // len(group.tokens)
    return Arriving(
        group.entries,
        group.tokens.repeat(layers, 1),
        coder.decode(header, records[..., : coder.record_bytes]),
        coder.block_tokens,
        group.queries,
    )


def _comparing(plans: Sequence[MiddlePlan]) -> list[int]:
    """Which of these layers compare."""
    return [layer for layer, plan in enumerate(plans) if plan.compares]


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """What each layer has, ``[1, ...]``, as ``[L, 1, ...]``."""
    return torch.stack(parts)
