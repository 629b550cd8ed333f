"""Other methods at equal bytes, one file each."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from adms.cache import ADMSKVCache
from adms.registry import Registry

POLICIES: Registry[Any] = Registry("method")


@contextlib.contextmanager
def open_policy(
    model: PreTrainedModel, name: str, adms: ADMSKVCache
) -> Iterator[tuple[Any, dict[str, Any]]]:
    yield POLICIES.get(name), {}
