"""Samplers: small pytrees whose structure is static and whose numbers are array leaves, one for all rows or one a row.

A sampler is called as `sampler(logits [B, V], keys [B]) -> tokens [B]`. A filter is called as `filter(logits) ->
logits`; `chain` applies filters in order and draws. Another number compiles nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax import struct
from kvjax.checks import whole
from kvjax.errors import InputError
from kvjax.types import Array


class Sampler(Protocol):
    """Chooses a token a row."""

    def __call__(self, logits: Array, keys: Array) -> Array:
        """`logits[B, V]` float, `keys[B]` random keys, one a row; `[B]` int32."""


@struct.node
class Greedy(struct.Value):
    """The first of the largest logits."""

    def __call__(self, logits: Array, keys: Array) -> Array:
        """See `Sampler`."""
        return largest(logits)


@struct.node
class Chain(struct.Value):
    """Filters in order, then a draw from the softmax of what is left.

    Args:
        filters: each `logits[B, V] -> logits[B, V]`.
    """

    filters: tuple[Any, ...]

    def __call__(self, logits: Array, keys: Array) -> Array:
        """See `Sampler`."""
        for each in self.filters:
            logits = each(logits)
        # Gumbel-max (Maddison et al. 2014, 1411.0030), one key a row: a row's draw does not see its neighbours.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
        return largest(jnp.where(jnp.isneginf(logits), -jnp.inf, logits + noise))


@struct.node
class Temperature(struct.Value):
    """Divides logits; 0 keeps only the first of the largest, so that the draw is greedy.

    Args:
        value: float32, scalar or `[B]`.
    """

    value: Array

    def __call__(self, logits: Array) -> Array:
        """`[B, V]` to `[B, V]`."""
        value = _per_row(self.value, logits)
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

    def __call__(self, logits: Array) -> Array:
        """`[B, V]` to `[B, V]`, -inf where dropped."""
        v = logits.shape[1]
        k = _per_row(self.k, logits)
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

    def __call__(self, logits: Array) -> Array:
        """`[B, V]` to `[B, V]`, -inf where dropped."""
        p = _per_row(self.p, logits)
        probabilities = jax.nn.softmax(logits, axis=1)
        ordered = _ordered(logits)

        def enough(t: Array) -> Array:
            kept = jnp.sum(jnp.where(ordered >= t, probabilities, 0), axis=1, keepdims=True)
            return (kept >= p) & (kept > 0)

        # Rounding may leave the whole sum below p: then no bound is enough and the lowest keeps all.
        return jnp.where((ordered >= _largest_bound(enough, logits)) | (p >= 1), logits, -jnp.inf)


def greedy() -> Greedy:
    """The most probable token."""
    return Greedy()


def chain(*filters: Any) -> Chain:
    """Filters in order, then a draw: `chain(temperature(0.8), top_p(0.95))`; `chain()` samples the model as it is."""
    for each in filters:
        if isinstance(each, Greedy | Chain) or not callable(each) or jax.tree_util.all_leaves([each]):
            raise InputError(f"sampling.chain: {each!r} is no filter, such as sampling.temperature(0.8)")
    return Chain(tuple(filters))


def temperature(value: Any) -> Temperature:
    """Divides logits by `value`, float or one a row, 0 or more; 0 is greedy.

    Raises:
        InputError: a value is negative or not finite.
    """
    return Temperature(_number("temperature", "value", value, jnp.float32, lambda x: np.isfinite(x) & (x >= 0)))


def top_k(k: Any) -> TopK:
    """Keeps the `k` most probable tokens, int or one a row; 0 keeps all.

    Raises:
        InputError: a value is negative.
    """
    return TopK(_number("top_k", "k", k, jnp.int32, lambda x: x >= 0))


def top_p(p: Any) -> TopP:
    """Keeps the most probable tokens up to a sum of `p`, float in [0, 1] or one a row.

    Raises:
        InputError: a value is outside [0, 1].
    """
    return TopP(_number("top_p", "p", p, jnp.float32, lambda x: (x >= 0) & (x <= 1)))


def checked(sampler: Any) -> Any:
    """A sampler as it is, greedy for None.

    Raises:
        InputError: a filter alone, or something that is no pytree that can be called.
    """
    if sampler is None:
        return Greedy()
    if isinstance(sampler, Temperature | TopK | TopP):
        raise InputError(f"sampler: {type(sampler).__name__} is a filter; wrap it, as in sampling.chain(…)")
    if not callable(sampler) or jax.tree_util.all_leaves([sampler]):
        raise InputError(f"sampler: {sampler!r} is no pytree that can be called, such as sampling.greedy()")
    return sampler


def largest(logits: Array) -> Array:
    """`[B]` int32, index of the first of the largest of `logits[B, V]`; faster on CPU than `argmax`. 0 on NaN."""
    v = logits.shape[1]
    index = jnp.arange(v, dtype=jnp.int32)[None, :]
    found = jnp.min(jnp.where(logits == jnp.max(logits, axis=1, keepdims=True), index, v), axis=1)
    return jnp.where(found < v, found, 0)


def row_keys(seeds: Array) -> Array:
    """`[B]` random keys from `[B]` uint32 seeds: a seed means the same in any row of any batch."""
    return jax.vmap(jax.random.key)(seeds)


def position_keys(keys: Array, positions: Array) -> Array:
    """`[B]` keys for the tokens at `positions[B]`: `fold_in(row_key, absolute position)`."""
    return jax.vmap(jax.random.fold_in)(keys, positions)


def _number(name: str, argument: str, value: Any, dtype: Any, good: Any) -> Array:
    if jnp.issubdtype(dtype, jnp.integer):
        x = jnp.asarray(whole(f"sampling.{name}: {argument}", value))
    else:
        try:
            x = jnp.asarray(value, dtype)
        except (TypeError, ValueError) as error:
            raise InputError(f"sampling.{name}: {argument} {value!r} is no number") from error
    if x.ndim > 1:
        raise InputError(f"sampling.{name}: {argument} must be one number or one a row, not of shape {x.shape}")
    if not isinstance(x, jax.core.Tracer) and not np.all(good(np.asarray(x))):
        raise InputError(f"sampling.{name}: {argument} {value} is out of range")
    return x


def _per_row(value: Array, logits: Array) -> Array:
    if value.ndim and value.shape[0] != logits.shape[0]:
        raise InputError(f"sampler: {value.shape[0]} values for {logits.shape[0]} rows")
    return jnp.broadcast_to(value, (logits.shape[0],))[:, None]


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


__all__ = [
    "Sampler",
    "greedy",
    "chain",
    "temperature",
    "top_k",
    "top_p",
    "checked",
    "largest",
    "row_keys",
    "position_keys",
]
