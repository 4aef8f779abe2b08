"""Shared prefix: one text for all rows, or one for every few, kept once, and a suffix of each row's own; joined inside
the softmax.

Hydragen (Juravsky et al. 2024, 2402.05099). The prefix is a cache of one or more rows of any kind, the suffix a node of
any kind that counts from the prefix's end. Make one with `kvjax.init_cache(model, plan, prefix=cache, batch=8,
capacity=512)`, or `kvjax.branched(cache, 4)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import struct
from kvjax.caches.base import Kind, LayerShape, Node, Project, Span
from kvjax.caches.dense import dense
from kvjax.caches.prefixes import Prefix, after_base, before_base
from kvjax.checks import count
from kvjax.errors import CacheError, InputError
from kvjax.ops.attention import View
from kvjax.types import Array


@struct.node
class SharedPrefix(Node):
    """A layer's keys and values of the prefixes, each once, and of each row's suffix.

    Args:
        prefix: a node of R rows, or None for an empty prefix; read, never written.
        suffix: a node of B rows.
        several: whether there may be several prefixes (`Prefix.share`).
    """

    prefix: Any
    suffix: Any
    several: bool = struct.static(default=False)

    @property
    def max_rewind(self) -> int | None:  # type: ignore[override]
        """That of the suffix; `Prefix` refuses what goes beyond it."""
        return self.suffix.max_rewind

    @property
    def patches(self) -> bool:
        """See `Node`."""
        return self.suffix.patches

    @property
    def sees(self) -> int | None:
        """See `Node`."""
        return self.suffix.sees

    def again(self, wanted: Any, start: Any, lengths: Any, written: Any, shared: Any) -> Any:
        """See `Node`; the prefix is never fed again."""
        common = shared["prefix"]
        own = (x - common.base for x in (wanted, start, lengths, written))
        return self.suffix.again(*own, common.suffix) + common.base

    def onward(self, kind: Any, shared: Any) -> tuple[Any, Any, dict[str, Any]]:
        """See `Node`."""
        return self.suffix, kind.suffix, shared["prefix"].suffix

    def word(self, kind: Any, shared: Any) -> Any:
        """See `Node`."""
        common = shared["prefix"]
        prefix = None if self.prefix is None else self.prefix.word(kind.prefix, common.prefix)
        suffix = self.suffix.word(kind.suffix, common.suffix)
        return dataclasses.replace(kind, suffix=suffix, prefix=prefix, share=common.share)

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], SharedPrefix]:
        """See `Node`."""
        common = shared["prefix"]
        views, suffix = self.suffix.extend(h, project, common.after(span), common.suffix)
        views = tuple(_placed(view, common.base) for view in views)
        if self.prefix is not None:
            narrow = {"window": views[0].window, "sinks": views[0].sinks}
            views = (*(_seen(view, **narrow) for view in self._read(h, project, span, common)), *views)
        if any(view.query_positions is not None for view in views):
            raise InputError("shared_prefix: kinds with positions inside the cache cannot share a prefix")
        return views, self.replace(suffix=suffix)

    def _read(self, h: Any, project: Project, span: Span, common: Prefix) -> tuple[View, ...]:
        """The prefix's views: what its node hands back when it is given no tokens."""
        r = common.lengths.shape[0]
        none = jax.tree.map(lambda x: x[:r, :0], h)
        shapes = jax.eval_shape(lambda: project.kv(h, span.positions))

        def kv(stream: Any, positions: Array | None) -> tuple[Array, Array]:
            if stream is not none:
                return project.kv(stream, positions)
            k, v = (jnp.zeros((r, 0, *x.shape[2:]), x.dtype) for x in shapes)
            return k, v

        empty = Span(common.lengths, jnp.zeros_like(common.lengths), jnp.zeros((r, 0), jnp.int32))
        views, _ = self.prefix.extend(none, dataclasses.replace(project, kv=kv), empty, common.prefix)
        return tuple(_for_all(view, span.start.shape[0]) for view in views)

    def resize(self, capacity: int, shared: Any) -> SharedPrefix:
        """See `Node`."""
        return self.replace(suffix=self.suffix.resize(shared["prefix"].room, shared["prefix"].suffix))

    def rewind(self, lengths: Array, before: Any, shared: Any) -> SharedPrefix:
        """See `Node`."""
        old, new = before["prefix"], shared["prefix"]
        return self.replace(suffix=self.suffix.rewind(lengths - new.base, old.suffix, new.suffix))

    def take(self, rows: Array, before: Any, shared: Any) -> SharedPrefix:
        """See `Node`. What rows still share afterwards stays where it is."""
        old, new = before["prefix"], shared["prefix"]
        own = self._own_prefixes(rows, old, new)
        return own.replace(suffix=self.suffix.take(rows, old.suffix, new.suffix))

    def reorder(self, beams: Array, before: Any, shared: Any) -> SharedPrefix:
        """See `Node`."""
        old, new = before["prefix"], shared["prefix"]
        own = self._own_prefixes(beams, old, new)
        return own.replace(suffix=self.suffix.reorder(beams, old.suffix, new.suffix))

    def _own_prefixes(self, rows: Array, old: Prefix, new: Prefix) -> SharedPrefix:
        if new.share != 1 or self.prefix is None:
            return self
        return self.replace(prefix=self.prefix.take(old.of(rows), old.prefix, new.prefix))

    def join(self, other: SharedPrefix) -> SharedPrefix:
        """See `Node`."""
        joined = self.replace(suffix=self.suffix.join(other.suffix))
        return joined.replace(prefix=self.prefix.join(other.prefix)) if self.several and self.prefix else joined

    def loosen(self, tokens: int, lengths: Array, shared: Any) -> SharedPrefix:
        """See `Node`."""
        common = shared["prefix"]
        return self.replace(suffix=self.suffix.loosen(tokens, lengths - common.base, common.suffix))

    def move(self, source: Array, target: Array, shared: Any) -> SharedPrefix:
        """See `Node`."""
        common = shared["prefix"]
        there, here = source - common.base[:, None], before_base(target, common.base)
        return self.replace(suffix=self.suffix.move(there, here, common.suffix))

    def turn(self, places: Array, by: Callable[[Array], Array], shared: Any) -> SharedPrefix:
        """See `Node`."""
        common = shared["prefix"]
        return self.replace(suffix=self.suffix.turn(before_base(places, common.base), by, common.suffix))

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """See `Node`. A prefix is repeated for each of its rows."""
        common = shared["prefix"]
        k, v, at = self.suffix.contents(lengths - common.base, common.suffix)
        at = after_base(at, common.base)
        if self.prefix is None:
            return k, v, at
        parts = self.prefix.contents(common.lengths, common.prefix)
        for a, b in zip(parts[:2], (k, v), strict=True):
            if (a.shape[1], a.shape[3]) != (b.shape[1], b.shape[3]):
                kept = [f"{x.shape[1]} of width {x.shape[3]}" for x in (a, b)]
                raise CacheError(f"the prefix keeps heads of another sort, {kept[0]}, than the suffixes, {kept[1]}")
        repeated = [jnp.repeat(x, at.shape[0] // x.shape[0], axis=0) for x in parts]
        both = [jnp.concatenate([a, b], axis=-2) for a, b in zip(repeated[:2], (k, v), strict=True)]
        return both[0], both[1], jnp.concatenate([repeated[2], at], axis=1)


def _placed(view: View, base: Array) -> View:
    """A suffix's view with its slots at their places in the text; the readers of a page have one prefix."""
    if view.pages is not None and base.shape[0] > 1:
        base = base[jnp.maximum(view.pages[0][:, 0], 0)]
    return view.replace(positions=after_base(view.positions, base))


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
    """A view of R rows for a batch where B / R rows read each: pages need to be told."""
    if view.pages is None:
        return view
    readers, places = view.pages
    copies, seats = batch // places.shape[0], readers.shape[1]
    if places.shape[0] == 1:  # only its first reader is any
        readers, places = readers[:, :1], jnp.where(places < 0, -1, places // seats)
    each = jnp.arange(copies, dtype=jnp.int32)[None, None, :]
    readers = jnp.where(readers[..., None] < 0, -1, readers[..., None] * copies + each)  # [P, W, B / R]
    each = each.swapaxes(1, 2)
    places = jnp.where(places[:, None] < 0, -1, places[:, None] * copies + each)  # [R, B / R, n]
    pages = readers.reshape(readers.shape[0], -1), places.reshape(batch, -1)
    return view.replace(pages=pages)


@dataclasses.dataclass(frozen=True)
class SharedPrefixKind(Kind):
    """See `shared_prefix`."""

    suffix: Any
    prefix: Any = None
    slots: int = 0
    share: int | None = None

    def of(self, shape: LayerShape) -> Kind:
        """See `Kind`."""
        prefix = None if self.prefix is None else self.prefix.of(shape)
        return dataclasses.replace(self, suffix=self.suffix.of(shape), prefix=prefix)

    def _room(self, capacity: int) -> int:
        if capacity <= self.slots:
            raise InputError(f"shared_prefix: capacity {capacity} leaves no room after a prefix of {self.slots} slots")
        return capacity - self.slots

    def _rows(self, batch: int) -> int:
        if batch % (self.share or batch):
            raise InputError(f"shared_prefix: share is {self.share}, which does not divide a batch of {batch}")
        return batch // (self.share or batch)

    def shared(self, batch: int, capacity: int) -> dict[str, Any]:
        """See `Kind`."""
        r, room = self._rows(batch), self._room(capacity)
        tokens, lengths = jnp.zeros((r, self.slots), jnp.int32), jnp.zeros((r,), jnp.int32)
        entries = self.prefix.shared(r, self.slots) if self.slots else {}
        return {"prefix": Prefix(tokens, lengths, entries, self.suffix.shared(batch, room), room, self.share)}

    def init(self, shape: LayerShape, batch: int, capacity: int) -> SharedPrefix:
        """See `Kind`."""
        prefix = self.prefix.init(shape, self._rows(batch), self.slots) if self.slots else None
        suffix = fit(self.suffix.init(shape, batch, self._room(capacity)))
        return SharedPrefix(prefix, suffix, self.share is not None)


def fit(suffix: Any) -> Any:
    """A node as it is.

    Raises:
        InputError: it sees more than its own tokens.
    """
    if not suffix.branches:
        raise InputError(f"shared_prefix: {type(suffix).__name__} cannot be a suffix: it sees more than its own tokens")
    return suffix


def shared_prefix(
    suffix: Any = None, *, prefix: Any = None, slots: int = 0, share: int | None = None
) -> SharedPrefixKind:
    """Rows that go on from one text, or every few of them from one; by itself the prefix is empty.

    `kvjax.init_cache(model, plan, prefix=cache, …)` makes such a cache from a plan for the suffixes and a cache that
    holds the prefixes, and `kvjax.branched(cache, n)` from a cache alone.

    Args:
        suffix: the kind that keeps each row's own tokens; None is `dense()`.
        prefix: the kind that keeps the prefix; None is `dense()`.
        slots: tokens of a prefix, for which there is room: what a saved cache is rebuilt with.
        share: rows that go on from one prefix, next to each other; None is all.

    Raises:
        InputError: `suffix` or `prefix` is no kind, `slots` negative, or `share` less than 1.
    """
    for name, number, least in (("slots", slots, 0), ("share", 1 if share is None else share, 1)):
        count(f"caches.shared_prefix: {name}", number, least)
    suffix, prefix = (dense() if kind is None else kind for kind in (suffix, prefix))
    for kind in (suffix, prefix):
        if not isinstance(kind, Kind):
            raise InputError(f"caches.shared_prefix: {kind!r} is no kind of cache; call it, as in caches.dense()")
    return SharedPrefixKind(suffix, prefix if slots else None, slots, share)


__all__ = ["shared_prefix", "SharedPrefix", "SharedPrefixKind", "fit"]
