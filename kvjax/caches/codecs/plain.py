"""Elements as they are, in a floating dtype."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import storage
from kvjax.caches.codecs.store import Codec, Segment, Store
from kvjax.errors import InputError
from kvjax.types import Array, DType


@struct.node
class PlainStore(Store):
    """Elements as they are. `data` is `[B * K, T, D]`, or `[T, D]` when B * K is 1; without D for a number per slot."""

    data: Array
    heads: int = struct.static()
    rest: int = struct.static(default=1)

    @property
    def axes(self) -> dict[str, int]:
        """See `Store`."""
        return {"data": self.rest}

    @property
    def reach(self) -> float | None:
        """See `Store`."""
        return float(jnp.finfo(self.data.dtype).max) if self.data.dtype == jnp.float16 else None

    def write(self, x: Array, slots: Array, positions: Array, rows: Array | None = None) -> PlainStore:
        """See `Store`."""
        return self.replace(data=storage.put(self.data, x, slots, rows))

    def read(self, positions: Array, end: Array) -> tuple[Segment, ...]:
        """See `Store`."""
        return (Segment(self.data, None, positions),)

    def fresh(self, x: Array, positions: Array) -> tuple[Segment, ...]:
        """See `Store`."""
        return (Segment(storage.pack(x).astype(self.data.dtype), None, positions),)

    def unpacked(self, end: Array | None = None) -> Array:
        """See `Store`."""
        return storage.unpack(self.data, self.heads, self.rest)


@dataclasses.dataclass(frozen=True)
class Plain(Codec):
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


__all__ = ["Plain", "PlainStore", "plain"]
