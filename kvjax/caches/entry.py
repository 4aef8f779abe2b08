"""An entry of what the layers of a cache have in common."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches.span import Span
from kvjax.types import Array


class Shared(struct.Value):
    """An entry of `Cache.shared`: what layers have in common, once; derives from it and is a `struct.node`.

    Every operation gives the entry and `[B]` int32 flags, bits for the rows where it could not be done.
    """

    still = False
    """Whether the text changes nothing in it: tokens fed, rewound or fed again."""

    fixed = 0
    """How much of the capacity is not the rows' own."""

    @property
    def least(self) -> Any:
        """Tokens that a row cannot lose: a number, or int32 `[1]` or `[B]`."""
        return 0

    @property
    def most(self) -> Any:
        """Tokens that a row can hold, int32 `[1]` or `[B]`; None is as many as the capacity."""
        return None

    def beside(self, other: Any) -> Any:
        """With what another kind of the plan asks for under the same name."""
        return self

    def reserve(self, span: Span) -> tuple[Any, Array]:
        """Makes room for the new tokens, once a call, before the layers run; tokens of flagged rows are dropped."""
        return self, jnp.zeros_like(span.start)

    def resize(self, capacity: int) -> Any:
        """The same for a cache with room for `capacity` tokens a row."""
        return self

    def rewind(self, lengths: Array) -> tuple[Any, Array]:
        """Gives back what lies at or past `lengths[B]`."""
        return self, jnp.zeros_like(lengths)

    def claim(self, places: Array) -> tuple[Any, Array]:
        """Makes what lies at `places[B, n]`, EMPTY for none, the row's own: it will be written."""
        return self, jnp.zeros(places.shape[:1], jnp.int32)

    def release(self, rows: Array) -> tuple[Any, Array]:
        """Gives back all that rows `rows[B]` bool hold."""
        return self, jnp.zeros(rows.shape, jnp.int32)

    def take(self, rows: Array) -> tuple[Any, Array]:
        """Other rows, `rows[n]`; everything moves."""
        raise NotImplementedError

    def reorder(self, beams: Array) -> tuple[Any, Array]:
        """Rows exchanged inside a source; what the rows of a source share stays."""
        return self.take(beams)

    def fork(self, rows: Array, copies: int) -> tuple[Any, Array]:
        """Every row `copies` times, one after the other, as `rows` says; what the copies share stays."""
        return self.take(rows)

    def alike(self, other: Any) -> tuple[Any, Any]:
        """Itself and another entry, of one structure if they can be joined."""
        return self, other

    def join(self, other: Any) -> tuple[Any, Array]:
        """These rows, then those of another entry made for as many tokens a row, and alike."""
        raise NotImplementedError


__all__ = ["Shared"]
