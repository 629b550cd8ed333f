"""``scripts/measure_layers.py`` from end to end, on a tiny model."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from adms.errors import ADMSValueError
from adms.evaluation.models import load_model
from adms.gates import UpdateGates

ROOT = Path(__file__).parents[2]


def script() -> ModuleType:
    path = ROOT / "scripts" / "measure_layers.py"
    spec = importlib.util.spec_from_file_location("measure_layers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_row_of_the_table_is_measured_once(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = tmp_path / "some.safetensors"
    UpdateGates.untrained(load_model(str(tiny_model_folder), device="cpu")[0]).save(gates)
    options = {
        "--output": tmp_path / "run",
        "--model": tiny_model_folder,
        "--device": "cpu",
        "--offset": 0,
        "--tokens": 160,
        "--first": 100,
        "--chunk": 16,
        "--recent": 32,
        "--budget": 48,
        "--admissions": 0.5,
        "--blocks": 8,
        "--bounds": 0.1,
        "--compressor": "quantized",
        "--gates": gates,
    }
    given = [str(text_file), *(str(part) for pair in options.items() for part in pair)]
    module = script()
    module.main(given)
    report = (tmp_path / "run" / "report.md").read_text()
    rows = [line.split("|")[1].strip() for line in report.splitlines() if line.startswith("| ")]
    names = ["similarity, 0.5 of 8", "learned, some", "integrated, bound 0.1", "both"]
    assert rows == ["layer", "full cache", "StreamingLLM", "plain ADMS", *names]
    assert {"config.json", "environment.json", "rows.csv"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    found = {}
    for path in (tmp_path / "run" / "items").iterdir():
        row = json.loads(path.read_text())["rows"][0]
        found[row["layer"]] = row
    assert found["learned, some"]["loss"] == found["plain ADMS"]["loss"], "untrained gates"
    assert found["similarity, 0.5 of 8"]["admitted"] == 0.5
    assert found["plain ADMS"]["max_nbytes"] <= found["StreamingLLM"]["max_nbytes"]
    capsys.readouterr()
    module.main([*given, "--passkeys", "0"])
    assert "perplexity': " not in capsys.readouterr().out, "nothing is measured again"
    with pytest.raises(ADMSValueError, match="other|another"):
        module.main([*given, "--recent", "24"])
