"""Log-probabilities of what is chosen and of the best, noted while tokens are made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kvjax import struct
from kvjax.types import Array


@struct.node
class Noted(struct.Value):
    """Log-probabilities under the model itself, before any filter, at the position of each token.

    Args:
        chosen: `[B, T]`, of the token there, at least float32.
        ids: `[B, T, n]` int32, of the n most probable, best first; -1 where the vocabulary has fewer.
        values: `[B, T, n]`, theirs.
    """

    chosen: Array
    ids: Array
    values: Array

    @classmethod
    def empty(cls, rows: int, capacity: int, best: int, logits: Array) -> Noted:
        """For `rows` rows of `capacity` tokens, the `best` most probable of each position; zeros, and no ids."""
        dtype, shape = jnp.promote_types(jnp.float32, logits.dtype), (rows, capacity)
        many = (*shape, best)
        return cls(jnp.zeros(shape, dtype), jnp.full(many, -1, jnp.int32), jnp.full(many, -jnp.inf, dtype))

    def note(self, logits: Array, tokens: Array, places: Array) -> Noted:
        """With the tokens `[B]` at `places[B]`, which were chosen by `logits[B, V]`; a place past T notes nothing."""
        wide = logits.astype(self.chosen.dtype)
        all_ = wide - jax.nn.logsumexp(wide, axis=1, keepdims=True)
        own = jnp.take_along_axis(all_, jnp.maximum(tokens, 0)[:, None], axis=1, mode="fill", fill_value=-jnp.inf)
        n = min(self.ids.shape[2], logits.shape[1])
        values, ids = lax.top_k(all_, n)
        rows = jnp.arange(tokens.shape[0])
        return self.replace(
            chosen=self.chosen.at[rows, places].set(own[:, 0], mode="drop"),
            ids=self.ids.at[rows, places, :n].set(ids.astype(jnp.int32), mode="drop"),
            values=self.values.at[rows, places, :n].set(values, mode="drop"),
        )

    def given(self, found: tuple[Array, Array, Array], start: Array, valid: Array) -> Noted:
        """With what was found of `valid[B]` tokens from `start[B]` on: chosen `[B, S]`, ids and values `[B, S, n]`."""
        places = start[:, None] + jnp.arange(found[0].shape[1], dtype=jnp.int32)[None, :]
        places = jnp.where(places < (start + valid)[:, None], places, self.chosen.shape[1])
        rows = jnp.arange(places.shape[0])[:, None]
        pairs = zip((self.chosen, self.ids, self.values), found, strict=True)
        return Noted(*(x.at[rows, places].set(new, mode="drop") for x, new in pairs))

    def resize(self, capacity: int) -> Noted:
        """The same for `capacity` tokens a row."""
        more = max(capacity - self.chosen.shape[1], 0)

        def sized(x: Array, rest: float) -> Array:
            pad = ((0, 0), (0, more), (0, 0))[: x.ndim]
            return jnp.pad(x[:, :capacity], pad, constant_values=rest)

        return Noted(sized(self.chosen, 0), sized(self.ids, -1), sized(self.values, -jnp.inf))

    def take(self, rows: Array) -> Noted:
        """Other rows, `rows[n]` int32."""
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), self)


__all__ = ["Noted"]
