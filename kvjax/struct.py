"""The one decorator for pytree nodes: frozen dataclasses whose static fields are hashable (`flax.struct`)."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Self, TypeVar, dataclass_transform

import flax.struct
from flax.struct import field

_C = TypeVar("_C")


@dataclass_transform(field_specifiers=(field,), frozen_default=True)
def node(cls: type[_C]) -> type[_C]:
    """Makes a class a frozen dataclass and a pytree; its class is part of its structure.

    From jax 0.10 on (seen there and on 0.12) dataclasses of different classes have equal structures where their fields
    agree, though not equal hashes. Of two such filters, one then now and then ran the other's compiled program. So the
    class stands among the static fields.
    """
    cls.__annotations__ = inspect.get_annotations(cls) | {"_class": type}
    cls._class = field(pytree_node=False, default=cls, kw_only=True, repr=False)  # type: ignore[attr-defined]
    return flax.struct.dataclass(cls)


class Value:
    """Base of every node: says to type checkers what `flax.struct` adds to a class."""

    def replace(self, **changes: Any) -> Self:
        """The same with other values in some fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def static(**kwargs: Any) -> Any:
    """A field that is part of the tree's structure, not a leaf; its value must be hashable."""
    return field(pytree_node=False, **kwargs)


__all__ = ["node", "field", "static", "Value"]
