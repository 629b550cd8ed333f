"""Runs into folders: complete, resumable after a kill anywhere, shared by processes."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from adms import ADMSConfig, ADMSError, ADMSValueError
from adms.evaluation import run_folder, runner
from adms.evaluation.run_folder import RunFolder, csv_text, markdown_table, write_atomic, write_run
from adms.evaluation.runner import run_evaluation
from adms.evaluation.settings import Evaluation
from adms.evaluation.units import plan

CONFIG = ADMSConfig(start_size=2, compressed_budget=40, recent_size=16, prefill_chunk_size=16)


def small(model: Path, text: Path, **changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "model": str(model),
        "text": str(text),
        "config": CONFIG,
        "methods": ("full", "streaming", "adms", "h2o"),
        "tokens": 120,
        "samples": 2,
        "log_every": 50,
        **changes,
    }
    return Evaluation(**values)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "rows.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(
    tiny_model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A run with every task but speed."""
    folder = tmp_path_factory.mktemp("run")
    evaluation = small(
        tiny_model_folder,
        text_file,
        tasks=("perplexity", "passkey"),
        budgets=(24, 40),
        lengths=(200,),
        depths=(0.5,),
        trials=2,
    )
    return folder, run_evaluation(evaluation, folder, command="the command")


def test_a_run_leaves_everything_a_reader_needs(
    finished: tuple[Path, list[dict[str, Any]]], tiny_model_folder: Path
) -> None:
    folder, summary = finished
    report = (folder / "report.md").read_text()
    assert "the command" in report and "| ADMS 2+40+16 |" in report
    for name in ("loss.png", "memory.png", "quality.png", "passkey.png"):
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG")
        assert f"plots/{name}" in report
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["compressed_budget"] == 40 and config["budgets"] == [24, 40]
    # Results travel; folders of the machine they were made on do not.
    for file in folder.rglob("*.*"):
        if file.suffix != ".png" and file.suffix != ".npz":
            assert str(tiny_model_folder.parent) not in file.read_text()
    rows = rows_of(folder)
    # Two samples and two trials; the full cache once, the others for each budget.
    assert len(rows) == 2 * (2 + 2 * 3 * 2)
    assert len({tuple(row.items()) for row in rows}) == len(rows)
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_summary_agrees_with_the_losses(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, summary = finished
    first = {row["measured_from"] for row in summary if row["task"] == "perplexity"}
    assert first == {60}
    losses = [
        np.load(folder / "items" / f"perplexity__adms__b40__s00{sample}.npz")["losses"][0, 59:]
        for sample in range(2)
    ]
    row = next(r for r in summary if r["method"] == "adms" and r["compressed_budget"] == 40)
    assert row["perplexity"] == pytest.approx(np.exp(np.concatenate(losses).mean()))
    other = [
        np.load(folder / "items" / f"perplexity__streaming__b40__s00{sample}.npz")["losses"][0, 59:]
        for sample in range(2)
    ]
    difference = np.concatenate(losses).mean() - np.concatenate(other).mean()
    assert row["nats_over_streaming"] == pytest.approx(difference, abs=1e-6)
    assert row["max_bytes"] == next(
        r["max_bytes"]
        for r in summary
        if r["method"] == "streaming" and r["compressed_budget"] == 40
    )


def test_what_cannot_run_gives_a_note_and_no_figures(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    # 300 tokens: more than the 256 the model was trained on.
    evaluation = small(tiny_model_folder, text_file, tokens=300, samples=1)
    summary = run_evaluation(evaluation, tmp_path, command="")
    full = next(row for row in summary if row["method"] == "full")
    assert "trained on 256" in full["note"] and "perplexity" not in full
    assert next(row for row in summary if row["method"] == "adms")["perplexity"] > 1
    assert "trained on 256" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("task", "sizes"),
    [("passkey", {"lengths": (256,)}), ("speed", {"tokens": 250, "decode_tokens": 6})],
)
def test_what_is_written_has_no_positions_beyond_the_trained_length(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path, task: str, sizes: dict[str, Any]
) -> None:
    """Learned positions end at the trained length, 256 here; the text alone would fit."""
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=258,
            hidden_size=32,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            word_embed_proj_dim=32,
        )
    )
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    evaluation = small(
        folder,
        text_file,
        **{"tasks": (task,), "depths": (0.5,), "trials": 1, "methods": ("full", "adms"), **sizes},
    )
    full, ours = run_evaluation(evaluation, tmp_path / "run", command="")
    assert "trained on 256" in full["note"] and not ours.get("note")


@pytest.fixture(scope="module")
def uncut(
    tiny_model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """The run that is cut short below, uncut."""
    folder = tmp_path_factory.mktemp("uncut")
    evaluation = small(tiny_model_folder, text_file, samples=1, methods=("full", "adms"))
    return folder, run_evaluation(evaluation, folder, command="")


class Killed(BaseException):
    """Stands for a kill: nothing of the program sees it coming."""


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 5])
def test_a_kill_at_any_write_loses_nothing_and_repeats_nothing(
    tiny_model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uncut: tuple[Path, list[dict[str, Any]]],
    writes: int,
) -> None:
    evaluation = small(tiny_model_folder, text_file, samples=1, methods=("full", "adms"))
    whole_folder, whole = uncut
    real, count = os.replace, 0

    def replace(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > writes:
            raise Killed
        real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_folder.os, "replace", replace)
        run_evaluation(evaluation, tmp_path / "cut", command="")
    kept = {file: file.read_bytes() for file in (tmp_path / "cut" / "items").glob("*.json")}
    assert run_evaluation(evaluation, tmp_path / "cut", command="") == whole
    assert rows_of(tmp_path / "cut") == rows_of(whole_folder)
    for file, content in kept.items():
        assert file.read_bytes() == content


def test_finished_work_is_not_done_again(
    finished: tuple[Path, list[dict[str, Any]]],
    tiny_model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluation = small(tiny_model_folder, text_file, samples=1, methods=("streaming",))
    run_evaluation(evaluation, tmp_path, command="")

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(runner, "load_model", refuse)
    run_evaluation(evaluation, tmp_path, command="")
    with pytest.raises(AssertionError, match="loaded again"):
        run_evaluation(evaluation, tmp_path, command="", force=True)


def test_another_configuration_is_refused(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    one = small(tiny_model_folder, text_file, samples=1, methods=("streaming",))
    run_evaluation(one, tmp_path, command="")
    other = small(tiny_model_folder, text_file, samples=1, methods=("streaming",), tokens=121)
    with pytest.raises(ADMSValueError, match="different: tokens"):
        run_evaluation(other, tmp_path, command="")


def test_another_text_or_model_of_the_same_name_is_refused(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    def named(place: str, text: str, changes: str) -> Evaluation:
        folder = tmp_path / place
        shutil.copytree(tiny_model_folder, folder / "model")
        config = folder / "model" / "config.json"
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', changes))
        (folder / "text.txt").write_text(text)
        asked = {"samples": 1, "methods": ("streaming",)}
        return small(folder / "model", folder / "text.txt", **asked)

    text, same = text_file.read_text(), '"rms_norm_eps": 1e-06'
    before = run_evaluation(named("one", text, same), tmp_path / "run", command="")
    again = run_evaluation(named("moved", text, same), tmp_path / "run", command="")
    assert again == before
    with pytest.raises(ADMSValueError, match="different: text_digest"):
        run_evaluation(named("text", text[::-1], same), tmp_path / "run", command="")
    with pytest.raises(ADMSValueError, match="different: model_digest"):
        other = named("model", text, '"rms_norm_eps": 1e-05')
        run_evaluation(other, tmp_path / "run", command="")
    # Not a file: nothing to digest, and a run that was begun before goes on.
    assert "text_digest" not in Evaluation().to_dict()


class Process:
    """One of several processes; the others' barriers are the order of the calls."""

    def __init__(self, index: int, number: int) -> None:
        self.process_index, self.num_processes = index, number
        self.is_main_process = index == 0

    def wait_for_everyone(self) -> None:
        """Nothing to wait for."""

    def main_process_first(self) -> Any:
        """Nothing to wait for."""
        return nullcontext()


def test_shards_give_the_rows_of_one_process(
    tiny_model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluation = small(tiny_model_folder, text_file)
    whole = run_evaluation(evaluation, tmp_path / "whole", command="")
    done: list[set[str]] = []
    for index in (2, 1, 0):
        monkeypatch.setattr(runner, "this_process", lambda index=index: Process(index, 3))
        before = {file.name for file in (tmp_path / "shared" / "items").glob("*.json")}
        with pytest.raises(ADMSError, match="not done") if index else nullcontext():
            run_evaluation(evaluation, tmp_path / "shared", command="")
        after = {file.name for file in (tmp_path / "shared" / "items").glob("*.json")}
        done.append(after - before)
    assert all(done) and sum(map(len, done)) == len(plan(evaluation))
    assert rows_of(tmp_path / "shared") == rows_of(tmp_path / "whole")
    assert json.loads((tmp_path / "shared" / "summary.json").read_text()) == whole


def command(model: Path, text: Path, output: Path) -> list[str]:
    return [
        *("-m", "adms.cli", "eval", "--model", str(model), "--text", str(text)),
        *("--tokens", "120", "--samples", "6", "--methods", "streaming,adms"),
        *("--start-size", "2", "--compressed-budget", "40", "--recent-size", "16"),
        *("--output", str(output)),
    ]


@pytest.mark.slow
def test_a_real_kill(tiny_model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = command(tiny_model_folder, text_file, tmp_path / "cut")
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    items = tmp_path / "cut" / "items"
    deadline = time.monotonic() + 300
    while len(list(items.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([sys.executable, *arguments], check=True)
    whole = command(tiny_model_folder, text_file, tmp_path / "whole")
    subprocess.run([sys.executable, *whole], check=True)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert len(rows_of(tmp_path / "cut")) == 12


@pytest.mark.slow
def test_accelerate_launch_gives_the_rows_of_one_process(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    several = command(tiny_model_folder, text_file, tmp_path / "several")
    subprocess.run([*launch, *several], check=True)
    one = command(tiny_model_folder, text_file, tmp_path / "one")
    subprocess.run([sys.executable, *one], check=True)
    assert rows_of(tmp_path / "several") == rows_of(tmp_path / "one")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.csv"
    write_atomic(file, "old")

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(run_folder.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_tables() -> None:
    rows = [{"a": 1, "b": "x|y"}, {"a": 2, "b": "line\nbreak"}]
    assert markdown_table(rows).splitlines()[2:] == ["| 1 | x\\|y |", "| 2 | line break |"]
    assert csv_text([{"a": 1}, {"b": 2}]) == "a,b\n1,\n,2\n"


def test_a_run_in_one_go_leaves_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "scripts" / "it.py"), "a b.txt"])
    rows = [{"n": 1, "ms": 0.5}, {"n": 2}]
    report = write_run("out", "Title", {"path": tmp_path / "x"}, rows, "| n |\n|---|\n| 1 |\n")
    assert report == "# Title\n\n| n |\n|---|\n| 1 |\n\n    python scripts/it.py 'a b.txt'\n"
    assert (tmp_path / "out" / "report.md").read_text() == report
    assert (tmp_path / "out" / "rows.csv").read_text() == "n,ms\n1,0.5\n2,\n"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["path"].endswith("x")
    assert "torch" in json.loads((tmp_path / "out" / "environment.json").read_text())["packages"]
    with pytest.raises(ADMSValueError, match="cannot write results"):
        write_run("out/report.md/below", "Title", {}, [], "")


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ADMSValueError, match="cannot write results"):
        RunFolder(tmp_path / "file" / "run", {})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("items/a.json", b"\xff"),
        ("items/a.npz", b""),
        ("items/a.npz", b"PK\x03\x04"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = RunFolder(tmp_path, {})
    folder.finish("a", [{"figure": 1}], {"losses": np.ones(3)})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ADMSValueError, match=f"{name}' is damaged"):
        again = RunFolder(tmp_path, {})
        again.rows(["a"])
        again.arrays("a")


def test_a_missing_text_is_nobodys_result(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Nothing is kept of it: with the text there, the same run gives figures for every method."""
    text = tmp_path / "text.txt"
    evaluation = Evaluation(
        model=str(tiny_model_folder),
        text=str(text),
        tokens=200,
        methods=("full", "streaming", "adms"),
        config=ADMSConfig(start_size=2, recent_size=16, compressed_budget=14),
    )
    with pytest.raises(ADMSValueError, match="no text"):
        run_evaluation(evaluation, tmp_path / "run", command="")
    assert not list((tmp_path / "run" / "items").iterdir())
    text.write_text("a text that came later, " * 40)
    again = dataclasses.replace(evaluation, text=str(text), tokens=2000)
    with pytest.raises(ADMSValueError, match="2000"):
        run_evaluation(again, tmp_path / "run", command="")
    rows = run_evaluation(evaluation, tmp_path / "run", command="")
    assert [row["method"] for row in rows if row["perplexity"] > 0] == list(evaluation.methods)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("adms", "strming")}, "unknown method 'strming'"),
        ({"methods": ()}, "no method given"),
        ({"tasks": ("poetry",)}, "unknown task 'poetry'"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"depths": (1.5,)}, "0..1"),
        ({"depths": ()}, "depths must hold at least one value"),
        ({"lengths": ()}, "lengths must hold at least one value"),
        ({"measure_from": 120}, "measure_from must lie in 1..119"),
        ({"budgets": (0,)}, "budgets"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ADMSValueError, match=message):
        small(Path("model"), Path("text"), **changes)


def test_what_is_asked_for_twice_is_measured_once() -> None:
    asked = small(
        Path("model"),
        Path("text"),
        tasks=("perplexity", "passkey", "perplexity"),
        methods=("adms", "adms", "streaming"),
        budgets=(30, 30),
        lengths=(200, 200),
        depths=(0.5, 0.5, 0.50001),
        trials=1,
    )
    once = dataclasses.replace(
        asked,
        tasks=("perplexity", "passkey"),
        methods=("adms", "streaming"),
        budgets=(30,),
        lengths=(200,),
        depths=(0.5, 0.50001),
    )
    assert asked == once
    keys = [unit.key for unit in plan(asked)]
    assert len(keys) == 2 * (2 + 2) and len(set(keys)) == len(keys)


def test_texts_read_together_give_what_they_give_alone(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    rows = []
    # Three are trials of both depths.
    for together in (1, 3):
        evaluation = small(
            tiny_model_folder,
            text_file,
            # Questions about several keys are not all of one length.
            tasks=("perplexity", "passkey", "multikey"),
            methods=("streaming", "adms", "window", "keydiff"),
            samples=4,
            lengths=(400,),
            depths=(0.2, 0.7),
            trials=4,
            together=together,
        )
        folder = tmp_path / str(together)
        run_evaluation(evaluation, folder, command="the command")
        rows.append(rows_of(folder))
    assert len(rows[0]) == 4 * (4 + 2 * 2 * 4)
    for alone, together in zip(*rows, strict=True):
        # A batch shares what does not depend on its rows, so a row's part of the bytes is less.
        for name in ("cache_bytes", "max_bytes"):
            one, part = alone.pop(name), together.pop(name)
            assert one == part or 0.9 * float(one) < float(part) <= float(one)
        # A batch rounds otherwise, and a codeword may fall the other way.
        for name in ("perplexity",):
            assert float(alone.pop(name) or 0) == pytest.approx(
                float(together.pop(name) or 0), rel=1e-3
            )
        assert alone == together


def test_trials_begin_a_stride_apart(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """A text that is too short for texts of their own carries overlapping ones."""
    asked = {"tasks": ("passkey",), "methods": ("adms",), "depths": (0.5,), "trials": 4}
    apart = small(tiny_model_folder, text_file, lengths=(2000,), **asked)
    with pytest.raises(ADMSValueError, match="the text has"):
        run_evaluation(apart, tmp_path / "apart", command="the command")
    near = small(tiny_model_folder, text_file, lengths=(2000,), stride=100, **asked)
    run_evaluation(near, tmp_path / "near", command="the command")
    assert len(rows_of(tmp_path / "near")) == 4
    with pytest.raises(ADMSValueError, match="stride must be at least 1"):
        small(tiny_model_folder, text_file, stride=0)
