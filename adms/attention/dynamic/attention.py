"""Attention that stays current while single keys and values change under fixed queries.

`DynamicAttention` holds the numerator, the denominator and the running maximum of every query
row's softmax. Changing an entry writes its key or value, O(D); the next read subtracts the entry's
old contribution from those sums and adds its new one, O(Q (D + E)), instead of attending again to
all entries, O(Q N (D + E)).

Shapes: `...` leading dimensions (batch, heads; none, one or many), `Q` queries, `N` entries,
`D` key size, `E` value size, `C` allocated slots (`N <= C`), `P` entries changed since the last
read, `R` rows asked for.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from adms.attention.dynamic.autograd import AttentionRead
from adms.attention.dynamic.checks import (
    check_accumulator,
    check_inputs,
    check_rows,
    checked_int,
    checked_scale,
    row_index,
)
from adms.attention.dynamic.sums import Entries, Pending, SoftmaxSums
from adms.errors import ADMSTypeError, ADMSValueError


class _Stale(NamedTuple):
    """An entry as the sums still hold it: key [..., D], value [..., E], and whether it counted."""

    key: Tensor
    value: Tensor
    counted: bool


class DynamicAttention:
    """softmax(q k^T * scale) v, kept up to date under changes of single keys and values.

    Entries have an id: 0 to N-1 for the initial ones, then what `append` returns. Deleting an
    entry renumbers nothing, and no id is used twice. A change applies to one entry in all leading
    dimensions at once. An entry changed several times between two reads is pending once.

    Reads with `exact=True` equal dense attention whatever happened before: up to `lazy_threshold`
    pending entries are exchanged one by one, more are absorbed by summing everything once. Rows
    whose sums have lost precision (a dominant entry left, or roundings have added up) are summed
    afresh on their own. Precision relative to a row's attention-weighted mean of |v|: 1e-12 in
    float64; with float32 inputs and scores within +-20, 1e-6 before the rounding to float32.

    Reads with `exact=False` return the last synchronised output while at most `lazy_threshold`
    entries are pending, and sum everything once beyond. How far such a read can be from the truth
    is `error_bound`. These reads are not differentiable.

    Exact reads are differentiable once, with respect to `q` and to every key and value that the
    entries hold, given initially or later; a backward pass costs dense attention. The graph of the
    changes lives as long as the object; under `torch.no_grad` there is none.

    Memory is O(Q N + N D) with the scores kept (the default). With `chunk_size` no score is kept:
    O(N D + Q D) and Q * chunk_size for a moment, for twice the work of an exchange. It follows
    the largest number of entries held, since slots are reused and never given back.

    Source: seeds' "Dynamic Attention" (lazy updates of A = exp(q k^T) and of its row sums);
    Milakov and Gimelshein (2018), arXiv:1805.02867, for the running maximum. Differs in holding
    scores instead of their overflowing exponentials, a scale, and guarded cancellation.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lazy_threshold: int = 8,
        scale: float | None = None,
        exact: bool = True,
        *,
        chunk_size: int | None = None,
        accumulator_dtype: torch.dtype = torch.float64,
    ) -> None:
        """Attends once to the initial entries.

        Args:
            q: Queries [..., Q, D], fixed for the life of the object.
            k: Keys [..., N, D], N >= 1; copied.
            v: Values [..., N, E]; copied.
            lazy_threshold: Pending entries up to which a read exchanges (`exact`) or ignores
                (not `exact`) them; beyond, a read sums everything once.
            scale: Factor on the scores; None means 1/sqrt(D).
            exact: Whether reads include every change made before them.
            chunk_size: Keys scored at a time when no scores are to be kept; None keeps them.
            accumulator_dtype: dtype of scores and sums; float32 halves memory and forgoes the
                stated precision.

        Raises:
            ADMSTypeError: An argument has a type that cannot work.
            ADMSValueError: A shape, dtype, device or value does not fit.
        """
        check_inputs(q, k, v)
        self.lazy_threshold = checked_int("lazy_threshold", lazy_threshold, 0)
        self.chunk_size = None if chunk_size is None else checked_int("chunk_size", chunk_size, 1)
        self.scale = checked_scale(scale, q.shape[-1])
        self.exact = bool(exact)
        if not self.exact and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ADMSValueError(
                "exact=False reads cannot be differentiated, got inputs that require gradients; "
                "use exact=True or detach them"
            )
        self._q = q
        self._keys = k.clone()
        self._values = v.clone()
        self._live = torch.ones(k.shape[-2], dtype=torch.bool, device=k.device)
        self._slot_of = {index: index for index in range(k.shape[-2])}
        self._next_id = k.shape[-2]
        self._free: list[int] = []
        self._pending: dict[int, _Stale | None] = {}
        check_accumulator(accumulator_dtype)
        queries = q.detach().to(accumulator_dtype)
        self._sums = SoftmaxSums(queries, self._entries(), self.scale, self.chunk_size)

    @property
    def num_entries(self) -> int:
        """Entries attended to, N."""
        return len(self._slot_of)

    @property
    def num_pending(self) -> int:
        """Entries changed since the sums were last brought up to date, P."""
        return len(self._pending)

    @property
    def ids(self) -> list[int]:
        """The entries' ids, oldest first."""
        return list(self._slot_of)

    @property
    def keys(self) -> Tensor:
        """The entries' keys [..., N, D] in the order of `ids`, a copy."""
        return self._keys[..., self._index(self._slot_of.values()), :]

    @property
    def values(self) -> Tensor:
        """The entries' values [..., N, E] in the order of `ids`, a copy."""
        return self._values[..., self._index(self._slot_of.values()), :]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, pending copies included."""
        held = [self._q, self._keys, self._values, self._live]
        held += [tensor for tensor in self._sums.tensors if tensor is not self._q]
        held += [tensor for old in self._pending.values() if old for tensor in old[:2]]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def update_key(self, i: int | Sequence[int], k: Tensor) -> None:
        """Replaces the key of entry `i` by k [..., D], or of P entries by k [..., P, D]. O(P D).

        Raises:
            ADMSTypeError: `i` or `k` has a type that cannot work.
            ADMSValueError: There is no such entry, or `k` has the wrong shape or is not finite.
        """
        slots, many = self._slots(i)
        check_rows("k", k, self._keys, len(slots) if many else None)
        self._mark(slots)
        self._keys = self._write(self._keys, slots, k if many else k.unsqueeze(-2))

    def update_value(self, i: int | Sequence[int], v: Tensor) -> None:
        """Replaces the value of entry `i` by v [..., E], or of P entries by v [..., P, E]. O(P E).

        Raises:
            ADMSTypeError: `i` or `v` has a type that cannot work.
            ADMSValueError: There is no such entry, or `v` has the wrong shape or is not finite.
        """
        slots, many = self._slots(i)
        check_rows("v", v, self._values, len(slots) if many else None)
        self._mark(slots)
        self._values = self._write(self._values, slots, v if many else v.unsqueeze(-2))

    def append(self, k: Tensor, v: Tensor) -> int:
        """Adds an entry with k [..., D], v [..., E] and returns its id. Amortised O(D + E).

        Raises:
            ADMSTypeError: `k` or `v` is no floating-point tensor.
            ADMSValueError: `k` or `v` has the wrong shape, dtype or device, or is not finite.
        """
        check_rows("k", k, self._keys, None)
        check_rows("v", v, self._values, None)
        if not self._free:
            # Doubling makes the copies cost O(1) slots per append.
            slots = self._live.numel()
            self._keys = pad(self._keys, (0, 0, 0, slots))
            self._values = pad(self._values, (0, 0, 0, slots))
            self._live = pad(self._live, (0, slots))
            self._free = list(range(2 * slots - 1, slots - 1, -1))
        slot = self._free.pop()
        self._mark([slot], counted=False)
        self._live[slot] = True
        self._keys = self._write(self._keys, [slot], k.unsqueeze(-2))
        self._values = self._write(self._values, [slot], v.unsqueeze(-2))
        self._slot_of[self._next_id] = slot
        self._next_id += 1
        return self._next_id - 1

    def delete(self, i: int) -> None:
        """Removes entry `i`; the ids of the others stay. O(D).

        Raises:
            ADMSTypeError: `i` is not an int.
            ADMSValueError: There is no such entry, or it is the last one.
        """
        if not isinstance(i, int):
            raise ADMSTypeError(f"i must be an int, got {type(i).__name__}; delete one at a time")
        slots, _ = self._slots(i)
        if len(self._slot_of) == 1:
            raise ADMSValueError(
                f"entry {i} is the last one and attention over no entries is undefined; "
                "append another before deleting it"
            )
        self._mark(slots)
        self._live[slots[0]] = False
        self._free.append(slots[0])
        del self._slot_of[i]

    def output(self, rows: Sequence[int] | Tensor | None = None) -> Tensor:
        """The attention output [..., Q, E], or [..., R, E] of the query rows asked for.

        A read of all rows brings the sums up to date. A read of some rows corrects those rows
        only and leaves the changes pending, unless they are more than `lazy_threshold`.

        Raises:
            ADMSValueError: `rows` is not one-dimensional or out of range.
        """
        picked = None if rows is None else row_index(rows, self._q)
        if len(self._pending) > self.lazy_threshold or (self.exact and picked is None):
            self.flush()
        if self.exact and self._pending and picked is not None:
            sums = self._sums.corrected_rows(picked, self._entries(), self._stale())
        else:
            sums = self._sums.sums if picked is None else self._sums.sums[..., picked, :]
        size = self._values.shape[-1]
        result = torch.empty(*sums.shape[:-1], size, dtype=self._q.dtype, device=sums.device)
        # Rounds on the way out: no copy in the sums' dtype.
        torch.div(sums[..., :size], sums[..., size : size + 1], out=result)
        tracked = (self._q, self._keys, self._values)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tracked)):
            return result
        if not self.exact:
            raise ADMSValueError(
                "exact=False reads cannot be differentiated, got an update that requires "
                "gradients; use exact=True, detach updates, or read under torch.no_grad()"
            )
        queries = self._q if picked is None else self._q[..., picked, :]
        # The buffers change in place later on; a backward pass needs them as they are now.
        read: Tensor = AttentionRead.apply(
            queries,
            self._keys.clone(),
            self._values.clone(),
            result,
            self._live.clone(),
            self.scale,
            self.chunk_size,
        )
        return read

    def flush(self) -> None:
        """Brings the sums up to date with every pending change, also with `exact=False`."""
        if len(self._pending) > self.lazy_threshold:
            self._sums.recompute(self._entries())
        elif self._pending:
            self._sums.exchange(self._entries(), self._stale())
        self._pending.clear()

    def error_bound(self) -> Tensor:
        """Largest possible Euclidean distance [..., Q] of an `exact=False` read from the truth.

        With dk and dv the largest norms of the pending entries' changes of key and value, V the
        largest norm of any value, now or then, and a the share of the softmax that the read gives
        to the pending entries::

            x = scale |q| dk
            |error| <= 2 V min(tanh(x / 2), a (e^x - 1) / (1 - a (1 - e^-x))) + a dv

        since scores that move by at most x change the softmax by at most tanh(x / 2) in total
        variation, and a share of a by at most the other term. An entry appended or deleted counts
        as dk = infinity. Beyond `lazy_threshold` pending entries a read sums everything, and the
        bound is 0. Costs O(Q (D + P) + P D + N E), with `chunk_size` O(Q P D + N E).
        """
        queries = self._sums.queries
        if not self._pending or len(self._pending) > self.lazy_threshold:
            return queries.new_zeros(queries.shape[:-1])
        pending = self._stale()
        index, old_keys, old_values, counted = pending
        keys = self._keys.detach()[..., index, :].to(queries.dtype)
        values = self._values.detach().to(queries.dtype)
        moved = (keys - old_keys).norm(dim=-1)
        moved = moved.masked_fill(self._live[index] != counted, math.inf).amax(-1, keepdim=True)
        # A row without a key change is bounded by its values alone, also where q is zero.
        shift = queries.norm(dim=-1) * abs(self.scale) * moved
        shift = torch.where(moved.isinf(), math.inf, shift)
        both = (counted & self._live[index]).to(queries.dtype)
        dv = ((values[..., index, :] - old_values).norm(dim=-1) * both).amax(-1, keepdim=True)
        norms = values.norm(dim=-1).masked_fill(~self._live, 0.0)
        largest = torch.cat([norms, old_values.norm(dim=-1)], -1).amax(-1, keepdim=True)
        share = self._sums.stale_share(pending)
        of_share = share * torch.expm1(shift) / (1.0 + share * torch.expm1(-shift))
        # 0 * infinity: an entry without a share so far may come to have all of it.
        of_share = of_share.nan_to_num(nan=math.inf, posinf=math.inf)
        varied = torch.minimum(torch.tanh(shift / 2.0), of_share)
        bound: Tensor = 2.0 * largest * varied + share * dv
        return bound

    def _entries(self) -> Entries:
        """All slots, without autograd's history."""
        return Entries(self._keys.detach(), self._values.detach(), self._live)

    def _stale(self) -> Pending:
        """The pending entries as the sums hold them; only below the threshold."""
        olds = [old for old in self._pending.values() if old is not None]
        counted = torch.tensor([old.counted for old in olds], device=self._live.device)
        dtype = self._sums.queries.dtype
        keys = torch.stack([old.key for old in olds], -2).to(dtype)
        values = torch.stack([old.value for old in olds], -2).to(dtype)
        return Pending(self._index(self._pending), keys, values, counted)

    def _mark(self, slots: Sequence[int], counted: bool = True) -> None:
        """Notes what the sums hold for slots that are about to change."""
        for slot in slots:
            if slot in self._pending:
                continue
            # Past the threshold everything is summed once, which needs no old entries.
            old = None
            if len(self._pending) < self.lazy_threshold:
                key = self._keys.detach()[..., slot, :].clone()
                old = _Stale(key, self._values.detach()[..., slot, :].clone(), counted)
            self._pending[slot] = old

    def _write(self, buffer: Tensor, slots: Sequence[int], rows: Tensor) -> Tensor:
        """Writes rows [..., P, D or E] into a buffer, recorded for autograd where it matters."""
        rows = rows if torch.is_grad_enabled() else rows.detach()
        # Also under no_grad a slot must stop passing gradients to what it held before.
        with torch.set_grad_enabled(buffer.requires_grad or rows.requires_grad):
            if len(slots) == 1:
                buffer[..., slots[0], :] = rows[..., 0, :]
            else:
                buffer[..., self._index(slots), :] = rows
        return buffer

    def _index(self, slots: Iterable[int]) -> Tensor:
        return torch.tensor(list(slots), dtype=torch.long, device=self._live.device)

    def _slots(self, i: int | Sequence[int]) -> tuple[list[int], bool]:
        """The slots of one or several entries, and whether several were asked for."""
        many = not isinstance(i, int)
        ids = list(i) if isinstance(i, Sequence) else [i]
        for index in ids:
            if not isinstance(index, int):
                raise ADMSTypeError(
                    f"i must be an int or a sequence of ints, got {type(index).__name__}"
                )
            if index not in self._slot_of:
                raise ADMSValueError(
                    f"i must be the id of an entry, got {index}; {self.num_entries} entries are "
                    f"held, with ids up to {self._next_id - 1} (see the property ids)"
                )
        if len(set(ids)) != len(ids):
            raise ADMSValueError(f"i must name each entry once, got {ids}")
        return [self._slot_of[index] for index in ids], many
