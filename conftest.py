"""Lets pytest import ``adms.patches`` from a checkout that is not installed.

An installation finds it through package-dir in pyproject.toml; a checkout has the folder
``patches/`` beside ``adms/``.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

PATCHES = Path(__file__).parent / "patches"


class PatchesFinder(MetaPathFinder):
    """Finds ``adms.patches`` in this checkout; its modules follow by the package's own path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "adms.patches":
            return None
        return spec_from_file_location(
            fullname, PATCHES / "__init__.py", submodule_search_locations=[str(PATCHES)]
        )


# First, so that the patches of another checkout, installed as editable, are never mixed in.
sys.meta_path.insert(0, PatchesFinder())
