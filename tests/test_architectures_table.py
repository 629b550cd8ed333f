"""The README's table of architectures against the families there are."""

import importlib.util
from pathlib import Path

from adms.patches import FAMILIES

ROOT = Path(__file__).parents[1]


def test_the_readme_has_every_family_as_it_describes_itself() -> None:
    """Its versions come from runs of the version matrix, which a single run cannot repeat."""
    path = ROOT / "scripts" / "architectures_table.py"
    spec = importlib.util.spec_from_file_location("architectures_table", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        rows = [line for line in readme.splitlines() if line.startswith(script.row_start(family))]
        assert len(rows) == 1, f"README.md is out of date for {family.name}"
        assert "none |" not in rows[0]
