"""Prototype kinds for the hard cases of the contract that share nothing: int8, layer input, sinks, un-rotated keys.

None of them is shipped. Each is a frozen node that derives from `kvjax.caches.base.Node` and runs under the library's
own attention, forward and loops. `contract.py` compares them with their references and measures them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import codecs, storage
from kvjax.caches.base import (
    Kind,
    LayerShape,
    Node,
    Project,
    Span,
    filled_positions,
    views_of,
)
from kvjax.caches.codecs import Segment, Store
from kvjax.caches.dense import Dense, dense
from kvjax.caches.ring import Ring, ring
from kvjax.ops.attention import EMPTY, View
from kvjax.types import Array, DType

# ---------------------------------------------------------------- a codec: int8 with a scale per token and head


@struct.node
class Int8Store(Store):
    """Codes `[B * K, T, D]` and the scales `[B * K, T]` they were made with."""

    codes: Array
    scale: Array
    heads: int = struct.static()

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Codes made with the scale as it is stored, so that they err by at most half a step."""
        scale = (jnp.max(jnp.abs(x), axis=-1) / 127 + 1e-9).astype(self.scale.dtype)
        return jnp.round(jnp.clip(x / scale[..., None].astype(x.dtype), -127, 127)).astype(jnp.int8), scale

    def write(self, x: Array, slots: Array, positions: Array, rows: Array | None = None) -> Int8Store:
        codes, scale = self.encode(x)
        put = lambda buffer, new: storage.put(buffer, new, slots, rows)  # noqa: E731
        return self.replace(codes=put(self.codes, codes), scale=put(self.scale, scale))

    def read(self, positions: Array, end: Array) -> tuple[Segment, ...]:
        return (Segment(self.codes, self.scale, positions),)

    def fresh(self, x: Array, positions: Array) -> tuple[Segment, ...]:
        codes, scale = self.encode(x)
        return (Segment(storage.pack(codes), storage.pack(scale), positions),)

    def move(self, source: Array, target: Array, rows: tuple[Array, Array] | None = None) -> Int8Store:
        there, here = rows or (None, None)
        return self.each(lambda x, k, rest: storage.put(x, storage.pick(x, source, k, rest, there), target, here))

    def resize(self, slots: int) -> Int8Store:
        return self.each(lambda x, heads, rest: storage.resize(x, slots, rest))

    def each(self, f: Callable[[Array, int, int], Array]) -> Int8Store:
        return self.replace(codes=f(self.codes, self.heads, 1), scale=f(self.scale, self.heads, 0))

    def unpacked(self) -> Array:
        scale = storage.unpack(self.scale, self.heads, 0)
        return storage.unpack(self.codes, self.heads, 1).astype(scale.dtype) * scale[..., None]


@dataclasses.dataclass(frozen=True)
class Int8:
    """Makes `Int8Store`s, or a broken one for a negative control."""

    store: type = Int8Store

    def empty(self, rows: int, heads: int, slots: int, width: int, dtype: DType) -> Any:
        codes = storage.empty(rows, heads, slots, (width,), jnp.int8)
        return self.store(codes, storage.empty(rows, heads, slots, (), dtype), heads)


# ---------------------------------------------------------------- layer input, absorbed


@struct.node
class LayerInput(Node):
    """The layer's input and its norm's factor, T slots; keys and values are never made."""

    x: Any
    factor: Any
    capacity: int = struct.static()

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        assert project.absorb is not None, "a rotation stands between the layer's input and its keys"
        maps, factor = project.absorb(h)
        slots = jnp.where(span.real(), span.order, self.capacity)
        node = self.replace(
            x=self.x.write(h[:, :, None], slots, span.positions),
            factor=self.factor.write(factor[:, :, None], slots, span.positions),
        )
        held = filled_positions(self.capacity, span.end)
        ((x, _, at),), ((factor, _, _),) = node.x.read(held, span.end), node.factor.read(held, span.end)
        return (View(x, x, at, k_scale=factor, v_scale=factor, absorb=maps),), node

    def take(self, rows: Array, before: Any, shared: Any) -> LayerInput:
        return self.replace(x=self.x.take(rows), factor=self.factor.take(rows))

    def resize(self, capacity: int, shared: Any) -> LayerInput:
        return LayerInput(self.x.resize(capacity), self.factor.resize(capacity), capacity)

    def move(self, source: Array, target: Array, shared: Any) -> LayerInput:
        return self.replace(x=self.x.move(source, target), factor=self.factor.move(source, target))


@dataclasses.dataclass(frozen=True)
class LayerInputKind(Kind):
    """Makes `LayerInput`s."""

    node: type = LayerInput

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        store, precise = codecs.plain(), jnp.promote_types(jnp.float32, shape.dtype)
        x = store.empty(batch, 1, capacity, shape.width, shape.dtype)
        return self.node(x, store.empty(batch, 1, capacity, None, precise), capacity)


# ---------------------------------------------------------------- sinks with positions inside the cache


@struct.node
class SinksInCache(Node):
    """StreamingLLM: the first tokens in a buffer of their own, read as if they stood right before the window."""

    k: Any
    v: Any
    recent: Ring
    sinks: int = struct.static()

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        k, v = project.kv(h, span.positions)
        slots = jnp.where(span.real(), span.order, self.sinks)  # later tokens fall outside
        node = self.replace(k=self.k.write(k, slots, span.positions), v=self.v.write(v, slots, span.positions))
        held = filled_positions(self.sinks, span.end)
        near, recent = self.recent.extend(h, project, span, shared)
        near = tuple(view.replace(positions=self.past_sinks(view.positions)) for view in near)
        at = self.in_cache(span.positions)
        first = views_of(node.k.read(held, span.end), node.v.read(held, span.end), query_positions=at, sinks=self.sinks)
        return (*first, *near), node.replace(recent=recent)

    def past_sinks(self, positions: Array) -> Array:
        """The ring leaves the first tokens to the other buffer."""
        return jnp.where(positions < self.sinks, EMPTY, positions)

    def in_cache(self, positions: Array) -> Array:
        """Where a query stands seen from the sinks: never further than the cache is long."""
        return jnp.minimum(positions, self.sinks + self.recent.window - 1)

    def take(self, rows: Array, before: Any, shared: Any) -> SinksInCache:
        recent = self.recent.take(rows, before, shared)
        return self.replace(k=self.k.take(rows), v=self.v.take(rows), recent=recent)

    def resize(self, capacity: int, shared: Any) -> SinksInCache:
        return self


@dataclasses.dataclass(frozen=True)
class SinksKind(Kind):
    """Makes `SinksInCache`s."""

    window: int
    sinks: int
    slack: int = 0
    node: type = SinksInCache

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        first = dense().init(shape, batch, self.sinks)
        return self.node(first.k, first.v, ring(self.window, slack=self.slack).init(shape, batch, capacity), self.sinks)


# ---------------------------------------------------------------- keys stored without rotation


@struct.node
class NotTurned(Dense):
    """Broken: keys are kept as they are projected, and read as if they were turned."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        views, node = super().extend(h, project, span, shared)
        return tuple(view.replace(rotated=True) for view in views), node


@dataclasses.dataclass(frozen=True)
class NotTurnedKind(Kind):
    """Makes `NotTurned`s."""

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        made = dense(rotated=False).init(shape, batch, capacity)
        return NotTurned(made.k, made.v, capacity, False)
