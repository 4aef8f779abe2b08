"""Dense: slot t keeps position t. The whole buffer is read; it grows between scans by `resize`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import codecs
from kvjax.caches.base import Kind, LayerShape, Node, Project, Span, filled_positions, views_of
from kvjax.checks import either
from kvjax.ops.attention import View
from kvjax.types import Array


@struct.node
class Dense(Node):
    """Keys and values of T positions.

    Args:
        k, v: stores of a codec, T slots each.
        capacity: T.
        rotated: whether keys are kept turned to their positions.
    """

    k: Any
    v: Any
    capacity: int = struct.static()
    rotated: bool = struct.static()

    @property
    def patches(self) -> bool:
        """See `Node`."""
        return self.max_rewind is None

    @property
    def shifts(self) -> bool:
        """See `Node`."""
        return not self.rotated

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Dense]:
        """See `Node`."""
        k, v = project.kv(h, span.positions if self.rotated else None)
        slots = jnp.where(span.kept(), span.order, self.capacity)
        held = filled_positions(self.capacity, span.end)
        new_k, keys = self.k.extend(k, slots, span.order, held, span.end)
        new_v, values = self.v.extend(v, slots, span.order, held, span.end)
        return views_of(keys, values, rotated=self.rotated), self.replace(k=new_k, v=new_v)

    def resize(self, capacity: int, shared: Any) -> Dense:
        """See `Node`."""
        return self.replace(k=self.k.resize(capacity), v=self.v.resize(capacity), capacity=capacity)

    def move(self, source: Array, target: Array, shared: Any) -> Dense:
        """See `Node`."""
        return self.replace(k=self.k.move(source, target), v=self.v.move(source, target))

    def turn(self, places: Array, by: Callable[[Array], Array], shared: Any) -> Dense:
        """See `Node`."""
        return self.replace(k=self.k.change(places, by)) if self.rotated else self

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """See `Node`."""
        return self.k.unpacked(lengths), self.v.unpacked(lengths), filled_positions(self.capacity, lengths)


@dataclasses.dataclass(frozen=True)
class DenseKind(Kind):
    """See `dense`."""

    store: Any
    rotated: bool

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Dense:
        """See `Kind`."""
        widths = (shape.key_dim, shape.value_dim)
        k, v = self.store.pair(batch, shape.kv_heads, capacity, widths, shape.dtype)
        return Dense(k, v, capacity, self.rotated)


def dense(*, store: Any = None, rotated: bool = True) -> DenseKind:
    """Every position in a slot of its own.

    Args:
        store: a codec, or a floating dtype; None stores what the model computes in.
        rotated: False keeps keys as they are projected and turns them when they are read: slower, and a text can be
            cut and joined without turning a stored key twice.
    """
    return DenseKind(codecs.as_codec(store), either("caches.dense: rotated", rotated))


__all__ = ["dense", "Dense", "DenseKind"]
