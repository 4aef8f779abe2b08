"""What one stored element is. A codec makes stores; a layout says where a position is kept and never looks inside.

A store keeps T slots of one tensor (keys, or values) for B rows and K heads. What `read` gives is as stored: codes with
their scales, decoded inside the attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import storage
from kvjax.errors import InputError
from kvjax.types import Array, DType


class Segment(NamedTuple):
    """One separate buffer of a store, as stored.

    Args:
        data: `[*lead, T', D]`.
        scale: `[*lead, T']`, a factor per slot; `[*lead, T' / g, D]`, a factor per channel of every g slots; or None.
        positions: `[R, T']` int32, position of each slot.
    """

    data: Array
    scale: Array | None
    positions: Array


class Store(struct.Value):
    """What a layout may do with stored tensors; a codec's store derives from it and is a `struct.node`.

    Stores of one codec give the same segments for keys and values. `each` reaches every buffer, so that moving rows,
    saving and laying out on a mesh know no codec.
    """

    def write(self, x: Array, slots: Array, positions: Array, rows: Array | None = None) -> Any:
        """Takes in `x[B, S, K, D]` at `slots[B, S]` of row b, or of `rows[B, S]` (pages); outside means dropped.

        `positions[B, S]` is where the tokens stand in the text.
        """
        raise NotImplementedError

    def read(self, positions: Array, end: Array) -> tuple[Segment, ...]:
        """The stored buffers; `positions[R, T]` says what each slot holds when row b has `end[b]` tokens."""
        raise NotImplementedError

    def fresh(self, x: Array, positions: Array) -> tuple[Segment, ...]:
        """`x[B, S, K, D]` as this store would keep it, in buffers of its own: a chunk is read before it is kept."""
        raise NotImplementedError

    def move(self, source: Array, target: Array, rows: tuple[Array, Array] | None = None) -> Any:
        """What `slots source[B, n]` hold is kept at `target[B, n]` too, as stored; a target outside is dropped.

        `rows` are the rows of the sources and of the targets, each `[B, n]`; None is row b.
        """
        raise NotImplementedError

    def resize(self, slots: int) -> Any:
        """The same with another number of slots."""
        raise NotImplementedError

    def each(self, f: Callable[[Array, int, int], Array]) -> Any:
        """The same with `f(buffer, heads, rest)` for every buffer; `rest` is its number of axes after the slots."""
        raise NotImplementedError

    def take(self, rows: Array) -> Any:
        """The same for other rows."""
        return self.each(lambda buffer, heads, rest: storage.take(buffer, rows, heads, rest))

    def unpacked(self) -> Array:
        """Decoded, `[B, K, T, D]`; a copy, for looking."""
        raise NotImplementedError


class Codec(Protocol):
    """Makes stores. Hashable, so that a plan is static."""

    def empty(self, rows: int, heads: int, slots: int, width: int | None, dtype: DType) -> Any:
        """An empty store; `dtype` is what the model computes in, `width` None for one number a slot (plain only)."""


@struct.node
class PlainStore(Store):
    """Elements as they are. `data` is `[B * K, T, D]`, or `[T, D]` when B * K is 1; without D for a number per slot."""

    data: Array
    heads: int = struct.static()
    rest: int = struct.static(default=1)

    def write(self, x: Array, slots: Array, positions: Array, rows: Array | None = None) -> PlainStore:
        """See `Store`."""
        return self.replace(data=storage.put(self.data, x, slots, rows))

    def read(self, positions: Array, end: Array) -> tuple[Segment, ...]:
        """See `Store`."""
        return (Segment(self.data, None, positions),)

    def fresh(self, x: Array, positions: Array) -> tuple[Segment, ...]:
        """See `Store`."""
        return (Segment(storage.pack(x).astype(self.data.dtype), None, positions),)

    def resize(self, slots: int) -> PlainStore:
        """See `Store`."""
        return self.replace(data=storage.resize(self.data, slots, self.rest))

    def move(self, source: Array, target: Array, rows: tuple[Array, Array] | None = None) -> PlainStore:
        """See `Store`."""
        there, here = rows or (None, None)
        moved = storage.pick(self.data, source, self.heads, self.rest, there)
        return self.replace(data=storage.put(self.data, moved, target, here))

    def each(self, f: Callable[[Array, int, int], Array]) -> PlainStore:
        """See `Store`."""
        return self.replace(data=f(self.data, self.heads, self.rest))

    def unpacked(self) -> Array:
        """See `Store`."""
        return storage.unpack(self.data, self.heads, self.rest)


@dataclasses.dataclass(frozen=True)
class Plain:
    """Stores elements in a floating dtype; None is the dtype that the model computes in."""

    dtype: Any = None

    def empty(self, rows: int, heads: int, slots: int, width: int | None, dtype: DType) -> PlainStore:
        """See `Codec`."""
        chosen = dtype if self.dtype is None else jnp.dtype(self.dtype)
        rest = () if width is None else (width,)
        return PlainStore(storage.empty(rows, heads, slots, rest, chosen), heads, len(rest))

    def __str__(self) -> str:
        return "" if self.dtype is None else str(self.dtype)


def plain(dtype: DType | None = None) -> Plain:
    """Elements as they are, in `dtype` (a floating dtype), or in what the model computes in.

    XLA on a CPU casts a store that is narrower than the computation whole at every step: there it saves memory at rest
    only.

    Raises:
        InputError: `dtype` is no dtype, not floating, or narrower than 16 bits (which needs scales).
    """
    if dtype is None:
        return Plain()
    try:
        chosen = jnp.dtype(dtype)
    except TypeError as error:
        raise InputError(f"codecs.plain: {dtype!r} is neither a codec nor a dtype") from error
    if not jnp.issubdtype(chosen, jnp.floating) or chosen.itemsize < 2:
        raise InputError(f"codecs.plain: dtype must be floating, of 16 bits or more, not {chosen.name}")
    return Plain(chosen.name)


def as_codec(store: Any) -> Any:
    """A codec as it is; a dtype as `plain(dtype)`; None as `plain()`."""
    return store if hasattr(store, "empty") else plain(store)


__all__ = ["Segment", "Store", "Codec", "Plain", "PlainStore", "plain", "as_codec"]
