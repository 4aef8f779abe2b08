"""Cross: what the layers of a decoder read of a source text. It is made once, and neither a step, nor a rewind, nor the
beams and samples of a source move or copy it.

K and V of every layer, projected once; or the encoder's output itself, one buffer for all layers, with absorbed
projections (as in DeepSeek-V2, 2405.04434), which is 2L times smaller where every query head has keys of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.caches import codecs, storage
from kvjax.caches.base import Kind, LayerShape, Project, Shared, filled_positions, views_of
from kvjax.caches.flags import NO_SOURCE, ROWS
from kvjax.caches.layer_input import one_factor
from kvjax.caches.opened import finite
from kvjax.checks import either, is_concrete
from kvjax.errors import CacheError, InputError
from kvjax.ops.attention import View
from kvjax.types import Array


@struct.node
class Source(struct.Value):
    """What a decoder attends to besides its own text: what `kvjax.encode` gives, or anything of this shape.

    Args:
        states: `[R, S, E]`, zero past a row's length.
        lengths: `[R]` int32, from 1 to S.
        flags: `[R]` int32, bits of what went wrong (`Cache.flags`); rows of a cache that read such a source are
            flagged, and take in nothing.
    """

    states: Array
    lengths: Array
    flags: Array

    def checked(self) -> Source:
        """The same with zeros past every row's length; a row whose length is not from 1 to S is flagged."""
        s = self.states.shape[1]
        wrong = (self.lengths < 1) | (self.lengths > s)
        lengths = jnp.where(wrong, 0, self.lengths).astype(jnp.int32)
        real = jnp.arange(s, dtype=jnp.int32)[None, :] < lengths[:, None]
        flags = (self.flags | jnp.where(wrong, NO_SOURCE, 0)).astype(jnp.int32)
        return Source(jnp.where(real[:, :, None], self.states, 0), lengths, flags)


def rows_of(name: str, source: Any) -> int:
    """R of a source.

    Raises:
        InputError: it is no source; its arrays do not go together; a row's length (outside `jit`) is not from 1 to S.
    """
    if not isinstance(source, Source):
        raise InputError(f"{name}: source must be a kvjax.Source, as kvjax.encode gives, not {type(source).__name__}")
    parts = {"states": source.states, "lengths": source.lengths, "flags": source.flags}
    if missing := [what for what, x in parts.items() if not hasattr(x, "dtype")]:
        raise InputError(f"{name}: {missing[0]} of the source is no array")
    states, lengths, flags = ((x.shape, x.dtype) for x in parts.values())
    if len(states[0]) != 3 or not all(states[0]) or not jnp.issubdtype(states[1], jnp.floating):
        raise InputError(f"{name}: states of the source are {states[1]}{list(states[0])}, not floats [R, S, E]")
    for what, (shape, dtype) in (("lengths", lengths), ("flags", flags)):
        if shape != states[0][:1] or not jnp.issubdtype(dtype, jnp.integer):
            raise InputError(f"{name}: {what} of the source are {dtype}{list(shape)}, not int32[{states[0][0]}]")
    if is_concrete(source.lengths) and is_concrete(source.flags):
        for row, (n, flag) in enumerate(zip(np.asarray(source.lengths), np.asarray(source.flags), strict=True)):
            if not (flag or 1 <= n <= states[0][1]):
                raise InputError(f"{name}: row {row} of the source has length {n}, not from 1 to {states[0][1]}")
    return int(states[0][0])


Projections = tuple[tuple[Array, Array] | None, ...]
"""Keys and values `[R, S, K, D]` of a source for each layer, None for a layer that does not attend to it."""


@struct.node
class Cross(Shared):
    """The entry of `Cache.shared` that cross-attention reads; derived classes say what is kept.

    Args:
        lengths, flags: `[R]` int32, of each source.
        slots: S, positions that a source has room for.
        share: rows of the batch that read one source, next to each other; B is R times that.
        kind: the word that made it.
        width, dtype: E and the dtype of the states that it was made from.
    """

    lengths: Array
    flags: Array
    slots: int = struct.static()
    share: int = struct.static()
    kind: Any = struct.static()
    width: int = struct.static()
    dtype: Any = struct.static()

    still = True

    def views(self, layer: int, project: Project) -> tuple[View, ...]:
        """What a layer attends over; `project.kv` and `project.absorb` are of the source's states."""
        raise NotImplementedError

    def reserve(self, span: Any) -> tuple[Any, Array]:
        """See `Shared`. Rows that have nothing to attend to take in nothing."""
        return self, jnp.repeat(self.flags, self.share)

    def take(self, rows: Array) -> tuple[Any, Array]:
        """See `Shared`. Afterwards every row has a source of its own."""
        sources = rows // self.share
        moved = self._stores(lambda store: store.take(sources))
        of = lambda x: jnp.take(x, sources, mode="clip")  # noqa: E731
        outside = (sources < 0) | (sources >= self.lengths.shape[0])
        flags = (of(self.flags) | jnp.where(outside, NO_SOURCE, 0)).astype(jnp.int32)
        return moved.replace(lengths=of(self.lengths), flags=flags, share=1), jnp.zeros_like(rows)

    def reorder(self, beams: Array) -> tuple[Any, Array]:
        """See `Shared`. The source stays where it is; where rows share none, each takes its own along.

        Raises:
            CacheError: a row would read another source than it did; under `jit` it is flagged.
        """
        if self.share == 1:
            return self.take(beams)
        here = jnp.arange(beams.shape[0], dtype=jnp.int32) // self.share
        strays = beams // self.share != here
        if is_concrete(strays) and np.asarray(strays).any():
            row = int(np.argmax(np.asarray(strays)))
            raise CacheError(
                f"reorder: row {row} reads source {row // self.share}, row {int(beams[row])} another "
                f"({int(beams[row]) // self.share}); `take` moves rows and their sources"
            )
        return self, jnp.where(strays, ROWS, 0).astype(jnp.int32)

    def fork(self, rows: Array, copies: int) -> tuple[Any, Array]:
        """See `Shared`. More rows read each source; nothing is copied."""
        return self.replace(share=self.share * copies), jnp.zeros_like(rows)

    def alike(self, other: Any) -> tuple[Any, Any]:
        """See `Shared`. The shorter buffers grow; where a source has more rows here than there, all get their own."""
        if not isinstance(other, Cross):
            return self, other
        pair, slots = [self, other], max(self.slots, other.slots)
        for i, x in enumerate(pair):
            if self.share != other.share:
                x, _ = x.take(jnp.arange(x.lengths.shape[0] * x.share, dtype=jnp.int32))
            pair[i] = x._stores(lambda store: store.resize(slots)).replace(slots=slots) if x.slots < slots else x
        return pair[0], pair[1]

    def join(self, other: Any) -> tuple[Any, Array]:
        """See `Shared`."""
        joined = self._stores(lambda store, more: store.join(more), other)
        lengths, flags = (jnp.concatenate([getattr(x, n) for x in (self, other)]) for n in ("lengths", "flags"))
        return joined.replace(lengths=lengths, flags=flags), jnp.zeros((lengths.shape[0] * self.share,), jnp.int32)

    def _stores(self, f: Callable[..., Any], *others: Any) -> Any:
        """The same with every store replaced by what a function makes of it."""
        one = lambda x, *rest: f(x, *rest) if isinstance(x, codecs.Store) else x  # noqa: E731
        return jax.tree.map(one, self, *others, is_leaf=lambda x: isinstance(x, codecs.Store))

    def _read(self, store: Any) -> tuple[Any, ...]:
        return store.read(filled_positions(self.slots, self.lengths), self.lengths)


@struct.node
class Projected(Cross):
    """Keys and values of each layer.

    Args:
        k, v: a store a layer, None for a layer that does not attend to the source.
    """

    k: tuple[Any, ...] = ()
    v: tuple[Any, ...] = ()

    def views(self, layer: int, project: Project) -> tuple[View, ...]:
        """See `Cross`."""
        return views_of(self._read(self.k[layer]), self._read(self.v[layer]), causal=False)


@struct.node
class Encoded(Cross):
    """The states themselves, once for all layers.

    Args:
        x: a store of one head of width E.
    """

    x: Any = None

    def views(self, layer: int, project: Project) -> tuple[View, ...]:
        """See `Cross`."""
        (part,) = self._read(self.x)
        states = part.decoded(self.dtype).reshape(-1, self.slots, self.width)  # the same bytes where nothing decodes
        if not self.kind.absorb:
            k, v = project.kv(states, None)
            return (View(storage.pack(k), storage.pack(v), part.positions, causal=False),)
        if project.absorb is None:
            raise InputError("caches.encoder_output(absorb=True): a norm of each key stands between; leave absorb out")
        maps, _ = project.absorb(states)  # none of their numbers is read
        x, scale, decode = part.data, part.scale, part.decode
        view = View(x, x, part.positions, scale, scale, absorb=maps, k_decode=decode, v_decode=decode, causal=False)
        return (view,)


class CrossKind:
    """A word for what is kept of a source: hashable, makes the entry that cross-attention reads."""

    __str__ = Kind.__str__

    def of(self, source: Source, share: int, ask: Callable[[], Projections]) -> Any:
        """The entry for a source that `share` rows each read; `ask` gives the layers' keys and values of it."""
        raise NotImplementedError

    def remark(self, shapes: tuple[LayerShape, ...], width: int) -> str:
        """What people should know of it on layers of these shapes and an encoder of that width; "" for nothing."""
        return ""


def _places(source: Source) -> tuple[Array, Array]:
    """Where the states of a source go, `[R, S]`: their places, and the same with S for padding."""
    r, s = source.states.shape[:2]
    places = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None, :], (r, s))
    return places, jnp.where(places < source.lengths[:, None], places, s)


@dataclasses.dataclass(frozen=True)
class ProjectedKind(CrossKind):
    """See `cross`."""

    store: Any

    def of(self, source: Source, share: int, ask: Callable[[], Projections]) -> Projected:
        """See `CrossKind`."""
        (places, slots), size = _places(source), source.states.shape[1]
        keys: list[Any] = []
        values: list[Any] = []
        for made in ask():
            k, v = None, None
            if made is not None:
                heads, dtype = made[0].shape[2], made[0].dtype
                k, v = self.store.pair(places.shape[0], heads, size, (made[0].shape[3], made[1].shape[3]), dtype)
                reach = min((x.reach for x in (k, v) if x.reach is not None), default=None)
                new_k, new_v = finite(*made, reach)
                k, v = k.write(new_k, slots, places), v.write(new_v, slots, places)
            keys.append(k)
            values.append(v)
        about = (size, share, self, source.states.shape[2], source.states.dtype)
        return Projected(source.lengths, source.flags, *about, tuple(keys), tuple(values))


@dataclasses.dataclass(frozen=True)
class EncodedKind(CrossKind):
    """See `encoder_output`."""

    absorb: bool
    store: Any

    def of(self, source: Source, share: int, ask: Callable[[], Projections]) -> Encoded:
        """See `CrossKind`.

        Raises:
            InputError: a store that has no one factor a position, where it must.
        """
        x, (places, slots) = source.states, _places(source)
        r, s, width = x.shape
        store = self.store.empty(r, 1, s, width, x.dtype)
        if self.absorb and not one_factor(store):
            raise InputError(f"caches.encoder_output(absorb=True): {self.store} has no one factor a position")
        if store.reach is not None:
            lost = jnp.any(jnp.abs(x) > store.reach, axis=(1, 2))
            x = jnp.clip(x, -store.reach, store.reach)
            source = source.replace(flags=source.flags | jnp.where(lost, NO_SOURCE, 0).astype(jnp.int32))
        store = store.write(x[:, :, None], slots, places)
        return Encoded(source.lengths, source.flags, s, share, self, width, x.dtype, store)

    def remark(self, shapes: tuple[LayerShape, ...], width: int) -> str:
        """See `CrossKind`."""
        kv = sum(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in shapes)
        verdict = "as many as" if kv == width else ("MORE than" if width > kv else "fewer than")
        return f"{width:,} numbers a source token, {verdict} keys and values ({kv:,}; {width / kv:.3g} times)"


def cross(*, store: Any = None) -> ProjectedKind:
    """Keys and values of the source, projected once for each layer.

    Args:
        store: a codec, or a floating dtype; None stores what the model computes in.
    """
    return ProjectedKind(codecs.as_codec(store))


def encoder_output(*, absorb: bool = False, store: Any = None) -> EncodedKind:
    """The encoder's output in place of keys and values: E numbers a position for all layers, where K/V keeps
    2 · L · K · D.

    Args:
        absorb: put the query through each layer's key and value maps, so that nothing is projected again: H times the
            FLOPs of attention at E in place of D. If not, every call projects all positions again in every layer, as
            most code does; one compiled loop hoists that, steps of their own pay for it each time.
        store: a codec, or a floating dtype; None stores what the model computes in.
    """
    return EncodedKind(either("caches.encoder_output: absorb", absorb), codecs.as_codec(store))


__all__ = ["Source", "rows_of", "Cross", "Projected", "Encoded", "CrossKind", "cross", "encoder_output"]
