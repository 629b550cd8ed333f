"""What a speed benchmark measures, and what must hold of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from adms.cache import ADMSKVCache
from adms.config import ADMSConfig
from adms.evaluation.latency import fill_bounded, open_cache
from adms.evaluation.run_folder import Row
from adms.kernels import Kernel

# How tokens are written: through ``generate``, or in a loop of single steps.
GENERATE, STEPS = "generate", "steps"


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        model: the model.
        config: of the ADMS cache.
        kernel: what decodes single tokens.
        tokens: timed per row of the tables.
        positions: of the stream, reached by advancing the counts.
        batch: rows of the part ``batch16``.
        context: tokens of the part ``context32k``, and of the longest one of ``crossover``.
        context_batch: its rows.
        context_tokens: timed there.
        prompt: tokens read in the part ``prefill``.
        chunks: sizes of chunks there.
        ids: ``[1, N]``, the text that fills bounded caches, over and over; None: random tokens.
        random_code: random directions in place of fitted ones.
    """

    model: PreTrainedModel
    config: ADMSConfig
    kernel: Kernel = "auto"
    tokens: int = 64
    positions: tuple[int, ...] = (1024, 5700, 100_000, 1_000_000)
    batch: int = 16
    context: int = 32768
    context_batch: int = 8
    context_tokens: int = 16
    prompt: int = 8192
    chunks: tuple[int, ...] = (64, 256, 1024)
    ids: torch.Tensor | None = None
    random_code: bool = True

    @property
    def slots(self) -> int:
        """Exact slots that an ADMS cache is compared at: sinks, budget and window."""
        config = self.config
        return config.start_size + config.compressed_budget + config.recent_size

    @property
    def streaming_label(self) -> str:
        """StreamingLLM in tables, with its sinks and its window."""
        config = self.config
        return f"streaming, {config.start_size} + {config.recent_size + config.compressed_budget}"

    def fill(self, cache: ADMSKVCache, rows: int, position: int) -> float:
        """Fills a bounded cache as if it had seen ``position`` tokens; see ``fill_bounded``."""
        return fill_bounded(self.model, cache, rows, position, self.ids)

    def open(self, method: str, position: int = 0, config: ADMSConfig | None = None) -> Any:
        """An empty cache of a method."""
        return open_cache(
            self.model, method, config or self.config, position, self.tokens, self.kernel,
            self.random_code,
        )  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """A figure that must hold.

    Attributes:
        what: it is.
        measured: its value.
        must: the bound.
        aim: what is wished for.
        at_most: whether the bounds are upper ones.
    """

    what: str
    measured: float
    must: float
    aim: float | None = None
    at_most: bool = True

    @property
    def row(self) -> Row:
        """As a row of a table."""
        sign = "<=" if self.at_most else ">="
        holds = self.measured <= self.must if self.at_most else self.measured >= self.must
        return {
            "what": self.what,
            "measured": f"{self.measured:.3g}",
            "must be": f"{sign} {self.must:g}",
            "goal": "" if self.aim is None else f"{sign} {self.aim:g}",
            "holds": "yes" if holds else "no",
        }


@dataclass(frozen=True)
class Part:
    """One part: its rows, and what must hold of them.

    Attributes:
        title: of its table.
        rows: measures.
        goals: from the rows.
    """

    title: str
    rows: Callable[[Bench], Iterator[Row]]
    goals: Callable[[Bench, list[Row]], list[Goal]]
