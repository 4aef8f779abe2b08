"""A prototype codec, int8, and broken twins of the library's kinds: negative controls of the hard cases.

None of them is shipped. They run under the library's own attention, forward and loops; `contract.py` compares them
with their references.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import storage
from kvjax.caches.base import Kind, LayerShape, Project, Span
from kvjax.caches.codecs import Segment, Store
from kvjax.caches.dense import Dense
from kvjax.caches.layer_input import AbsorbedInput
from kvjax.caches.sinks import SinksInCache
from kvjax.ops.attention import View
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


# ---------------------------------------------------------------- broken twins of kinds


@dataclasses.dataclass(frozen=True)
class Twin(Kind):
    """Makes the nodes of another kind, but of a class with the same fields."""

    plan: Kind
    node: type

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        made = self.plan.init(shape, batch, capacity)
        return self.node(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})


@struct.node
class NoFactor(AbsorbedInput):
    """Broken: the norm's factor of each position is left out."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> Any:
        views, node = super().extend(h, project, span, shared)
        return tuple(view.replace(k_scale=None, v_scale=None) for view in views), node


@struct.node
class TextPositions(SinksInCache):
    """Broken: sinks are read at their positions in the text."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> Any:
        (first, *near), node = super().extend(h, project, span, shared)
        return (first.replace(query_positions=None), *near), node


@struct.node
class NotTurned(Dense):
    """Broken: keys are kept as they are projected, and read as if they were turned."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        views, node = super().extend(h, project, span, shared)
        return tuple(view.replace(rotated=True) for view in views), node
