"""The file of a session: safetensors with JSON metadata and a checksum over every byte.

The header's metadata holds two strings: ``adms``, a JSON object that says what the tensors are, and
``sha256``, the digest of the whole file with these 64 characters set to zeros. Any change of any
byte is noticed. A file appears under its name complete or not at all.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from adms.errors import ADMSTypeError, SessionFileError

FORMAT = "adms-session"
VERSION = 1

_ZEROS = b"0" * 64
_MARK = b'"sha256":"'
# What safetensors itself accepts.
_LARGEST_HEADER = 100_000_000


def resolve_path(path: object) -> Path:
    """A caller's path, links followed: replacing a link must not cut it off from its file.

    Raises:
        ADMSTypeError: ``path`` is no path.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise ADMSTypeError(f"path must be a string or a Path, got {path!r}")
    return Path(os.path.realpath(Path(os.fspath(path)).expanduser()))


def pack(tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> bytes:
    """The bytes of a session file.

    Raises:
        ADMSTypeError: ``info`` holds something that JSON has no form for.
    """
    try:
        described = json.dumps(
            {"format": FORMAT, "version": VERSION, **info}, allow_nan=False, sort_keys=True
        )
    except (TypeError, ValueError) as error:
        raise ADMSTypeError(
            f"notes must be plain JSON values (strings, finite numbers, lists, dicts): {error}"
        ) from error
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = bytearray(save(held, {"adms": described, "sha256": _ZEROS.decode()}))
    place = _digest_place(data, 8 + int.from_bytes(data[:8], "little"), _ZEROS)
    if place < 0:
        raise RuntimeError("safetensors wrote a header of an unexpected form")
    data[place : place + 64] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def _digest_place(data: bytes | bytearray, header_end: int, digest: bytes) -> int:
    """Where the digest's characters start; -1 where they are not there exactly once.

    Text inside the JSON object cannot be taken for it, since its quotes are escaped.
    """
    wanted = _MARK + digest + b'"'
    first = data.find(wanted, 8, header_end)
    if first < 0 or data.find(wanted, first + 1, header_end) >= 0:
        return -1
    return first + len(_MARK)


def write(path: Path, data: bytes) -> None:
    """Puts ``data`` under ``path`` so that a reader finds the old file or the new one, whole.

    Raises:
        SessionFileError: the folder does not exist or cannot be written, or the disk is full; an
            old file stays as it was.
    """
    if path.is_dir():
        raise SessionFileError(f"{path} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise SessionFileError(f"the folder {path.parent} does not exist; make it first")
    _remove_abandoned(path)
    partial: Path | None = None
    try:
        # The process id tells a save under way from one that was killed.
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.{os.getpid()}.", suffix=".partial", dir=path.parent
        )
        partial = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(partial, path.stat().st_mode & 0o777)
        os.replace(partial, path)
        partial = None
        _sync_folder(path.parent)
    except OSError as error:
        raise SessionFileError(
            f"cannot write {path}: {error.strerror or error}; an older file there is unchanged"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Only POSIX lets a folder be opened, and only there a rename waits for this.
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Removes what saves to ``path`` left behind whose process is gone."""
    if os.name != "posix":
        return
    start = f".{path.name}."
    for found in path.parent.iterdir():
        if not (found.name.startswith(start) and found.name.endswith(".partial")):
            continue
        process = found.name[len(start) :].split(".")[0]
        if not process.isdigit():
            continue
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            found.unlink(missing_ok=True)
        except (PermissionError, OverflowError):
            continue


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and information of a session file, after checking all of its bytes.

    Raises:
        SessionFileError: there is no such file, or it is damaged, foreign or too new.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= _LARGEST_HEADER:
                raise SessionFileError(f"{path} is not a session file: it is no safetensors file")
            header = file.read(length)
            if len(header) < length:
                raise _truncated(path, size, 8 + length)
            metadata = _metadata(path, header, size)
            data = start + header + file.read()
    except OSError as error:
        raise SessionFileError(f"cannot read {path}: {error.strerror or error}") from error
    info = _info(path, metadata)
    _check_digest(path, data, 8 + length, metadata)
    try:
        return load(data), info
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(path, str(error)) from error


def _truncated(path: Path, size: int, wanted: int) -> SessionFileError:
    return SessionFileError(
        f"{path} is cut short: it has {size} bytes of at least {wanted}; use an older copy"
    )


def _damaged(path: Path, why: str) -> SessionFileError:
    return SessionFileError(f"{path} is damaged ({why}); use an older copy")


def _metadata(path: Path, header: bytes, size: int) -> dict[str, str]:
    try:
        parsed = json.loads(header)
        metadata = parsed.get("__metadata__", {})
        ends = [
            entry["data_offsets"][1] for name, entry in parsed.items() if name != "__metadata__"
        ]
        wanted = 8 + len(header) + max(ends, default=0)
        is_session = isinstance(metadata.get("adms"), str) and isinstance(
            metadata.get("sha256"), str
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _damaged(path, "its header cannot be read") from error
    if not is_session:
        raise SessionFileError(
            f"{path} is a safetensors file, but not a session; expected one made by cache.save"
        )
    if size < wanted:
        raise _truncated(path, size, wanted)
    return metadata


def _info(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        info = json.loads(metadata["adms"])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its description cannot be read") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise _damaged(path, f"its description is not of format {FORMAT!r}")
    version = info.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise _damaged(path, f"version {version!r}")
    if version > VERSION:
        raise SessionFileError(
            f"{path} is of session version {version}, this ADMS reads up to {VERSION}; update adms"
        )
    return info


def _check_digest(path: Path, data: bytes, header_end: int, metadata: dict[str, str]) -> None:
    stated = metadata["sha256"]
    try:
        place = _digest_place(data, header_end, stated.encode("ascii"))
    except UnicodeEncodeError as error:
        raise _damaged(path, "its checksum cannot be read") from error
    if len(stated) != 64 or place < 0:
        raise _damaged(path, "its checksum cannot be read")
    digest = hashlib.sha256(data[:place])
    digest.update(_ZEROS)
    digest.update(data[place + 64 :])
    if digest.hexdigest() != stated:
        raise _damaged(path, "its checksum does not fit its content")
