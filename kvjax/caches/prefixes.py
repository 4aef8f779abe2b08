"""What rows have in common when they go on from texts that are kept once: the entry of `Cache.shared`, beside the nodes
of `kvjax.caches.shared_prefix`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.caches.base import Shared, Span
from kvjax.caches.flags import CAPACITY, PREFIX, REWIND, ROWS, ask
from kvjax.checks import is_concrete
from kvjax.errors import CacheError
from kvjax.ops.attention import EMPTY
from kvjax.types import Array


@struct.node
class Prefix(Shared):
    """What the rows have in common, and what their suffixes have.

    Args:
        tokens: `[R, P]` int32, the prefixes' ids.
        lengths: `[R]` int32, how many they are.
        prefix: entries of the prefixes' own cache.
        suffix: entries of the suffixes, which count from the end of their prefix.
        room: tokens that a suffix can hold.
        share: rows of the batch that go on from one prefix, next to each other: B is R times that. None: R is 1, and
            all rows go on from it, however many they become.
    """

    tokens: Array
    lengths: Array
    prefix: dict[str, Any]
    suffix: dict[str, Any]
    room: int = struct.static()
    share: int | None = struct.static(default=None)

    @property
    def base(self) -> Array:
        """`[B]` int32, tokens before each row's suffix; `[1]` where all rows have the same prefix."""
        return self.lengths if self.share is None else jnp.repeat(self.lengths, self.share)

    @property
    def least(self) -> Array:
        """See `Shared`."""
        return self.base

    @property
    def most(self) -> Array:
        """See `Shared`. Less than the capacity where a prefix is shorter than its buffers."""
        return self.base + self.room

    @property
    def fixed(self) -> int:  # type: ignore[override]
        """See `Shared`."""
        return self.tokens.shape[1]

    def beside(self, other: Any) -> Prefix:
        """See `Shared`: prefixes and suffixes of every layer have their entries here."""
        return self.replace(prefix=other.prefix | self.prefix, suffix=other.suffix | self.suffix)

    def after(self, span: Span) -> Span:
        """The new tokens as a suffix counts them."""
        return span.replace(start=span.start - self.base, base=self.base)

    def _ask(self, what: Any, flags: Array) -> tuple[Prefix, Array]:
        suffix, flags = ask(self.suffix, what, flags)
        return self.replace(suffix=suffix), flags.astype(jnp.int32)

    def reserve(self, span: Span) -> tuple[Prefix, Array]:
        """See `Shared`."""
        own = self.after(span)
        full = own.end > self.room
        own = own.replace(valid=jnp.where(full, 0, own.valid))
        return self._ask(lambda entry: entry.reserve(own), jnp.where(full, CAPACITY, 0))

    def resize(self, capacity: int) -> Prefix:
        """See `Shared`."""
        room = capacity - self.fixed
        return self.replace(suffix={name: entry.resize(room) for name, entry in self.suffix.items()}, room=room)

    def rewind(self, lengths: Array) -> tuple[Prefix, Array]:
        """See `Shared`. A row that would go into the prefix stays where it is."""
        below = lengths < self.base
        to = jnp.where(below, EMPTY, lengths - self.base)
        return self._ask(lambda entry: entry.rewind(to), jnp.where(below, REWIND, 0))

    def claim(self, places: Array) -> tuple[Prefix, Array]:
        """See `Shared`."""
        below = jnp.any(places < self.base[:, None], axis=1)
        places = jnp.where(below[:, None], EMPTY, before_base(places, self.base))
        return self._ask(lambda entry: entry.claim(places), jnp.where(below, REWIND, 0))

    def release(self, rows: Array) -> tuple[Prefix, Array]:
        """See `Shared`."""
        return self._ask(lambda entry: entry.release(rows), jnp.zeros(rows.shape, jnp.int32))

    def take(self, rows: Array) -> tuple[Prefix, Array]:
        """See `Shared`. One prefix of all rows stays; of several, every row has one of its own afterwards."""
        moved, flags = self._ask(lambda entry: entry.take(rows), jnp.zeros_like(rows))
        return (moved, flags) if self.share is None else moved._of_their_own(rows, flags)

    def _of_their_own(self, rows: Array, flags: Array) -> tuple[Prefix, Array]:
        at = self.of(rows)
        entries, flags = ask(self.prefix, lambda entry: entry.take(at), flags)
        tokens, lengths = (jnp.take(x, at, axis=0, mode="clip") for x in (self.tokens, self.lengths))
        return self.replace(tokens=tokens, lengths=lengths, prefix=entries, share=1), flags.astype(jnp.int32)

    def of(self, rows: Array) -> Array:
        """Which of several prefixes rows go on from; outside for a row outside the batch."""
        assert self.share is not None
        return rows // self.share

    def reorder(self, beams: Array) -> tuple[Prefix, Array]:
        """See `Shared`. Prefixes stay where they are; where rows share none, each takes its own along.

        Raises:
            CacheError: a row would go on from another prefix than it did; under `jit` it is flagged.
        """
        moved, flags = self._ask(lambda entry: entry.reorder(beams), jnp.zeros_like(beams))
        if self.share is None:
            return moved, flags
        if self.share == 1:
            return moved._of_their_own(beams, flags)
        here = jnp.arange(beams.shape[0], dtype=jnp.int32)
        strays = self.of(beams) != self.of(here)
        if is_concrete(strays) and np.asarray(strays).any():
            row = int(np.argmax(np.asarray(strays)))
            raise CacheError(
                f"reorder: row {row} goes on from prefix {row // self.share}, row {int(beams[row])} from another "
                f"({int(beams[row]) // self.share}); `take` moves rows and their prefixes"
            )
        return moved, flags | jnp.where(strays, ROWS, 0).astype(jnp.int32)

    def fork(self, rows: Array, copies: int) -> tuple[Prefix, Array]:
        """See `Shared`. More rows go on from each prefix; none is copied."""
        moved, flags = self._ask(lambda entry: entry.fork(rows, copies), jnp.zeros_like(rows))
        return moved.replace(share=None if self.share is None else self.share * copies), flags

    def alike(self, other: Any) -> tuple[Any, Any]:
        """See `Shared`.

        Raises:
            CacheError: other numbers of rows go on from each prefix, or prefixes have other buffers.
        """
        if isinstance(other, Prefix):
            for what, a, b in (("rows share a prefix", self.share, other.share), ("slots", self.fixed, other.fixed)):
                if a != b:
                    said = ["all" if x is None else x for x in (a, b)]
                    raise CacheError(f"join: {what}: {said[0]} here and {said[1]} there; `take` gives each row its own")
        return self, other

    def join(self, other: Prefix) -> tuple[Prefix, Array]:
        """See `Shared`. Where all rows have one prefix, those of another are an error on the host; under `jit` all are
        flagged.

        Raises:
            CacheError: the two prefixes differ.
        """
        both = jnp.concatenate([self.base, other.base])
        more = lambda entry, more: entry.join(more)  # noqa: E731
        if self.share is not None:
            entries, flags = ask(self.prefix, more, jnp.zeros((both.shape[0] // self.share,), jnp.int32), other.prefix)
            suffix, flags = ask(self.suffix, more, jnp.repeat(flags, self.share), other.suffix)
            tokens, lengths = (jnp.concatenate([getattr(x, n) for x in (self, other)]) for n in ("tokens", "lengths"))
            joined = self.replace(tokens=tokens, lengths=lengths, prefix=entries, suffix=suffix)
            return joined, flags.astype(jnp.int32)
        at = jnp.arange(self.fixed)[None, :]
        same = (self.lengths == other.lengths) & jnp.all(
            (self.tokens == other.tokens) | (at >= self.lengths[:, None]), axis=1
        )
        if is_concrete(same) and not bool(same[0]):
            raise CacheError("join: the rows of the other cache go on from another prefix")
        suffix, flags = ask(self.suffix, more, jnp.where(same, 0, PREFIX), other.suffix)
        return self.replace(suffix=suffix), flags.astype(jnp.int32)


def after_base(positions: Array, base: Array) -> Array:
    """Places in a suffix as places in the text; `[R, T]`."""
    return jnp.where(positions == EMPTY, EMPTY, positions + base[:, None])


def before_base(places: Array, base: Array) -> Array:
    """Places in the text as places in a suffix; `[B, n]`."""
    return jnp.where(places == EMPTY, EMPTY, places - base[:, None])


__all__ = ["Prefix", "after_base", "before_base"]
