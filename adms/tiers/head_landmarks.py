"""Landmarks that each KV head chooses by itself, more of them where codes are worse.

A head's landmarks are those of a layer with that head alone. How many a head has is settled when
coding starts, by the squared error of its codes, within the layer's total; every head has at least
half and at most twice its even share.

Shapes: ``B`` rows, ``K`` KV heads, ``L`` landmarks a head on average, ``S = K L`` slots of a layer,
``M`` most landmarks of a head, ``N`` tokens.

Source: the sources' variance-adaptive budget; cf. Feng et al. (2024), Ada-KV, arXiv 2407.11550,
which shifts whole tokens between heads by their attention.
"""

from dataclasses import dataclass, replace

import torch

from adms.compressors.base import Coder
from adms.config import ADMSConfig
from adms.entries import Entries, TokenShape
from adms.importance import Evidence, Metric
from adms.importance.coding_error import coding_error
from adms.tiers.candidates import Candidates, choose
from adms.tiers.landmarks import Landmarks, LandmarkStore, aligned

# Bytes of a head's quota in the header.
QUOTA_BYTES = 4


@dataclass(frozen=True)
class Arriving:
    """Tokens on their way into the middle.

    Attributes:
        entries: the ``N`` tokens, exact.
        tokens: ``[B, N]`` text positions, -1 where there is none.
        decoded: what their codes decode to.
        block_tokens: tokens that were coded together.
        queries: ``[B, H, Q, D]`` the pass's queries before positions, or None.
    """

    entries: Entries
    tokens: torch.Tensor
    decoded: Entries
    block_tokens: int
    queries: torch.Tensor | None


class HeadLandmarkStore:
    """How the landmarks of single heads lie in bytes: quotas, the heads' headers, slots by head.

    Args:
        shape: keys and values of one token.
        dtype: dtype of decoded entries.
        count: landmarks a head on average (``L``).
        codes: not used: the fine form of codes for all heads is none for one of them.
    """

    def __init__(
        self, shape: TokenShape, dtype: torch.dtype, count: int, codes: Coder | None = None
    ) -> None:
        self.count = count
        self.num_heads = shape.num_heads
        single = TokenShape(1, shape.key_dim, shape.value_dim)
        #: the store of a layer with one head, whose rows are the heads of ours
        self.single = LandmarkStore(single, dtype, count)
        self.quota_bytes = aligned(QUOTA_BYTES * shape.num_heads)
        self.header_bytes = self.quota_bytes + shape.num_heads * self.single.header_bytes
        self.slot_bytes = shape.num_heads * self.single.slot_bytes
        self.nbytes = self.header_bytes + count * self.slot_bytes if count else 0
        self.most = min(2 * count, shape.num_heads * count)

    @classmethod
    def within(
        cls, shape: TokenShape, dtype: torch.dtype, nbytes: int, codes: Coder | None = None
    ) -> "HeadLandmarkStore":
        """The store of as many landmarks as fit."""
        probe = cls(shape, dtype, 1)
        return cls(shape, dtype, max(0, (nbytes - probe.header_bytes) // probe.slot_bytes))

    def fit(self, arriving: Arriving) -> torch.Tensor:
        """Header ``[B, header_bytes]``: quotas by the codes' errors, spreads and means by head."""
        heads = _by_head(arriving)
        headers = self.single.fit(heads.entries)
        errors = coding_error(heads.entries, self._evidence(headers, heads))
        errors = errors.mean(1).unflatten(0, (-1, self.num_heads))
        quotas = self._quotas(errors).to(torch.int32).view(torch.uint8)
        quotas = torch.nn.functional.pad(quotas, (0, self.quota_bytes - quotas.shape[1]))
        return torch.cat([quotas, headers.unflatten(0, (-1, self.num_heads)).flatten(1)], dim=1)

    def update(
        self,
        header: torch.Tensor,
        present: torch.Tensor | None,
        arriving: Arriving,
        metric: Metric,
        config: ADMSConfig,
    ) -> torch.Tensor:
        """The bytes after the header, once tokens have arrived: ``[B, S slots]``.

        Args:
            header: ``[B, header_bytes]``.
            present: ``[B, nbytes]`` with the landmarks so far, or None.
            arriving: tokens that may become landmarks.
            metric: scores them; it is given one head at a time.
            config: how places are spread over the text.
        """
        quotas, headers, heads = self.quotas(header), self._head_headers(header), _by_head(arriving)
        # The single store has codes of its own.
        none = headers[:, :0]
        candidates = Candidates(
            rows=[],
            records=self.single.encode(headers, heads.entries, none, none[:, None]),
            tokens=heads.tokens,
            scores=metric(heads.entries, self._evidence(headers, heads)).float(),
            present=None if present is None else self._of_heads(self._slots(present), quotas),
        )
        chosen = choose(candidates, self.most, config, quotas.flatten())
        return self.single.slots(self._in_slots(chosen, quotas))

    def decode(self, data: torch.Tensor) -> tuple[Entries, torch.Tensor]:
        """Entries ``[B, K, S, ...]``, each valid in its own head, and text positions ``[B, S]``.

        One column a slot: columns have one position for all heads, and heads differ in theirs.
        """
        quotas, landmarks = self.quotas(data), self._slots(data)
        rows = self._of_heads(landmarks, quotas)
        headers = self._head_headers(data)[:, self.single.reference_bytes :]
        decoded = self.single.coder.decode(headers, rows.records)
        head, index, used = self._places(quotas)
        own = torch.arange(len(quotas), device=data.device)[:, None]
        keys, values = (
            part.squeeze(1).unflatten(0, (-1, self.num_heads)).flatten(1, 2)[own, index]
            for part in (decoded.keys, decoded.values)
        )
        heads = torch.arange(self.num_heads, device=data.device)[:, None]
        valid = (head[:, None] == heads) & used[:, None]
        shown = [part[:, None].expand(-1, self.num_heads, -1, -1) for part in (keys, values)]
        tokens = torch.where(used, landmarks.tokens, -1)
        return Entries(shown[0], shown[1], valid=valid), tokens

    def quotas(self, data: torch.Tensor) -> torch.Tensor:
        """Landmarks of each head ``[B, K]``; their sum is at most ``S``."""
        stored = data[:, : QUOTA_BYTES * self.num_heads].contiguous()
        return stored.view(torch.int32).long().clamp(0, self.most)

    def _quotas(self, errors: torch.Tensor) -> torch.Tensor:
        """Half the slots evenly, half in proportion to the errors ``[B, K]``."""
        least = -(-self.count // 2)
        left = float(self.num_heads * (self.count - least))
        room = float(self.most - least)
        extra = torch.zeros_like(errors)
        weight = errors.clamp(min=1e-12)
        # Each round deals out what heads at their most had to leave, and fills one head or ends.
        for _ in range(self.num_heads):
            open_weight = weight * (extra < room)
            share = open_weight / open_weight.sum(1, keepdim=True).clamp(min=1e-12)
            extra = (extra + (left - extra.sum(1, keepdim=True)) * share).clamp(max=room)
        # Rounding down keeps to the total; the largest remainders get what that leaves.
        whole = extra.floor()
        over = (left - whole.sum(1, keepdim=True)).round()
        rank = (whole - extra).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        whole = (whole + (rank < over)).clamp(max=room)
        return least + whole.long()

    def _evidence(self, headers: torch.Tensor, heads: Arriving) -> Evidence:
        return self.single.evidence(
            headers, heads.queries, lambda: heads.decoded, heads.block_tokens
        )

    def _head_headers(self, data: torch.Tensor) -> torch.Tensor:
        """``[B * K, bytes]``."""
        headers = data[:, self.quota_bytes : self.header_bytes]
        return headers.unflatten(1, (self.num_heads, -1)).flatten(0, 1)

    def _slots(self, data: torch.Tensor) -> Landmarks:
        """All slots ``[B, S]``."""
        return self.single.read_slots(data[:, self.header_bytes : self.nbytes])

    def _of_heads(self, landmarks: Landmarks, quotas: torch.Tensor) -> Landmarks:
        """Slots ``[B, S]`` as one row for each head, ``[B * K, M]``."""
        rank = torch.arange(self.most, device=quotas.device)
        first = quotas.cumsum(1) - quotas
        index = (first[..., None] + rank).clamp(max=landmarks.tokens.shape[1] - 1)
        used = (rank < quotas[..., None]).flatten(0, 1)
        found = _take(landmarks, index.flatten(1))
        return Landmarks(
            found.records.unflatten(1, (self.num_heads, -1)).flatten(0, 1),
            torch.where(used, found.tokens.unflatten(1, (self.num_heads, -1)).flatten(0, 1), -1),
            found.scores.unflatten(1, (self.num_heads, -1)).flatten(0, 1),
        )

    def _in_slots(self, landmarks: Landmarks, quotas: torch.Tensor) -> Landmarks:
        """The inverse of ``_of_heads``."""
        _, index, used = self._places(quotas)
        of_rows = Landmarks(
            landmarks.records.unflatten(0, (-1, self.num_heads)).flatten(1, 2),
            landmarks.tokens.unflatten(0, (-1, self.num_heads)).flatten(1, 2),
            landmarks.scores.unflatten(0, (-1, self.num_heads)).flatten(1, 2),
        )
        found = _take(of_rows, index)
        return Landmarks(found.records, torch.where(used, found.tokens, -1), found.scores)

    def _places(self, quotas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Head, index among ``[K * M]`` and whether it is in use, of every slot: ``[B, S]``."""
        slot = torch.arange(self.num_heads * self.count, device=quotas.device)
        ends = quotas.cumsum(1)
        head = (slot[:, None] >= ends[:, None]).sum(2).clamp(max=self.num_heads - 1)
        rank = slot - (ends - quotas).gather(1, head)
        used = rank < quotas.gather(1, head)
        return head, head * self.most + rank.clamp(max=self.most - 1), used


def _take(landmarks: Landmarks, index: torch.Tensor) -> Landmarks:
    """Those at ``index [B, M]``."""
    own = torch.arange(index.shape[0], device=index.device)[:, None]
    return Landmarks(
        landmarks.records[own, index], landmarks.tokens[own, index], landmarks.scores[own, index]
    )


def _by_head(arriving: Arriving) -> Arriving:
    """The same with each head as a row of its own: ``[B * K, 1, N, ...]``."""
    heads = arriving.entries.keys.shape[1]
    queries = arriving.queries
    if queries is not None:
        queries = queries.unflatten(1, (heads, -1)).flatten(0, 1)
    return replace(
        arriving,
        entries=_split(arriving.entries),
        tokens=arriving.tokens.repeat_interleave(heads, dim=0),
        decoded=_split(arriving.decoded),
        queries=queries,
    )


def _split(entries: Entries) -> Entries:
    weight = entries.log_weight
    return Entries(
        entries.keys.flatten(0, 1)[:, None],
        entries.values.flatten(0, 1)[:, None],
        None if weight is None else weight.flatten(0, 1)[:, None],
    )
