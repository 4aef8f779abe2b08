"""Thresholds on logits: temperature, top-k, top-p. None sorts the vocabulary: bounds are found bit by bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax import struct
from kvjax.sampling.contract import Text, number, per_row
from kvjax.sampling.drawing import largest
from kvjax.types import Array


@struct.node
class Temperature(struct.Value):
    """Divides logits; 0 keeps only the first of the largest, so that the draw is greedy.

    Args:
        value: float32, scalar or `[B]`.
    """

    value: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        value = per_row(self.value, logits, text)
        best = jnp.arange(logits.shape[1])[None, :] == largest(logits)[:, None]
        top = jnp.max(logits, axis=1, keepdims=True)
        below = logits - jnp.where(jnp.isfinite(top), top, 0)  # so that a small temperature does not overflow
        return jnp.where(value > 0, below / jnp.where(value > 0, value, 1), jnp.where(best, 0.0, -jnp.inf))


@struct.node
class TopK(struct.Value):
    """Keeps the k largest logits, and those equal to the k-th (Fan et al. 2018, 1805.04833).

    Args:
        k: int32, scalar or `[B]`; 0, or V and more, keeps all.
    """

    k: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`, -inf where dropped."""
        v = logits.shape[1]
        k = per_row(self.k, logits, text)
        ordered = _ordered(logits)
        bound = _largest_bound(lambda t: jnp.sum(ordered >= t, axis=1, keepdims=True) >= jnp.minimum(k, v), logits)
        return jnp.where((ordered >= bound) | (k <= 0), logits, -jnp.inf)


@struct.node
class TopP(struct.Value):
    """Keeps the smallest set of most probable tokens whose probabilities sum to p (Holtzman et al. 2019, 1904.09751),
    and those equal to its least.

    Args:
        p: float32, scalar or `[B]`; at least 1 keeps all, 0 keeps the most probable.
    """

    p: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`, -inf where dropped."""
        p = per_row(self.p, logits, text)
        probabilities = jax.nn.softmax(logits, axis=1)
        ordered = _ordered(logits)

        def enough(t: Array) -> Array:
            kept = jnp.sum(jnp.where(ordered >= t, probabilities, 0), axis=1, keepdims=True)
            return (kept >= p) & (kept > 0)

        # Rounding may leave the whole sum below p: then no bound is enough and the lowest keeps all.
        return jnp.where((ordered >= _largest_bound(enough, logits)) | (p >= 1), logits, -jnp.inf)


def temperature(value: Any) -> Temperature:
    """Divides logits by `value`, float or one a row, 0 or more; 0 is greedy.

    Raises:
        InputError: a value is negative or not finite.
    """
    return Temperature(number("temperature", "value", value, jnp.float32, lambda x: np.isfinite(x) & (x >= 0)))


def top_k(k: Any) -> TopK:
    """Keeps the `k` most probable tokens, int or one a row; 0 keeps all.

    Raises:
        InputError: a value is negative.
    """
    return TopK(number("top_k", "k", k, jnp.int32, lambda x: x >= 0))


def top_p(p: Any) -> TopP:
    """Keeps the most probable tokens up to a sum of `p`, float in [0, 1] or one a row.

    Raises:
        InputError: a value is outside [0, 1].
    """
    return TopP(number("top_p", "p", p, jnp.float32, lambda x: (x >= 0) & (x <= 1)))


def _ordered(x: Array) -> Array:
    """Logits as uint32 that order the same way, so that a threshold can be found bit by bit; no sort of V."""
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # one zero; XLA drops `x + 0.0`
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_bound(enough: Any, logits: Array) -> Array:
    """`[B, 1]` uint32, the largest bound that is `enough`, 32 passes over V; 0 if none is."""

    def bit(i: Array, bound: Array) -> Array:
        more = bound | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(more), more, bound)

    return lax.fori_loop(0, 32, bit, jnp.zeros((logits.shape[0], 1), jnp.uint32))


__all__ = ["Temperature", "TopK", "TopP", "temperature", "top_k", "top_p"]
