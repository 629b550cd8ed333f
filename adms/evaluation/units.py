"""The pieces of work of a run: each is measured alone, kept once finished, and never repeated.

A piece's result depends on its key and the run's configuration alone, so processes can share a run
in any order and the rows come out the same.
"""

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adms.cache import ADMSKVCache
from adms.config import ADMSConfig
from adms.errors import ADMSValueError, UnsupportedModelError
from adms.evaluation import needles
from adms.evaluation.console import percent
from adms.evaluation.methods import (
    ADMS,
    FULL,
    STREAMING,
    WINDOW,
    Method,
    open_method,
    trained_length,
)
from adms.evaluation.run_folder import Arrays, Row
from adms.evaluation.settings import PERPLEXITY, SPEED, Evaluation, short_name
from adms.evaluation.speed import WARMUP_TOKENS, measure_speed
from adms.evaluation.statistics import perplexity
from adms.evaluation.stream import answer, check_length, read, read_only
from adms.evaluation.texts import collect_ids, decode_ids

Progress = Callable[[int], object]

# Methods that can read several texts as rows of a batch.
READS_ROWS = (ADMS, STREAMING, FULL, WINDOW)


@dataclass(frozen=True)
class Unit:
    """One piece of work: a task with one method on texts that are read together.

    Attributes:
        key: its name in the run's folder.
        length: tokens of a trial; 0 for streams.
        texts: the number of each stream or trial, and the depth of a trial's fact.
    """

    key: str
    task: str
    method: str
    config: ADMSConfig
    length: int = 0
    texts: tuple[tuple[int, float], ...] = ((0, 0.0),)

    @property
    def label(self) -> str:
        """For progress bars."""
        depths = sorted({depth for _, depth in self.texts})
        place = f" {self.length} at {', '.join(map(percent, depths))}"
        return f"{self.method} {self.task}{place if self.length else ''}"


def plan(evaluation: Evaluation) -> list[Unit]:
    """Every piece of work of a run, in the order of its rows."""
    units = []
    for task in evaluation.tasks:
        for index, config in enumerate(evaluation.configs()):
            for method in evaluation.methods:
                # The full cache is the same for every budget.
                if method == FULL and index:
                    continue
                budget = "" if method == FULL else f"/b{config.compressed_budget}"
                stem = f"{task}/{method}{budget}"
                units += _of_task(evaluation, task, method, config, stem)
    return units


def _of_task(
    evaluation: Evaluation, task: str, method: str, config: ADMSConfig, stem: str
) -> list[Unit]:
    if task == SPEED:
        return [Unit(stem, task, method, config)]
    together = evaluation.together if method in READS_ROWS else 1
    if task == PERPLEXITY:
        streams = [(sample, 0.0) for sample in range(evaluation.samples)]
        return [
            Unit(f"{stem}/s{part[0][0]:03d}", task, method, config, texts=part)
            for part in _parts(streams, together)
        ]
    trials = [(trial, depth) for depth in evaluation.depths for trial in range(evaluation.trials)]
    return [
        Unit(
            f"{stem}/n{length}/d{part[0][1]}/t{part[0][0]:03d}",
            task,
            method,
            config,
            length,
            part,
        )
        for length in evaluation.lengths
        for part in _parts(trials, together)
    ]


def _answer_as_it_is(method: Method, device: torch.device) -> None:
    """An answer is a few tokens, which a graph captured for them would not repay."""
    if device.type == "cuda" and isinstance(method.cache, ADMSKVCache):
        method.cache.refuse_steps("an answer would not repay what a capture costs")


def _of_rows(method: Method, rows: list[int]) -> Method:
    """Some rows of what a method has read, in a cache of their own."""
    cache = copy.deepcopy(method.cache)
    cache.batch_select_indices(torch.tensor(rows))
    return dataclasses.replace(method, cache=cache)


def _parts(texts: list[tuple[int, float]], size: int) -> list[tuple[tuple[int, float], ...]]:
    return [tuple(texts[start : start + size]) for start in range(0, len(texts), size)]


@dataclass
class Bench:
    """A loaded model and the texts, made when the first piece of work asks for them."""

    evaluation: Evaluation
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: Any = None
    _ids: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def ids(self, offset: int, tokens: int) -> torch.Tensor:
        """``[1, tokens]`` of the run's text."""
        wanted = (offset, tokens)
        if wanted not in self._ids:
            one = self.evaluation
            self._ids[wanted] = collect_ids(
                self.tokenizer,
                one.text,
                config=one.text_config,
                split=one.split,
                column=one.column,
                num_tokens=tokens,
                offset=offset,
                rows_at_a_time=one.rows_at_a_time,
            )
        return self._ids[wanted]

    def describe(self, unit: Unit) -> Row:
        """The columns that every row begins with."""
        one = self.evaluation
        return {
            "scenario": one.scenario,
            "profile": one.profile,
            "model": short_name(one.model),
            "dataset": "/".join(filter(None, [short_name(one.text), one.text_config])),
            "context": unit.length or one.tokens,
            "task": unit.task,
            "method": unit.method,
            "start_size": unit.config.sink_size,
            "compressed_budget": unit.config.compressed_budget,
            "recent_size": unit.config.recent_size,
            "equal_memory": one.equal_memory,
        }

    def run(self, unit: Unit, on_chunk: Progress) -> tuple[list[Row], Arrays]:
        """Does one piece of work.

        Returns:
            Its rows and arrays. A ceiling or baseline that cannot work here gives a row with a
            note instead of figures; ADMS and StreamingLLM raise.
        """
        row = self.describe(unit)
        streaming = None if self.evaluation.equal_memory else unit.config.recent_size
        own = self.calibration if unit.method == ADMS else None
        # What is wrong with sizes or text is no method's fault and no result.
        self._chunk(unit)
        for sample, _ in unit.texts:
            self._text(unit, sample)
        try:
            with open_method(
                self.model,
                unit.method,
                unit.config,
                streaming_recent=streaming,
                calibration=own,
            ) as method:
                row["label"] = method.label
                found, arrays = self._measure(unit, method, on_chunk)
        except (ADMSValueError, UnsupportedModelError) as error:
            if unit.method in (ADMS, STREAMING):
                raise
            row.setdefault("label", unit.method)
            return [{**row, "note": str(error)}], {}
        return [{**row, **one} for one in found], arrays

    def _measure(self, unit: Unit, method: Method, on_chunk: Progress) -> tuple[list[Row], Arrays]:
        match unit.task:
            case "perplexity":
                return self._perplexity(unit, method, on_chunk)
            case "speed":
                row, arrays = self._speed(unit, method, on_chunk)
                return [row], arrays
            case _:
                return self._retrieval(unit, method, on_chunk), {}

    def _text(self, unit: Unit, sample: int) -> torch.Tensor:
        """``[1, tokens]`` that a piece of work reads; every sample and trial has its own."""
        one = self.evaluation
        tokens = unit.length or one.tokens
        stride = one.stride if unit.length and one.stride else tokens
        return self.ids(one.offset + sample * stride, tokens)

    def _chunk(self, unit: Unit) -> int:
        # What ADMS resolves to; every method reads in the same chunks.
        with open_method(self.model, ADMS, unit.config) as probe:
            return int(probe.cache.sizes.chunk)

    def _perplexity(
        self, unit: Unit, method: Method, on_chunk: Progress
    ) -> tuple[list[Row], Arrays]:
        one = self.evaluation
        check_length(method, one.tokens)
        chunk = self._chunk(unit)
        ids = torch.cat([self._text(unit, sample) for sample, _ in unit.texts])
        trace = read(self.model, method, ids, chunk=chunk, on_chunk=on_chunk)
        first = one.first_measured(trained_length(self.model))
        nbytes = np.asarray(trace.nbytes) // len(ids)
        rows: list[Row] = [
            {
                "sample": sample,
                "chunk": chunk,
                "measured_from": first,
                "perplexity": perplexity(losses[first - 1 :]),
                "cache_bytes": int(nbytes.max()),
                "max_bytes": method.max_nbytes,
            }
            for (sample, _), losses in zip(unit.texts, trace.losses, strict=True)
        ]
        arrays = {"losses": trace.losses, "tokens": np.asarray(trace.tokens), "nbytes": nbytes}
        return rows, arrays

    def _retrieval(self, unit: Unit, method: Method, on_chunk: Progress) -> list[Row]:
        trials = [self._trial(unit, sample, depth) for sample, depth in unit.texts]
        answer_tokens = max(needles.answer_tokens(self.tokenizer, one.answer) for one in trials)
        # The answer's last token is read by nobody.
        check_length(method, unit.length + answer_tokens - 1)
        chunk = self._chunk(unit)
        # Questions differ by a few tokens, and their texts with them. What is as long in all of
        # them is read as rows of one batch, in the chunks that each would be read in alone.
        alike: dict[int, list[int]] = defaultdict(list)
        for row, trial in enumerate(trials):
            alike[trial.text.shape[1]].append(row)
        shared = min(alike)
        if len(alike) > 1:
            shared -= shared % chunk
        _answer_as_it_is(method, self.model.device)
        texts = torch.cat([trial.text[:, :shared] for trial in trials])
        held = 0
        for read_tokens, nbytes in read_only(self.model, method, texts, chunk=chunk):
            on_chunk(read_tokens)
            held = max(held, nbytes // len(trials))
        replies: dict[int, torch.Tensor] = {}
        for rows in alike.values():
            own = method if len(alike) == 1 else _of_rows(method, rows)
            rest = torch.cat([trials[row].text[:, shared:] for row in rows])
            for _, nbytes in read_only(self.model, own, rest, chunk=chunk):
                held = max(held, nbytes // len(rows))
            produced = answer(
                self.model,
                own,
                torch.cat([trials[row].question for row in rows]),
                chunk=chunk,
                max_new_tokens=answer_tokens,
            )
            replies.update(zip(rows, produced, strict=True))
        return [
            {
                "sample": sample,
                "chunk": chunk,
                "depth": depth,
                "correct": needles.is_correct(self.tokenizer, replies[row], trial.answer),
                "expected": trial.answer,
                "reply": " ".join(decode_ids(self.tokenizer, replies[row]).split()),
                "cache_bytes": held,
                "max_bytes": method.max_nbytes,
            }
            for row, ((sample, depth), trial) in enumerate(zip(unit.texts, trials, strict=True))
        ]

    def _trial(self, unit: Unit, sample: int, depth: float) -> needles.Trial:
        """Every trial has its own filler text and its own facts."""
        return needles.make_trial(
            self.tokenizer,
            self._text(unit, sample),
            unit.task,
            length=unit.length,
            depth=depth,
            seed=self.evaluation.seed * 1000 + sample,
        )

    def _speed(self, unit: Unit, method: Method, on_chunk: Progress) -> tuple[Row, Arrays]:
        one = self.evaluation
        check_length(method, one.tokens + WARMUP_TOKENS + one.decode_tokens)
        chunk = self._chunk(unit)
        figures, arrays = measure_speed(
            self.model,
            method,
            self._text(unit, 0),
            chunk=chunk,
            decode_tokens=one.decode_tokens,
            on_chunk=on_chunk,
        )
        return {"chunk": chunk, "max_bytes": method.max_nbytes, **figures}, arrays
