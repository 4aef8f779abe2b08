"""Prototype kinds for the hard cases whose layers share something: one encoder output, one page table, one prefix."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import codecs
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
        return self.replace(table=table, owner=owner, index=index)

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

    def move(self, source: Array, target: Array, shared: Any) -> Paged:
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
