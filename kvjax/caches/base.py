"""The container: a cache as an immutable value, and the same while a model takes in new tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
from kvjax.checks import is_concrete, whole
from kvjax.errors import CacheError
from kvjax.ops.attention import EMPTY, attention
from kvjax.types import Array, DType

CAPACITY, POSITIONS, PAGES, NAN, TOKEN, REWIND, ROWS = (1 << i for i in range(7))
"""Bits of `Cache.flags`."""

MEANING = {
    CAPACITY: "tokens past the capacity were dropped",
    POSITIONS: "tokens past the model's last position were dropped",
    PAGES: "the page pool was exhausted",
    NAN: "the model gave NaN logits",
    TOKEN: "a token id was outside the vocabulary",
    REWIND: "it was rewound further than its kind keeps",
    ROWS: "it was taken from a row outside the batch",
}


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
        softcap: float | None = None,
    ) -> tuple[Array, OpenCache]:
        """Extends one layer's node and attends. `kvjax.attend` is the door for models of one's own."""
        project = dataclasses.replace(project, kv=functools.partial(_finite_values, project.kv))
        views, node = self.layers[layer].extend(h, project, self.span, self.shared)
        views = tuple(self.span.tree_view(view) for view in views)
        out = attention(
            q,
            self.span.positions,
            views,
            kv_heads=kv_heads,
            scale=scale,
            window=window,
            softcap=softcap,
            rotate=project.rotate,
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
            CacheError: a row outside the batch; under `jit` what takes its place is flagged.
        """
        return self._rows(rows, "take")

    def reorder(self, beams: Any) -> Cache:
        """Rows exchanged inside a source: as `take`, but what the rows of a source share stays where it is.

        Raises:
            CacheError: a row outside the batch, or another number of rows than the batch.
        """
        return self._rows(beams, "reorder")

    def _rows(self, rows: Any, how: str) -> Cache:
        rows = jnp.asarray(whole(f"{how}: rows", rows, error=CacheError))
        if rows.ndim != 1 or not rows.shape[0]:
            raise CacheError(f"{how}: rows has shape {list(rows.shape)}, it must be [n], n at least 1")
        if how == "reorder" and rows.shape[0] != self.batch:
            raise CacheError(f"reorder: {rows.shape[0]} rows given, the batch is {self.batch}")
        if is_concrete(rows):
            for row in np.asarray(rows):
                if not 0 <= row < self.batch:
                    raise CacheError(f"{how}: row {row} is outside a batch of {self.batch}")
        pick = lambda x: jnp.take(x, rows, axis=0, mode="clip")  # noqa: E731
        outside = (rows < 0) | (rows >= self.batch)
        marked = pick(self.flags) | jnp.where(outside, ROWS, 0).astype(jnp.int32)
        shared, flags = _ask(self.shared, lambda entry: getattr(entry, how)(rows), marked)
        return self.replace(
            layers=tuple(getattr(node, how)(rows, self.shared, shared) for node in self.layers),
            shared=shared,
            tokens=jnp.where(outside[:, None], -1, pick(self.tokens)),  # no ids: seen again after a rewind
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
            layers=tuple(node.move(source, target, self.shared) for node in self.layers),
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


def _finite_values(kv: Callable[..., Any], h: Any, positions: Array | None) -> tuple[Array, Array]:
    """Keys and values, a value that is not finite moved into its key: there it shows as long as it is seen, and masks
    hide it afterwards; among the values it would leak as 0 · NaN."""
    k, v = kv(h, positions)
    good = jnp.isfinite(v)
    return jnp.where(jnp.all(good, axis=-1, keepdims=True), k, jnp.nan), jnp.where(good, v, 0)


def _ask(
    shared: dict[str, Any], what: Callable[[Any], tuple[Any, Array]], flags: Array
) -> tuple[dict[str, Any], Array]:
    """Every entry asked in turn, and the flags that come of it."""
    asked = {name: what(entry) for name, entry in shared.items()}
    for _, bits in asked.values():
        flags = flags | bits
    return {name: entry for name, (entry, _) in asked.items()}, flags


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
    "ROWS",
    "MEANING",
    "DType",
]
