"""Ring: the last `window` positions, and the first `sinks` ones, in memory that does not grow with the text.

Sliding-window attention (Beltagy et al. 2020, 2004.05150; Mistral 7B, 2310.06825); sinks at their positions in the
text after StreamingLLM (Xiao et al. 2023, 2309.17453).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import codecs
from kvjax.caches.base import Kind, LayerShape, Node, Project, Span, views_of
from kvjax.caches.sinks import SinksInCache
from kvjax.checks import count, either
from kvjax.ops.attention import EMPTY, View
from kvjax.types import Array


@struct.node
class Ring(Node):
    """Keys and values of `sinks + window + slack` positions; which one a slot holds follows from the length alone.

    Args:
        k, v: stores of a codec: first the sinks, then the ring, slot `sinks + (p - sinks) mod (window + slack)`.
        window: positions that a query sees, its own included.
        sinks: positions at the start of the text that are always seen.
        slack: positions kept beyond the window, so that a row can be rewound.
        rotated: whether keys are kept turned to their positions.
    """

    k: Any
    v: Any
    window: int = struct.static()
    sinks: int = struct.static()
    slack: int = struct.static()
    rotated: bool = struct.static()

    @property
    def size(self) -> int:
        """Slots of the ring proper."""
        return self.window + self.slack

    @property
    def max_rewind(self) -> int:  # type: ignore[override]
        """The slack."""
        return self.slack

    @property
    def sees(self) -> int | None:
        """See `Node`."""
        return None if self.sinks else self.window

    def again(self, wanted: Any, start: Any, lengths: Any, written: Any, shared: Any) -> Any:
        """See `Node`. What has been overwritten is fed again, and before it the windows of the first that is wanted."""
        first = wanted.clip(None, start)
        near = first >= written - self.slack - 1  # a query that is fed sees one position less than a window back
        far = (wanted - (self.window - 1)).clip(None, lengths - self.size)
        return first * near + far * ~near * ((far > self.sinks) & (start >= self.sinks))

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Ring]:
        """See `Node`."""
        k, v = project.kv(h, span.positions if self.rotated else None)
        slots = self._slots(span)
        node = self.replace(k=self.k.write(k, slots, span.positions), v=self.v.write(v, slots, span.positions))
        if k.shape[1] <= self.slack + 1:
            # What the new tokens overwrite lies outside the window of the first of them.
            return node._views(span.end), node
        # A longer chunk overwrites what its first queries still see: they read the ring as it was, and the chunk.
        at = jnp.where(span.real(), span.order, EMPTY)
        return (*self._views(span.start), *self._seen(self.k.fresh(k, at), self.v.fresh(v, at))), node

    def _views(self, end: Array) -> tuple[View, ...]:
        at = self._positions(end)
        return self._seen(self.k.read(at, end), self.v.read(at, end))

    def _seen(self, k: Any, v: Any) -> tuple[View, ...]:
        return views_of(k, v, window=self.window, sinks=self.sinks, rotated=self.rotated)

    def _slots(self, span: Span) -> Array:
        order = span.order
        kept = span.kept() & ((order >= span.end[:, None] - self.size) | (order < self.sinks))
        return self.slots_of(jnp.where(kept, order, EMPTY))

    def slots_of(self, order: Array) -> Array:
        """Where each place in the order of feeding is kept; outside the store for EMPTY."""
        at = jnp.where(order < self.sinks, order, self.sinks + (order - self.sinks) % self.size)
        return jnp.where(order == EMPTY, self.sinks + self.size, at)

    def _positions(self, end: Array) -> Array:
        """`[B, slots]` int32: what each slot holds once a row has `end[b]` tokens."""
        j = jnp.arange(self.size, dtype=jnp.int32)[None, :]
        last = end[:, None] - 1 - self.sinks  # of the ring proper, counted from its first position
        held = last - (last - j) % self.size
        held = jnp.where(held >= 0, held + self.sinks, EMPTY)
        if not self.sinks:
            return held
        first = jnp.arange(self.sinks, dtype=jnp.int32)[None, :]
        return jnp.concatenate([jnp.where(first < end[:, None], first, EMPTY), held], axis=1)

    def resize(self, capacity: int, shared: Any) -> Ring:
        """Itself: a ring does not grow with the text."""
        return self

    def loosen(self, tokens: int, lengths: Array, shared: Any) -> Ring:
        """See `Node`: a larger ring, where each position has another slot."""
        if tokens <= self.slack:
            return self
        wider = self.replace(slack=tokens)
        slots = self.sinks + wider.size
        held = self.slots_of(wider._positions(lengths))  # of positions that are gone: anything, which nobody sees
        own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None, :], held.shape)
        return wider.replace(k=self.k.resize(slots).move(held, own), v=self.v.resize(slots).move(held, own))

    def word(self, kind: Any, shared: Any) -> Any:
        """See `Node`."""
        return dataclasses.replace(kind, slack=self.slack)

    def move(self, source: Array, target: Array, shared: Any) -> Ring:
        """See `Node`."""
        there, here = self.slots_of(source), self.slots_of(target)
        return self.replace(k=self.k.move(there, here), v=self.v.move(there, here))

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """See `Node`."""
        at = self._positions(lengths)
        # After a rewind, slots behind the window may hold what was dropped: only what the next query sees is sure.
        live = (at >= lengths[:, None] - self.window) | (at < self.sinks)
        return self.k.unpacked(), self.v.unpacked(), jnp.where(live, at, EMPTY)


@dataclasses.dataclass(frozen=True)
class RingKind(Kind):
    """See `ring`."""

    window: int
    sinks: int
    slack: int
    store: Any
    rotated: bool
    sinks_in_cache: bool

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Ring | SinksInCache:
        """See `Kind`."""

        def stores(slots: int) -> tuple[Any, Any]:
            k = self.store.empty(batch, shape.kv_heads, slots, shape.key_dim, shape.dtype)
            return k, self.store.empty(batch, shape.kv_heads, slots, shape.value_dim, shape.dtype)

        inside = 0 if self.sinks_in_cache else self.sinks
        made = Ring(*stores(inside + self.window + self.slack), self.window, inside, self.slack, self.rotated)
        return SinksInCache(*stores(self.sinks), made, self.sinks) if self.sinks_in_cache else made


def ring(
    window: int,
    *,
    sinks: int = 0,
    slack: int = 0,
    store: Any = None,
    rotated: bool = True,
    sinks_in_cache: bool = False,
) -> RingKind:
    """The last `window` positions in bounded memory.

    Exact for a layer whose own window is at least as short. For a layer that sees everything this is another
    algorithm, sliding-window attention; `recompute(window=, sinks=, sinks_in_cache=)` is its reference.

    Args:
        window: positions that a query sees, its own included, in tokens.
        sinks: positions at the start of the text that are always seen, at their positions in the text.
        slack: how many tokens a row can be rewound exactly.
        store: a codec, or a floating dtype; None stores what the model computes in.
        rotated: False keeps keys as they are projected and turns them when they are read.
        sinks_in_cache: sinks are seen as if they stood right before the window, so that no distance is longer than the
            model knows (StreamingLLM).

    Raises:
        InputError: `window` is less than 1, or another number negative; `sinks_in_cache` without sinks.
    """
    rotated = either("caches.ring: rotated", rotated)
    in_cache = either("caches.ring: sinks_in_cache", sinks_in_cache)
    for name, value, least in (("window", window, 1), ("sinks", sinks, int(in_cache)), ("slack", slack, 0)):
        count(f"caches.ring: {name}", value, least)
    return RingKind(window, sinks, slack, codecs.as_codec(store), rotated, in_cache)


__all__ = ["ring", "Ring", "RingKind"]
