"""The parts of the speed benchmark, on a tiny model."""

from pathlib import Path

import pytest
import torch

from adms import ADMSConfig
from adms.evaluation.random_models import random_llama
from adms.evaluation.speed_bench import Bench, Goal
from adms.evaluation.speed_parts import PARTS, crossing
from adms.evaluation.speed_report import SpeedReport

CONFIG = ADMSConfig(start_size=4, recent_size=64, compressed_budget=160)
# What each part measures on a CPU.
METHODS = {
    "batch1": ["streaming, 4 + 224", "streaming, 4 + 224", *["adms"] * 4],
    "batch16": ["adms without a middle", "adms"],
    "context32k": ["adms", "full"],
    "prefill": ["adms", "adms"],
    "memory": [],
    "first_call": ["streaming, 4 + 224", "adms"],
    "crossover": ["full", "full", "full", "streaming, 4 + 224", *["adms"] * 3],
}


@pytest.fixture(scope="module")
def bench() -> Bench:
    torch.manual_seed(0)
    return Bench(
        random_llama("tiny", torch.device("cpu"), torch.float32),
        CONFIG,
        tokens=8,
        positions=(600, 100_000),
        batch=2,
        context=500,
        context_batch=2,
        context_tokens=2,
        prompt=48,
        chunks=(16, 32),
    )


@pytest.mark.parametrize("name", list(PARTS))
def test_a_part(name: str, bench: Bench, tmp_path: Path) -> None:
    part = PARTS[name]
    rows = list(part.rows(bench))
    assert [row["method"] for row in rows] == METHODS[name]
    goals = part.goals(bench, rows)
    assert bool(goals) == (name not in ("memory", "first_call"))
    assert all(goal.measured > 0 for goal in goals)
    report = SpeedReport(tmp_path, {"parts": [name], "output": tmp_path})
    report.add(name, part.title, rows, goals)
    if not rows:
        assert not (tmp_path / "report.md").exists()
        return
    text = (tmp_path / "report.md").read_text()
    for goal in goals:
        assert goal.what in text
    # Under each table stands the command that made it.
    assert text.rstrip().endswith("`")
    assert {file.name for file in tmp_path.iterdir()} >= {
        "config.json", "environment.json", "rows.csv", "report.md",
    }  # fmt: skip


def test_positions_are_those_asked_for(bench: Bench) -> None:
    rows = [row for row in PARTS["batch1"].rows(bench) if row["method"] == "adms"]
    assert [row["way"] for row in rows] == ["generate", "generate", "steps", "steps"]
    near, far = rows[0]["position"], rows[1]["position"]
    # Whole rounds of the ring, from what was read to fill the cache.
    assert near <= 600 and 99_000 < far <= 100_000


def test_goals_say_whether_they_hold() -> None:
    assert Goal("a ratio", 1.1, 1.2, 1.05).row == {
        "what": "a ratio", "measured": "1.1", "must be": "<= 1.2", "goal": "<= 1.05",
        "holds": "yes",
    }  # fmt: skip
    assert Goal("a ratio", 3.0, 4, at_most=False).row["holds"] == "no"


def test_crossing() -> None:
    assert crossing([1000, 2000, 4000], [11.0, 12.0, 14.0], 15.0) == pytest.approx(5000)
    assert crossing([1000, 2000], [2.0, 1.5], 3.0) == float("inf")
