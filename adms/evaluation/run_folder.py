"""The folder of one run: files that are whole or absent, and results that survive a kill.

Every finished piece of work is one file in ``items/``; ``rows.csv`` is always derived from those,
so nothing is lost and nothing appears twice, however often a run is killed and started again.
"""

import csv
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch

import adms
from adms.errors import ADMSValueError
from adms.outputs import ready_folder

Row = dict[str, Any]
Arrays = dict[str, npt.NDArray[Any]]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a kill, finds it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; results are for reading by whoever may read the folder.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; keys keep their order."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV; the columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown_table(rows: Sequence[Row], show: Any = str) -> str:
    """Rows of equal keys as a Markdown table."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = (show(row[name]).replace("|", "\\|").replace("\n", " ") for name in columns)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def environment() -> dict[str, Any]:
    """What a reader must know to judge a figure's speed, and to make it again."""
    packages = ("torch", "transformers", "datasets", "accelerate", "numpy", "tokenizers")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "adms": adms.__version__,
        "packages": found,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_device": device,
    }


def command_line() -> str:
    """The command that made a result, as a user would type it again."""
    import shlex

    program = Path(sys.argv[0])
    name = program.name
    if name == "__main__.py":
        # `python -m adms.cli`, which is the command adms.
        name = program.parent.parent.name
    elif name.endswith(".py"):
        package = "adms" in program.parts and program.parent.name == "evaluation"
        words = f"-m adms.evaluation.{program.stem}" if package else _typed(program)
        name = f"python {words}"
    return " ".join([name, *map(shlex.quote, sys.argv[1:])])


def _typed(script: Path) -> str:
    """A script's path as one types it in the folder one is in; its name alone from elsewhere."""
    try:
        return script.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return script.name


def write_run(
    path: str | os.PathLike[str], title: str, config: dict[str, Any], rows: Sequence[Row], body: str
) -> str:
    """Writes the folder of a run that is measured in one go.

    Args:
        path: the folder; files of an earlier run in it are replaced.
        title: the report's heading.
        config: everything that decides the results.
        rows: the figures as they were measured, for ``rows.csv``.
        body: Markdown of the report: tables as people read them, and pictures.

    Returns:
        The report: heading, body, and the command that made it.

    Raises:
        ADMSValueError: the folder cannot be written.
    """
    folder = Path(path)
    report = f"# {title}\n\n{body.strip()}\n\n    {command_line()}\n"
    try:
        write_atomic(folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")
        write_json(folder / "environment.json", environment())
        write_atomic(folder / "rows.csv", csv_text(rows))
        # Last: its presence says that the run is complete.
        write_atomic(folder / "report.md", report)
    except OSError as error:
        raise ADMSValueError(
            f"cannot write results to {str(folder)!r}: {error.strerror}; use another folder"
        ) from error
    return report


def differing(folder: Path, config: dict[str, Any]) -> list[str]:
    """Names of what a folder's ``config.json`` says otherwise than ``config``.

    Raises:
        ADMSValueError: the file is missing or damaged.
    """
    before = _read_json(folder / "config.json")
    now = json.loads(json.dumps(config))
    alike = {name for name in before if name in now and before[name] == now[name]}
    return sorted({*before, *now} - alike)


class RunFolder:
    """One run's results.

    Args:
        path: the folder; made where it is missing.
        config: everything that decides the results. A folder that holds results of another
            configuration is refused.

    Raises:
        ADMSValueError: the folder belongs to another configuration, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], config: dict[str, Any]) -> None:
        self.path = Path(path)
        self.config = json.loads(json.dumps(config, sort_keys=True))
        try:
            ready_folder(self.items_path)
            self._settle_config()
        except OSError as error:
            raise ADMSValueError(
                f"cannot write results to {str(self.path)!r}: {error.strerror}; use another folder"
            ) from error

    @property
    def items_path(self) -> Path:
        """Where each finished piece of work has its file."""
        return self.path / "items"

    def _settle_config(self) -> None:
        file = self.path / "config.json"
        if file.is_file() and any(self.items_path.glob("*.json")):
            names = differing(self.path, self.config)
            if names:
                raise ADMSValueError(
                    f"{str(self.path)!r} holds results of another configuration (different: "
                    f"{', '.join(names)}); use another folder, or delete that one"
                )
        write_json(file, self.config)

    def is_done(self, key: str) -> bool:
        """Whether the piece of work with this key is finished."""
        return self._item(key).is_file()

    def finish(self, key: str, rows: list[Row], arrays: Arrays | None = None) -> None:
        """Keeps a finished piece of work: its rows, and arrays that plots are made from."""
        if arrays:
            buffer = BytesIO()
            np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
            write_atomic(self._item(key).with_suffix(".npz"), buffer.getvalue())
        # Last, since this file is what says that the work is done.
        write_json(self._item(key), {"key": key, "rows": rows})

    def rows(self, keys: Iterable[str]) -> list[Row]:
        """The rows of finished pieces, in the order of ``keys``."""
        found: list[Row] = []
        for key in keys:
            if self.is_done(key):
                found += _read_json(self._item(key))["rows"]
        return found

    def arrays(self, key: str) -> Arrays:
        """The arrays of a finished piece; empty where it has none."""
        file = self._item(key).with_suffix(".npz")
        if not file.is_file():
            return {}
        try:
            with file.open("rb") as opened, np.load(opened) as stored:
                return {name: stored[name] for name in stored.files}
        except (OSError, EOFError, ValueError, BadZipFile) as error:
            raise _damaged(file, error) from error

    def write_rows(self, keys: Iterable[str]) -> list[Row]:
        """Derives ``rows.csv`` from the finished pieces and returns its rows."""
        rows = self.rows(keys)
        write_atomic(self.path / "rows.csv", csv_text(rows))
        return rows

    def _item(self, key: str) -> Path:
        return self.items_path / f"{key.replace('/', '__')}.json"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a JSON {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error
    return found


def _damaged(file: Path, error: Exception) -> ADMSValueError:
    return ADMSValueError(
        f"{str(file)!r} is damaged ({error}); run again with --force, or delete the run's folder"
    )
