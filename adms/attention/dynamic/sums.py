"""The arithmetic of `DynamicAttention`: softmax sums and the exchange of entries in them.

The sums of a query row are `sum_j exp(s_j - top) u_j` over its entries, with score s_j and
u_j = [v_j, 1, max|v_j|]: numerator, denominator, and the size that the numerator's terms have,
which says how much of it rounding can have eaten.

Shapes: `...` leading dimensions, `Q` queries (or some of them), `C` slots of entries, `D` key
size, `E` value size, `P` entries changed since the sums were brought up to date, `R` query rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# A row is summed afresh once its accumulated rounding could exceed this many unit roundoffs of its
# own sum: 4096 * 1.1e-16 = 4.5e-13 in float64, with 1e-12 promised.
_DRIFT_LIMIT = 4096.0
# Roundings that a term of the sums takes on its way in or out: of its exponential (2 units at
# most), its product, its sum with the other terms exchanged, and of the sum of those.
_TERM_ROUNDINGS = 5.0


class Entries(NamedTuple):
    """All slots as they are now: keys [..., C, D], values [..., C, E], live [C]."""

    keys: Tensor
    values: Tensor
    live: Tensor


class Pending(NamedTuple):
    """Entries as the sums still hold them: slots [P], keys, values and whether they counted [P]."""

    slots: Tensor
    keys: Tensor
    values: Tensor
    counted: Tensor


def extended(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [..., C, E] as summands [..., C, E + 2]: [v, 1, max|v|]."""
    values = values.detach().to(dtype)
    size = values.abs().amax(-1, keepdim=True)
    return torch.cat([values, torch.ones_like(size), size], -1)


def scores_of(queries: Tensor, keys: Tensor, live: Tensor, scale: float) -> Tensor:
    """Scores [..., Q, C] of queries [..., Q, D] and keys [..., C, D]; -inf where not live [C]."""
    keys = keys.detach().to(queries.dtype)
    return ((queries @ keys.transpose(-1, -2)) * scale).masked_fill_(~live, -math.inf)


def summed(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [..., Q, E + 2] and running maximum [..., Q, 1] from scores [..., Q, C]."""
    top = scores.amax(-1, keepdim=True)
    return torch.exp(scores - top) @ extended(values, scores.dtype), top


def summed_in_chunks(
    queries: Tensor, keys: Tensor, values: Tensor, live: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """As `summed`, scoring `chunk_size` keys at a time.

    Source: Milakov and Gimelshein (2018), arXiv:1805.02867, algorithm 3.
    """
    sums = queries.new_zeros(*queries.shape[:-1], values.shape[-1] + 2)
    top = queries.new_full((*queries.shape[:-1], 1), -math.inf)
    for start in range(0, keys.shape[-2], chunk_size):
        part = slice(start, start + chunk_size)
        scores = scores_of(queries, keys[..., part, :], live[part], scale)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        # A chunk of dead slots before any live one has no maximum yet: -inf - -inf is NaN.
        safe = higher.masked_fill(higher == -math.inf, 0.0)
        sums = sums * torch.exp(top - safe)
        sums += torch.exp(scores - safe) @ extended(values[..., part, :], queries.dtype)
        top = higher
    return sums, top


def exchanged(
    sums: Tensor,
    top: Tensor,
    drift: Tensor,
    old_scores: Tensor,
    new_scores: Tensor,
    old_summands: Tensor,
    new_summands: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, maximum and drift after P entries changed their scores and summands.

    Args:
        sums: [..., Q, E + 2].
        top: What the sums' exponents are relative to, [..., Q, 1].
        drift: Sizes that passed through denominator and numerator so far, [..., Q, 2]; times the
            unit roundoff, a bound on the rounding error they carry.
        old_scores: [..., Q, P], -inf for entries that did not count.
        new_scores: [..., Q, P], -inf for entries that no longer count.
        old_summands: [..., P, E + 2].
        new_summands: [..., P, E + 2].
    """
    higher = torch.maximum(top, new_scores.amax(-1, keepdim=True))
    shrink = torch.exp(top - higher)
    weights = torch.cat([-torch.exp(old_scores - higher), torch.exp(new_scores - higher)], -1)
    summands = torch.cat([old_summands, new_summands], -2)
    # Added in one step, so that what is rounded at the size of the sums is rounded once.
    after = (weights @ summands).addcmul_(sums, shrink)
    moved = weights.abs() @ summands[..., -2:]
    passed = after[..., -2:].abs() + _TERM_ROUNDINGS * moved
    passed += (sums[..., -2:] * shrink).abs() * (shrink != 1.0)
    return after, higher, drift * shrink + passed


class SoftmaxSums:
    """The sums [..., Q, E + 2] of fixed queries, their running maximum, and the scores if kept."""

    def __init__(
        self, queries: Tensor, entries: Entries, scale: float, chunk_size: int | None
    ) -> None:
        """Sums all entries. `queries` [..., Q, D] are in the dtype to accumulate in."""
        self.queries = queries
        self.scale = scale
        self.chunk_size = chunk_size
        self.scores: Tensor | None = None
        self.recompute(entries)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        kept = [] if self.scores is None else [self.scores]
        return [self.queries, self.sums, self._top, self._drift, *kept]

    def recompute(self, entries: Entries) -> None:
        """Sums everything once."""
        if self.chunk_size is None:
            # The old scores go first, so that two of them never exist at once.
            self.scores = None
            self.scores = scores_of(self.queries, entries.keys, entries.live, self.scale)
        self.sums, self._top = self._fresh(slice(None), entries, self.scores)
        self._drift = self.sums[..., -2:].clone()

    def exchange(self, entries: Entries, pending: Pending) -> None:
        """Brings all rows up to date with the pending entries."""
        sums, top, drift, new_scores = self._corrected(slice(None), entries, pending)
        if self.scores is not None:
            self.scores[..., pending.slots] = new_scores
        lost = _lost(sums, drift)
        if lost.numel():
            # Rows half-way there come along: one by one, each would cost a pass over all values.
            lost = _lost(sums, drift, _DRIFT_LIMIT / 2)
            scores = None if self.scores is None else self.scores[..., lost, :]
            sums[..., lost, :], top[..., lost, :] = self._fresh(lost, entries, scores)
            drift[..., lost, :] = sums[..., lost, -2:]
        self.sums, self._top, self._drift = sums, top, drift

    def corrected_rows(self, rows: Tensor, entries: Entries, pending: Pending) -> Tensor:
        """The up-to-date sums [..., R, E + 2] of some rows; nothing is stored."""
        sums, _, drift, new_scores = self._corrected(rows, entries, pending)
        lost = _lost(sums, drift)
        if lost.numel():
            scores = None
            if self.scores is not None:
                scores = self.scores[..., rows[lost], :]
                scores[..., pending.slots] = new_scores[..., lost, :]
            sums[..., lost, :] = self._fresh(rows[lost], entries, scores)[0]
        return sums

    def stale_share(self, pending: Pending) -> Tensor:
        """Share [..., Q] of the softmax that the sums give to the pending entries."""
        if self.scores is None:
            old_scores = scores_of(self.queries, pending.keys, pending.counted, self.scale)
        else:
            # Slots newer than the kept scores do not count yet.
            known = pending.slots[pending.slots < self.scores.shape[-1]]
            old_scores = self.scores[..., known]
        weights = torch.exp(old_scores - self._top).sum(-1) / self.sums[..., -2]
        return weights.clamp(max=1.0)

    def _fresh(
        self, rows: Tensor | slice, entries: Entries, scores: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sums and maxima of some rows from all entries; `scores` [..., R, C] where kept."""
        if scores is not None:
            return summed(scores, entries.values)
        chunk_size = self.chunk_size or entries.live.numel()
        return summed_in_chunks(self.queries[..., rows, :], *entries, self.scale, chunk_size)

    def _corrected(
        self, rows: Tensor | slice, entries: Entries, pending: Pending
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums, maxima, drift and the pending entries' new scores [..., R, P] of some rows."""
        slots = pending.slots
        queries = self.queries[..., rows, :]
        new_scores = scores_of(
            queries, entries.keys[..., slots, :], entries.live[slots], self.scale
        )
        if self.scores is None:
            old_scores = scores_of(queries, pending.keys, pending.counted, self.scale)
        else:
            missing = entries.live.numel() - self.scores.shape[-1]
            if missing:
                self.scores = pad(self.scores, (0, missing), value=-math.inf)
            across = rows if isinstance(rows, slice) else rows.unsqueeze(-1)
            old_scores = self.scores[..., across, slots]
        sums, top, drift = (held[..., rows, :] for held in (self.sums, self._top, self._drift))
        new = extended(entries.values[..., slots, :], queries.dtype)
        old = extended(pending.values, queries.dtype)
        return *exchanged(sums, top, drift, old_scores, new_scores, old, new), new_scores


def _lost(sums: Tensor, drift: Tensor, limit: float = _DRIFT_LIMIT) -> Tensor:
    """Rows that have lost precision in any leading dimension."""
    # Negated, so that NaN counts as lost.
    lost = ~(drift <= limit * sums[..., -2:]).all(-1)
    return lost.reshape(-1, lost.shape[-1]).any(0).nonzero().squeeze(-1)
