"""The command ``adms``: help that teaches, results, and one clear line for mistakes."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from adms.cli import app
from adms.evaluation.console import print_table

SIZES = ["--start-size", "2", "--compressed-budget", "40", "--recent-size", "16"]


def invoke(*arguments: object, environment: dict[str, str] | None = None):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, [str(word) for word in arguments], env=environment)


@pytest.fixture
def place(tiny_model_folder: Path, text_file: Path) -> list[object]:
    return ["--model", tiny_model_folder, "--text", text_file, "--device", "cpu"]


@pytest.mark.parametrize("command", ["eval", "report", "bench", "passkey", "inspect"])
def test_help_teaches(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output and f"adms {command}" in result.output


def test_eval(place: list[object], tmp_path: Path) -> None:
    result = invoke(
        "eval", *place, *SIZES, "--tokens", 150, "--output", tmp_path, "--methods", "streaming,adms"
    )
    assert result.exit_code == 0, result.output
    assert "ADMS 2+40+16" in result.output and "earlier run" not in result.output
    assert (tmp_path / "report.md").is_file() and (tmp_path / "rows.csv").is_file()


def test_results_of_an_earlier_run_are_said_to_be_such(place: list[object], tmp_path: Path) -> None:
    command = ("eval", *place, *SIZES, "--tokens", 150, "--output", tmp_path, "--methods")
    invoke(*command, "streaming,adms")
    next((tmp_path / "items").glob("perplexity__adms__*.json")).unlink()
    again = invoke(*command, "streaming,adms")
    assert "1 of 2 results are from an earlier run" in again.output.replace("\n", " ")
    forced = invoke(*command, "streaming,adms", "--force")
    assert forced.exit_code == 0 and "earlier run" not in forced.output


def test_bench(place: list[object], tmp_path: Path) -> None:
    result = invoke(
        "bench", *place, *SIZES, "--tokens", 100, "--decode-tokens", 5, "--output", tmp_path
    )
    assert result.exit_code == 0, result.output
    header, *rows = (tmp_path / "rows.csv").read_text().splitlines()
    names = header.split(",")
    for name in ("first_token_ms", "token_ms_median", "token_ms_p99", "process_peak_bytes"):
        for row in rows:
            assert float(row.split(",")[names.index(name)]) > 0
    assert (tmp_path / "plots" / "latency.png").is_file()


def test_passkey(place: list[object], tmp_path: Path) -> None:
    result = invoke(
        *("passkey", *place, *SIZES, "--lengths", 220, "--depths", 0.5, "--trials", 1),
        *("--kinds", "passkey", "--methods", "adms", "--output", tmp_path),
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plots" / "passkey.png").is_file()


def test_inspect(place: list[object], tmp_path: Path) -> None:
    result = invoke("inspect", *place, *SIZES, "--tokens", 200, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plots" / "tiers.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "report.md").read_text()
    assert "| recent |" in report and "landmarks of the middle" in report
    bar = next(line for line in result.output.splitlines() if line.startswith("S"))
    assert set(bar.strip()) <= set("Sm.R") and bar.strip().endswith("R")


def test_report_from_the_environment(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    environment = {
        "SCENARIOS": f"name=one model={tiny_model_folder} dataset={text_file} tokens=200 "
        "methods=streaming,adms",
        "PROFILES": "quality",
        "OUTPUT_ROOT": str(tmp_path),
        "FORCE_RERUN": "0",
    }
    result = invoke("report", environment=environment)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "one" / "quality" / "summary.json").is_file()
    assert "finished before" in invoke("report", environment=environment).output
    forced = invoke("report", environment={**environment, "FORCE_RERUN": "1"})
    assert "finished before" not in forced.output
    report = (tmp_path / "report.md").read_text()
    assert "adms report --output-root" in report and "--profiles quality" in report
    collected = invoke("report", "--only-collect", environment=environment)
    assert "2 rows" in collected.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--text", "absent.txt"], "no text file"),
        (["eval", "--text", "no_such_data_set_here"], "cannot read text"),
        (["eval", "--set", "compressor_type=zip"], "unknown compressor 'zip'"),
        (["eval", "--set", "colour=blue"], "unknown parameter 'colour'"),
        (["eval", "--set", "rank"], "NAME=VALUE"),
        (["eval", "--set", "compressed_budget=30"], "use --compressed-budget 30"),
        (["bench", "--set", "recent_size=30"], "use --recent-size 30"),
        (["passkey", "--set", "start_size=1"], "use --start-size 1"),
        (["inspect", "--set", "compressed_budget=30"], "use --compressed-budget 30"),
        (["passkey", "--depths", ""], "depths must hold at least one value"),
        (["passkey", "--lengths", ","], "lengths must hold at least one value"),
        (["eval", "--recent-size", "300"], "the model was trained on 256"),
        (["eval", "--compressed-budget", "250"], "the model was trained on 256"),
        (["eval", "--methods", "h20"], "did you mean 'h2o'"),
        (["eval", "--model", "./absent"], "no model folder"),
        (["eval", "--dtype", "int8"], "dtype must name"),
        (["passkey", "--depths", "deep"], "--depths must be numbers"),
        (["report", "--scenarios", "nothing_like_this"], "no scenario is called"),
        (["inspect", "--tokens", "99999999"], "use a longer text"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    place: list[object], tmp_path: Path, arguments: list[str], message: str
) -> None:
    command, *changes = arguments
    before = [] if command == "report" else [*place, *SIZES]
    if command in ("eval", "passkey"):
        before += ["--output", tmp_path / "run"]
    if command == "report":
        before += ["--output-root", tmp_path / "root"]
    if "--compressed-budget" in changes:
        before = [*place, "--output", tmp_path / "run"]
    result = invoke(command, *before, *changes)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and message in result.stderr
    assert "Traceback" not in result.output and result.exc_info[0] is SystemExit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stream", "absent.txt"], "cannot read 'absent.txt'"),
        (["stream", "--generate", "-1"], "--generate must be at least 0"),
        (["stream", "--seed", "99999999999999999999"], "--seed must be of 64 bits"),
        (["chat", "--seed", "99999999999999999999"], "--seed must be of 64 bits"),
        (["stream", "--temperature", "1e-40"], "--temperature must be finite and at least 1e-06"),
        (["stream", "--temperature", "nan"], "--temperature must be finite"),
        (["stream", "--temperature", "inf"], "--temperature must be finite"),
        (["chat", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["chat", "--model", "./absent"], "no model folder"),
    ],
)
def test_mistakes_in_sessions_are_one_line_too(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and message in result.stderr


@pytest.mark.parametrize("command", [("eval",), ("eval", "--force"), ("inspect",)])
@pytest.mark.parametrize("below", ["", "run"])
def test_an_output_that_is_no_folder_is_refused_before_the_model_is_loaded(
    tmp_path: Path, command: tuple[str, ...], below: str
) -> None:
    (tmp_path / "file").touch()
    result = invoke(*command, "--model", "./absent", "--output", tmp_path / "file" / below)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert "cannot write results to" in result.stderr


def test_an_interrupted_inspect_keeps_nothing(
    place: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adms.cli.inspect.collect_ids", stop)
    result = invoke("inspect", *place, *SIZES, "--output", tmp_path)
    assert result.exit_code == 130 and "nothing was written" in result.stderr


def test_names_in_tables_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("of book[bold].txt", [{"text": "a rather wide a[red]b"}])
    out = capsys.readouterr().out
    assert "of book[bold].txt" in out and "a[red]b" in out


def test_wrong_values_of_options_are_exit_code_2() -> None:
    for option in (("--tokens", "many"), ("--seed", "-1")):
        result = invoke("eval", "--model", "./absent", *option)
        assert result.exit_code == 2 and "Traceback" not in result.output
        assert option[0] in result.stderr
