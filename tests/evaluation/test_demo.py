"""The demonstration, on a tiny model."""

import csv
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adms.evaluation import demo

app = typer.Typer()
app.command()(demo.main)


def arguments(model: Path, text: Path, output: Path) -> list[str]:
    return [
        *("--model", str(model), "--text", str(text), "--output", str(output)),
        *("--start-size", "2", "--compressed-budget", "40", "--recent-size", "24"),
        *("--tokens", "400", "--new-tokens", "8", "--device", "cpu"),
    ]


def test_writes_report_rows_and_picture(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, arguments(tiny_model_folder, text_file, tmp_path))
    assert result.exit_code == 0, result.output
    assert "equal bytes" in result.output and "ADMSKVCache(" in result.output
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    # 400 tokens and more are beyond the 256 the model was trained on: no full cache, and said so.
    assert [row["method"] for row in rows] == ["StreamingLLM 2+64", "ADMS 2+40+24"]
    assert "no full cache" in result.output
    assert rows[0]["max bytes"] == rows[1]["max bytes"]
    for row in rows:
        assert int(row["cache bytes"]) <= int(row["max bytes"])
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "report.md").read_text()
    speeds = [line.split("|")[-3].strip() for line in report.splitlines() if line.startswith("| ")]
    assert all(len(speed.replace(",", "").replace(".", "").strip("0")) <= 3 for speed in speeds[1:])
    assert "was fitted to the model, once, in" in result.output
    assert "stream.png" in report and "compressed_budget 40" in report
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tokens"] == 400 and config["adms"]["recent_size"] == 24
    assert (tmp_path / "environment.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--text", "absent.txt"], "no text file at 'absent.txt'"),
        (["--model", "./absent"], "no model folder"),
        (["--tokens", "100000"], "use a longer text"),
        (["--recent-size", "4000"], "trained on 256"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tiny_model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    changes: list[str],
    message: str,
) -> None:
    given = arguments(tiny_model_folder, text_file, tmp_path) + changes
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and message in result.stderr
    assert "Traceback" not in result.output
