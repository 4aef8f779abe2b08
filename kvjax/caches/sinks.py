"""Sinks with positions inside the cache: the first tokens are read as if they stood right before the window.

Attention sinks (StreamingLLM, Xiao et al. 2023, 2309.17453, section 3.2). A text of any length never shows the model a
distance of more than sinks + window.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import storage
from kvjax.caches.base import Node, Project, Span, filled_positions, views_of
from kvjax.ops.attention import EMPTY, View
from kvjax.types import Array


def in_cache(positions: Array, window: int, sinks: int) -> Array:
    """Where a query stands seen from the sinks: never further than the cache is long."""
    return jnp.minimum(positions, sinks + window - 1)


def past_sinks(positions: Array, sinks: int) -> Array:
    """Positions without the first ones, which are read elsewhere."""
    return jnp.where(positions < sinks, EMPTY, positions)


@struct.node
class SinksInCache(Node):
    """The first tokens in a buffer of their own, for which queries are turned otherwise, and a ring.

    Args:
        k, v: stores of a codec, slot t keeps position t < sinks.
        recent: a ring without sinks; it takes in all tokens, and the first are not read from it.
        sinks: how many.
    """

    k: Any
    v: Any
    recent: Any
    sinks: int = struct.static()

    branches = False  # it is told places in the text from the first one on

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], SinksInCache]:
        """See `Node`."""
        rotated = self.recent.rotated
        k, v = project.kv(h, span.positions if rotated else None)
        slots = jnp.where(span.kept(), span.order, self.sinks)  # later tokens have no slot
        node = self.replace(k=self.k.write(k, slots, span.positions), v=self.v.write(v, slots, span.positions))
        near, recent = self.recent.extend(h, project, span, shared)
        near = tuple(view.replace(positions=past_sinks(view.positions, self.sinks)) for view in near)
        held = filled_positions(self.sinks, span.end)
        at = in_cache(span.positions, self.recent.window, self.sinks)
        first = views_of(
            node.k.read(held, span.end),
            node.v.read(held, span.end),
            query_positions=at,
            window=self.recent.window,
            sinks=self.sinks,
            rotated=rotated,
        )
        return (*first, *near), node.replace(recent=recent)

    def resize(self, capacity: int, shared: Any) -> SinksInCache:
        """Itself: it does not grow with the text."""
        return self

    def word(self, kind: Any, shared: Any) -> Any:
        """See `Node`."""
        return self.recent.word(kind, shared)

    def move(self, source: Array, target: Array, shared: Any) -> SinksInCache:
        """See `Node`. A token that moves up among the sinks may come from behind them: the ring has it."""
        there = self.recent.slots_of(source)
        here = jnp.where(target < self.sinks, target, self.sinks)

        def fill(buffer: Array, heads: int, rest: int, recent: Array) -> Array:
            return storage.put(buffer, storage.pick(recent, there, heads, rest), here)

        ring = self.recent
        return self.replace(
            k=self.k.each(fill, ring.k), v=self.v.each(fill, ring.v), recent=ring.move(source, target, shared)
        )

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """See `Node`."""
        k, v, at = self.recent.contents(lengths, shared)
        return (
            jnp.concatenate([self.k.unpacked(), k], axis=2),
            jnp.concatenate([self.v.unpacked(), v], axis=2),
            jnp.concatenate([filled_positions(self.sinks, lengths), past_sinks(at, self.sinks)], axis=1),
        )


__all__ = ["SinksInCache", "in_cache", "past_sinks"]
