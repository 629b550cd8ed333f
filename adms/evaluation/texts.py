"""Where evaluations take their text from: a file, CPython's own documentation, or a data set."""

import hashlib
import itertools
import os
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from adms.errors import ADMSError, ADMSValueError

PYDOC = "pydoc"
"""The name that stands for the help topics that every CPython carries."""

_TEXT_SUFFIXES = (".htm", ".html", ".md", ".rst", ".tex", ".text", ".txt")


def load_text(
    name_or_path: str | os.PathLike[str] = PYDOC,
    *,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    max_rows: int | None = None,
) -> str:
    """Loads one long text.

    Args:
        name_or_path: ``"pydoc"``, a file in UTF-8, or the name of a data set for
            ``datasets.load_dataset``. What exists as a file is a file.
        config: the data set's configuration, e.g. ``"wikitext-2-raw-v1"``.
        split: the data set's split.
        column: the data set's column of strings; rows are joined by an empty line.
        max_rows: reads no more rows than this of a data set.

    Raises:
        ADMSValueError: there is no such file, data set, split or column, the file is not UTF-8,
            or the text is empty.
        ADMSError: this Python was installed without ``pydoc_data``.
    """
    if max_rows is not None and max_rows < 1:
        raise ADMSValueError(f"max_rows must be at least 1, got {max_rows}; use None for all rows")
    if name_or_path == PYDOC:
        return _pydoc_text()
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    path_meant = isinstance(name_or_path, os.PathLike) or name.startswith((".", "~", os.sep))
    if path.is_file():
        text = _file_text(path)
    elif path_meant or path.suffix.lower() in _TEXT_SUFFIXES or name.count("/") > 1 or not name:
        # Not left to datasets: a mistyped file must not become a search on the network.
        raise ADMSValueError(
            f"no text file at {name!r}; expected {PYDOC!r}, a file in UTF-8, or the name of a data "
            "set"
        )
    else:
        text = _dataset_text(name, config, split, column, max_rows)
    if not text.strip():
        raise ADMSValueError(f"the text from {name!r} is empty; use another one")
    return text


def text_digest(name: str) -> str | None:
    """SHA-256 of a text file; None for what is no file: ``"pydoc"`` and data sets.

    Raises:
        ADMSValueError: the file cannot be read.
    """
    path = Path(name).expanduser()
    if name == PYDOC or not path.is_file():
        return None
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ADMSValueError(
            f"cannot read {str(path)!r}: {error.strerror}; use another text"
        ) from error


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str:
    """The text of ids ``[N]``, special tokens left out."""
    # The signature allows a list, which only a batch of rows gives.
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def collect_ids(
    tokenizer: PreTrainedTokenizerBase,
    name_or_path: str | os.PathLike[str] = PYDOC,
    *,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    num_tokens: int,
    offset: int = 0,
    rows_at_a_time: int = 64,
) -> torch.Tensor:
    """Ids of a text of exactly the length asked for, ``[1, N]``.

    Rows of a data set are joined by an empty line, and read until there are enough tokens: however
    short they are, the length is reached.

    Args:
        tokenizer: of the model that reads the ids.
        name_or_path, config, split, column: as for ``load_text``.
        num_tokens: how many tokens to return.
        offset: how many tokens to leave out at the start.
        rows_at_a_time: rows of a data set to read first; twice as many each time that is too few.

    Raises:
        ADMSValueError: as ``load_text``; or the whole text has too few tokens.
    """
    rows = rows_at_a_time
    length = -1
    while True:
        text = load_text(name_or_path, config=config, split=split, column=column, max_rows=rows)
        try:
            return encode_text(tokenizer, text, offset=offset, num_tokens=num_tokens)
        except ADMSValueError:
            # Files come whole, and a data set has ended where twice the rows give no more text.
            if len(text) == length or name_or_path == PYDOC or Path(name_or_path).is_file():
                raise
        length, rows = len(text), 2 * rows


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    offset: int = 0,
    num_tokens: int | None = None,
) -> torch.Tensor:
    """Token ids of a text, without special tokens, ``[1, N]`` in int64.

    Args:
        tokenizer: of the model that reads the ids.
        text: what to encode; it is encoded whole, so that an offset means the same always.
        offset: how many tokens to leave out at the start.
        num_tokens: how many tokens to return; None returns all that follow the offset.

    Raises:
        ADMSValueError: the text has fewer tokens than were asked for.
    """
    if offset < 0:
        raise ADMSValueError(f"offset must be at least 0, got {offset}; it counts tokens")
    if num_tokens is not None and num_tokens < 1:
        raise ADMSValueError(
            f"num_tokens must be at least 1, got {num_tokens}; use None for all that follow offset"
        )
    # verbose=False: a text longer than the model was trained for is the purpose here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    wanted = 1 if num_tokens is None else num_tokens
    if len(ids) < offset + wanted:
        raise ADMSValueError(
            f"the text has {len(ids)} tokens, but {wanted} from offset {offset} on were asked "
            "for; use a longer text, fewer tokens or a smaller offset"
        )
    end = None if num_tokens is None else offset + num_tokens
    return torch.tensor(ids[offset:end], dtype=torch.long).unsqueeze(0)


def _pydoc_text() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ADMSError(
            "this Python has no module pydoc_data, which the default text comes from; name a "
            "text file instead"
        ) from error
    return "\n\n".join(topics.values())


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ADMSValueError(
            f"{str(path)!r} is not text in UTF-8 (byte {error.start}); convert it first, "
            "e.g. with iconv"
        ) from error
    except OSError as error:
        raise ADMSValueError(f"cannot read {str(path)!r}: {error.strerror}") from error


def _dataset_text(
    name: str, config: str | None, split: str, column: str, max_rows: int | None
) -> str:
    # datasets takes seconds to import, and the other sources do not need it.
    import datasets

    hint = f"expected {PYDOC!r}, a file in UTF-8, or the name of a reachable data set"
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        columns = rows.column_names
        if columns is not None and column not in columns:
            raise ADMSValueError(
                f"data set {name!r} has no column {column!r}; it has {', '.join(columns)}"
            )
        texts = [row[column] for row in itertools.islice(rows, max_rows)]
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ADMSError):
            raise
        raise ADMSValueError(f"cannot read text from {name!r}: {error}; {hint}") from error
    if not all(isinstance(text, str) for text in texts):
        raise ADMSValueError(
            f"column {column!r} of data set {name!r} does not hold strings; use another column"
        )
    return "\n\n".join(texts)
