"""Prototype kinds for the hard cases whose layers share something: one encoder output, one page table, one prefix."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches.base import (
    REWIND,
    Cache,
    Kind,
    LayerShape,
    Node,
    Project,
    Shared,
    Span,
    filled_positions,
    views_of,
)
from kvjax.caches.dense import dense
from kvjax.ops.attention import EMPTY, View
from kvjax.types import Array

# ---------------------------------------------------------------- cross-attention, absorbed, one source for all layers


@struct.node
class Source(Shared):
    """Encoder output of R sources, consecutive rows sharing one: `[R, T, 1 head, E]` stored, `lengths[R]`."""

    x: Any
    lengths: Array
    share: int = struct.static()

    def positions(self) -> Array:
        """`[R, T]`: 0, before every query, where the source has a token."""
        t = self.x.data.shape[-2]
        return jnp.where(jnp.arange(t)[None, :] < self.lengths[:, None], 0, EMPTY).astype(jnp.int32)

    def take(self, rows: Array) -> tuple[Source, Array]:
        source = rows // self.share
        return Source(self.x.take(source), self.lengths[source], 1), jnp.zeros_like(rows)

    def reorder(self, beams: Array) -> tuple[Source, Array]:
        return self, jnp.zeros_like(beams)  # beams stay within their source


@struct.node
class AbsorbedCross(Node):
    """Keeps nothing: attends over the one encoder output through the layer's maps."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        source = shared["source"]
        assert project.absorb is not None
        maps, _ = project.absorb(h)
        return (View(source.x.data, source.x.data, source.positions(), absorb=maps),), self

    def take(self, rows: Array, before: Any, shared: Any) -> AbsorbedCross:
        return self

    def resize(self, capacity: int, shared: Any) -> AbsorbedCross:
        return self


# ---------------------------------------------------------------- one prefix for all rows, a suffix for each


@struct.node
class Prefix(Shared):
    """How long the shared prefix is: `length[1]` int32."""

    length: Array

    def rewind(self, lengths: Array) -> tuple[Prefix, Array]:
        return self, jnp.where(lengths < self.length, REWIND, 0).astype(jnp.int32)

    def take(self, rows: Array) -> tuple[Prefix, Array]:
        return self, jnp.zeros_like(rows)


@struct.node
class SharedPrefix(Node):
    """Keys and values of the prefix once for all rows, `[K, T, D]`; after it a node of any kind for each row's own."""

    k: Any
    v: Any
    own: Any
    slots: int = struct.static()

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        length = shared["prefix"].length
        held = filled_positions(self.slots, length)  # [1, T]
        views, own = self.own.extend(h, project, span.replace(start=span.start - length), shared)
        views = tuple(view.replace(positions=self.after(view.positions, length)) for view in views)
        return (*views_of(self.k.read(held, length), self.v.read(held, length)), *views), self.replace(own=own)

    def after(self, positions: Array, length: Array) -> Array:
        """The suffix counts from the prefix's end."""
        return jnp.where(positions == EMPTY, EMPTY, positions + length[:, None])

    def take(self, rows: Array, before: Any, shared: Any) -> SharedPrefix:
        return self.replace(own=self.own.take(rows, before, shared))

    def resize(self, capacity: int, shared: Any) -> SharedPrefix:
        return self.replace(own=self.own.resize(capacity - self.slots, shared))

    def move(self, source: Array, target: Array, shared: Any) -> SharedPrefix:
        length = shared["prefix"].length
        target = jnp.where(target == EMPTY, EMPTY, target - length[:, None])
        return self.replace(own=self.own.move(source - length[:, None], target, shared))


@dataclasses.dataclass(frozen=True)
class SharedPrefixKind(Kind):
    """Makes `SharedPrefix`es with room for a prefix of `slots` tokens; `join` fills them."""

    slots: int
    own: Any = dense()
    node: type = SharedPrefix

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        prefix = dense().init(shape, 1, self.slots)
        return self.node(prefix.k, prefix.v, self.own.init(shape, batch, capacity - self.slots), self.slots)

    def shared(self, batch: int, capacity: int) -> dict[str, Any]:
        return {"prefix": Prefix(jnp.zeros((1,), jnp.int32))} | self.own.shared(batch, capacity - self.slots)


def join(prefix: Cache, cache: Cache) -> Cache:
    """A fresh cache of `SharedPrefix`es whose rows all go on from a dense cache of one row."""
    layers = tuple(
        node.replace(k=one.k.resize(node.slots), v=one.v.resize(node.slots))
        for one, node in zip(prefix.layers, cache.layers, strict=True)
    )
    spread = lambda x: jnp.repeat(x, cache.batch, axis=0)  # noqa: E731
    tokens = cache.tokens.at[:, : prefix.capacity].set(prefix.tokens)
    shared = cache.shared | {"prefix": Prefix(prefix.lengths)}
    lengths = spread(prefix.lengths)
    return cache.replace(layers=layers, shared=shared, tokens=tokens, lengths=lengths, written=lengths + 0)
