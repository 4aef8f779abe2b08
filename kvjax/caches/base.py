"""The contract of a cache: the container, the node of a layer, and what passes between a layer and its node.

A layer asks its node to take in S new tokens and to hand back what to attend over:

    extend(h, project, span, shared) -> (views, node)
    record(site, x, span) -> node             default: itself; a trace needs it
    resize(capacity), rewind(lengths), take(rows), reorder(beams), keep(source, target)

What layers have in common lies once in `Cache.shared`: named `Shared` entries, asked once a call (`reserve`) before the
layers run, and moved with the same operations. Nodes and entries are frozen pytrees; nothing here is changed in place.
`docs/decisions.md` says what forced each part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.caches import storage
from kvjax.caches.codecs import Segment
from kvjax.errors import CacheError
from kvjax.ops.attention import EMPTY, Absorb, View, attention
from kvjax.types import Array, DType

CAPACITY, POSITIONS, PAGES, NAN, TOKEN, REWIND = (1 << i for i in range(6))
"""Bits of `Cache.flags`."""

MEANING = {
    CAPACITY: "tokens past the capacity were dropped",
    POSITIONS: "tokens past the model's last position were dropped",
    PAGES: "the page pool was exhausted",
    NAN: "the model gave NaN logits",
    TOKEN: "a token id was outside the vocabulary",
    REWIND: "it was rewound further than its kind keeps",
}


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What a kind must know of a layer to make its node.

    Args:
        kv_heads: K.
        key_dim, value_dim: widths of one key and one value.
        dtype: what the layer computes in.
        window: the layer's own window, or None.
        width: M, of the layer's input; None where the model does not show it.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: Any
    window: int | None = None
    width: int | None = None


@struct.node
class Span(struct.Value):
    """The new tokens of one call.

    Args:
        start: `[B]` int32, tokens a row already has.
        valid: `[B]` int32, how many of the S new ones are real; the others are padding and are not kept.
        positions: `[B, S]` int32, where each new token stands in the text: rotation, learned tables and masks read it.
        ancestors: `[B, S, S]` bool or None: which new tokens each new token may see, itself included (tree drafts,
            where siblings share a position); None is causal order.
    """

    start: Array
    valid: Array
    positions: Array
    ancestors: Array | None = None

    @property
    def end(self) -> Array:
        """`[B]` int32, tokens a row has afterwards."""
        return self.start + self.valid

    @property
    def order(self) -> Array:
        """`[B, S]` int32, the place of each new token in the order of feeding; equal to positions but in a tree."""
        steps = jnp.arange(self.positions.shape[1], dtype=jnp.int32)
        return self.start[:, None] + steps[None, :]

    def real(self) -> Array:
        """`[B, S]` bool, which new tokens are not padding."""
        steps = jnp.arange(self.positions.shape[1], dtype=jnp.int32)
        return steps[None, :] < self.valid[:, None]

    def text(self, order: Array) -> Array:
        """`[B, T]`, where tokens stand in the text, by their place in the order of feeding; the same but in a tree."""
        if self.ancestors is None:
            return order
        new, inside = self._new(order)
        return jnp.where(inside, jnp.take_along_axis(self.positions, new, axis=1), order)

    def tree_view(self, view: View) -> View:
        """A view whose positions are places in the order of feeding, with positions of the text and a tree's mask."""
        if self.ancestors is None:
            return view
        span = self if view.pages is None else self._rows(view.pages[0])
        order = _for_rows(view.positions, span.start.shape[0])
        return view.replace(positions=span.text(order), visible=span.seen(order))

    def seen(self, order: Array) -> Array:
        """`[B, S, T]` bool, what a tree lets each new token see of places in the order of feeding: what was there
        before, and of the new ones its ancestors."""
        assert self.ancestors is not None
        new, inside = self._new(order)
        at = jnp.broadcast_to(new[:, None, :], (*self.ancestors.shape[:2], new.shape[1]))
        return jnp.take_along_axis(self.ancestors, at, axis=2) | ~inside[:, None, :]

    def _new(self, order: Array) -> tuple[Array, Array]:
        """For places `[B, T]`: which of the new tokens each is, clipped, and whether it is one."""
        new = order - self.start[:, None]
        size = self.positions.shape[1]
        return jnp.clip(new, 0, size - 1), (new >= 0) & (new < size)

    def _rows(self, rows: Array) -> Span:
        pick = lambda x: None if x is None else jnp.take(x, rows, axis=0, mode="clip")  # noqa: E731
        return Span(pick(self.start), pick(self.valid), pick(self.positions), pick(self.ancestors))


@struct.node
class Tree(struct.Value):
    """How the new tokens of one call hang together when they are drafts of several continuations.

    Args:
        depths: `[B or 1, S]` int32, how far below the text each token stands; its parent's and one.
        ancestors: `[B or 1, S, S]` bool, which tokens each may see, itself included.
    """

    depths: Array
    ancestors: Array


@dataclasses.dataclass(frozen=True)
class Project:
    """What a layer can do for its node: functions, not results.

    Args:
        kv: `(h [B, S, ...], positions [B, S] or None) -> (k [B, S, K, D], v [B, S, K, D])`, keys rotated to
            `positions`, or not rotated when None.
        rotate: `(x [B, S, heads, D], positions [B, S]) -> x`, the layer's rotation.
        absorb: `h [B, S, E] -> (maps, factor [B, S] or None)`: keys and values are linear in `h` times a factor per
            position (the norm's); or None where something stands between, a rotation or a norm of the keys.
    """

    kv: Callable[[Any, Array | None], tuple[Array, Array]]
    rotate: Callable[[Array, Array], Array]
    absorb: Callable[[Any], tuple[Absorb, Array | None]] | None = None


class Shared(struct.Value):
    """An entry of `Cache.shared`: what layers have in common, once; derives from it and is a `struct.node`.

    Every operation gives the entry and `[B]` int32 flags, bits for the rows where it could not be done.
    """

    def reserve(self, span: Span) -> tuple[Any, Array]:
        """Makes room for the new tokens, once a call, before the layers run; tokens of flagged rows are dropped."""
        return self, jnp.zeros_like(span.start)

    def resize(self, capacity: int) -> Any:
        """The same for a cache with room for `capacity` tokens a row."""
        return self

    def rewind(self, lengths: Array) -> tuple[Any, Array]:
        """Gives back what lies at or past `lengths[B]`."""
        return self, jnp.zeros_like(lengths)

    def take(self, rows: Array) -> tuple[Any, Array]:
        """Other rows, `rows[n]`; everything moves."""
        raise NotImplementedError

    def reorder(self, beams: Array) -> tuple[Any, Array]:
        """Rows exchanged inside a source; what the rows of a source share stays."""
        return self.take(beams)


class Node(struct.Value):
    """A layer's part of the cache; a layout derives from it and is a `struct.node`."""

    replays = False
    """Whether the layer keeps nothing, so that every call must feed the whole text again."""

    max_rewind: int | None = None
    """How many tokens behind the furthest one written a row can be rewound exactly; None is any number."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        """Takes in the new tokens; hands back the views to attend over and the node that has them.

        The views' positions are places in the order of feeding (`span.order`, or 0 for what every query sees, such as
        a source text); where a tree makes the text's positions differ, the container turns one into the other.

        Args:
            h: `[B, S, M]`, the layer's input before its norm; only passed on to `project.kv` or stored. None: nothing
                is new to this node (cross-attention while the target grows).
            project: what the layer can do.
            span: the new tokens.
            shared: what layers have in common, by name; read, not changed.
        """
        raise NotImplementedError

    def record(self, site: str, x: Array, span: Span) -> Any:
        """Sees `x[B, S, M]` at a named site of the layer. Most kinds keep nothing of it."""
        return self

    # In what follows `shared` is as it will be in the same container as the result, `before` as it was.

    def resize(self, capacity: int, shared: Any) -> Any:
        """The same with room for `capacity` tokens."""
        raise NotImplementedError

    def rewind(self, lengths: Array) -> Any:
        """Forgets what lies at or past `lengths[B]`. Kinds whose positions follow from lengths have nothing to do."""
        return self

    def take(self, rows: Array, before: Any, shared: Any) -> Any:
        """Other rows, `rows[n]` int32; everything moves."""
        raise NotImplementedError

    def reorder(self, beams: Array, before: Any, shared: Any) -> Any:
        """Rows exchanged inside a source; what the rows of a source share stays."""
        return self.take(beams, before, shared)

    def keep(self, source: Array, target: Array, shared: Any) -> Any:
        """What stands at places `source[B, n]` in the order of feeding stands at `target[B, n]` too, as stored; EMPTY
        targets are dropped. The accepted path of a tree of drafts moves up so."""
        raise NotImplementedError

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """Keys and values `[B, K, T, D]`, decoded, and the position `[B, T]` of every slot; a copy, for looking."""
        raise NotImplementedError


class Kind:
    """A word of a plan: hashable, makes a layer's node."""

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        """An empty node for `batch` rows and `capacity` tokens."""
        raise NotImplementedError

    def shared(self, batch: int, capacity: int) -> dict[str, Any]:
        """Entries of `Cache.shared` that its nodes look for; kinds that name the same one share it."""
        return {}


@struct.node
class OpenCache(struct.Value):
    """A cache while a model takes in new tokens: what `Model.apply` is given and returns.

    Args:
        layers: the nodes, one a layer.
        shared: what the layers have in common.
        span: the new tokens.
    """

    layers: Any
    shared: Any
    span: Span

    @property
    def positions(self) -> Array:
        """`[B, S]` int32, where the new tokens stand in the text."""
        return self.span.positions

    def record(self, layer: int, site: str, x: Array) -> OpenCache:
        """Shows `x[B, S, M]` to the layer's node under a name."""
        return self._with(layer, self.layers[layer].record(site, x, self.span))

    def attend(
        self,
        layer: int,
        q: Array,
        project: Project,
        h: Any = None,
        *,
        kv_heads: int,
        scale: float | None = None,
        window: int | None = None,
    ) -> tuple[Array, OpenCache]:
        """Extends one layer's node and attends. `kvjax.attend` is the door for models of one's own."""
        views, node = self.layers[layer].extend(h, project, self.span, self.shared)
        views = tuple(self.span.tree_view(view) for view in views)
        out = attention(
            q, self.span.positions, views, kv_heads=kv_heads, scale=scale, window=window, rotate=project.rotate
        )
        return out, self._with(layer, node)

    def _with(self, layer: int, node: Any) -> OpenCache:
        if node is self.layers[layer]:
            return self
        layers = (*self.layers[:layer], node, *self.layers[layer + 1 :])
        return self.replace(layers=layers)


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
    """

    layers: tuple[Any, ...]
    shared: dict[str, Any]
    tokens: Array
    lengths: Array
    written: Array
    flags: Array

    @property
    def capacity(self) -> int:
        """T, tokens that a row can hold."""
        return int(self.tokens.shape[1])

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

    def resize(self, capacity: int) -> Cache:
        """The same with room for `capacity` tokens a row; clears the flag of a full cache.

        Raises:
            CacheError: a row is longer than `capacity`.
        """
        if is_concrete(self.lengths):
            for row, length in enumerate(np.asarray(self.lengths)):
                if length > capacity:
                    raise CacheError(f"resize: capacity {capacity} is less than the length {length} of row {row}")
        tokens = storage.resize(self.tokens, capacity, rest=0)
        if capacity > self.capacity:
            fresh = jnp.arange(capacity, dtype=jnp.int32)[None, :] >= self.capacity
            tokens = jnp.where(fresh, -1, tokens)
        shared = {name: entry.resize(capacity) for name, entry in self.shared.items()}
        return self.replace(
            layers=tuple(node.resize(capacity, shared) for node in self.layers),
            shared=shared,
            tokens=tokens,
            flags=self.flags & ~CAPACITY,
        )

    def reserve(self, span: Span) -> tuple[dict[str, Any], Array]:
        """Room for new tokens in what layers have in common: the entries, and `[B]` int32 flags of refused rows."""
        return _ask(self.shared, lambda entry: entry.reserve(span), jnp.zeros_like(self.flags))

    def rewind(self, lengths: Any) -> Cache:
        """Goes back to absolute `lengths`; what is kept is bitwise what it would be had the rest never been fed.

        Args:
            lengths: int or `[B]` int32; not more than `self.lengths`.

        Returns:
            The rewound cache, flags cleared (what is still wrong shows at the next call).

        Raises:
            CacheError: a length is negative, more than the row has, or further back than the kind keeps. Under `jit`
                the row is flagged and its logits become NaN.
        """
        target = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), self.lengths.shape)
        wrong = (target < 0) | (target > self.lengths)
        if self.max_rewind is not None:
            wrong |= target < self.written - self.max_rewind
        if is_concrete(wrong) and np.asarray(wrong).any():
            row = int(np.argmax(np.asarray(wrong)))
            want, have, far = (int(np.asarray(x)[row]) for x in (target, self.lengths, self.written))
            if 0 <= want <= have:
                raise CacheError(
                    f"rewind: row {row} to length {want} is {far - want} behind the furthest token written ({far}), "
                    f"and this plan keeps {self.max_rewind}; give the ring more slack"
                )
            raise CacheError(f"rewind: row {row} to length {want}, but the row has {have} tokens")
        target = jnp.clip(target, 0, self.lengths)
        shared, refused = _ask(self.shared, lambda entry: entry.rewind(target), jnp.zeros_like(target))
        wrong |= refused != 0
        if is_concrete(wrong) and np.asarray(wrong).any():
            row = int(np.argmax(np.asarray(wrong)))
            raise CacheError(f"rewind: row {row} to length {int(target[row])} goes into what other rows share")
        return self.replace(
            layers=tuple(node.rewind(target) for node in self.layers),
            shared=shared,
            lengths=target,
            flags=jnp.where(wrong, REWIND, 0).astype(jnp.int32),
        )

    def take(self, rows: Any) -> Cache:
        """Other rows, `rows[n]` int32, repeated or left out at will; everything moves.

        Raises:
            CacheError: a row outside the batch.
        """
        return self._rows(rows, "take")

    def reorder(self, beams: Any) -> Cache:
        """Rows exchanged inside a source: as `take`, but what the rows of a source share stays where it is.

        Raises:
            CacheError: a row outside the batch, or another number of rows than the batch.
        """
        return self._rows(beams, "reorder")

    def _rows(self, rows: Any, how: str) -> Cache:
        rows = jnp.asarray(rows, jnp.int32)
        if rows.ndim != 1 or (how == "reorder" and rows.shape[0] != self.batch):
            raise CacheError(f"{how}: rows has shape {rows.shape}, the batch is {self.batch}")
        if is_concrete(rows):
            for row in np.asarray(rows):
                if not 0 <= row < self.batch:
                    raise CacheError(f"{how}: row {row} is outside a batch of {self.batch}")
        pick = lambda x: jnp.take(x, rows, axis=0, mode="clip")  # noqa: E731
        shared, flags = _ask(self.shared, lambda entry: getattr(entry, how)(rows), pick(self.flags))
        return self.replace(
            layers=tuple(getattr(node, how)(rows, self.shared, shared) for node in self.layers),
            shared=shared,
            tokens=pick(self.tokens),
            lengths=pick(self.lengths),
            written=pick(self.written),
            flags=flags,
        )

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
        moved = jnp.take_along_axis(self.tokens, source, axis=1, mode="clip")
        kept = self.replace(
            layers=tuple(node.keep(source, target, self.shared) for node in self.layers),
            tokens=self.tokens.at[jnp.arange(self.batch)[:, None], target].set(moved, mode="drop"),
        )
        return kept.rewind(start + counts)

    def check(self) -> Cache:
        """Itself, or the error that its flags stand for. Waits for the device; for loops of one's own.

        Raises:
            CacheError: a row is flagged; names row, length and capacity.
        """
        flags, lengths = np.asarray(self.flags), np.asarray(self.lengths)
        for row in np.flatnonzero(flags):
            what = "; ".join(text for bit, text in MEANING.items() if flags[row] & bit)
            raise CacheError(f"row {row}, length {lengths[row]}, capacity {self.capacity}: {what}")
        return self


def _ask(
    shared: dict[str, Any], what: Callable[[Any], tuple[Any, Array]], flags: Array
) -> tuple[dict[str, Any], Array]:
    """Every entry asked in turn, and the flags that come of it."""
    asked = {name: what(entry) for name, entry in shared.items()}
    for _, bits in asked.values():
        flags = flags | bits
    return {name: entry for name, (entry, _) in asked.items()}, flags


def _for_rows(positions: Array, batch: int) -> Array:
    """`[R, T]` for a view's rows, as `[B, T]`."""
    return positions if positions.shape[0] == batch else jnp.repeat(positions, batch // positions.shape[0], axis=0)


def is_concrete(x: Any) -> bool:
    """Whether a value can be looked at on the host now."""
    return not isinstance(x, jax.core.Tracer)


def filled_positions(capacity: int, end: Array) -> Array:
    """`[B, T]` int32: slot t holds position t where `t < end[b]`, nothing elsewhere."""
    slots = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    return jnp.where(slots < end[:, None], slots, EMPTY)


def views_of(keys: tuple[Segment, ...], values: tuple[Segment, ...], **static: Any) -> tuple[View, ...]:
    """One view for each pair of segments that two stores of one codec gave."""
    pairs = zip(keys, values, strict=True)
    return tuple(View(k.data, v.data, k.positions, k.scale, v.scale, **static) for k, v in pairs)


__all__ = [
    "Cache",
    "OpenCache",
    "Span",
    "Tree",
    "Project",
    "Shared",
    "Node",
    "Kind",
    "LayerShape",
    "filled_positions",
    "views_of",
    "is_concrete",
    "CAPACITY",
    "POSITIONS",
    "PAGES",
    "NAN",
    "TOKEN",
    "REWIND",
    "MEANING",
    "DType",
]
