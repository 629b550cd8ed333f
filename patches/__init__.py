"""Architecture families: where each one's positions enter, and nothing else of it."""

from adms.patches.base import FAMILIES, Family, find_family
from adms.patches.falcon import FalconFamily
from adms.patches.gpt_neox import GPTNeoXFamily
from adms.patches.llama import LlamaFamily
from adms.patches.mpt import MptFamily
from adms.patches.opt import OPTFamily

__all__ = [
    "FAMILIES",
    "FalconFamily",
    "Family",
    "GPTNeoXFamily",
    "LlamaFamily",
    "MptFamily",
    "OPTFamily",
    "find_family",
]
