"""int4 in groups of tokens behind a tail in full precision: keys per channel, values per token.

KIVI (Liu et al. 2024, 2402.02750): some channels of the keys are much larger than the others, so keys get a scale and a
zero point per channel for every G tokens, values a scale per token. Here what a token reads in full precision follows
from its own place alone, so that a row can go back, and a text may come in any chunks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import storage
from kvjax.caches.codecs.scaled import (
    INT4,
    encode,
    from_nibbles,
    numbers,
    pack_nibbles,
    scale_of,
    whole_codes,
    without_gradient,
)
from kvjax.caches.codecs.store import Codec, Segment, Store
from kvjax.checks import count
from kvjax.errors import InputError
from kvjax.ops.attention import EMPTY
from kvjax.types import Array, DType


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is where, by a row's length.

    Args:
        slots: T, tokens a row can have.
        group: G, tokens that become codes together.
        residual: R, of the last tokens, never codes.
        slack: how many tokens a row can be rewound.
    """

    slots: int
    group: int
    residual: int
    slack: int

    @property
    def tail(self) -> int:
        """Slots in full precision: what is no codes yet, R + G - 1 at most, and the slack behind it."""
        return self.residual + self.group + self.slack

    @property
    def groups(self) -> int:
        """Groups of codes that T tokens can have; at least one, since no buffer is empty."""
        return max((self.slots - self.residual) // self.group, 1)

    def coded(self, length: Array) -> Array:
        """How many of a row's first tokens are read as codes once it has `length`."""
        return jnp.maximum(length - self.residual, 0) // self.group * self.group


class Grouped(Store):
    """Codes of T' slots, whole groups, and a ring of R + G + slack slots in full precision."""

    codes: Array
    tail: Array
    sizes: Sizes

    def encoded(self, x: Array) -> dict[str, Array]:
        """Groups `[B, n, G, K, D]` as kept, by field: `[B, n * G, K, ...]` of slots, or `[B, n, K, ...]` of groups."""
        raise NotImplementedError

    @property
    def max_rewind(self) -> int:
        """See `Store`."""
        return self.sizes.slack

    def write(self, x: Array, slots: Array, positions: Array, rows: Array | None = None) -> Any:
        """See `Store`. The slots of a row are consecutive; those outside come last."""
        sizes, x = self.sizes, x.astype(self.tail.dtype)
        start, size = slots[:, :1], x.shape[1]
        end = start + jnp.sum((slots >= 0) & (slots < sizes.slots), axis=1, keepdims=True, dtype=jnp.int32)
        order = start + jnp.arange(size, dtype=jnp.int32)[None, :]
        last = (order < end) & (order >= end - sizes.tail)
        node = self.replace(tail=storage.put(self.tail, x, jnp.where(last, order % sizes.tail, sizes.tail)))
        count = -(-size // sizes.group)
        places = sizes.coded(start) + jnp.arange(count * sizes.group, dtype=jnp.int32)[None, :]
        if size <= sizes.slack + 1:
            # What the new tokens overwrote lies before every group that they close.
            group = node._kept(places)
        else:
            own = jnp.clip(places - start, 0, size - 1)[:, :, None, None]
            own = jnp.take_along_axis(x, own, axis=1)
            group = jnp.where((places >= start)[:, :, None, None], own, self._kept(places))  # [B, n * G, K, D]
        return node._coded(group, places, places < sizes.coded(end))

    def _kept(self, places: Array) -> Array:
        """What the tail has of `places[B, n]`, `[B, n, K, D]`."""
        return storage.pick(self.tail, places % self.sizes.tail, self.heads, 1)

    def _coded(self, x: Array, places: Array, where: Array) -> Any:
        """With the groups `x[B, n * G, K, D]` kept as codes at `places[B, n * G]`, where a whole group is wanted."""
        sizes = self.sizes
        slots = jnp.where(where, places, EMPTY)
        groups = jnp.where(where, places // sizes.group, EMPTY)[:, :: sizes.group]
        made = self.encoded(x.reshape(x.shape[0], -1, sizes.group, *x.shape[2:]))
        return self.replace(
            **{
                name: storage.put(getattr(self, name), new, slots if new.shape[1] == slots.shape[1] else groups)
                for name, new in made.items()
            }
        )

    def read(self, positions: Array, end: Array) -> tuple[Segment, ...]:
        """See `Store`; for a call that sees all alike."""
        return self._codes(positions, end), self._tail(positions, end, self.sizes.coded(end))

    def extend(
        self, x: Array, slots: Array, order: Array, positions: Array, end: Array
    ) -> tuple[Any, tuple[Segment, ...]]:
        """See `Store`. Each new token reads as codes what it would if it were the last."""
        if not x.shape[1]:  # nothing is new: a prefix is only read
            return self, self.read(positions, end)
        node, sizes = self.write(x, slots, order), self.sizes
        if x.shape[1] == 1:
            return node, node.read(positions, end)
        start, coded = order[:, 0], sizes.coded(order + 1)[:, :, None]  # [B, S, 1]
        codes = node._codes(positions, end)
        codes = codes._replace(visible=jnp.arange(codes.positions.shape[1])[None, None, :] < coded)
        from_tail = (
            x.shape[1] <= sizes.slack + 1
        )  # otherwise the new tokens have overwritten what the first of them see
        tail = (node if from_tail else self)._tail(positions, end if from_tail else start, sizes.coded(start + 1))
        tail = tail._replace(visible=tail.positions[:, None, :] >= coded)
        if from_tail:
            return node, (codes, tail)
        at = jnp.where(slots < sizes.slots, order, EMPTY)
        fresh = Segment(storage.pack(x.astype(self.tail.dtype)), None, at, visible=at[:, None, :] >= coded)
        return node, (codes, tail, fresh)

    def _codes(self, positions: Array, end: Array) -> Segment:
        """The codes of rows that have `end[b]` tokens."""
        sizes = self.sizes
        slots = jnp.arange(sizes.groups * sizes.group, dtype=jnp.int32)[None, :]
        held = positions[:, : slots.shape[1]]
        held = jnp.pad(held, ((0, 0), (0, slots.shape[1] - held.shape[1])), constant_values=EMPTY)
        return self.segment(jnp.where(slots < sizes.coded(end)[:, None], held, EMPTY))

    def _tail(self, positions: Array, end: Array, first: Array) -> Segment:
        """The tail of rows that have `end[b]` tokens, from slot `first[b]`."""
        last = end[:, None] - 1
        place = last - (last - jnp.arange(self.sizes.tail, dtype=jnp.int32)[None, :]) % self.sizes.tail
        at = jnp.take_along_axis(positions, jnp.clip(place, 0, positions.shape[1] - 1), axis=1)
        return Segment(self.tail, None, jnp.where(place >= first[:, None], at, EMPTY))

    def segment(self, positions: Array) -> Segment:
        """The codes."""
        raise NotImplementedError

    def unpacked(self, end: Array | None = None) -> Array:
        """See `Store`."""
        assert end is not None, "which slots are codes follows from the lengths"
        made = self.decoded()  # [B, K, T', D]
        t = self.sizes.slots
        made = jnp.pad(made, ((0, 0), (0, 0), (0, max(t - made.shape[2], 0)), (0, 0)))[:, :, :t]
        slots = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None, :], (made.shape[0], t))
        exact = slots >= self.sizes.coded(end)[:, None]
        tail = self._kept(slots).swapaxes(1, 2)
        return jnp.where(exact[:, None, :, None], tail.astype(jnp.float32), made)

    def decoded(self) -> Array:
        """All codes as numbers `[B, K, T', D]`, float32."""
        raise NotImplementedError

    def move(self, source: Array, target: Array, rows: tuple[Array, Array] | None = None) -> Any:
        """See `Store`; sources and targets no further back than the slack. Their groups are coded anew."""
        sizes = self.sizes
        to = jnp.where((target >= 0) & (target < sizes.slots), target % sizes.tail, sizes.tail)
        node = self.replace(tail=storage.put(self.tail, self._kept(source), to))
        first = jnp.min(jnp.where(to < sizes.tail, target, sizes.slots), axis=1, keepdims=True)
        count = -(-target.shape[1] // sizes.group) + 1
        places = first // sizes.group * sizes.group + jnp.arange(count * sizes.group, dtype=jnp.int32)[None, :]
        return node._coded(node._kept(places), places, places < sizes.groups * sizes.group)

    def resize(self, slots: int) -> Any:
        """See `Store`."""
        sizes, had = dataclasses.replace(self.sizes, slots=slots), self.sizes.groups
        made = {
            name: storage.resize(x, x.shape[-1 - rest] // had * sizes.groups, rest)
            for name, rest in self.axes.items()
            if name != "tail"
            for x in [getattr(self, name)]
        }
        return self.replace(sizes=sizes, **made)


@struct.node
class ChannelStore(Grouped):
    """Codes `[*lead, T', D / 2]`, scales and zero points `[*lead, T' / G, D]`, tail `[*lead, R + G + slack, D]`."""

    codes: Array
    scale: Array
    zero: Array
    tail: Array
    heads: int = struct.static()
    sizes: Sizes = struct.static()

    @property
    def axes(self) -> dict[str, int]:
        """See `Store`."""
        return {"codes": 1, "scale": 1, "zero": 1, "tail": 1}

    def encoded(self, x: Array) -> dict[str, Array]:
        """See `Grouped`. Codes from -8 to 7, made with the scale and the zero point as stored."""
        x = without_gradient(x.astype(jnp.float32), "int4_channels")
        low, high = (f(x, axis=2, keepdims=True) for f in (jnp.min, jnp.max))
        # Powers of two are exact, so that no fused operation rounds otherwise; high - low might be infinite.
        scale = scale_of(high * 0.5 - low * 0.5, 7.5, jnp.float32)
        zero = low + 8 * scale
        codes = pack_nibbles(whole_codes((x - zero) / scale, -8, 7))
        return {
            "codes": codes.reshape(x.shape[0], -1, *codes.shape[3:]),
            "scale": scale[:, :, 0],
            "zero": zero[:, :, 0],
        }

    def segment(self, positions: Array) -> Segment:
        """See `Grouped`."""
        return Segment(self.codes, self.scale, positions, self.zero, from_nibbles)

    def decoded(self) -> Array:
        """See `Grouped`."""
        codes = numbers(storage.unpack(self.codes, self.heads, 1), from_nibbles)
        scale, zero = (storage.unpack(x, self.heads, 1)[:, :, :, None] for x in (self.scale, self.zero))
        groups = codes.reshape(*scale.shape[:3], -1, codes.shape[-1])  # [B, K, T' / G, G, D]
        return (groups * scale + zero).reshape(codes.shape)


@struct.node
class TokenStore(Grouped):
    """Codes `[*lead, T', D / 2]`, scales `[*lead, T']`, tail `[*lead, R + G + slack, D]`."""

    codes: Array
    scale: Array
    tail: Array
    heads: int = struct.static()
    sizes: Sizes = struct.static()

    @property
    def axes(self) -> dict[str, int]:
        """See `Store`."""
        return {"codes": 1, "scale": 0, "tail": 1}

    def encoded(self, x: Array) -> dict[str, Array]:
        """See `Grouped`."""
        codes, scale = encode(x.reshape(x.shape[0], -1, *x.shape[3:]), INT4, self.scale.dtype)
        return {"codes": codes, "scale": scale}

    def segment(self, positions: Array) -> Segment:
        """See `Grouped`."""
        return Segment(self.codes, self.scale, positions, None, from_nibbles)

    def decoded(self) -> Array:
        """See `Grouped`."""
        codes = numbers(storage.unpack(self.codes, self.heads, 1), from_nibbles)
        return codes * storage.unpack(self.scale, self.heads, 0)[..., None]


@dataclasses.dataclass(frozen=True)
class ChannelGroups(Codec):
    """See `int4_channels`."""

    group: int
    residual: int
    slack: int

    def empty(self, rows: int, heads: int, slots: int, width: int | None, dtype: DType) -> Any:
        """Raises InputError: a layout that asks for one store at a time overwrites or moves slots singly."""
        raise InputError(
            "codecs.int4_channels: tokens of a group share their scales, so it goes with dense caches only; "
            "a ring or pages take codecs.int4()"
        )

    def pair(self, rows: int, heads: int, slots: int, widths: tuple[int, int], dtype: DType) -> tuple[Any, Any]:
        """See `Codec`. Keys per channel, values per token."""
        sizes = Sizes(slots, self.group, self.residual, self.slack)
        for width in widths:
            if width % 2:
                raise InputError(f"codecs.{self}: a slot must have a multiple of 2 channels, not {width}")

        def parts(width: int) -> tuple[Array, Array, Array]:
            make = lambda n, rest, kind: storage.empty(rows, heads, n, rest, kind)  # noqa: E731
            full = sizes.groups * self.group
            return (
                make(full, (width // 2,), jnp.uint8),
                make(sizes.groups, (width,), jnp.float32),
                make(sizes.tail, (width,), dtype),
            )

        codes, scale, tail = parts(widths[0])
        keys = ChannelStore(codes, scale, jnp.zeros_like(scale), tail, heads, sizes)
        codes, _, tail = parts(widths[1])
        scale = storage.empty(rows, heads, sizes.groups * self.group, (), jnp.float32)
        return keys, TokenStore(codes, scale, tail, heads, sizes)

    def __str__(self) -> str:
        return f"int4_channels({self.group}, residual={self.residual}, slack={self.slack})"


def int4_channels(group: int = 32, *, residual: int = 128, slack: int = 16) -> ChannelGroups:
    """int4 behind a tail in full precision: keys with a scale and zero point per channel for every `group` tokens,
    values with a scale per token and head (KIVI, Liu et al. 2024, 2402.02750).

    A group becomes codes once all of its tokens are `residual` or more behind the end of the row. Keys take
    `1 / 2 + 8 / group` bytes an element, values `1 / 2 + 4 / D`, and both a tail of `residual + group + slack` tokens
    as the model computes. Each element of a key errs by at most half its scale, a fifteenth of what its channel spans
    in the group; outliers in other channels do not matter. For dense caches.

    Args:
        group: G, tokens that share their scales.
        residual: R, of the last tokens, always read in full precision.
        slack: how many tokens a row can be rewound exactly.

    Raises:
        InputError: `group` is less than 1, or another number negative.
    """
    for name, value, least in (("group", group, 1), ("residual", residual, 0), ("slack", slack, 0)):
        count(f"codecs.int4_channels: {name}", value, least)
    return ChannelGroups(group, residual, slack)


__all__ = ["Sizes", "Grouped", "ChannelStore", "TokenStore", "ChannelGroups", "int4_channels"]
