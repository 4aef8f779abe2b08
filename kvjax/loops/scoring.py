"""Log-probabilities of tokens that are given, from a prefilled cache, on the device.

Nothing here knows a kind of cache, or a model.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax import struct
from kvjax.caches.base import Cache
from kvjax.caches.flags import COUNT, TOKEN
from kvjax.checks import count, is_concrete
from kvjax.loops import decode as loop
from kvjax.loops.feed import feed, finish
from kvjax.model import Model, check_ids
from kvjax.sampling.drawing import largest
from kvjax.types import Array

CHUNK = 64
"""Tokens a row that are fed at once: no more than so many have logits at a time."""


@struct.node
class Likelihood(struct.Value):
    """Of given tokens under the model itself, before any filter; what is past a row's tokens means nothing.

    Args:
        logprobs: `[B, S]`, at least float32; 0 past a row's tokens.
        greedy: `[B, S]` bool, whether each is the one that greedy decoding takes: the first of the most probable.
        ids: `[B, S, n]` int32, of the n most probable in its place, best first; -1 where there is none.
        values: `[B, S, n]`, theirs.
    """

    logprobs: Array
    greedy: Array
    ids: Array
    values: Array


def loglikelihood(
    model: Model,
    cache: Cache,
    logits: Array,
    tokens: Any,
    valid: Any = None,
    *,
    best: int = 0,
    chunk: int = CHUNK,
) -> tuple[Likelihood, Array, Cache]:
    """Log-probabilities of tokens that go on from a cache; they are fed, so that one can go on from there.

    A `lax.scan` over chunks: logits take B · chunk · V numbers, not B · S · V. Compiles for each S: pad, and say how
    many are meant with `valid`.

    Args:
        model: any model.
        cache: stays usable.
        logits: `[B, V]`, for the first token, from `prefill`, `step` or `decode`.
        tokens: `[B, S]` int32, padded at the end.
        valid: `[B]` int32, how many of a row's tokens are real, or None for all. 0 leaves a row as it is.
        best: static; also of so many of the most probable in the place of each token.
        chunk: static; 1 feeds one token at a time, as decoding does: with a quantised cache all that a prediction rests
            on is then read from it.

    Returns:
        The likelihoods, logits `[B, V]` for the next token, and the cache.

    Raises:
        InputError: shapes or dtypes are wrong, `valid` is outside 0 to S, `best` below 0, `chunk` below 1, or an id is
            outside the vocabulary (under `jit` the row is flagged, and its numbers are NaN).
        CacheError: a row's tokens do not fit the capacity (under `jit` the row is flagged, and its numbers are NaN).
    """
    loop.check_logits("loglikelihood", cache, logits)
    for name, value, least in (("best", best, 0), ("chunk", chunk, 1)):
        count(f"loglikelihood: {name}", value, least)
    tokens, valid = loop.check_tokens("loglikelihood", model, cache, tokens, valid)
    if is_concrete(logits):
        check_ids("loglikelihood", logits.shape[1], tokens, valid)
    return _all_fed(model, cache, logits, tokens, valid, best=best, chunk=chunk)


@functools.partial(jax.jit, static_argnames=("best", "chunk"))
def _all_fed(
    model: Model, cache: Cache, logits: Array, tokens: Array, valid: Array, *, best: int, chunk: int
) -> tuple[Likelihood, Array, Cache]:
    return scored(model, cache, logits, tokens, valid, valid, best=best, chunk=chunk)


def scored(
    model: Model, cache: Cache, logits: Array, tokens: Array, valid: Array, fed: Array, *, best: int, chunk: int
) -> tuple[Likelihood, Array, Cache]:
    """See `loglikelihood`; `fed[B]` of the `valid[B]` tokens are fed: all, or all but the last, which nothing follows.

    The logits of a token are those of the token before it: the first are given, and each chunk is measured against
    the tokens that follow its own.
    """
    b, s = tokens.shape
    size = min(chunk, s)
    count = -(-s // size)
    tokens = jnp.pad(tokens, ((0, 0), (0, count * size - s)))
    follow = jnp.concatenate([tokens[:, 1:], jnp.zeros((b, 1), tokens.dtype)], axis=1)
    real = jnp.arange(s, dtype=jnp.int32)[None, :] < valid[:, None]
    unknown = jnp.any(real & ((tokens[:, :s] < 0) | (tokens[:, :s] >= logits.shape[1])), axis=1)
    wrong = (valid < 0) | (valid > s)
    flags = jnp.where(unknown, TOKEN, 0) | jnp.where(wrong, COUNT, 0)
    asked = jnp.where((valid > 0)[:, None], logits, 0)  # those of a row without tokens mean nothing
    cache = loop.flag_nan(cache.replace(flags=(cache.flags | flags).astype(jnp.int32)), asked)
    steps = jnp.arange(size, dtype=jnp.int32)[None, :]

    def one(carry: tuple[Array, Cache], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Cache], Likelihood]:
        (logits, cache), (new, follow, at) = carry, chunk
        # A row that is flagged stops: what comes later must not close the gap.
        some = jnp.where(cache.flags != 0, 0, jnp.clip(fed - at, 0, size))
        x, cache = feed(model, cache, new, some)
        # Padding has the features of a row's last token: what it would have itself may be NaN.
        places = jnp.maximum(jnp.minimum(steps, some[:, None] - 1), 0)
        x = jnp.take_along_axis(x, places.reshape(b, size, *(1,) * (x.ndim - 2)), axis=1)
        each, cache = finish(model, cache, x, some)  # [B, C, V]
        return (jnp.where((some > 0)[:, None], each[:, -1], logits), cache), _measured(each, follow, best)

    def chunks(x: Array) -> Array:
        return x.reshape(b, count, size).swapaxes(0, 1)  # [chunks, B, C]

    first = _measured(logits[:, None], tokens[:, :1], best)
    at = jnp.arange(count, dtype=jnp.int32) * size
    (logits, cache), rest = lax.scan(one, (logits, cache), (chunks(tokens), chunks(follow), at))

    def joined(first: Array, rest: Array, nothing: Any) -> Array:
        rest = rest.swapaxes(0, 1).reshape(b, count * size, *rest.shape[3:])
        found = jnp.concatenate([first, rest], axis=1)[:, :s]
        return jnp.where(real.reshape(b, s, *(1,) * (found.ndim - 2)), found, nothing)

    found: Likelihood = jax.tree.map(joined, first, rest, Likelihood(0, False, -1, -jnp.inf))  # type: ignore[arg-type]
    broken = real & (cache.flags != 0)[:, None]
    return found.replace(logprobs=jnp.where(broken, jnp.nan, found.logprobs)), logits, cache


def _measured(logits: Array, tokens: Array, best: int) -> Likelihood:
    # tokens [B, n] against logits [B, n, V]
    (b, n, v), dtype = logits.shape, jnp.promote_types(jnp.float32, logits.dtype)
    wide = logits.astype(dtype)
    top = lax.stop_gradient(jnp.max(wide, axis=-1, keepdims=True))
    below = wide - top  # first: a difference of large numbers has few digits
    total = jnp.log(jnp.sum(jnp.exp(below), axis=-1))
    known = jnp.where(tokens < 0, v, tokens)[:, :, None]
    own = jnp.take_along_axis(below, known, axis=-1, mode="fill", fill_value=jnp.nan)[:, :, 0] - total
    most = largest(wide.reshape(b * n, v)).reshape(b, n)
    ids, values = jnp.full((b, n, best), -1, jnp.int32), jnp.full((b, n, best), -jnp.inf, dtype)
    if best:
        many = min(best, v)
        each, at = lax.top_k(below, many)
        ids = ids.at[:, :, :many].set(at.astype(jnp.int32))
        values = values.at[:, :, :many].set(each - total[:, :, None])
    return Likelihood(own, most == tokens, ids, values)


__all__ = ["Likelihood", "loglikelihood", "scored", "CHUNK"]
