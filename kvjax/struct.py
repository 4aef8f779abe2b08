"""The one decorator for pytree nodes: frozen dataclasses whose static fields are hashable (`flax.struct`)."""

from __future__ import annotations

from typing import Any

from flax.struct import dataclass as node
from flax.struct import field


def static(**kwargs: Any) -> Any:
    """A field that is part of the tree's structure, not a leaf; its value must be hashable."""
    return field(pytree_node=False, **kwargs)


__all__ = ["node", "field", "static"]
