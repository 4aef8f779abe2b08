"""One call of a model on a cache: room is checked, tokens are noted, lengths and flags move."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.caches.base import Cache, OpenCache, Span, Tree
from kvjax.caches.flags import CAPACITY, COUNT, NAN, POSITIONS, TOKEN
from kvjax.config import Config
from kvjax.errors import InputError
from kvjax.model import Model
from kvjax.types import Array


def feed(model: Model, cache: Cache, tokens: Array, valid: Array, tree: Tree | None = None) -> tuple[Array, Cache]:
    """Feeds S tokens a row.

    A row whose tokens do not fit is left as it is, and flagged: nothing is clamped, wrapped or partly written.

    Args:
        model: any model.
        cache: at the tokens that came before.
        tokens: `[B, S]` int32.
        valid: `[B]` int32, how many of a row's tokens are real, 0 to S.
        tree: how the tokens hang together; None is one after the other. `Cache.keep` then keeps one path.

    Returns:
        Features `[B, S, ...]` of the new tokens for `model.head`, and the cache.
    """
    b, s = tokens.shape
    layers = model.config.num_layers if isinstance(model.config, Config) else len(cache.layers)
    if len(cache.layers) != layers:
        raise InputError(f"the cache has {len(cache.layers)} layers, the model has {layers}: it was made for another")
    start = cache.lengths
    wrong = (valid < 0) | (valid > s)  # negative, it would be a rewind that nobody looks at
    valid = jnp.where(wrong, 0, valid)
    full = start + valid > cache.capacity
    flags = jnp.where(full, CAPACITY, 0) | jnp.where(wrong, COUNT, 0)
    if model.max_positions is not None:
        real = jnp.arange(s, dtype=jnp.int32)[None, :] < valid[:, None]
        last = valid if tree is None else jnp.max(jnp.where(real, tree.depths + 1, 0), axis=1)
        past = start + last > model.max_positions
        flags |= jnp.where(past, POSITIONS, 0)
        full |= past
    valid = jnp.where(full, 0, valid)
    steps = jnp.arange(s, dtype=jnp.int32)[None, :]
    fed = jnp.where(steps < valid[:, None], tokens, 0)  # padding may hold anything
    places = start[:, None] + steps  # [B, S]
    span = Span(start, valid, places)
    if tree is not None:
        span = Span(start, valid, start[:, None] + tree.depths, jnp.broadcast_to(tree.ancestors, (b, s, s)))
    shared, refused = cache.reserve(span)
    span = span.replace(valid=jnp.where(refused != 0, 0, valid)) if shared else span
    valid = span.valid
    flags = (cache.flags | flags | refused).astype(jnp.int32)
    cache = cache.replace(shared=shared)
    slots = jnp.where(steps < valid[:, None], places, cache.capacity)
    noted = cache.tokens.at[jnp.arange(b)[:, None], slots].set(tokens, mode="drop")
    if cache.replays:
        # Some layer keeps nothing: the whole text goes through again, and the new tokens' features are picked out.
        zeros = jnp.zeros_like(start)
        every = jnp.broadcast_to(jnp.arange(cache.capacity, dtype=jnp.int32)[None, :], noted.shape)
        whole = Span(zeros, start + valid, every)
        if tree is not None:
            causal = jnp.broadcast_to(every[:, :, None] >= every[:, None, :], (b, cache.capacity, cache.capacity))
            seen = causal.at[jnp.arange(b)[:, None], places].set(span.seen(every), mode="drop")
            whole = Span(zeros, start + valid, span.text(every), seen)
        x, opened = _apply(model, cache, jnp.maximum(noted, 0), whole)
        at = jnp.clip(places, 0, cache.capacity - 1)
        x = jnp.take_along_axis(x, at.reshape(b, s, *(1,) * (x.ndim - 2)), axis=1)
    else:
        x, opened = _apply(model, cache, fed, span)
    lengths = start + valid
    return x, cache.replace(
        layers=opened.layers,
        shared=opened.shared,
        tokens=noted,
        lengths=lengths,
        written=jnp.maximum(cache.written, lengths),
        flags=flags,
    )


def _apply(model: Model, cache: Cache, tokens: Array, span: Span) -> tuple[Array, OpenCache]:
    opened = OpenCache(cache.layers, cache.shared, span)
    return model.apply(model.params, model.config, opened, tokens, span.valid)


def finish(model: Model, cache: Cache, x: Array, valid: Array) -> tuple[Array, Cache]:
    """Logits of some of the fed tokens; flags NaN logits and bad ids, and makes flagged rows' logits NaN.

    Args:
        model: any model.
        cache: as `feed` returned it.
        x: `[B, n, ...]`, features of the wanted tokens.
        valid: `[B]` int32, as given to `feed`.

    Returns:
        `[B, n, V]` and the cache.
    """
    logits = model.head(model.params, model.config, x)
    # All live tokens, not the new ones alone: what a rewind left in place shows again.
    live = jnp.arange(cache.capacity, dtype=jnp.int32)[None, :] < cache.lengths[:, None]
    bad = jnp.any(live & ((cache.tokens < 0) | (cache.tokens >= logits.shape[-1])), axis=1)
    broken = jnp.isnan(jnp.max(logits, axis=(1, 2))) & (valid > 0)  # a largest is NaN if one of them is
    flags = cache.flags | jnp.where(bad, TOKEN, 0) | jnp.where(broken, NAN, 0)
    logits = jnp.where((flags != 0)[:, None, None], jnp.nan, logits)
    return logits, cache.replace(flags=flags.astype(jnp.int32))


__all__ = ["feed", "finish"]
