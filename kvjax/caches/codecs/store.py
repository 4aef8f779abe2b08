"""What a codec gives to a layout: stores, and what a store does. A layout says where a position is kept and never looks
inside.

A store keeps T slots of one tensor (keys, or values) for B rows and K heads. What `read` gives is as stored: codes with
their scales, decoded inside the attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import storage
from kvjax.ops import decoding
from kvjax.ops.attention import Decode
from kvjax.types import Array, DType


class Segment(NamedTuple):
    """One separate buffer of a store, as stored.

    Args:
        data: `[*lead, T', D]`.
        scale: `[*lead, T']`, a factor per slot; `[*lead, T' / g, D]`, a factor per channel of every g slots; or None.
        positions: `[R, T']` int32, position of each slot.
        zero: `[*lead, T' / g, D]`, added per channel to what the scale has multiplied; or None.
        decode: module-level `(data, dtype) -> parts`, the numbers that packed codes stand for; None casts.
        visible: `[B, S, T']` bool, which of the slots each new token may read here; None is all.
    """

    data: Array
    scale: Array | None
    positions: Array
    zero: Array | None = None
    decode: Decode | None = None
    visible: Array | None = None

    def decoded(self, dtype: DType) -> Array:
        """`[*lead, T', D]` in `dtype`; a copy, but for plain elements of that dtype."""
        parts, scale = decoding.decoded(self.data, self.scale, self.zero, self.decode, dtype)
        x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
        return x if scale is None else x * scale[..., None].astype(dtype)


class Store(struct.Value):
    """What a layout may do with stored tensors; a codec's store derives from it and is a `struct.node`.

    Stores of one codec give the same segments for keys and values. `each` reaches every buffer, so that moving rows,
    saving and laying out on a mesh know no codec.
    """

    heads: int

    @property
    def reach(self) -> float | None:
        """The largest number that it can keep; None is any that the model computes with."""
        return None

    @property
    def max_rewind(self) -> int | None:
        """How many tokens behind the furthest one written are kept as they were written; None is any number."""
        return None

    @property
    def axes(self) -> dict[str, int]:
        """Every buffer by its field's name, with its number of axes after the slots: 1 for `[*lead, T, D]`."""
        raise NotImplementedError

    def write(self, x: Array, slots: Array, positions: Array, rows: Array | None = None) -> Any:
        """Takes in `x[B, S, K, D]` at `slots[B, S]` of row b, or of `rows[B, S]` (pages); outside means dropped.

        `positions[B, S]` is where the tokens stand in the text.
        """
        raise NotImplementedError

    def read(self, positions: Array, end: Array) -> tuple[Segment, ...]:
        """The stored buffers; `positions[R, T]` says what each slot holds when row b has `end[b]` tokens."""
        raise NotImplementedError

    def extend(
        self, x: Array, slots: Array, order: Array, positions: Array, end: Array
    ) -> tuple[Any, tuple[Segment, ...]]:
        """`write` and `read` in one, for a layout that keeps position t in slot t: what each new token reads must not
        depend on those after it. `order[B, S]` is where they stand in the order of feeding."""
        node = self.write(x, slots, order)
        return node, node.read(positions, end)

    def fresh(self, x: Array, positions: Array) -> tuple[Segment, ...]:
        """`x[B, S, K, D]` as this store would keep it, in buffers of its own: a chunk is read before it is kept."""
        raise NotImplementedError

    def unpacked(self, end: Array | None = None) -> Array:
        """Decoded, `[B, K, T, D]`, of rows with `end[B]` tokens; a copy, for looking. None where it does not matter."""
        raise NotImplementedError

    def each(self, f: Callable[..., Array], *others: Any) -> Any:
        """The same with `f(buffer, heads, rest, *buffers of the others)` for every buffer; see `axes` for `rest`."""
        made = {}
        for name, rest in self.axes.items():
            made[name] = f(getattr(self, name), self.heads, rest, *(getattr(other, name) for other in others))
        return self.replace(**made)

    def take(self, rows: Array) -> Any:
        """The same for other rows."""
        return self.each(lambda buffer, heads, rest: storage.take(buffer, rows, heads, rest))

    def join(self, other: Any) -> Any:
        """These rows, then those of another store of the same codec and as many slots."""
        return self.each(storage.join, other)

    # As it stands for stores whose every buffer has one entry a slot.

    def move(self, source: Array, target: Array, rows: tuple[Array, Array] | None = None) -> Any:
        """What `slots source[B, n]` hold is kept at `target[B, n]` too, as stored; a target outside is dropped.

        `rows` are the rows of the sources and of the targets, each `[B, n]`; None is row b.
        """
        there, here = rows or (None, None)
        return self.each(
            lambda x, heads, rest: storage.put(x, storage.pick(x, source, heads, rest, there), target, here)
        )

    def change(self, slots: Array, f: Callable[[Array], Array], rows: Array | None = None) -> Any:
        """What `slots[B, n]` hold, decoded, becomes what `f([B, n, K, D])` gives; a slot outside is dropped. `rows` as
        for `write`."""
        some = self.each(lambda x, heads, rest: storage.pack(storage.pick(x, slots, heads, rest, rows)))
        x = some.unpacked().swapaxes(1, 2)  # [B, n, K, D]
        return self.write(f(x.astype(jnp.promote_types(jnp.float32, x.dtype))), slots, slots, rows)

    def resize(self, slots: int) -> Any:
        """The same with another number of slots."""
        return self.each(lambda x, heads, rest: storage.resize(x, slots, rest))


class Codec:
    """Makes stores. Hashable, so that a plan is static."""

    def empty(self, rows: int, heads: int, slots: int, width: int | None, dtype: DType) -> Any:
        """An empty store; `dtype` is what the model computes in, `width` None for one number a slot (plain only)."""
        raise NotImplementedError

    def pair(self, rows: int, heads: int, slots: int, widths: tuple[int, int], dtype: DType) -> tuple[Any, Any]:
        """Empty stores for keys and for values, for a layout that keeps position t in slot t."""
        keys, values = (self.empty(rows, heads, slots, width, dtype) for width in widths)
        return keys, values


__all__ = ["Segment", "Store", "Codec"]
