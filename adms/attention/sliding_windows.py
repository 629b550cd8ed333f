"""Sliding windows over a sequence: queries in blocks, each with the keys that it can reach.

Letters: ``B`` batch, ``H`` heads, ``N`` tokens, ``D`` head size, ``W`` windows, ``Q`` queries of a
window, ``K`` keys of a window. Windows are laid out as rows of one batch, so that all of them are
one call and none waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlidingWindows:
    """Where each window's queries and keys stand in the sequence.

    Attributes:
        tokens: length ``N`` of the sequence.
        query_at: positions ``[W, Q]`` of queries; the last window's may pass the end.
        key_at: positions ``[W, K]`` of keys; those outside ``0..N-1`` don't exist.
    """

    tokens: int
    query_at: Tensor
    key_at: Tensor

    @classmethod
    def over(
        cls, tokens: int, win_size: int, before: int, after: int, device: torch.device
    ) -> SlidingWindows:
        """Cut ``tokens`` into windows of ``win_size`` whose keys also cover tokens around them.

        ``before`` and ``after`` are how many tokens of keys precede and follow a window's queries:
        the overlap of neighbouring windows.
        """
        starts = torch.arange(0, tokens, win_size, device=device)[:, None]
        query_at = starts + torch.arange(win_size, device=device)
        key_at = starts + torch.arange(-before, win_size + after, device=device)
        return cls(tokens, query_at, key_at)

    @property
    def distance(self) -> Tensor:
        """Signed distances ``[W, Q, K]`` in tokens, positive where the key precedes the query."""
        return self.query_at[:, :, None] - self.key_at[:, None, :]

    @property
    def exists(self) -> Tensor:
        """Boolean ``[W, 1, K]``: which keys are tokens of the sequence."""
        return ((self.key_at >= 0) & (self.key_at < self.tokens))[:, None, :]

    def queries(self, x: Tensor) -> Tensor:
        """Return ``[B * W, H, Q, D]`` of ``[B, H, N, D]``; queries past the end repeat the last."""
        return self._gather(x, self.query_at)

    def keys(self, x: Tensor) -> Tensor:
        """Return ``[B * W, H, K, D]`` of ``[B, H, N, D]``; keys outside repeat the nearest."""
        return self._gather(x, self.key_at)

    def scales(self, x: Tensor) -> Tensor:
        """Return ``[B, W, Q]`` of one number per token ``[B, N]``."""
        return x[:, self.query_at.clamp(max=self.tokens - 1)]

    def mask(self, mask: Tensor) -> Tensor:
        """Return ``[B or 1, W, H or 1, Q, K]`` of ``[B or 1, H or 1, N or 1, N or 1]``."""
        whole = mask.expand(-1, -1, self.tokens, self.tokens)
        rows = self.query_at.clamp(max=self.tokens - 1)[:, :, None]
        columns = self.key_at.clamp(0, self.tokens - 1)[:, None, :]
        return whole[:, :, rows, columns].transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """Return ``[B, H, N, D]`` of windows' outputs ``[B * W, H, Q, D]``."""
        windows = x.unflatten(0, (-1, self.query_at.shape[0])).transpose(1, 2)
        return windows.flatten(2, 3)[:, :, : self.tokens]

    def _gather(self, x: Tensor, at: Tensor) -> Tensor:
        picked = x[:, :, at.clamp(0, self.tokens - 1)]
        return picked.transpose(1, 2).flatten(0, 1)
