"""Architecture families: where each one's positions enter, and nothing else of it."""

from adms.patches.base import FAMILIES, Family, find_family
from adms.patches.llama import LlamaFamily

__all__ = ["FAMILIES", "Family", "LlamaFamily", "find_family"]
