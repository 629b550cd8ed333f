"""Where results go: found writable before the work, and files that are whole or absent."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from adms.errors import ADMSTypeError, ADMSValueError


def ready_folder(path: str | os.PathLike[str]) -> Path:
    """Makes a folder where it is missing, and sees that files can be made in it.

    Raises:
        ADMSValueError: it cannot be made or written to.
    """
    folder = Path(path)
    if folder.is_file():
        raise ADMSValueError(
            f"cannot write results to {str(folder)!r}: it is a file; name a folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder).close()
    except OSError as error:
        raise ADMSValueError(
            f"cannot write results to {str(folder)!r}: {error.strerror}; use another folder"
        ) from error
    return folder


def ready_file(path: str | os.PathLike[str]) -> Path:
    """Makes the folder of a file that will be written, and sees that it can be.

    Raises:
        ADMSTypeError: ``path`` is no path.
        ADMSValueError: it is a folder, or its folder cannot be made or written to.
    """
    if not isinstance(path, str | os.PathLike):
        raise ADMSTypeError(f"path must be a string or a Path, got {path!r}")
    target = Path(path)
    if target.is_dir():
        raise ADMSValueError(f"{str(target)!r} is a folder; give the name of a file in it")
    ready_folder(target.parent)
    return target


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside ``path`` to write; it takes its place at the end, whole.

    Raises:
        ADMSValueError: it cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    try:
        yield partial
        partial.replace(target)
    # torch.save has no error of its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ADMSValueError(
            f"cannot write {str(target)!r}: {error}; name a file in a folder that can be written"
        ) from error
