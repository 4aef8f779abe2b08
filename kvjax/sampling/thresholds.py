"""Temperature, and thresholds on logits: top-k, top-p, min-p, typical. Bounds are found bit by bit: nothing sorts V."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax import struct
from kvjax.sampling.contract import Text, never, number, per_row, wide
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
        value, x = per_row(self.value, logits, text), wide(logits)
        most = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), axis=1, keepdims=True)
        limit = jnp.finfo(logits.dtype)
        least = jnp.maximum(most / (float(limit.max) / 4), float(limit.tiny))  # less would overflow
        best = jnp.arange(logits.shape[1])[None, :] == largest(logits)[:, None]
        kept = jnp.where(value > 0, x / jnp.maximum(value, least), never(~best & ~jnp.isnan(x), x))
        return kept.astype(logits.dtype)


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
        return never((ordered < bound) & (k > 0), logits)


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
        return never(_rest(_ordered(logits), logits, per_row(self.p, logits, text)), logits)


@struct.node
class MinP(struct.Value):
    """Keeps tokens that are at least p times as probable as the most probable one (Nguyen et al. 2024, 2407.01082).

    Args:
        p: float32, scalar or `[B]`; 0 keeps all, 1 the most probable and those equal to it.
    """

    p: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`, -inf where dropped."""
        x = wide(logits)
        return never(x < jnp.max(x, axis=1, keepdims=True) + jnp.log(per_row(self.p, logits, text)), logits)


@struct.node
class Typical(struct.Value):
    """Keeps the tokens whose surprise is nearest to the entropy, until their probabilities sum to p, and those as near
    as the last (Meister et al. 2022, 2202.00666).

    Args:
        p: float32, scalar or `[B]`; at least 1 keeps all, 0 keeps the most typical.
    """

    p: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`, -inf where dropped."""
        log = jax.nn.log_softmax(wide(logits), axis=1)
        entropy = -jnp.sum(jnp.where(jnp.isneginf(log), 0, jnp.exp(log) * log), axis=1, keepdims=True)
        return never(_rest(_ordered(-jnp.abs(log + entropy)), logits, per_row(self.p, logits, text)), logits)


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


def min_p(p: Any) -> MinP:
    """Keeps tokens at least `p` times as probable as the most probable one, float in [0, 1] or one a row.

    Raises:
        InputError: a value is outside [0, 1].
    """
    return MinP(number("min_p", "p", p, jnp.float32, lambda x: (x >= 0) & (x <= 1)))


def typical(p: Any) -> Typical:
    """Keeps the most typical tokens up to a sum of `p`, float in [0, 1] or one a row.

    Raises:
        InputError: a value is outside [0, 1].
    """
    return Typical(number("typical", "p", p, jnp.float32, lambda x: (x >= 0) & (x <= 1)))


def _rest(ordered: Array, logits: Array, p: Array) -> Array:
    """`[B, V]` bool, all but the fewest of the largest `ordered[B, V]` whose probabilities reach `p[B, 1]`."""
    probabilities = jax.nn.softmax(wide(logits), axis=1)

    def enough(t: Array) -> Array:
        kept = jnp.sum(jnp.where(ordered >= t, probabilities, 0), axis=1, keepdims=True)
        return (kept >= p) & (kept > 0)

    # Rounding may leave the whole sum below p: then no bound is enough and the lowest keeps all.
    return (ordered < _largest_bound(enough, logits)) & (p < 1)


def _ordered(x: Array) -> Array:
    """Logits as uint32 that order the same way, so that a threshold can be found bit by bit; no sort of V.

    One zero; NaN, whatever its sign, above all, so that it is kept and seen.
    """
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # XLA drops `x + 0.0`
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
    return jnp.where(jnp.isnan(x), jnp.uint32(0xFFFFFFFF), ordered)


def _largest_bound(enough: Any, logits: Array) -> Array:
    """`[B, 1]` uint32, the largest bound that is `enough`, 32 passes over V; 0 if none is."""

    def bit(i: Array, bound: Array) -> Array:
        more = bound | (jnp.uint32(1) << (31 - jnp.uint32(i)))
        return jnp.where(enough(more), more, bound)

    return lax.fori_loop(0, 32, bit, jnp.zeros((logits.shape[0], 1), jnp.uint32))


__all__ = ["Temperature", "TopK", "TopP", "MinP", "Typical", "temperature", "top_k", "top_p", "min_p", "typical"]
