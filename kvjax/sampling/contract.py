"""What a filter and a sampler are, and what of a text they see besides the logits."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.checks import bucket, is_concrete, whole
from kvjax.errors import InputError
from kvjax.types import Array


@struct.node
class Text(struct.Value):
    """The rows for whose next token logits stand.

    Args:
        tokens: `[B, T]` int32, ids so far, prompt included; anything at and past a row's length.
        lengths: `[B]` int32, how many they are.
        starts: `[B]` int32, how many of them were given: new tokens begin there.
        limits: `[B]` int32, how many a row may have.
        stops: `[n]` int32, ids that end a row, -1 for none.
        copies: rows next to each other that are of one prompt, and share what is given one a prompt: samples, beams.
    """

    tokens: Array
    lengths: Array
    starts: Array
    limits: Array
    stops: Array
    copies: int = struct.static(default=1)

    @property
    def new(self) -> Array:
        """`[B]` int32, how many of a row's tokens are new."""
        return self.lengths - self.starts


class Filter(Protocol):
    """Changes logits before a token is chosen. A pytree: its structure is static, its numbers are array leaves."""

    def __call__(self, logits: Array, text: Text) -> Array:
        """`[B, V]` float to the same; -inf is never chosen."""


class Sampler(Protocol):
    """Chooses a token a row. A pytree, as a filter is."""

    def __call__(self, logits: Array, keys: Array, text: Text) -> Array:
        """`logits[B, V]` float, `keys[B]` random keys, one a row; `[B]` int32, -1 where no token may be chosen."""


def text_of(name: str, text: Text | None) -> Text:
    """`text` as it is.

    Raises:
        InputError: there is none.
    """
    if text is None:
        raise InputError(f"sampling.{name} reads the text so far: call it with a sampling.Text")
    return text


def number(name: str, argument: str, value: Any, dtype: Any, good: Any) -> Array:
    """A number of a filter as an array of `dtype`, so that another one compiles nothing.

    Args:
        name: of the filter, for the error.
        argument: of the number.
        value: one, or one a row.
        dtype: of the result; whole numbers are checked, not cast.
        good: which of a NumPy array are in range.

    Raises:
        InputError: no number, out of range, or of another shape.
    """
    if jnp.issubdtype(dtype, jnp.integer):
        x = jnp.asarray(whole(f"sampling.{name}: {argument}", value))
    else:
        try:
            x = jnp.asarray(value, dtype)
        except (TypeError, ValueError) as error:
            raise InputError(f"sampling.{name}: {argument} {value!r} is no number") from error
    if x.ndim > 1:
        raise InputError(f"sampling.{name}: {argument} must be one number or one a row, not of shape {x.shape}")
    if is_concrete(x) and not np.all(good(np.asarray(x))):
        raise InputError(f"sampling.{name}: {argument} {value} is out of range")
    return x


def of_rows(value: Array, rank: int, logits: Array, text: Text | None = None) -> Array:
    """`[B, …]`, what a filter has for each row: one for all, one a row, or one a prompt where rows are copies.

    Args:
        value: of `rank` axes for all rows, or of one more before them.
        rank: see `value`.
        logits: `[B, V]`.
        text: says how many rows are of one prompt.

    Raises:
        InputError: as many as there are neither rows nor prompts.
    """
    rows = logits.shape[0]
    value = value[None] if value.ndim == rank else value
    if value.shape[0] not in (1, rows):
        copies, each = 1 if text is None else text.copies, rows // max(value.shape[0], 1)
        if each * value.shape[0] != rows or copies % each:  # samples of samples: one for each of the first is right too
            raise InputError(f"sampler: {value.shape[0]} values for {rows // copies} rows")
        value = jnp.repeat(value, each, axis=0)
    return jnp.broadcast_to(value, (rows, *value.shape[1:]))


def per_row(value: Array, logits: Array, text: Text | None = None) -> Array:
    """`[B, 1]`, a number of a filter for each row; see `of_rows`."""
    return of_rows(value, 0, logits, text)[:, None]


def id_list(name: str, ids: Any) -> np.ndarray:
    """`[n]` int32, each once, n a bucket of at least 8, so that another number of them compiles nothing; -1 for none.

    Args:
        name: of the argument, for the error.
        ids: whole numbers of 0 or more, possibly none.

    Raises:
        InputError: no list of ids.
    """
    if not hasattr(ids, "__len__") or isinstance(ids, str | bytes):
        raise InputError(f"{name} must be a list of ids, not {ids!r}")
    given = np.asarray(whole(name, list(ids), ((len(ids),),))) if len(ids) else np.zeros((0,), np.int32)
    if (given < 0).any():
        raise InputError(f"{name} has id {given.min()}, ids are 0 or more")
    given = np.unique(given)
    found = np.full((bucket(max(len(given), 1), 8),), -1, np.int32)
    found[: len(given)] = given
    return found


def id_lists(name: str, ids: Any) -> Array:
    """`[n]` int32 of one list for all rows, or `[B, n]` of a list of lists, one a row; see `id_list`."""
    ids = np.asarray(ids) if hasattr(ids, "dtype") else ids
    rows = hasattr(ids, "__len__") and not isinstance(ids, str | bytes) and len(ids) > 0
    if not rows or not all(np.iterable(each) for each in ids):
        return jnp.asarray(id_list(name, ids))
    return jnp.asarray(stacked([id_list(f"{name}: row {row}", each) for row, each in enumerate(ids)], -1))


def stacked(rows: list[np.ndarray], rest: float) -> np.ndarray:
    """`[B, n]` of rows `[n]` of different n, with `rest` at their ends."""
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=rest) for row in rows])


def bias(name: str, value: Any) -> float:
    """What is added to a logit.

    Raises:
        InputError: it is neither finite nor -inf.
    """
    most, number = float(np.finfo(np.float32).max), isinstance(value, int | float | np.number)
    if not number or isinstance(value, bool) or not (value == -np.inf or abs(value) <= most):
        raise InputError(f"{name} must be a finite number of float32, or -inf for never; not {value!r}")
    return float(value)


def among(ids: Array, vocab: int) -> Array:
    """`[V]` bool, which of the vocabulary are among `ids[n]`, -1 for none; ids past it are nothing."""
    return jnp.zeros((vocab,), bool).at[jnp.where(ids < 0, vocab, ids)].set(True, mode="drop")


def marked(ids: Array, logits: Array, text: Text | None = None) -> Array:
    """`[B, V]` bool, or `[1, V]`, which are among `ids[n]`, or among those of a row, `[B, n]`; see `among`."""
    if ids.ndim == 1:
        return among(ids, logits.shape[1])[None]
    return jax.vmap(among, (0, None))(of_rows(ids, 1, logits, text), logits.shape[1])


def never(which: Array, logits: Array) -> Array:
    """`logits[B, V]` with -inf `which[B, V]` says so."""
    return jnp.where(which, jnp.asarray(-jnp.inf, logits.dtype), logits)


def wide(logits: Array) -> Array:
    """`logits` in at least float32; a filter computes in it, and gives back the dtype that it got."""
    return logits.astype(jnp.promote_types(jnp.float32, logits.dtype))


__all__ = ["Text", "Filter", "Sampler", "text_of", "number", "of_rows", "per_row", "id_list", "id_lists", "stacked"]
__all__ += ["bias", "among", "marked", "never", "wide"]
