"""What ``adms chat`` and ``adms stream`` share: opening a memory, saving it, describing it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from adms.cache import ADMSKVCache
from adms.config import ADMSConfig
from adms.enable import enable_adms_llm
from adms.errors import ADMSValueError
from adms.session import Session, load_session, save_session


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Parameters of ``ADMSConfig`` from ``name=value``; values are JSON, or else plain strings.

    Raises:
        ADMSValueError: a pair without ``=``, or a name given twice.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise ADMSValueError(f"--set takes name=value, got {pair!r}; e.g. recent_size=512")
        if name in settings:
            raise ADMSValueError(f"--set {name} was given twice; leave one out")
        try:
            settings[name] = json.loads(text)
        except ValueError:
            settings[name] = text
    return settings


def open_memory(
    model: nn.Module, session: Path | None, settings: dict[str, Any]
) -> tuple[Session, bool]:
    """The session of a file, or an empty one where there is no such file yet.

    Returns:
        The session, and whether it came from the file.

    Raises:
        ADMSValueError: settings for a session that exists, which brings its own.
        SessionFileError: the file cannot be used.
    """
    if session is not None and session.exists():
        if settings:
            raise ADMSValueError(
                f"{session} exists and brings its own configuration; leave --set "
                f"{next(iter(settings))} out, or name another file"
            )
        return load_session(session, model), True
    cache = enable_adms_llm(model, **settings) if settings else enable_adms_llm(model, ADMSConfig())
    return Session(cache, None, {}), False


class Autosave:
    """Saves a cache to a file every so many tokens.

    Args:
        path: the file; None saves never.
        every: tokens between two saves.
        notes: gives what is saved beside the cache.
    """

    def __init__(self, path: Path | None, every: int, notes: Callable[[], dict[str, Any]]) -> None:
        if every < 1:
            raise ADMSValueError(f"--save-every must be at least 1, got {every}")
        self.path = path
        self.every = every
        self.notes = notes
        self.saved_at = 0

    def start(self, cache: ADMSKVCache) -> None:
        """Takes what the cache holds now as saved."""
        self.saved_at = cache.tokens_seen

    def maybe(self, cache: ADMSKVCache) -> None:
        """Saves if enough tokens have come since the last time."""
        if self.path is not None and cache.tokens_seen - self.saved_at >= self.every:
            self.now(cache)

    def now(self, cache: ADMSKVCache) -> None:
        """Saves."""
        if self.path is not None:
            save_session(cache, self.path, notes=self.notes())
            self.saved_at = cache.tokens_seen


class Rate:
    """Tokens per second since it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.tokens = 0

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.started
        return f"{self.tokens / max(seconds, 1e-9):.1f} tokens/s"


def in_bytes(count: int) -> str:
    """Bytes in a readable unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def status_line(cache: ADMSKVCache, rate: Rate) -> str:
    """Tokens seen, bytes of the bound, tokens per second, and what the tiers hold."""
    summary = cache.summary()
    parts = [
        f"{cache.tokens_seen:,} tokens seen",
        f"memory {in_bytes(cache.nbytes)} of {in_bytes(cache.max_nbytes)}",
        str(rate),
    ]
    middle = summary.get("middle", {})
    if middle.get("tokens"):
        parts.append(f"{middle['tokens']:,} in the middle ({middle['form']})")
    if middle.get("forgotten_tokens"):
        parts.append(f"{middle['forgotten_tokens']:,} forgotten")
    return " | ".join(parts)


def describe_memory(cache: ADMSKVCache) -> list[tuple[str, str]]:
    """What each tier holds, for ``/inspect``."""
    summary = cache.summary()
    if "sink" not in summary:
        return [("memory", "empty")]
    sink, middle, recent = summary["sink"], summary["middle"], summary["recent"]
    rows = [
        ("tokens seen", f"{summary['tokens_seen']:,}"),
        ("sink", f"{sink['tokens']} of {sink['capacity']} first tokens, exact"),
    ]
    if middle["tokens"]:
        text = f"{middle['tokens']:,} of at most {middle['capacity_tokens']:,} ({middle['form']})"
        if middle["landmarks"]:
            text += f", {middle['landmarks']} landmarks in a finer form"
        rows += [("middle", text), ("forgotten", f"{middle['forgotten_tokens']:,} tokens")]
    rows += [
        ("recent", f"{recent['tokens']:,} of {recent['capacity']:,} last tokens, exact"),
        ("bytes", f"{summary['nbytes']:,} of at most {summary['max_nbytes']:,}"),
        ("configuration", repr(cache.config)),
    ]
    return rows
