"""The processes of ``accelerate launch``; one process where there is no launcher."""

from typing import Any


def this_process() -> Any:
    """accelerate's ``PartialState``: index and number of processes, barriers, who writes."""
    # Takes seconds to import, which a command's --help need not wait for.
    from accelerate import PartialState  # type: ignore[import-untyped]

    return PartialState()
