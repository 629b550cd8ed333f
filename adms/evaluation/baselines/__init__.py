"""Other methods at equal bytes, one file each, over one simulation of a bounded cache.

They serve every table in which ADMS is compared. Correct first: they hold floats and count the
bytes an implementation would store, so their speed says nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from adms.cache import ADMSKVCache
from adms.evaluation.baselines.h2o import H2O
from adms.evaluation.baselines.keydiff import KeyDiff
from adms.evaluation.baselines.lacache import LaCache
from adms.evaluation.baselines.policy import Eviction, Held, Policy, Setting
from adms.evaluation.baselines.quantized import Int2Window, Int3Window, Int4Window
from adms.evaluation.baselines.simulation import SimulatedCache, simulated
from adms.evaluation.baselines.snapkv import SnapKV
from adms.evaluation.baselines.tova import TOVA
from adms.evaluation.baselines.zsmerge import ZSMerge
from adms.registry import Registry

__all__ = [
    "POLICIES",
    "Eviction",
    "Held",
    "Policy",
    "Setting",
    "SimulatedCache",
    "open_policy",
    "simulated",
]

POLICIES: Registry[type[Policy]] = Registry("method")
POLICIES.register("int4", Int4Window)
POLICIES.register("int3", Int3Window)
POLICIES.register("int2", Int2Window)
POLICIES.register("h2o", H2O)
POLICIES.register("tova", TOVA)
POLICIES.register("snapkv", SnapKV)
POLICIES.register("keydiff", KeyDiff)
POLICIES.register("lacache", LaCache)
POLICIES.register("zsmerge", ZSMerge)


@contextlib.contextmanager
def open_policy(
    model: PreTrainedModel, name: str, adms: ADMSKVCache
) -> Iterator[tuple[SimulatedCache, dict[str, Any]]]:
    """A baseline's cache by name, in the bytes of an ADMS cache; with its settings for tables."""
    with simulated(model, POLICIES.get(name), adms) as cache:
        settings = {
            "label": cache.policies[0].label,
            "entries": max(policy.max_entries for policy in cache.policies),
        }
        yield cache, settings
