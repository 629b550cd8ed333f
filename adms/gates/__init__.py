"""Admission gates: which tokens enter the middle as entries of their own, and which are folded."""

from adms.gates.config import AdaptiveUpdateConfig
from adms.gates.learned import UpdateGates

__all__ = ["AdaptiveUpdateConfig", "UpdateGates"]
