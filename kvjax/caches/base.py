"""The container: a cache as an immutable value."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.caches import storage
from kvjax.caches.contract import (
    Kind,
    LayerShape,
    Node,
    Project,
    Shared,
    Span,
    Tree,
    filled_positions,
    views_of,
)
from kvjax.caches.flags import CAPACITY, PAGES, REWIND, ROWS, ask, meaning
from kvjax.caches.opened import SOURCE, OpenCache
from kvjax.checks import count, is_concrete, whole
from kvjax.errors import CacheError
from kvjax.ops.attention import EMPTY
from kvjax.types import Array


@struct.node
class Cache(struct.Value):
    """A decoder's cache: an immutable value. Make one with `kvjax.init_cache`.

    Args:
        layers: one node a layer, chosen by a plan.
        shared: what layers have in common, once: `Shared` entries by name.
        tokens: `[B, T]` int32, the ids that were fed; -1 where nothing was.
        lengths: `[B]` int32, tokens of each row; rows advance on their own.
        written: `[B]` int32, one past the furthest position ever written; a ring's slack counts from it.
        flags: `[B]` int32, bits of what went wrong under `jit`; `check` turns them into an error.
        plan: the kind of each layer, which made its node; a saved cache is rebuilt from it.
    """

    layers: tuple[Any, ...]
    shared: dict[str, Any]
    tokens: Array
    lengths: Array
    written: Array
    flags: Array
    plan: tuple[Kind, ...] = struct.static(default=())

    @property
    def capacity(self) -> int:
        """T, tokens that a row can hold at most; `room` says it of each."""
        return int(self.tokens.shape[1])

    @property
    def fixed(self) -> int:
        """How much of the capacity is not the rows' own: the slots of a prefix that they share."""
        return max((entry.fixed for entry in self.shared.values()), default=0)

    @property
    def doubled(self) -> int:
        """A capacity with twice the room for what is the rows' own."""
        return 2 * self.capacity - self.fixed

    def enough(self, lengths: Any) -> int:
        """The capacity, doubled until rows of `lengths[B]` tokens fit; on the host."""
        capacity, needed = self.capacity, self.needed(lengths)
        while needed > capacity:
            capacity = 2 * capacity - self.fixed
        return capacity

    def needed(self, lengths: Any) -> int:
        """The least capacity where rows of `lengths[B]` tokens fit; on the host."""
        return max(int(np.max(np.asarray(lengths) + self.capacity - np.asarray(self.room))), self.fixed + 1)

    @property
    def room(self) -> Array:
        """`[B]` int32, tokens that each row can hold: the capacity, or less where rows share prefixes that are shorter
        than their slots."""
        fill = np.full if is_concrete(self.lengths) else jnp.full  # on the host, nothing is compiled for it
        room: Any = fill((self.batch,), self.capacity, jnp.int32)
        for entry in self.shared.values():
            room = room if entry.most is None else jnp.minimum(room, entry.most)
        return room

    @property
    def branches(self) -> bool:
        """Whether rows can go on from it while it is kept once (`kvjax.branched`)."""
        return all(node.branches for node in self.layers)

    @property
    def batch(self) -> int:
        """B, rows."""
        return int(self.tokens.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def max_rewind(self) -> int | None:
        """How many tokens behind `written` every layer can be rewound exactly; None is any number."""
        limits = [node.max_rewind for node in self.layers if node.max_rewind is not None]
        return min(limits, default=None)

    @property
    def words(self) -> tuple[Kind, ...]:
        """The plan that makes an empty cache like it; `plan` made it, before rows were moved."""
        return tuple(node.word(kind, self.shared) for kind, node in zip(self.plan, self.layers, strict=False))

    @property
    def replays(self) -> bool:
        """Whether any layer keeps nothing, so that every call feeds the whole text again."""
        return any(node.replays for node in self.layers)

    def keys(self, layer: int) -> Array:
        """The layer's keys `[B, K, T, D]`, slot by slot as kept; a copy. `positions` says what each slot holds."""
        return self.layers[layer].contents(self.lengths, self.shared)[0]

    def values(self, layer: int) -> Array:
        """The layer's values `[B, K, T, D]`, slot by slot as kept; a copy."""
        return self.layers[layer].contents(self.lengths, self.shared)[1]

    def positions(self, layer: int) -> Array:
        """`[B, T]` int32, the position in the text of each of the layer's slots; int32.max where there is none."""
        return self.layers[layer].contents(self.lengths, self.shared)[2]

    def trace(self, layer: int, site: str) -> Array:
        """`[B, T, M]`, the residual stream that a layer showed at a site, zeros past a row's length; a copy.

        Raises:
            CacheError: it was not recorded.
        """
        store = self.recorded(layer, site)
        if store is None:
            how = "caches.layer_input()" if site == "input" else f"caches.traced(kind, sites=({site!r},))"
            raise CacheError(f"trace: layer {layer} of {len(self.layers)} keeps no {site!r}; make the cache with {how}")
        live = jnp.arange(self.capacity, dtype=jnp.int32)[None, :] < self.lengths[:, None]
        return jnp.where(live[:, :, None], store.unpacked(self.lengths)[:, 0], 0)

    def recorded(self, layer: int, site: str) -> Any:
        """The store of what a layer showed at a site, wherever it is kept, or None: the output of one layer is the
        input of the next."""
        nodes = self.layers
        if not 0 <= layer < len(nodes):
            return None
        store = nodes[layer].recorded(site)
        if store is None and (layer, site) == (0, "embedding"):
            return nodes[0].recorded("below")
        if store is None and site == "after_ffn" and layer + 1 < len(nodes):
            return nodes[layer + 1].recorded("below")
        return store

    def resize(self, capacity: int) -> Cache:
        """The same with room for `capacity` tokens a row; clears the flag of a full cache.

        Raises:
            CacheError: a row is longer than `capacity`, or this leaves no room after the slots of a prefix.
        """
        if 0 < self.fixed >= capacity:
            raise CacheError(f"resize: capacity {capacity} leaves no room after a prefix of {self.fixed} slots")
        tokens = storage.resize(self.tokens, capacity, rest=0)
        if capacity > self.capacity:
            fresh = jnp.arange(capacity, dtype=jnp.int32)[None, :] >= self.capacity
            tokens = jnp.where(fresh, -1, tokens)
        shared = {name: entry.resize(capacity) for name, entry in self.shared.items()}
        if is_concrete(self.lengths):
            room = np.asarray(self.replace(tokens=tokens, shared=shared).room)
            for row, (length, most) in enumerate(zip(np.asarray(self.lengths), room, strict=True)):
                if length > most:
                    short = "" if most == capacity else f", which leaves room for {most},"
                    raise CacheError(
                        f"resize: capacity {capacity}{short} is less than the length {length} of row {row}"
                    )
        layers = self.layers
        if capacity < self.capacity and shared:  # what is cut off moves first
            layers = tuple(node.rewind(self.lengths, self.shared, shared) for node in layers)
        return self.replace(
            layers=tuple(node.resize(capacity, shared) for node in layers),
            shared=shared,
            tokens=tokens,
            flags=self.flags & ~CAPACITY,
        )

    def reserve(self, span: Span) -> tuple[dict[str, Any], Array]:
        """Room for new tokens in what layers have in common: the entries, and `[B]` int32 flags of refused rows."""
        return ask(self.shared, lambda entry: entry.reserve(span), jnp.zeros_like(self.flags))

    def rewind(self, lengths: Any) -> Cache:
        """Goes back to absolute `lengths`; what is kept is bitwise what it would be had the rest never been fed.

        Args:
            lengths: int or `[B]` int32; not more than `self.lengths`.

        Returns:
            The rewound cache, flags cleared (what is still wrong shows at the next call).

        Raises:
            CacheError: a length is negative, more than the row has, or further back than the kind keeps (under `jit`
                the row is flagged and its logits become NaN); `lengths` has a wrong shape or dtype.
        """
        lengths = whole("rewind: lengths", lengths, ((), self.lengths.shape), CacheError)
        target = jnp.broadcast_to(lengths, self.lengths.shape)
        wrong = (target < 0) | (target > self.lengths)
        if self.max_rewind is not None:
            wrong |= target < self.written - self.max_rewind
        if is_concrete(wrong) and np.asarray(wrong).any():
            row = int(np.argmax(np.asarray(wrong)))
            want, have, far = (int(np.asarray(x)[row]) for x in (target, self.lengths, self.written))
            if 0 <= want <= have:
                raise CacheError(
                    f"rewind: row {row} to length {want} is {far - want} behind the furthest token written ({far}), "
                    f"and this plan keeps {self.max_rewind}; give it more slack"
                )
            raise CacheError(f"rewind: row {row} to length {want}, but the row has {have} tokens")
        target = jnp.clip(target, 0, self.lengths)
        shared, refused = ask(self.shared, lambda entry: entry.rewind(target), jnp.zeros_like(target))
        if is_concrete(refused):
            for row in np.flatnonzero(refused).tolist():
                why = "needs a page of its own" if int(refused[row]) & PAGES else "goes into what other rows share"
                raise CacheError(f"rewind: row {row} to length {int(target[row])} {why}: {meaning(int(refused[row]))}")
        target = jnp.where(refused != 0, self.lengths, target)
        return self.replace(
            layers=tuple(node.rewind(target, self.shared, shared) for node in self.layers),
            shared=shared,
            lengths=target,
            flags=refused.astype(jnp.int32) | jnp.where(wrong, REWIND, 0).astype(jnp.int32),
        )

    def release(self, rows: Any) -> Cache:
        """Empties rows `rows[n]` and gives back what they held in common with others, pages for one: their lengths
        are 0, or that of a prefix which rows share, and their flags are 0.

        Raises:
            CacheError: a row outside the batch (under `jit` it is left out).
        """
        rows = self._checked_rows("release", rows)
        gone = jnp.zeros((self.batch,), bool).at[jnp.where(rows < 0, self.batch, rows)].set(True, mode="drop")
        least: Any = 0
        for entry in self.shared.values():
            least = jnp.maximum(least, entry.least)
        lengths = jnp.where(gone, least, self.lengths)
        shared, refused = ask(self.shared, lambda entry: entry.release(gone), jnp.zeros_like(lengths))
        return self.replace(
            layers=tuple(node.rewind(lengths, self.shared, shared) for node in self.layers),
            shared=shared,
            lengths=lengths,
            written=jnp.where(gone, least, self.written),
            flags=jnp.where(gone, refused, self.flags),
        )

    def insert(self, rows: Any, other: Cache) -> Cache:
        """Rows `rows[n]` become the n rows of another cache of the same plan, as stored; the rest stays as it is.

        So a prompt is prefilled by itself and joins a batch that is being decoded.

        Args:
            rows: `[n]` int32, all different.
            other: of n rows, each no longer than this cache's capacity.

        Raises:
            CacheError: another plan, other than n rows, a row outside the batch or named twice.
        """
        rows = self._checked_rows("insert", rows)
        if rows.shape[0] != other.batch:
            raise CacheError(f"insert: {rows.shape[0]} rows named, the other cache has {other.batch}")
        if is_concrete(rows) and len(set(np.asarray(rows).tolist())) < rows.shape[0]:
            raise CacheError(f"insert: rows {np.asarray(rows).tolist()} name a row twice")
        index = jnp.arange(self.batch, dtype=jnp.int32)
        index = index.at[rows].set(self.batch + jnp.arange(rows.shape[0], dtype=jnp.int32), mode="drop")
        return self.join(other).take(index)

    def join(self, other: Cache) -> Cache:
        """The rows of this cache, then those of another of the same plan; copies.

        Raises:
            CacheError: another plan, or a row of the other is longer than this cache's capacity.
        """
        other = other if other.capacity == self.capacity else other.resize(self.capacity)
        pairs = {name: entry.alike(other.shared.get(name)) for name, entry in self.shared.items()}
        entries = {name: pair[0] for name, pair in pairs.items()}
        other = other.replace(shared=other.shared | {name: pair[1] for name, pair in pairs.items()})
        alike = (self.replace(shared=entries), other)
        made: list[Any] = [jax.tree.structure(cache.replace(plan=cache.words)) for cache in alike]
        if made[0] != made[1]:
            raise CacheError("join: the other cache was made by another plan, or for another model")
        after = lambda a, b: jnp.concatenate([a, b])  # noqa: E731
        both = after(self.flags, other.flags)
        shared, flags = ask(entries, lambda entry, more: entry.join(more), both, other.shared)
        return self.replace(
            layers=tuple(a.join(b) for a, b in zip(self.layers, other.layers, strict=True)),
            shared=shared,
            tokens=after(self.tokens, other.tokens),
            lengths=after(self.lengths, other.lengths),
            written=after(self.written, other.written),
            flags=flags,
        )

    def fork(self, copies: int) -> Cache:
        """Every row `copies` times: `take([0, 0, 1, 1])` for two of two rows, but a source stays, and they share it.
        `kvjax.branched` shares the text so far as well.

        Raises:
            CacheError: `copies` is no whole number of at least 1.
        """
        count("fork: copies", copies, error=CacheError)
        every = np.repeat(np.arange(self.batch, dtype=np.int32), copies)
        return self._rows(every, "take", lambda entry, rows: entry.fork(rows, copies))

    def take(self, rows: Any) -> Cache:
        """Other rows, `rows[n]` int32, repeated or left out at will; everything moves.

        Raises:
            CacheError: a row outside the batch; under `jit` what takes its place is flagged.
        """
        return self._rows(rows, "take")

    def reorder(self, beams: Any) -> Cache:
        """Rows exchanged inside a source: as `take`, but what the rows of a source share stays where it is.

        Raises:
            CacheError: a row outside the batch, or another number of rows than the batch.
        """
        return self._rows(beams, "reorder")

    def _rows(self, rows: Any, how: str, common: Any = None) -> Cache:
        common = common or (lambda entry, rows: getattr(entry, how)(rows))
        rows = self._checked_rows(how, rows)
        if how == "reorder" and rows.shape[0] != self.batch:
            raise CacheError(f"reorder: {rows.shape[0]} rows given, the batch is {self.batch}")
        pick = lambda x: jnp.take(x, rows, axis=0, mode="clip")  # noqa: E731
        outside = (rows < 0) | (rows >= self.batch)
        marked = pick(self.flags) | jnp.where(outside, ROWS, 0).astype(jnp.int32)
        shared, flags = ask(self.shared, lambda entry: common(entry, rows), marked)
        return self.replace(
            layers=tuple(getattr(node, how)(rows, self.shared, shared) for node in self.layers),
            shared=shared,
            tokens=jnp.where((flags & ROWS != 0)[:, None], -1, pick(self.tokens)),  # no ids: seen again after a rewind
            lengths=pick(self.lengths),
            written=pick(self.written),
            flags=flags,
        )

    def _checked_rows(self, how: str, rows: Any) -> Array:
        rows = jnp.asarray(whole(f"{how}: rows", rows, error=CacheError))
        if rows.ndim != 1 or not rows.shape[0]:
            raise CacheError(f"{how}: rows has shape {list(rows.shape)}, it must be [n], n at least 1")
        if is_concrete(rows):
            for row in np.asarray(rows):
                if not 0 <= row < self.batch:
                    raise CacheError(f"{how}: row {row} is outside a batch of {self.batch}")
        return rows

    def keep(self, lengths: Any, path: Any, counts: Any) -> Cache:
        """Keeps one path of a tree of drafts: of the tokens fed since `lengths`, those at `path`, in this order.

        Args:
            lengths: `[B]` int32, tokens of each row before the tree was fed.
            path: `[B, n]` int32, increasing indices into the tree's tokens: each a child of the one before.
            counts: `[B]` int32, how many of `path` are kept; the cache is rewound to `lengths + counts`.
        """
        start, path, counts = (jnp.asarray(x, jnp.int32) for x in (lengths, path, counts))
        steps = jnp.arange(path.shape[1], dtype=jnp.int32)[None, :]
        source = start[:, None] + path
        target = jnp.where(steps < counts[:, None], start[:, None] + steps, EMPTY)
        shared, refused = ask(self.shared, lambda entry: entry.claim(target), jnp.zeros_like(self.flags))
        target = jnp.where(refused[:, None] != 0, EMPTY, target)
        layers = tuple(node.rewind(self.lengths, self.shared, shared) for node in self.layers)
        moved = jnp.take_along_axis(self.tokens, source, axis=1, mode="clip")
        kept = self.replace(
            layers=tuple(node.move(source, target, shared) for node in layers),
            shared=shared,
            tokens=self.tokens.at[jnp.arange(self.batch)[:, None], target].set(moved, mode="drop"),
        ).rewind(jnp.where(refused != 0, self.lengths, start + counts))
        return kept.replace(flags=kept.flags | refused)

    def check(self) -> Cache:
        """Itself, or the error that its flags stand for. Waits for the device; for loops of one's own.

        Raises:
            CacheError: a row is flagged; names row, length and capacity.
        """
        flags, lengths = np.asarray(self.flags), np.asarray(self.lengths)
        for row in np.flatnonzero(flags):
            what = meaning(flags[row])
            raise CacheError(f"row {row}, length {lengths[row]}, capacity {self.capacity}: {what}")
        return self


__all__ = ["Cache", "OpenCache", "Span", "Tree", "Project", "Shared", "Node"]
__all__ += ["Kind", "LayerShape", "filled_positions", "views_of", "is_concrete", "SOURCE"]
