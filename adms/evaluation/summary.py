"""What the rows of a run say together: one row for each method and question."""

from collections import defaultdict

import numpy as np

from adms.evaluation.methods import FULL, STREAMING
from adms.evaluation.needles import KINDS
from adms.evaluation.run_folder import Row, RunFolder
from adms.evaluation.settings import PERPLEXITY, SPEED, Evaluation
from adms.evaluation.statistics import Losses, block_bootstrap, gap_closed, perplexity, wilson
from adms.evaluation.units import Unit

_COMMON = (
    "scenario", "profile", "model", "dataset", "context", "task", "method", "label",
    "start_size", "compressed_budget", "recent_size", "equal_memory",
)  # fmt: skip


def summarize(
    evaluation: Evaluation, folder: RunFolder, units: list[Unit], rows: list[Row]
) -> list[Row]:
    """The summary's rows, in the order of the tasks."""
    found: list[Row] = []
    for task in evaluation.tasks:
        own = [row for row in rows if row["task"] == task]
        if task == PERPLEXITY:
            found += _perplexities(evaluation, folder, units, own)
        elif task in KINDS:
            found += _recall(own)
        elif task == SPEED:
            found += [dict(row) for row in own]
    return found


def measured_losses(folder: RunFolder, units: list[Unit], rows: list[Row]) -> dict[str, Losses]:
    """Losses of the measured tokens of all samples, by method and budget."""
    first = next((row["measured_from"] for row in rows if "measured_from" in row), 1)
    parts: dict[str, list[Losses]] = defaultdict(list)
    for unit in units:
        if unit.task == PERPLEXITY and folder.is_done(unit.key):
            arrays = folder.arrays(unit.key)
            if arrays:
                parts[_group(unit.method, unit.config.compressed_budget)].append(
                    arrays["losses"][:, first - 1 :].reshape(-1)
                )
    return {name: np.concatenate(values) for name, values in parts.items()}


def _group(method: str, budget: int) -> str:
    return method if method == FULL else f"{method} {budget}"


def _perplexities(
    evaluation: Evaluation, folder: RunFolder, units: list[Unit], rows: list[Row]
) -> list[Row]:
    losses = measured_losses(folder, units, rows)
    full = losses.get(FULL)
    found = []
    groups: dict[str, Row] = {}
    for row in rows:
        groups.setdefault(_group(row["method"], row["compressed_budget"]), row)
    for name, first in groups.items():
        summary: Row = {key: first.get(key) for key in _COMMON}
        own = losses.get(name)
        if own is None:
            found.append({**summary, "note": first.get("note", "")})
            continue
        streaming = losses.get(_group(STREAMING, first["compressed_budget"]))
        value = perplexity(own)
        summary |= {
            "samples": evaluation.samples,
            "chunk": first["chunk"],
            "measured_from": first["measured_from"],
            "perplexity": value,
        }
        closed = None
        if streaming is not None and full is not None and first["method"] != FULL:
            closed = gap_closed(perplexity(streaming), perplexity(full), value)
        summary["gap_closed"] = closed
        for other, reference in (("streaming", streaming), ("full", full)):
            difference = (
                block_bootstrap(own - reference, seed=evaluation.seed)
                if reference is not None and reference is not own
                else None
            )
            summary |= {
                f"nats_over_{other}": difference and difference.estimate,
                f"nats_over_{other}_low": difference and difference.low,
                f"nats_over_{other}_high": difference and difference.high,
            }
        summary |= {"cache_bytes": first["cache_bytes"], "max_bytes": first["max_bytes"]}
        found.append(summary)
    return found


def _recall(rows: list[Row]) -> list[Row]:
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        key = (row["method"], row["compressed_budget"], row["context"], row.get("depth"))
        groups[key].append(row)
    found = []
    for group in groups.values():
        first = group[0]
        summary: Row = {key: first.get(key) for key in _COMMON}
        if "correct" not in first:
            found.append({**summary, "note": first.get("note", "")})
            continue
        rate = wilson(sum(row["correct"] for row in group), len(group))
        found.append(
            {
                **summary,
                "depth": first["depth"],
                "trials": len(group),
                "recall": rate.estimate,
                "recall_low": rate.low,
                "recall_high": rate.high,
                "cache_bytes": max(row["cache_bytes"] for row in group),
                "max_bytes": first["max_bytes"],
            }
        )
    return found


def curve_rows(evaluation: Evaluation, folder: RunFolder, units: list[Unit]) -> list[Row]:
    """Perplexity of every ``log_every`` tokens and bytes held there, by method and sample."""
    found = []
    step = evaluation.log_every
    for unit in units:
        if unit.task != PERPLEXITY or not folder.is_done(unit.key):
            continue
        arrays = folder.arrays(unit.key)
        if not arrays:
            continue
        tokens, nbytes = arrays["tokens"], arrays["nbytes"]
        for (sample, _), losses in zip(unit.texts, arrays["losses"], strict=True):
            for start in range(0, len(losses), step):
                stop = min(start + step, len(losses))
                reached = int(np.searchsorted(tokens, stop).clip(max=len(tokens) - 1))
                found.append(
                    {
                        "method": unit.method,
                        "compressed_budget": unit.config.compressed_budget,
                        "sample": sample,
                        "tokens": stop + 1,
                        "perplexity": perplexity(losses[start:stop]),
                        "perplexity_so_far": perplexity(losses[:stop]),
                        "cache_bytes": int(nbytes[reached]),
                    }
                )
    return found
