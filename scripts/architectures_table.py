"""Writes the README's table of architectures from the reports of test runs, into a folder.

    python -m pytest tests/test_architectures*.py --junitxml=reports/newest.xml
    VERSION_MATRIX_REPORTS=reports bash scripts/version_matrix.sh
    python scripts/architectures_table.py reports

A version is in a family's row if every test of that family passed on it.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

# Run as a script, the checkout itself is not on the path.
sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers
from packaging.version import Version

from adms.evaluation.run_folder import Row, markdown_table, write_run
from adms.patches import FAMILIES, Family
from tests.patches.tiny import ARCHITECTURES, config_of

PARAMETERS = re.compile(r"\[(.+)\]$")


def family_of(name: str) -> Family:
    """The family of a tiny model."""
    model_type = config_of(name).model_type
    return next(family for family in FAMILIES if model_type in family.model_types)


def architecture_of(case: str) -> str | None:
    """The tiny model that a test case is about, by its parameters."""
    found = PARAMETERS.search(case)
    if found is None:
        return None
    text = f"-{found.group(1)}-"
    names = [name for name in ARCHITECTURES if f"-{name}-" in text]
    return max(names, key=len, default=None)


def read_report(path: Path) -> tuple[str, dict[str, list[bool]]]:
    """A run's transformers version, and per tiny model whether each of its tests passed."""
    root = ElementTree.parse(path).getroot()
    versions = {
        entry.get("value") for entry in root.iter("property") if entry.get("name") == "transformers"
    }
    if len(versions) != 1:
        raise SystemExit(f"{path} names no transformers version; make it with pytest --junitxml")
    results: dict[str, list[bool]] = defaultdict(list)
    for case in root.iter("testcase"):
        name = architecture_of(case.get("name", ""))
        if name is not None and case.find("skipped") is None:
            results[name].append(case.find("failure") is None and case.find("error") is None)
    return str(versions.pop()), results


def family_row(family: Family) -> Row:
    """What a family says of itself."""
    return {
        "Models": family.name,
        "`model_type`": ", ".join(f"`{name}`" for name in family.model_types),
        "Positions": family.positions,
        "Result": family.exact,
    }


def row_start(family: Family) -> str:
    """A family's row up to the versions."""
    return f"| {' | '.join(family_row(family).values())} |"


def rows_of(reports: dict[str, dict[str, list[bool]]]) -> list[Row]:
    """One row a family; a version stands there if every test of the family passed on it."""
    rows = []
    for family in FAMILIES:
        names = [name for name in ARCHITECTURES if family_of(name) is family]
        passed = sorted(
            (
                version
                for version, results in reports.items()
                if all(results.get(name) and all(results[name]) for name in names)
            ),
            key=Version,
        )
        versions = ", ".join(passed) or "none"
        rows.append({**family_row(family), "Tests passed with transformers": versions})
    return rows


def main() -> None:
    """Reads the folder of reports and prints the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "reports", type=Path, help="folder of JUnit files, at least one per version"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/architectures"))
    arguments = parser.parse_args()
    folder = arguments.reports
    paths = sorted(folder.glob("*.xml"))
    if not paths:
        raise SystemExit(f"{folder} holds no *.xml; make some with pytest --junitxml")
    transformers.utils.logging.set_verbosity_error()
    merged: dict[str, dict[str, list[bool]]] = {}
    for path in paths:
        version, results = read_report(path)
        known = merged.setdefault(version, defaultdict(list))
        for name, outcomes in results.items():
            known[name] += outcomes
    rows = rows_of(merged)
    counts = {
        version: sum(len(outcomes) for outcomes in results.values())
        for version, results in merged.items()
    }
    tests = ", ".join(f"{version}: {count} tests" for version, count in sorted(counts.items()))
    body = f"transformers {tests}.\n\n{markdown_table(rows)}"
    config = {"reports": [path.name for path in paths], "tests": counts}
    print(write_run(arguments.output, "Supported models", config, rows, body))


if __name__ == "__main__":
    main()
