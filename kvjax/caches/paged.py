"""Paged: rows of any length in one pool of pages, which they can share.

PagedAttention (Kwon et al. 2023, 2309.06180). Pages are not gathered: every page attends for its readers, and each row
joins the partial results of its pages (`kvjax.ops.attention`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax import struct
from kvjax.caches import codecs
from kvjax.caches.base import Kind, LayerShape, Node, Project, Span, is_concrete, views_of
from kvjax.caches.pages import Pages
from kvjax.checks import count, either
from kvjax.ops.attention import EMPTY, View
from kvjax.types import Array


@struct.node
class Paged(Node):
    """A pool of P pages of keys and values; who reads them lies in `shared["pages"]`.

    Args:
        k, v: stores of a codec; their rows are pages.
        rotated: whether keys are kept turned to their positions.
    """

    k: Any
    v: Any
    rotated: bool = struct.static()

    @property
    def patches(self) -> bool:
        """See `Node`."""
        return self.max_rewind is None

    @property
    def shifts(self) -> bool:
        """See `Node`."""
        return not self.rotated

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Paged]:
        """See `Node`."""
        pages = shared["pages"]
        k, v = project.kv(h, span.positions if self.rotated else None)
        at, slots = pages.place(jnp.where(span.kept(), span.order, EMPTY))
        k, v = (store.write(x, slots, span.positions, at) for store, x in ((self.k, k), (self.v, v)))
        node = self.replace(k=k, v=v)
        held, end = pages.held(span.end), pages.ends(span.end)
        views = views_of(node.k.read(held, end), node.v.read(held, end), pages=pages.view(), rotated=self.rotated)
        return views, node

    def _stores(self, f: Callable[[Any], Any]) -> Paged:
        return self.replace(k=f(self.k), v=f(self.v))

    def resize(self, capacity: int, shared: Any) -> Paged:
        """See `Node`."""
        pages = shared["pages"]
        if pages.pool is not None:
            return self
        ids = jnp.arange(pages.readers.shape[0])  # what is new holds what the last page does
        return self._stores(lambda store: store.take(ids))

    def rewind(self, lengths: Array, before: Any, shared: Any) -> Paged:
        """See `Node`. Copies the pages that rows got of their own, and no others."""
        old, new = before["pages"], shared["pages"]
        if old.readers.shape == new.readers.shape and new.readers.shape[1] == 1:
            return self
        source = old.table[:, : new.table.shape[1]]
        moved = (source != new.table) & (new.table >= 0)
        if is_concrete(moved) and not np.asarray(moved).any():
            return self
        at = jnp.nonzero(moved, size=moved.size, fill_value=0)
        slots = jnp.arange(new.page, dtype=jnp.int32)[None, :]

        def one(i: Array, node: Paged) -> Paged:
            there, here = (jnp.broadcast_to(table[at][i], slots.shape) for table in (source, new.table))
            return node._stores(lambda store: store.move(slots, slots, (there, here)))

        return lax.fori_loop(0, jnp.sum(moved), one, self)

    def take(self, rows: Array, before: Any, shared: Any) -> Paged:
        """See `Node`. One gather of the pool."""
        new = shared["pages"]
        old = jnp.take(before["pages"].table, rows, axis=0, mode="clip")
        at = jnp.where(new.table >= 0, new.table, new.index.shape[0])
        source = jnp.full_like(new.index, old[0, 0]).at[at].set(old, mode="drop")
        return self._stores(lambda store: store.take(source))

    def move(self, source: Array, target: Array, shared: Any) -> Paged:
        """See `Node`."""
        (here, at), (there, to) = shared["pages"].place(source), shared["pages"].place(target)
        return self._stores(lambda store: store.move(at, to, (here, there)))

    def turn(self, places: Array, by: Callable[[Array], Array], shared: Any) -> Paged:
        """See `Node`."""
        if not self.rotated:
            return self
        rows, slots = shared["pages"].place(places)
        return self.replace(k=self.k.change(slots, by, rows))

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """See `Node`."""
        pages = shared["pages"]
        b, n = pages.table.shape
        at = jnp.arange(n * pages.page, dtype=jnp.int32)[None, :]
        has = jnp.repeat(pages.table >= 0, pages.page, axis=1)
        lists = (store.unpacked()[pages.table].swapaxes(1, 2) for store in (self.k, self.v))  # [B, K, n, page, D]
        k, v = (x.reshape(b, x.shape[1], n * pages.page, x.shape[-1]) for x in lists)
        return k, v, jnp.where(has & (at < lengths[:, None]), at, EMPTY)


@dataclasses.dataclass(frozen=True)
class PagedKind(Kind):
    """See `paged`."""

    page_size: int
    pages: int | None
    share: int
    store: Any
    rotated: bool

    def shared(self, batch: int, capacity: int) -> dict[str, Any]:
        """See `Kind`."""
        return {"pages": Pages.empty(batch, capacity, self.page_size, self.pages, self.share)}

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Paged:
        """See `Kind`."""
        pages = batch * -(-capacity // self.page_size) if self.pages is None else self.pages
        k = self.store.empty(pages, shape.kv_heads, self.page_size, shape.key_dim, shape.dtype)
        v = self.store.empty(pages, shape.kv_heads, self.page_size, shape.value_dim, shape.dtype)
        return Paged(k, v, self.rotated)


def paged(
    page_size: int = 16, pages: int | None = None, *, share: int = 1, store: Any = None, rotated: bool = True
) -> PagedKind:
    """Rows of any length in one pool of pages; all layers of the plan have one table.

    A row that finds no page free is refused and flagged as a full cache is; `Cache.release` gives a row's pages back.

    Args:
        page_size: slots a page, in tokens. Larger pages are read faster; 128 costs little against `dense`.
        pages: how many the pool has, however many rows there are; None is as many as all rows can fill, and grows.
        share: W, how many rows may read one page. Above 1, rows that `take`, `fork` or `insert` repeat share their full
            pages, and a page is copied before it is written; attention computes W queries for every page.
        store: a codec, or a floating dtype; None stores what the model computes in.
        rotated: False keeps keys as they are projected and turns them when they are read.

    Raises:
        InputError: a number is less than 1.
    """
    for name, value in (("page_size", page_size), ("pages", 1 if pages is None else pages), ("share", share)):
        count(f"caches.paged: {name}", value)
    return PagedKind(page_size, pages, share, codecs.as_codec(store), either("caches.paged: rotated", rotated))


__all__ = ["paged", "Paged", "PagedKind"]
