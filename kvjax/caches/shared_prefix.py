"""Shared prefix: one text for all rows, kept once, and a suffix of each row's own; joined inside the softmax.

Hydragen (Juravsky et al. 2024, 2402.05099). The prefix is a cache of one row of any kind, the suffix a node of any kind
that counts from the prefix's end. Make one with `kvjax.init_cache(model, plan, prefix=cache, batch=8, capacity=512)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import struct
from kvjax.caches.base import SOURCE, Cache, Kind, LayerShape, Node, Project, Shared, Span, ask
from kvjax.caches.dense import dense
from kvjax.caches.flags import CAPACITY, PREFIX, REWIND
from kvjax.checks import is_concrete
from kvjax.errors import CacheError, InputError
from kvjax.ops.attention import EMPTY, View
from kvjax.types import Array


@struct.node
class Prefix(Shared):
    """What the rows have in common, and what their suffixes have.

    Args:
        tokens: `[1, P]` int32, the prefix's ids.
        length: `[1]` int32, how many they are.
        prefix: entries of the prefix's own cache.
        suffix: entries of the suffixes, which count from the prefix's end.
        room: tokens that a suffix can hold.
    """

    tokens: Array
    length: Array
    prefix: dict[str, Any]
    suffix: dict[str, Any]
    room: int = struct.static()

    @property
    def least(self) -> Array:
        """See `Shared`."""
        return self.length

    def after(self, span: Span) -> Span:
        """The new tokens as a suffix counts them."""
        return span.replace(start=span.start - self.length, base=self.length)

    def _ask(self, what: Any, flags: Array) -> tuple[Prefix, Array]:
        suffix, flags = ask(self.suffix, what, flags)
        return self.replace(suffix=suffix), flags.astype(jnp.int32)

    def reserve(self, span: Span) -> tuple[Prefix, Array]:
        """See `Shared`."""
        own = self.after(span)
        full = own.end > self.room  # where the prefix is shorter than its buffers
        own = own.replace(valid=jnp.where(full, 0, own.valid))
        return self._ask(lambda entry: entry.reserve(own), jnp.where(full, CAPACITY, 0))

    def resize(self, capacity: int) -> Prefix:
        """See `Shared`."""
        room = max(capacity - self.tokens.shape[1], 1)
        return self.replace(suffix={name: entry.resize(room) for name, entry in self.suffix.items()}, room=room)

    def rewind(self, lengths: Array) -> tuple[Prefix, Array]:
        """See `Shared`. A row that would go into the prefix stays where it is."""
        below = lengths < self.length
        to = jnp.where(below, EMPTY, lengths - self.length)
        return self._ask(lambda entry: entry.rewind(to), jnp.where(below, REWIND, 0))

    def claim(self, places: Array) -> tuple[Prefix, Array]:
        """See `Shared`."""
        below = jnp.any(places < self.length[:, None], axis=1)
        places = jnp.where(below[:, None], EMPTY, _before(places, self.length))
        return self._ask(lambda entry: entry.claim(places), jnp.where(below, REWIND, 0))

    def release(self, rows: Array) -> tuple[Prefix, Array]:
        """See `Shared`."""
        return self._ask(lambda entry: entry.release(rows), jnp.zeros(rows.shape, jnp.int32))

    def take(self, rows: Array) -> tuple[Prefix, Array]:
        """See `Shared`. The prefix stays where it is."""
        return self._ask(lambda entry: entry.take(rows), jnp.zeros_like(rows))

    def reorder(self, beams: Array) -> tuple[Prefix, Array]:
        """See `Shared`."""
        return self._ask(lambda entry: entry.reorder(beams), jnp.zeros_like(beams))

    def join(self, other: Prefix) -> tuple[Prefix, Array]:
        """See `Shared`. Rows of two prefixes are an error on the host; under `jit` all are flagged.

        Raises:
            CacheError: the two prefixes differ.
        """
        at = jnp.arange(self.tokens.shape[1])[None, :]
        same = (self.length == other.length) & jnp.all(
            (self.tokens == other.tokens) | (at >= self.length[:, None]), axis=1
        )
        if is_concrete(same) and not bool(same[0]):
            raise CacheError("join: the rows of the other cache go on from another prefix")
        suffix, flags = ask(self.suffix, lambda entry, more: entry.join(more), jnp.where(same, 0, PREFIX), other.suffix)
        return self.replace(suffix=suffix), flags.astype(jnp.int32)


@struct.node
class SharedPrefix(Node):
    """A layer's keys and values of the prefix, once for all rows, and of each row's suffix.

    Args:
        prefix: a node of one row, or None for an empty prefix; read, never written.
        suffix: a node of B rows.
    """

    prefix: Any
    suffix: Any

    @property
    def max_rewind(self) -> int | None:  # type: ignore[override]
        """That of the suffix; `Prefix` refuses what goes beyond it."""
        return self.suffix.max_rewind

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], SharedPrefix]:
        """See `Node`."""
        common = shared["prefix"]
        views, suffix = self.suffix.extend(h, project, common.after(span), common.suffix)
        views = tuple(view.replace(positions=_after(view.positions, common.length)) for view in views)
        if self.prefix is not None:
            narrow = {"window": views[0].window, "sinks": views[0].sinks}
            views = (*(_seen(view, **narrow) for view in self._read(h, project, span, common)), *views)
        if any(view.query_positions is not None for view in views):
            raise InputError("shared_prefix: kinds with positions inside the cache cannot share a prefix")
        return views, self.replace(suffix=suffix)

    def _read(self, h: Any, project: Project, span: Span, common: Prefix) -> tuple[View, ...]:
        """The prefix's views: what its node hands back when it is given no tokens."""
        none = jax.tree.map(lambda x: x[:1, :0], h)
        shapes = jax.eval_shape(lambda: project.kv(h, span.positions))

        def kv(stream: Any, positions: Array | None) -> tuple[Array, Array]:
            if stream is not none:
                return project.kv(stream, positions)
            k, v = (jnp.zeros((1, 0, *x.shape[2:]), x.dtype) for x in shapes)
            return k, v

        empty = Span(common.length, jnp.zeros_like(common.length), jnp.zeros((1, 0), jnp.int32))
        views, _ = self.prefix.extend(none, dataclasses.replace(project, kv=kv), empty, common.prefix)
        return tuple(_for_all(view, span.start.shape[0]) for view in views)

    def resize(self, capacity: int, shared: Any) -> SharedPrefix:
        """See `Node`."""
        return self.replace(suffix=self.suffix.resize(shared["prefix"].room, shared["prefix"].suffix))

    def rewind(self, lengths: Array, before: Any, shared: Any) -> SharedPrefix:
        """See `Node`."""
        old, new = before["prefix"], shared["prefix"]
        return self.replace(suffix=self.suffix.rewind(lengths - new.length, old.suffix, new.suffix))

    def take(self, rows: Array, before: Any, shared: Any) -> SharedPrefix:
        """See `Node`. The prefix stays where it is."""
        return self.replace(suffix=self.suffix.take(rows, before["prefix"].suffix, shared["prefix"].suffix))

    def reorder(self, beams: Array, before: Any, shared: Any) -> SharedPrefix:
        """See `Node`."""
        return self.replace(suffix=self.suffix.reorder(beams, before["prefix"].suffix, shared["prefix"].suffix))

    def join(self, other: SharedPrefix) -> SharedPrefix:
        """See `Node`."""
        return self.replace(suffix=self.suffix.join(other.suffix))

    def move(self, source: Array, target: Array, shared: Any) -> SharedPrefix:
        """See `Node`."""
        common = shared["prefix"]
        there, here = source - common.length[:, None], _before(target, common.length)
        return self.replace(suffix=self.suffix.move(there, here, common.suffix))

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """See `Node`. The prefix is repeated for each row."""
        common = shared["prefix"]
        k, v, at = self.suffix.contents(lengths - common.length, common.suffix)
        at = _after(at, common.length)
        if self.prefix is None:
            return k, v, at
        parts = self.prefix.contents(common.length, common.prefix)
        for a, b in zip(parts[:2], (k, v), strict=True):
            if (a.shape[1], a.shape[3]) != (b.shape[1], b.shape[3]):
                kept = [f"{x.shape[1]} of width {x.shape[3]}" for x in (a, b)]
                raise CacheError(f"the prefix keeps heads of another sort, {kept[0]}, than the suffixes, {kept[1]}")
        both = [jnp.concatenate([jnp.repeat(a, b.shape[0], 0), b], -2) for a, b in zip(parts[:2], (k, v), strict=True)]
        return both[0], both[1], jnp.concatenate([jnp.repeat(parts[2], at.shape[0], 0), at], axis=1)


def _after(positions: Array, length: Array) -> Array:
    """Places in a suffix as places in the text; `[R, T]`."""
    return jnp.where(positions == EMPTY, EMPTY, positions + length[:, None])


def _before(places: Array, length: Array) -> Array:
    """Places in the text as places in a suffix; `[B, n]`."""
    return jnp.where(places == EMPTY, EMPTY, places - length[:, None])


def _seen(view: View, window: int | None, sinks: int) -> View:
    """The prefix as the suffix's kind lets it be seen: a ring's window reaches back into it."""
    if window is None:
        return view
    if view.window is None:
        return view.replace(window=window, sinks=sinks)
    if sinks > view.sinks:
        raise InputError(
            f"shared_prefix: the suffix's kind sees {sinks} sinks, but the prefix's ring keeps {view.sinks}; "
            "prefill the prefix in a cache with as many"
        )
    return view.replace(window=min(window, view.window), sinks=sinks)


def _for_all(view: View, batch: int) -> View:
    """A view of one row for a batch that reads it: pages need to be told."""
    if view.pages is None:
        return view
    readers, places = view.pages
    rows = jnp.arange(batch, dtype=jnp.int32)
    places = jnp.where(places < 0, -1, places // readers.shape[1] * batch + rows[:, None])
    return view.replace(pages=(jnp.where(readers[:, :1] < 0, -1, rows[None, :]), places))


@dataclasses.dataclass(frozen=True)
class SharedPrefixKind(Kind):
    """See `shared_prefix`."""

    suffix: Any
    prefix: Any = None
    slots: int = 0

    def of(self, shape: LayerShape) -> Kind:
        """See `Kind`."""
        prefix = None if self.prefix is None else self.prefix.of(shape)
        return dataclasses.replace(self, suffix=self.suffix.of(shape), prefix=prefix)

    def _room(self, capacity: int) -> int:
        if capacity <= self.slots:
            raise InputError(f"shared_prefix: capacity {capacity} leaves no room after a prefix of {self.slots} slots")
        return capacity - self.slots

    def shared(self, batch: int, capacity: int) -> dict[str, Any]:
        """See `Kind`."""
        tokens, length, room = jnp.zeros((1, self.slots), jnp.int32), jnp.zeros((1,), jnp.int32), self._room(capacity)
        entries = self.prefix.shared(1, self.slots) if self.slots else {}
        return {"prefix": Prefix(tokens, length, entries, self.suffix.shared(batch, room), room)}

    def init(self, shape: LayerShape, batch: int, capacity: int) -> SharedPrefix:
        """See `Kind`."""
        prefix = self.prefix.init(shape, 1, self.slots) if self.slots else None
        return SharedPrefix(prefix, _fit(self.suffix.init(shape, batch, self._room(capacity))))


def _fit(suffix: Any) -> Any:
    if suffix.replays or type(suffix).record is not Node.record:
        raise InputError(f"shared_prefix: {type(suffix).__name__} cannot be a suffix: it sees more than its own tokens")
    return suffix


def shared_prefix(suffix: Any = None, *, prefix: Any = None, slots: int = 0) -> SharedPrefixKind:
    """Rows that go on from one text; by itself the prefix is empty.

    `kvjax.init_cache(model, plan, prefix=cache, …)` makes such a cache from a plan for the suffixes and a cache of one
    row, which holds the prefix.

    Args:
        suffix: the kind that keeps each row's own tokens; None is `dense()`.
        prefix: the kind that keeps the prefix; None is `dense()`.
        slots: tokens of the prefix, for which there is room: what a saved cache is rebuilt with.

    Raises:
        InputError: `suffix` or `prefix` is no kind, or `slots` negative.
    """
    if not isinstance(slots, int) or isinstance(slots, bool) or slots < 0:
        raise InputError(f"caches.shared_prefix: slots must be a whole number of at least 0, not {slots!r}")
    suffix, prefix = (dense() if kind is None else kind for kind in (suffix, prefix))
    for kind in (suffix, prefix):
        if not isinstance(kind, Kind):
            raise InputError(f"caches.shared_prefix: {kind!r} is no kind of cache; call it, as in caches.dense()")
    return SharedPrefixKind(suffix, prefix if slots else None, slots)


def room_after(prefix: Cache, layers: int, capacity: int) -> tuple[Cache, int]:
    """A prefix without slots that it does not need, and how many of `capacity` are left for a suffix.

    Raises:
        InputError: `prefix` has another number of rows than one or of layers than the model, is empty, keeps nothing,
            or leaves no room.
        CacheError: its row is flagged.
    """
    if prefix.batch != 1 or len(prefix.layers) != layers:
        rows, have = prefix.batch, len(prefix.layers)
        raise InputError(f"prefix: a cache of {rows} rows and {have} layers, it must be 1 row and {layers} layers")
    if prefix.replays:
        raise InputError("prefix: a cache that recomputes keeps nothing that could be shared")
    if is_concrete(prefix.lengths):
        if not int(prefix.check().lengths[0]):
            raise InputError("prefix: the cache is empty; feed the text that the rows share first")
        prefix = prefix.resize(int(prefix.lengths[0]))
    if capacity <= prefix.capacity:
        raise InputError(f"prefix: capacity {capacity} leaves no room after a prefix of {prefix.capacity} tokens")
    return prefix, capacity - prefix.capacity


def after(prefix: Cache, suffix: Cache) -> Cache:
    """The rows of an empty cache, going on from a cache of one row, which is copied once and stays usable; all read the
    source that it reads."""
    prefix = jax.tree.map(jnp.copy, prefix)
    rows, slots = lambda x: jnp.repeat(x, suffix.batch, axis=0), prefix.capacity
    entries = dict(prefix.shared)
    every = jnp.zeros((suffix.batch,), jnp.int32)
    source = {SOURCE: entries.pop(SOURCE).fork(every, suffix.batch)[0]} if SOURCE in entries else {}
    common = Prefix(prefix.tokens, prefix.lengths, entries, suffix.shared, suffix.capacity)
    pairs = zip(prefix.layers, suffix.layers, strict=True)
    return Cache(
        tuple(SharedPrefix(one, _fit(own)) for one, own in pairs),
        {"prefix": common, **source},
        jnp.concatenate([rows(prefix.tokens), suffix.tokens], axis=1),
        rows(prefix.lengths),
        rows(prefix.lengths) + suffix.written,
        rows(prefix.flags),
        tuple(SharedPrefixKind(own, one, slots) for own, one in zip(suffix.plan, prefix.plan, strict=False)),
    )


__all__ = ["shared_prefix", "SharedPrefix", "SharedPrefixKind", "Prefix", "room_after", "after"]
