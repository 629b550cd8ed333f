"""A typed registry of named things that users may extend."""

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from adms.errors import ADMSTypeError, ADMSValueError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names mapped to objects of one kind, with helpful errors.

    Args:
        kind: what the registry holds, as it appears in messages, e.g. ``"compressor"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T, *, replace: bool = False) -> T:
        """Adds ``item`` under ``name`` and returns it.

        Raises:
            ADMSTypeError: ``name`` is not a string.
            ADMSValueError: ``name`` is empty, or taken and ``replace`` is False.
        """
        if not isinstance(name, str):
            raise ADMSTypeError(f"a {self.kind} name must be a string, got {name!r}")
        if not name:
            raise ADMSValueError(f"a {self.kind} name must not be empty")
        if name in self._items and not replace:
            raise ADMSValueError(
                f"{self.kind} {name!r} is registered already; pass replace=True to replace it"
            )
        self._items[name] = item
        return item

    def get(self, name: str) -> T:
        """Returns what is registered under ``name``.

        Raises:
            ADMSValueError: nothing is; the message suggests near names and lists all.
        """
        try:
            return self._items[name]
        except (KeyError, TypeError):
            near = difflib.get_close_matches(str(name), self._items, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ADMSValueError(
                f"unknown {self.kind} {name!r}; {hint}registered: {', '.join(sorted(self._items))}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))
