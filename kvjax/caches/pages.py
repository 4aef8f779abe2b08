"""Who reads which page of a pool: tables, a free list that is a value, pages that several rows share.

PagedAttention (Kwon et al. 2023, 2309.06180): the text of a row lies in pages from anywhere in the pool. A page that
several rows share is full for all of them, so that whatever is written lies in a page with one reader.
"""

from __future__ import annotations

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches.base import Shared, Span
from kvjax.caches.flags import PAGES
from kvjax.ops.attention import EMPTY
from kvjax.types import Array


@struct.node
class Pages(Shared):
    """One table for all layers, and who reads each of the P pages.

    Args:
        table: `[B, n]` int32, the pages of each row in the order of its text, -1 for none.
        readers: `[P, W]` int32, the rows that read each page, ascending, then -1; a page without any is free.
        index: `[P]` int32, which page of its readers' text each one is.
        page: slots a page.
        pool: P if it was given; None is as many as all rows can fill.
    """

    table: Array
    readers: Array
    index: Array
    page: int = struct.static()
    pool: int | None = struct.static()

    @classmethod
    def empty(cls, batch: int, capacity: int, page: int, pool: int | None, share: int) -> Pages:
        """All pages free, with room for `capacity` tokens in each of `batch` rows; at most `share` rows a page."""
        n = -(-capacity // page)
        size = batch * n if pool is None else pool
        table, readers = jnp.full((batch, n), -1, jnp.int32), jnp.full((size, share), -1, jnp.int32)
        return cls(table, readers, jnp.zeros((size,), jnp.int32), page, pool)

    @property
    def free(self) -> Array:
        """`[P]` bool, pages that nobody reads."""
        return self.readers[:, 0] < 0

    def reserve(self, span: Span) -> tuple[Pages, Array]:
        """See `Shared`. Least needs first: a row that is refused takes nothing from the others."""
        b, size = span.start.shape[0], self.readers.shape[0]
        have = jnp.sum(self.table >= 0, axis=1, dtype=jnp.int32)
        lost = have * self.page < span.start  # it came from a `take` whose pool was too small
        need = jnp.where(lost, 0, jnp.maximum(-(-span.end // self.page) - have, 0))
        row = jnp.arange(b, dtype=jnp.int32)
        equal = (need[None, :] == need[:, None]) & (row[None, :] < row[:, None])
        ahead = jnp.sum(jnp.where((need[None, :] < need[:, None]) | equal, need[None, :], 0), axis=1)
        refused = lost | ((need > 0) & (ahead + need > jnp.sum(self.free)))
        most = -(-span.positions.shape[1] // self.page)
        place = jnp.arange(most, dtype=jnp.int32)[None, :]  # [1, m], of the row's new pages
        new = place < jnp.where(refused, 0, need)[:, None]
        given = jnp.where(new, self._spare(b * most, ahead[:, None] + place), size)
        column = jnp.where(new, have[:, None] + place, self.table.shape[1])
        row = jnp.broadcast_to(row[:, None], given.shape)
        pages = self.replace(
            table=self.table.at[row, column].set(given, mode="drop"),
            readers=self.readers.at[given, 0].set(row, mode="drop"),
            index=self.index.at[given].set(column, mode="drop"),
        )
        return pages, jnp.where(refused, PAGES, 0).astype(jnp.int32)

    def _spare(self, most: int, which: Array) -> Array:
        """The free pages number `which`, of the first `most`."""
        size = self.readers.shape[0]
        (spare,) = jnp.nonzero(self.free, size=min(most, size), fill_value=size)
        return spare.astype(jnp.int32).at[which].get(mode="clip")

    def kept(self, lengths: Array) -> Array:
        """`[B, n]` bool, which of its pages a row of this length reads."""
        return jnp.arange(self.table.shape[1], dtype=jnp.int32)[None, :] * self.page < lengths[:, None]

    def rewind(self, lengths: Array) -> tuple[Pages, Array]:
        """See `Shared`. A row that ends inside a page that others share gets a page of its own instead, or stays."""
        table = jnp.where(self.kept(lengths), self.table, -1)
        column = jnp.arange(table.shape[1], dtype=jnp.int32)[None, :]
        inside = (column == lengths[:, None] // self.page) & (lengths % self.page > 0)[:, None]
        back, short = self._read_by(table)._alone(inside)
        if self.readers.shape[1] == 1:
            return back, short
        # A refused row goes on reading what it read: then no page that was shared is anybody's to write.
        shared = (self.table >= 0) & (self.readers[self.table, 1] >= 0)
        refused = jnp.any(short != 0) & jnp.any(inside & shared, axis=1)
        table = jnp.where(refused[:, None], self.table, back.table)
        return self._read_by(table), jnp.where(refused, PAGES, 0).astype(jnp.int32)

    def claim(self, places: Array) -> tuple[Pages, Array]:
        """See `Shared`."""
        rows = jnp.arange(places.shape[0])[:, None]
        writes = jnp.zeros(self.table.shape, bool).at[rows, places // self.page].set(True, mode="drop")
        return self._alone(writes)

    def _alone(self, writes: Array) -> tuple[Pages, Array]:
        """With one reader for each page where `writes[B, n]`: if all readers write, the first keeps it. If the pool has
        not enough for all, nothing changes, and rows that would have needed it are flagged."""
        b, n = self.table.shape
        if self.readers.shape[1] == 1:
            return self, jnp.zeros((b,), jnp.int32)
        readers = jnp.where((self.table >= 0)[..., None], self.readers[self.table], -1)  # [B, n, W]
        there = readers >= 0
        column = jnp.arange(n)[None, :, None]
        all_write = jnp.all(writes[readers, column] | ~there, axis=2)
        crowded = writes & there[..., 1]
        leaves = crowded & ~(all_write & (readers[..., 0] == jnp.arange(b)[:, None]))
        short = jnp.sum(leaves) > jnp.sum(self.free)
        number = jnp.cumsum(leaves).reshape(b, n) - 1
        table = jnp.where(leaves & ~short, self._spare(b * n, number), self.table)
        flags = jnp.where(short & jnp.any(crowded, axis=1), PAGES, 0).astype(jnp.int32)
        return self._read_by(table), flags

    def release(self, rows: Array) -> tuple[Pages, Array]:
        """See `Shared`."""
        return self._read_by(jnp.where(rows[:, None], -1, self.table)), jnp.zeros(rows.shape, jnp.int32)

    def take(self, rows: Array) -> tuple[Pages, Array]:
        """See `Shared`. Rows with the same text share its full pages, up to W each; pages get new numbers, row by row.

        A row whose pages do not fit a pool of a given size has none, and is flagged now and whenever it is fed.
        """
        old = jnp.take(self.table, rows, axis=0, mode="clip")  # [R, n]
        seat = jnp.zeros_like(old)
        if self.readers.shape[1] > 1:
            # The last page of a row may go on being written, unless others shared it before: then it is full.
            last = jnp.arange(old.shape[1])[None, :] == jnp.sum(old >= 0, axis=1, keepdims=True) - 1
            rank = _rank(old)
            seat = jnp.where(last & (self.readers[old, 1] < 0), 0, rank % self.readers.shape[1])
        leads = (old >= 0) & (seat == 0)
        number = jnp.cumsum(leads, dtype=jnp.int32).reshape(old.shape) - 1
        if self.readers.shape[1] > 1:
            # A page that is shared has the number of its first reader's: that of the row with the rank of seat 0.
            first = _same(old) & ((rank - seat)[:, None] == rank[None, :])  # [R, R, n]
            number = jnp.where(leads, number, jnp.sum(jnp.where(first, number[None, :], 0), axis=1))
        size = rows.shape[0] * old.shape[1] if self.pool is None else self.pool
        fits = jnp.all((number < size) | (old < 0), axis=1)
        table = jnp.where(fits[:, None] & (old >= 0), number, -1)
        return self._read_by(table, size), jnp.where(fits, 0, PAGES).astype(jnp.int32)

    def join(self, other: Pages) -> tuple[Pages, Array]:
        """See `Shared`. Both pools, one after the other; `take` brings a pool of a given size back to it."""
        size, batch = self.readers.shape[0], self.table.shape[0]
        after = lambda a, b, by: jnp.concatenate([a, jnp.where(b >= 0, b + by, -1)])  # noqa: E731
        table, readers = after(self.table, other.table, size), after(self.readers, other.readers, batch)
        both = self.replace(table=table, readers=readers, index=jnp.concatenate([self.index, other.index]))
        return both, jnp.zeros((table.shape[0],), jnp.int32)

    def resize(self, capacity: int) -> Pages:
        """See `Shared`. Pages past the end of a smaller pool move to free ones before it."""
        (batch, have), size = self.table.shape, self.readers.shape[0]
        n = -(-capacity // self.page)
        smaller = batch * n if self.pool is None else self.pool
        table = jnp.pad(self.table[:, :n], ((0, 0), (0, max(n - have, 0))), constant_values=-1)
        if smaller < size:
            stray = ~self.free & (jnp.arange(size) >= smaller)
            (spare,) = jnp.nonzero(self.free, size=size, fill_value=size)
            moved = jnp.where(stray, spare[jnp.cumsum(stray) - 1], jnp.arange(size))
            table = jnp.where(table >= 0, moved[table], -1).astype(jnp.int32)
        return self._read_by(table, smaller)

    def _read_by(self, table: Array, size: int | None = None) -> Pages:
        """With this table, and the readers that follow from it."""
        size = self.readers.shape[0] if size is None else size
        share = self.readers.shape[1]
        at = jnp.where(table >= 0, table, size)
        seat = _rank(table) if share > 1 else jnp.zeros_like(table)
        row, column = (jnp.broadcast_to(x, table.shape) for x in jnp.ogrid[: table.shape[0], : table.shape[1]])
        return self.replace(
            table=table,
            readers=jnp.full((size, share), -1, jnp.int32).at[at, seat].set(row.astype(jnp.int32), mode="drop"),
            index=jnp.zeros((size,), jnp.int32).at[at].set(column.astype(jnp.int32), mode="drop"),
        )

    # What a layer reads.

    def view(self) -> tuple[Array, Array]:
        """`View.pages`: who reads each page, and where in `[P * W]` each page of a row is read for it, -1 for none."""
        share = self.readers.shape[1]
        if share == 1:
            return self.readers, self.table
        row = jnp.arange(self.table.shape[0])[:, None, None]
        seat = jnp.argmax(self.readers[self.table] == row, axis=2)
        return self.readers, jnp.where(self.table >= 0, self.table * share + seat, -1)

    def place(self, order: Array) -> tuple[Array, Array]:
        """Page and slot `[B, S]` of places in the order of feeding; the slot is outside for EMPTY."""
        at = jnp.clip(order // self.page, 0, self.table.shape[1] - 1)
        page = jnp.take_along_axis(self.table, at, axis=1)
        return page, jnp.where((order == EMPTY) | (page < 0), self.page, order % self.page)

    def ends(self, end: Array) -> Array:
        """`[P]` int32, tokens of each page's longest reader when rows have `end[B]`; 0 for a free one."""
        return jnp.max(jnp.where(self.readers >= 0, end[self.readers], 0), axis=1)

    def held(self, end: Array) -> Array:
        """`[P, page]` int32, which place each slot holds."""
        at = self.index[:, None] * self.page + jnp.arange(self.page, dtype=jnp.int32)[None, :]
        return jnp.where(at < self.ends(end)[:, None], at, EMPTY)


def _same(table: Array) -> Array:
    """`[R, R, n]` bool, whether two rows have the same page there."""
    return (table[:, None] == table[None, :]) & (table >= 0)[:, None]


def _rank(table: Array) -> Array:
    """`[R, n]` int32, how many rows before have the same page there: a page is at one place in all texts."""
    row = jnp.arange(table.shape[0])
    earlier = _same(table) & (row[None, :] < row[:, None])[..., None]
    return jnp.sum(earlier, axis=1, dtype=jnp.int32)


__all__ = ["Pages"]
