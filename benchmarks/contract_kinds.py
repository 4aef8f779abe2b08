"""Prototype kinds for the seven hard cases of the contract: what must be possible without a change of kvjax.

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
    PAGES,
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
        """Codes made with the scale as it is stored (TRAPS: otherwise they err by 0.94 step)."""
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

    def keep(self, source: Array, target: Array, shared: Any) -> LayerInput:
        return self.replace(x=self.x.move(source, target), factor=self.factor.move(source, target))


@dataclasses.dataclass(frozen=True)
class LayerInputKind(Kind):
    """Makes `LayerInput`s."""

    node: type = LayerInput

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        store, precise = codecs.plain(), jnp.promote_types(jnp.float32, shape.dtype)
        x = store.empty(batch, 1, capacity, shape.width, shape.dtype)
        return self.node(x, store.empty(batch, 1, capacity, None, precise), capacity)


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


# ---------------------------------------------------------------- paged: one table for all layers


@struct.node
class Pages(Shared):
    """Who owns which page.

    Args:
        table: `[B, n]` int32, the pages of each row in the order of its text, -1 for none.
        owner, index: `[P]` int32, the row that owns each page (-1 for none), and its place in that row.
        page: slots a page.
    """

    table: Array
    owner: Array
    index: Array
    page: int = struct.static()

    def reserve(self, span: Span) -> tuple[Pages, Array]:
        have = jnp.sum(self.table >= 0, axis=1)
        need = jnp.where(span.valid > 0, jnp.maximum(-(-span.end // self.page) - have, 0), 0)
        free = self.owner < 0
        refused = (need > 0) & (jnp.cumsum(need) > jnp.sum(free))
        need = jnp.where(refused, 0, need)
        place = jnp.arange(self.table.shape[1])[None, :] - have[:, None]  # [B, n], which of the row's new pages
        new = (place >= 0) & (place < need[:, None])
        (spare,) = jnp.nonzero(free, size=free.shape[0], fill_value=free.shape[0])
        given = spare[jnp.clip((jnp.cumsum(need) - need)[:, None] + place, 0, free.shape[0] - 1)]
        table = jnp.where(new, given, self.table).astype(jnp.int32)
        return self.owned(table, self.owner.shape[0]), jnp.where(refused, PAGES, 0).astype(jnp.int32)

    def owned(self, table: Array, pages: int) -> Pages:
        """With this table and the owners that follow from it."""
        b, n = table.shape
        at = jnp.where(table >= 0, table, pages)
        spread = lambda x: jnp.broadcast_to(x, (b, n)).astype(jnp.int32)  # noqa: E731
        owner = jnp.full((pages,), -1, jnp.int32).at[at].set(spread(jnp.arange(b)[:, None]), mode="drop")
        index = jnp.zeros((pages,), jnp.int32).at[at].set(spread(jnp.arange(n)[None, :]), mode="drop")
        return Pages(table, owner, index, self.page)

    def rewind(self, lengths: Array) -> tuple[Pages, Array]:
        kept = jnp.arange(self.table.shape[1])[None, :] * self.page < lengths[:, None]
        return self.owned(jnp.where(kept, self.table, -1), self.owner.shape[0]), jnp.zeros_like(lengths)

    def take(self, rows: Array) -> tuple[Pages, Array]:
        pages = -(-self.owner.shape[0] * rows.shape[0] // self.table.shape[0])
        have = jnp.sum(self.table >= 0, axis=1)[rows]
        ends, place = jnp.cumsum(have), jnp.arange(self.table.shape[1])[None, :]
        given = (place < have[:, None]) & (ends <= pages)[:, None]
        table = jnp.where(given, (ends - have)[:, None] + place, -1).astype(jnp.int32)
        return self.owned(table, pages), jnp.where(ends > pages, PAGES, 0).astype(jnp.int32)

    def resize(self, capacity: int) -> Pages:
        n = -(-capacity // self.page)
        table = self.table[:, :n]
        return self.replace(table=jnp.pad(table, ((0, 0), (0, n - table.shape[1])), constant_values=-1))

    def place(self, order: Array) -> tuple[Array, Array]:
        """Page and offset `[B, S]` of places in the order of feeding; outside for EMPTY."""
        at = jnp.clip(order // self.page, 0, self.table.shape[1] - 1)
        page = jnp.take_along_axis(self.table, at, axis=1)
        return page, jnp.where((order == EMPTY) | (page < 0), self.page, order % self.page)

    def held(self, end: Array) -> Array:
        """`[P, page]` int32, what each slot of the pool holds."""
        at = self.index[:, None] * self.page + jnp.arange(self.page, dtype=jnp.int32)[None, :]
        return jnp.where((self.owner >= 0)[:, None] & (at < end[self.owner][:, None]), at, EMPTY)


@struct.node
class Paged(Node):
    """A pool of P pages of keys and values; the table lies in `shared`."""

    k: Any
    v: Any

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        pages = shared["pages"]
        k, v = project.kv(h, span.positions)
        rows, slots = pages.place(jnp.where(span.real(), span.order, EMPTY))
        k, v = (s.write(x, slots, span.positions, rows) for s, x in ((self.k, k), (self.v, v)))
        held, end = pages.held(span.end), span.end[pages.owner]
        owner = jnp.maximum(pages.owner, 0)
        return views_of(k.read(held, end), v.read(held, end), pages=(owner, pages.table)), Paged(k, v)

    def take(self, rows: Array, before: Any, shared: Any) -> Paged:
        old, new = before["pages"], shared["pages"]
        source = jnp.zeros_like(new.owner).at[jnp.where(new.table >= 0, new.table, new.owner.shape[0])]
        source = source.set(old.table[rows], mode="drop")
        return Paged(self.k.take(source), self.v.take(source))

    def resize(self, capacity: int, shared: Any) -> Paged:
        return self  # the pool stays; rows share it

    def keep(self, source: Array, target: Array, shared: Any) -> Paged:
        (here, at), (there, to) = shared["pages"].place(source), shared["pages"].place(target)
        return Paged(self.k.move(at, to, (here, there)), self.v.move(at, to, (here, there)))

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        pages = shared["pages"]
        n = pages.table.shape[1]
        k, v = (store.unpacked()[pages.table].swapaxes(1, 2) for store in (self.k, self.v))  # [B, K, n, page, D]
        k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (k, v))
        return k, v, filled_positions(n * pages.page, lengths)


@dataclasses.dataclass(frozen=True)
class PagedKind(Kind):
    """Makes `Paged`; `pages` is the size of the pool, by default as many as all rows can fill."""

    page: int = 128
    pages: int | None = None
    store: Any = codecs.plain()
    node: type = Paged

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        pages = self.shared(batch, capacity)["pages"].owner.shape[0]
        empty = lambda width: self.store.empty(pages, shape.kv_heads, self.page, width, shape.dtype)  # noqa: E731
        return self.node(empty(shape.key_dim), empty(shape.value_dim))

    def shared(self, batch: int, capacity: int) -> dict[str, Any]:
        n = -(-capacity // self.page)
        p = self.pages or batch * n
        none = jnp.full((p,), -1, jnp.int32)
        return {"pages": Pages(jnp.full((batch, n), -1, jnp.int32), none, jnp.zeros((p,), jnp.int32), self.page)}


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
class Unrotated(Dense):
    """Dense, with keys turned when they are read: text can be cut and joined without turning a stored key twice."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        k, v = project.kv(h, None)
        slots = jnp.where(span.real(), span.order, self.capacity)
        node = self.replace(k=self.k.write(k, slots, span.positions), v=self.v.write(v, slots, span.positions))
        held = filled_positions(self.capacity, span.end)
        ((keys, scale, at),), ((values, v_scale, _),) = node.k.read(held, span.end), node.v.read(held, span.end)
        return (View(self.turned(keys, span.text(at), project), values, at, scale, v_scale),), node

    def turned(self, keys: Array, positions: Array, project: Project) -> Array:
        """`[*lead, T, D]` at `positions[B, T]`: every head of every row as a row of one head."""
        rows = keys.reshape(-1, *keys.shape[-2:])[:, :, None]  # [B * K, T, 1, D]
        at = jnp.repeat(positions, rows.shape[0] // positions.shape[0], axis=0)
        return project.rotate(rows, at).reshape(keys.shape)


@dataclasses.dataclass(frozen=True)
class UnrotatedKind(Kind):
    """Makes `Unrotated`s."""

    node: type = Unrotated

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        made = dense().init(shape, batch, capacity)
        return self.node(made.k, made.v, capacity)


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
        return jnp.where(positions == EMPTY, EMPTY, positions + length)

    def take(self, rows: Array, before: Any, shared: Any) -> SharedPrefix:
        return self.replace(own=self.own.take(rows, before, shared))

    def resize(self, capacity: int, shared: Any) -> SharedPrefix:
        return self.replace(own=self.own.resize(capacity - self.slots, shared))

    def keep(self, source: Array, target: Array, shared: Any) -> SharedPrefix:
        length = shared["prefix"].length
        target = jnp.where(target == EMPTY, EMPTY, target - length)
        return self.replace(own=self.own.keep(source - length, target, shared))


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
