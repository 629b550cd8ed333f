"""Scenarios: their language, the built-in ones, and runs over several."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from adms import ADMSValueError
from adms.evaluation import suite
from adms.evaluation.scenarios import (
    built_in,
    choose_profiles,
    choose_scenarios,
    offline,
    parse_scenarios,
)
from adms.evaluation.settings import PROFILES
from adms.evaluation.suite import aggregate, collect, run_suite, trained_positions


def test_entries_are_split_at_each_name() -> None:
    one, two = parse_scenarios(
        "name=a model=m dataset=wikitext task=wikitext-103-raw-v1 split=test samples=64 tokens=8192"
        " log_every=512 name=b model='with space' dataset=pydoc tokens=100"
    )
    assert (one.name, one.task, one.samples, one.tokens, one.log_every) == (
        "a", "wikitext-103-raw-v1", 64, 8192, 512,
    )  # fmt: skip
    assert (two.model, two.dataset, two.task, two.tokens) == ("with space", "pydoc", None, 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=m name=a", "begins with name="),
        ("name=a model=m speed=9", "unknown key 'speed'"),
        ("name=a", "needs name=... and model=..."),
        ("name=a model=m tokens=many", "whole number"),
        ("name=a model=m tokens=²", "whole number"),
        ("name=a model=m name=a model=n", "two scenarios are called 'a'"),
        ("name=a model=m model=n", "stands twice"),
        ("name=a model=m nonsense", "key=value"),
        ("name=../up model=m", "becomes a folder"),
        ("name=a model='m", "cannot read the scenarios"),
        ("name=a model=m methods=adms,nope", "unknown method 'nope'"),
        ("name=a model=m depths=deep", "numbers in 0..1"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ADMSValueError, match=message):
        parse_scenarios(text)


def test_built_in_scenarios_cover_the_published_comparison() -> None:
    found = {(one.model.split("/")[-1], one.tokens) for one in built_in()}
    for model, lengths in {
        "TinyLlama-1.1B-Chat-v1.0": (2048, 4096),
        "opt-1.3b": (2048, 4096),
        "Meta-Llama-3-8B-Instruct": (8192, 16384, 32768),
        "pythia-6.9b": (2048,),
        "falcon-7b": (2048,),
        "mpt-7b": (2048,),
    }.items():
        assert {(model, length) for length in lengths} <= found


def test_choosing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADMS_TEST_ASSETS", raising=False)
    assert choose_scenarios("") == choose_scenarios(None) == built_in()
    assert choose_scenarios("offline") == offline()
    assert [one.name for one in choose_scenarios("llama3_8k, tinyllama_2k")] == [
        "llama3_8k", "tinyllama_2k",
    ]  # fmt: skip
    with pytest.raises(ADMSValueError, match="no scenario is called 'llama4'"):
        choose_scenarios("llama4")
    assert choose_profiles("") == list(PROFILES.values())
    assert [one.name for one in choose_profiles("quality")] == ["quality"]
    with pytest.raises(ADMSValueError, match="no profile is called 'best'"):
        choose_profiles("best")


def test_profiles_fit_context_and_trained_length() -> None:
    balanced = PROFILES["balanced"].config(4096, 8192)
    assert (balanced.start_size, balanced.compressed_budget, balanced.recent_size) == (4, 252, 256)
    quality = PROFILES["quality"].config(1536, 512)
    assert quality.start_size + quality.compressed_budget + quality.recent_size == 256


@pytest.fixture
def scenarios(tiny_model_folder: Path, text_file: Path) -> str:
    words = f"model={tiny_model_folder} dataset={text_file} tokens=200 methods=streaming,adms"
    return f"name=good {words} name=bad model=/nowhere/model dataset=pydoc tokens=200"


def test_a_failing_scenario_does_not_stop_the_others(scenarios: str, tmp_path: Path) -> None:
    chosen = parse_scenarios(scenarios)
    profiles = choose_profiles("quality")
    failures = run_suite(chosen, profiles, tmp_path, command="the command")
    assert [(one.scenario, one.profile) for one in failures] == [("bad", "quality")]
    report = (tmp_path / "report.md").read_text()
    assert "## Not run" in report and "bad quality: no model folder" in report
    assert "the command" in report
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["streaming", "adms"]
    for row in rows:
        assert (row["scenario"], row["model"], row["dataset"], row["context"]) == (
            "good", "tiny", "text.txt", "200",
        )  # fmt: skip
        assert int(row["max_bytes"]) == int(rows[0]["max_bytes"])
    assert (tmp_path / "plots" / "perplexity.png").stat().st_size > 1000


def test_finished_scenarios_are_left_alone_unless_forced(
    scenarios: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, profiles = parse_scenarios(scenarios)[:1], choose_profiles("quality")
    run_suite(good, profiles, tmp_path, command="")
    runs: list[Any] = []
    real = suite.run_evaluation
    monkeypatch.setattr(
        suite, "run_evaluation", lambda *args, **kwargs: runs.append(real(*args, **kwargs))
    )
    run_suite(good, profiles, tmp_path, command="")
    assert not runs
    run_suite(good, profiles, tmp_path, command="", force=True)
    assert len(runs) == 1
    assert len(aggregate(tmp_path, "", [])) == 2


def test_figures_of_another_configuration_are_named(scenarios: str, tmp_path: Path) -> None:
    profiles = choose_profiles("quality")
    good = parse_scenarios(scenarios)[:1]
    run_suite(good, profiles, tmp_path, command="")
    longer = [dataclasses.replace(good[0], tokens=210)]
    (failure,) = run_suite(longer, profiles, tmp_path, command="")
    assert "another configuration (different: config, lengths, tokens)" in failure.reason
    report = (tmp_path / "report.md").read_text()
    assert "good quality: " in report.split("## Not run")[1] and "FORCE_RERUN=1" in report
    assert not run_suite(longer, profiles, tmp_path, command="", force=True)
    assert not run_suite(longer, profiles, tmp_path, command="")


def test_where_nothing_can_run_the_report_says_why(scenarios: str, tmp_path: Path) -> None:
    bad = parse_scenarios(scenarios)[1:]
    (failure,) = run_suite(bad, choose_profiles("quality"), tmp_path / "new", command="")
    assert "no model folder at '/nowhere/model'" in failure.reason
    assert failure.reason in (tmp_path / "new" / "report.md").read_text()


def test_models_of_scenarios_are_found_at_home(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_model_folder.parent))
    assert trained_positions(f"~/{tiny_model_folder.name}") == 256


def test_collecting_from_nowhere_or_from_damage(tmp_path: Path) -> None:
    with pytest.raises(ADMSValueError, match="run adms report first"):
        collect(tmp_path / "absent")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ADMSValueError, match="is damaged"):
        collect(tmp_path)
