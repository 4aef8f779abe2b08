"""Dense: slot t keeps position t. The whole buffer is read; it grows between scans by `resize`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import codecs
from kvjax.caches.base import LayerShape, Node, Project, Span, filled_positions, views_of
from kvjax.ops.attention import View
from kvjax.types import Array


@struct.node
class Dense(Node):
    """Keys and values of T positions.

    Args:
        k, v: stores of a codec, T slots each.
        capacity: T.
    """

    k: Any
    v: Any
    capacity: int = struct.static()

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Dense]:
        """See `Node`."""
        k, v = project.kv(h, span.positions)
        slots = jnp.where(span.real(), span.order, self.capacity)
        node = self.replace(  # type: ignore[attr-defined]
            k=self.k.write(k, slots, span.positions), v=self.v.write(v, slots, span.positions)
        )
        held = filled_positions(self.capacity, span.end)
        views = views_of(node.k.read(held, span.end), node.v.read(held, span.end))
        if span.ancestors is not None:
            seen = in_tree(span, self.capacity)
            views = tuple(view.replace(visible=seen) for view in views)  # type: ignore[attr-defined]
        return views, node

    def resize(self, capacity: int) -> Dense:
        """See `Node`."""
        return Dense(self.k.resize(capacity), self.v.resize(capacity), capacity)

    def take(self, rows: Array) -> Dense:
        """See `Node`."""
        return Dense(self.k.take(rows), self.v.take(rows), self.capacity)

    def contents(self, lengths: Array) -> tuple[Array, Array, Array]:
        """See `Node`."""
        return self.k.unpacked(), self.v.unpacked(), filled_positions(self.capacity, lengths)


def in_tree(span: Span, capacity: int) -> Array:
    """`[B, S, T]` bool: what each token of a tree sees in slots in order of feeding: all that was there before, and of
    the new ones its ancestors."""
    assert span.ancestors is not None
    s = span.ancestors.shape[0]
    new = jnp.arange(capacity, dtype=jnp.int32)[None, :] - span.start[:, None]  # [B, T], index among the new
    among = jnp.take(span.ancestors, jnp.clip(new, 0, s - 1), axis=1).swapaxes(0, 1)  # [B, S, T]
    inside = (new >= 0) & (new < span.valid[:, None])
    return jnp.where(inside[:, None, :], among, (new < 0)[:, None, :])


@dataclasses.dataclass(frozen=True)
class DenseKind:
    """See `dense`."""

    store: Any

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Dense:
        """See `Kind`."""
        k = self.store.empty(batch, shape.kv_heads, capacity, shape.key_dim, shape.dtype)
        v = self.store.empty(batch, shape.kv_heads, capacity, shape.value_dim, shape.dtype)
        return Dense(k, v, capacity)


def dense(*, store: Any = None) -> DenseKind:
    """Every position in a slot of its own.

    Args:
        store: a codec, or a floating dtype; None stores what the model computes in.
    """
    return DenseKind(codecs.as_codec(store))


__all__ = ["dense", "Dense", "DenseKind"]
