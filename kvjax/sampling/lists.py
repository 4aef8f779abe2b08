"""Filters that name tokens: some are banned, only some are allowed, some are more or less likely."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.errors import InputError
from kvjax.sampling.contract import Text, bias, id_list, id_lists, marked, never, of_rows, stacked, wide
from kvjax.types import Array


@struct.node
class Banned(struct.Value):
    """Some tokens are never chosen.

    Args:
        ids: `[n]` or `[B, n]` int32, -1 for none.
    """

    ids: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        return never(marked(self.ids, logits, text), logits)


@struct.node
class Allowed(struct.Value):
    """Only some tokens are chosen.

    Args:
        ids: `[n]` or `[B, n]` int32, -1 for none.
    """

    ids: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        return never(~marked(self.ids, logits, text), logits)


@struct.node
class LogitBias(struct.Value):
    """Adds to the logits of some tokens.

    Args:
        ids: `[n]` or `[B, n]` int32, -1 for none.
        values: float32 of the same shape.
    """

    ids: Array
    values: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        v = logits.shape[1]

        def of_row(ids: Array, values: Array) -> Array:
            return jnp.zeros((v,), values.dtype).at[jnp.where(ids < 0, v, ids)].add(values, mode="drop")

        if self.ids.ndim == 1:
            more = of_row(self.ids, self.values)[None]
        else:
            more = jax.vmap(of_row)(*(of_rows(x, 1, logits, text) for x in (self.ids, self.values)))
        return (wide(logits) + more).astype(logits.dtype)


def banned(ids: Any) -> Banned:
    """Never chooses any of `ids`, a list for all rows or a list of lists, one a row.

    Ids past the vocabulary are nothing.

    Raises:
        InputError: no list of ids.
    """
    return Banned(id_lists("sampling.banned: ids", ids))


def allowed(ids: Any) -> Allowed:
    """Chooses only among `ids`, a list for all rows or a list of lists, one a row.

    Ids past the vocabulary are nothing.

    Raises:
        InputError: no list of ids, or one without any.
    """
    return Allowed(some("allowed", ids))


def some(name: str, ids: Any) -> Array:
    """`id_lists` of which none is empty.

    Raises:
        InputError: no list of ids, or one without any.
    """
    found = id_lists(f"sampling.{name}: ids", ids)
    if empty := np.flatnonzero(np.max(np.atleast_2d(np.asarray(found)), axis=1) < 0).tolist():
        row = f"row {empty[0]} has" if found.ndim == 2 else "has"
        raise InputError(f"sampling.{name}: ids: {row} no id, so that no token could be chosen")
    return found


def logit_bias(biases: Any) -> LogitBias:
    """Adds to logits: `{id: bias}` for all rows or a list of these, one a row; -inf bans a token.

    Ids past the vocabulary are nothing.

    Raises:
        InputError: no ids, or a bias that is neither finite nor -inf.
    """
    name = "sampling.logit_bias: biases"
    if isinstance(biases, dict):
        ids, values = _biases(name, biases)
    elif isinstance(biases, list | tuple) and biases and all(isinstance(row, dict) for row in biases):
        rows = [_biases(f"{name}: row {i}", row) for i, row in enumerate(biases)]
        ids, values = (stacked([row[i] for row in rows], rest) for i, rest in ((0, -1), (1, 0)))
    else:
        raise InputError(f"{name} must be a dict of ids and numbers, or a list of such, not {biases!r}")
    return LogitBias(jnp.asarray(ids), jnp.asarray(values))


def _biases(name: str, biases: dict[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    ids = id_list(name, list(biases))
    values = np.zeros(ids.shape, np.float32)
    for place, i in enumerate(ids[ids >= 0].tolist()):
        values[place] = bias(f"{name}: that of {i}", biases[i])
    return ids, values


__all__ = ["Banned", "Allowed", "LogitBias", "banned", "allowed", "logit_bias", "some"]
