"""The one decorator for pytree nodes: frozen dataclasses whose static fields are hashable (`flax.struct`)."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from flax.struct import dataclass as node
from flax.struct import field


class Value:
    """Base of every node: says to type checkers what `flax.struct` adds to a class."""

    def replace(self, **changes: Any) -> Self:
        """The same with other values in some fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def static(**kwargs: Any) -> Any:
    """A field that is part of the tree's structure, not a leaf; its value must be hashable."""
    return field(pytree_node=False, **kwargs)


__all__ = ["node", "field", "static", "Value"]
