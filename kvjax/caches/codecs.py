"""What one stored element is. A codec makes stores; a layout says where a position is kept and never looks inside.

A store keeps T slots of one tensor (keys, or values) for B rows and K heads, and offers `write`, `read`, `resize`,
`take` and `unpacked`. What `read` gives is as stored: codes with their scales, decoded inside the attention.
"""

from __future__ import annotations

import dataclasses
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
        scale: `[*lead, T']` or None.
        positions: `[R, T']` int32, position of each slot.
    """

    data: Array
    scale: Array | None
    positions: Array


class Store(Protocol):
    """What a layout may do with stored tensors. Stores of one codec give the same segments for keys and values."""

    def write(self, x: Array, slots: Array, positions: Array) -> Any:
        """Takes in `x[B, S, K, D]` at `slots[B, S]`; outside the store means dropped. `positions[B, S]` is the text's."""

    def read(self, positions: Array, end: Array) -> tuple[Segment, ...]:
        """The stored buffers; `positions[R, T]` says what each slot holds when row b has `end[b]` tokens."""

    def fresh(self, x: Array, positions: Array) -> tuple[Segment, ...]:
        """`x[B, S, K, D]` as this store would keep it, in buffers of its own: a chunk that is read before it is kept."""

    def resize(self, slots: int) -> Any:
        """The same with another number of slots."""

    def take(self, rows: Array) -> Any:
        """The same for other rows."""

    def unpacked(self) -> Array:
        """Decoded, `[B, K, T, D]`; a copy, for looking and saving."""


class Codec(Protocol):
    """Makes stores. Hashable, so that a plan is static."""

    def empty(self, rows: int, heads: int, slots: int, width: int, dtype: DType) -> Any:
        """An empty store; `dtype` is what the model computes in."""


@struct.node
class PlainStore:
    """Elements as they are. `data` is `[B * K, T, D]`, or `[T, D]` when B * K is 1."""

    data: Array
    heads: int = struct.static()

    def write(self, x: Array, slots: Array, positions: Array) -> PlainStore:
        """See `Store`."""
        return self.replace(data=storage.put(self.data, x, slots))  # type: ignore[attr-defined]

    def read(self, positions: Array, end: Array) -> tuple[Segment, ...]:
        """See `Store`."""
        return (Segment(self.data, None, positions),)

    def fresh(self, x: Array, positions: Array) -> tuple[Segment, ...]:
        """See `Store`."""
        return (Segment(storage.pack(x).astype(self.data.dtype), None, positions),)

    def resize(self, slots: int) -> PlainStore:
        """See `Store`."""
        return self.replace(data=storage.resize(self.data, slots, rest=1))  # type: ignore[attr-defined]

    def take(self, rows: Array) -> PlainStore:
        """See `Store`."""
        return self.replace(data=storage.take(self.data, rows, self.heads, rest=1))  # type: ignore[attr-defined]

    def unpacked(self) -> Array:
        """See `Store`."""
        return storage.unpack(self.data, self.heads, rest=1)


@dataclasses.dataclass(frozen=True)
class Plain:
    """Stores elements in a floating dtype; None is the dtype that the model computes in."""

    dtype: Any = None

    def empty(self, rows: int, heads: int, slots: int, width: int, dtype: DType) -> PlainStore:
        """See `Codec`."""
        chosen = dtype if self.dtype is None else jnp.dtype(self.dtype)
        return PlainStore(storage.empty(rows, heads, slots, (width,), chosen), heads)

    def __str__(self) -> str:
        return "" if self.dtype is None else str(self.dtype)


def plain(dtype: DType | None = None) -> Plain:
    """Elements as they are, in `dtype` (a floating dtype), or in what the model computes in.

    Raises:
        InputError: `dtype` is not floating.
    """
    if dtype is None:
        return Plain()
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"codecs.plain: dtype must be floating, not {jnp.dtype(dtype).name}")
    return Plain(jnp.dtype(dtype).name)


def as_codec(store: Any) -> Any:
    """A codec as it is; a dtype as `plain(dtype)`; None as `plain()`."""
    return store if hasattr(store, "empty") else plain(store)


__all__ = ["Segment", "Store", "Codec", "Plain", "PlainStore", "plain", "as_codec"]
