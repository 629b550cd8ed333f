"""Lazily updated attention: exact or boundedly stale under changing keys and values."""

from adms.attention.dynamic.attention import DynamicAttention

__all__ = ["DynamicAttention"]
