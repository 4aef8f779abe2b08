"""Filters that depend on how long a text is: no end too early, and what it begins and ends with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax import struct
from kvjax.sampling.contract import Text, id_lists, marked, never, number, per_row, text_of, wide
from kvjax.sampling.lists import some
from kvjax.types import Array


@struct.node
class MinLength(struct.Value):
    """No token that ends a row, until the row has n tokens, prompt included.

    Args:
        n: int32, scalar or `[B]`.
        ids: `[n]` or `[B, n]` int32, -1 for none; None: those that end a row.
    """

    n: Array
    ids: Array | None

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        text = text_of("min_length", text)
        return _until(text.lengths, self.n, self.ids, logits, text)


@struct.node
class MinNewTokens(struct.Value):
    """No token that ends a row, until the row has n new tokens.

    Args:
        n: int32, scalar or `[B]`.
        ids: `[n]` or `[B, n]` int32, -1 for none; None: those that end a row.
    """

    n: Array
    ids: Array | None

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        text = text_of("min_new_tokens", text)
        return _until(text.new, self.n, self.ids, logits, text)


@struct.node
class ForcedFirst(struct.Value):
    """The first new token is among some.

    Args:
        ids: `[n]` or `[B, n]` int32, -1 for none.
    """

    ids: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        text = text_of("forced_first", text)
        return _forced(text.new == 0, self.ids, logits, text)


@struct.node
class ForcedLast(struct.Value):
    """The last token that a row may have is among some.

    Args:
        ids: `[n]` or `[B, n]` int32, -1 for none.
    """

    ids: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        text = text_of("forced_last", text)
        return _forced(text.lengths + 1 == text.limits, self.ids, logits, text)


@struct.node
class BannedFirst(struct.Value):
    """The first token that is chosen is none of some.

    Args:
        ids: `[n]` or `[B, n]` int32, -1 for none.
        least: int32, scalar or `[B]`; in a shorter text the token after so many is meant.
    """

    ids: Array
    least: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        text = text_of("banned_first", text)
        first = text.lengths[:, None] == jnp.maximum(text.starts[:, None], per_row(self.least, logits, text))
        return never(first & marked(self.ids, logits, text), logits)


def _until(have: Array, n: Array, ids: Array | None, logits: Array, text: Text) -> Array:
    early = have[:, None] < per_row(n, logits, text)
    return never(early & marked(text.stops if ids is None else ids, logits, text), logits)


def _forced(now: Array, ids: Array, logits: Array, text: Text) -> Array:
    # What is forced has all the probability, also where filters before left it none; a sum of one is 0.
    x, inside = wide(logits), marked(ids, logits, text)
    total = jax.nn.logsumexp(never(~inside, x), axis=1, keepdims=True)
    forced = never(~inside, jnp.where(jnp.isneginf(total), 0, x - total))
    return jnp.where(now[:, None], forced.astype(logits.dtype), logits)


def min_length(n: Any, ids: Any = None) -> MinLength:
    """Bans what ends a row until it has `n` tokens, prompt included, int or one a row.

    Args:
        n: how many.
        ids: what is banned, a list or one a row; None: the ids that end a row.

    Raises:
        InputError: a value is negative, or no list of ids.
    """
    return MinLength(*_least("min_length", n, ids))


def min_new_tokens(n: Any, ids: Any = None) -> MinNewTokens:
    """Bans what ends a row until it has `n` new tokens, int or one a row.

    Args:
        n: how many.
        ids: what is banned, a list or one a row; None: the ids that end a row.

    Raises:
        InputError: a value is negative, or no list of ids.
    """
    return MinNewTokens(*_least("min_new_tokens", n, ids))


def _least(name: str, n: Any, ids: Any) -> tuple[Array, Array | None]:
    n = number(name, "n", n, jnp.int32, lambda x: x >= 0)
    return n, None if ids is None else id_lists(f"sampling.{name}: ids", ids)


def forced_first(ids: Any) -> ForcedFirst:
    """The first new token is among `ids`, a list or one a row, with the probabilities that they have to each other.

    Raises:
        InputError: no list of ids, or one without any.
    """
    return ForcedFirst(some("forced_first", ids))


def forced_last(ids: Any) -> ForcedLast:
    """The last token that a row's budget allows is among `ids`; see `forced_first`.

    Raises:
        InputError: no list of ids, or one without any.
    """
    return ForcedLast(some("forced_last", ids))


def banned_first(ids: Any, least: Any = 0) -> BannedFirst:
    """The first new token is none of `ids`, a list or one a row.

    Args:
        ids: what is banned.
        least: where texts begin with so many tokens that a model forces on them, the token after these is meant.

    Raises:
        InputError: no list of ids, or a number is negative.
    """
    least = number("banned_first", "least", least, jnp.int32, lambda x: x >= 0)
    return BannedFirst(id_lists("sampling.banned_first: ids", ids), least)


__all__ = ["MinLength", "MinNewTokens", "ForcedFirst", "ForcedLast", "BannedFirst"]
__all__ += ["min_length", "min_new_tokens", "forced_first", "forced_last", "banned_first"]
