"""The script that makes the tables of docs/middle-tier.md."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "middle_tier_tables.py"
    spec = importlib.util.spec_from_file_location("middle_tier_tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["middle_tier_tables"] = module
    spec.loader.exec_module(module)
    return module


def jobs_of(script: ModuleType, texts: list[str]) -> list:
    return [job for make in script.TABLES.values() for job in make(texts)]


def test_every_job_has_a_folder_of_its_own(script: ModuleType) -> None:
    jobs = jobs_of(script, ["handbook.txt", "pydoc", "sotu.txt"])
    assert len({job.name for job in jobs}) == len(jobs) > 200


def test_sizes_are_sinks_budget_and_recent_tokens(script: ModuleType) -> None:
    for size, (budget, recent) in script.SIZES.items():
        assert 4 + budget + recent == size


def test_gaps_are_measured_against_the_default_run_of_the_text(
    script: ModuleType, tmp_path: Path
) -> None:
    texts = ["one.txt", "two.txt"]
    values = {"full": 10.0, "streaming": 20.0, "adms": 12.0}
    for job in jobs_of(script, texts):
        if job.table != "settings" or job.row not in (("default",), ("importance_ratio=0",)):
            continue
        asked = job.arguments[job.arguments.index("--methods") + 1].split(",")
        worse = 0.0 if job.row == ("default",) else 3.0
        lines = [
            f"{name},{name},{sample},{(values[name] + worse) * (1 + sample)},1,2"
            for name in asked
            for sample in range(2)
        ]
        folder = tmp_path / job.name
        folder.mkdir()
        (folder / "summary.json").write_text("[]")
        head = "method,label,sample,perplexity,cache_bytes,max_bytes"
        (folder / "rows.csv").write_text("\n".join([head, *lines]) + "\n")
    table = script.adms_table(list(script.setting_jobs(texts)), tmp_path)
    assert [row["setting"] for row in table] == ["default", "importance_ratio=0"]
    assert [row["mean"] for row in table] == ["0.800", "0.500"]
    assert table[1]["two.txt"] == "15.000 (50% / 50%)"


def test_recall_is_counted_by_depth(script: ModuleType, tmp_path: Path) -> None:
    job = next(iter(script.recall_jobs(["one.txt"])))
    folder = tmp_path / job.name
    folder.mkdir()
    lines = [f"{depth},{trial < 7}" for depth in (0.5, 0.1) for trial in range(10)]
    lines += ["0.9,True", "0.9,"]
    (folder / "rows.csv").write_text("\n".join(["depth,correct", *lines]) + "\n")
    (row,) = script.recall_table([job], tmp_path)
    assert row[job.column] == "7 7 1 of 1"
