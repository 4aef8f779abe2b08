"""How decoding begins: an encoded source, and an empty cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import caches
from kvjax.caches import plans
from kvjax.caches.base import SOURCE, Cache, OpenCache, Span
from kvjax.caches.branches import after, branched, room_after
from kvjax.caches.cross import CrossKind, Source, rows_of
from kvjax.caches.flags import COUNT, NAN, NO_SOURCE, POSITIONS, TOKEN
from kvjax.caches.recompute import Recompute
from kvjax.checks import bucket, is_concrete, whole
from kvjax.errors import InputError
from kvjax.model import Asked, Model, check_ids, check_source, check_valid
from kvjax.types import Array


def encode(model: Model, tokens: Any, valid: Any = None) -> Source:
    """Runs the encoder over source texts, once; padded to buckets (16, 32, 64, …) as prompts are.

    Args:
        model: with an encoder.
        tokens: `[R, S]` int32, padded at the end.
        valid: `[R]` int32, how many of a row's tokens are real, or None for all.

    Returns:
        What `init_cache` and `forward` take as `source`. Under `jit`, where an error cannot be raised, rows that are
        empty, too long or hold an unknown id are flagged.

    Raises:
        InputError: the model has no encoder; `tokens` is not `[R, S]` whole numbers; a row is empty, longer than the
            encoder's positions, or has an id outside the vocabulary.
    """
    if model.encode is None:
        raise InputError("encode: the model has no encoder (Model.encode is None)")
    tokens = whole("encode: tokens", tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise InputError(f"encode: tokens must be [R, S] with at least one token, not {list(tokens.shape)}")
    r, s = tokens.shape
    valid = check_valid("encode", valid, r, s)
    limit, vocab = source_limits(model)
    check_ids("encode", vocab, tokens, valid)
    if is_concrete(valid):
        for row, n in enumerate(np.asarray(valid).tolist()):
            if not n:
                raise InputError(f"encode: row {row} of the source is empty; there is nothing to attend to")
            if limit is not None and n > limit:
                raise InputError(f"encode: row {row} has {n} tokens, the encoder has {limit} positions")
    if is_concrete(tokens) and is_concrete(valid):  # else the columns are all that can be asked for
        room = bucket(s, most=limit)
        tokens = np.pad(np.asarray(tokens), ((0, 0), (0, room - s)))
    return _encode(model, tokens.astype(jnp.int32), valid)


def source_limits(model: Model) -> tuple[int | None, int | None]:
    """Positions and vocabulary of the encoder, as far as the configuration says."""
    encoder = getattr(model.config, "encoder", None)
    return getattr(encoder, "max_positions", None), getattr(encoder, "vocab_size", None)


@jax.jit
def _encode(model: Model, tokens: Array, valid: Array) -> Source:
    assert model.encode is not None
    limit, vocab = source_limits(model)
    s = tokens.shape[1]
    wrong = (valid < 0) | (valid > s)
    past = jnp.zeros_like(wrong) if limit is None else valid > limit
    valid = jnp.where(wrong | past, 0, valid).astype(jnp.int32)
    real = jnp.arange(s, dtype=jnp.int32)[None, :] < valid[:, None]
    states = model.encode(model.params, model.config, jnp.where(real, tokens, 0), valid)
    source = Source(states, valid, jnp.zeros_like(valid)).checked()
    broken = ~jnp.all(jnp.isfinite(source.states), axis=(1, 2))
    unknown = (tokens < 0) if vocab is None else (tokens < 0) | (tokens >= vocab)
    bits = ((wrong, COUNT), (past, POSITIONS), (broken, NAN), (jnp.any(real & unknown, axis=1), TOKEN))
    flags = functools.reduce(jnp.bitwise_or, (jnp.where(where, bit, 0) for where, bit in bits), source.flags)
    flags |= jnp.where(flags != 0, NO_SOURCE, 0)
    states = jnp.where(broken[:, None, None], 0, source.states)
    return source.replace(states=states, flags=flags.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("kind", "share"))
def _keep(model: Model, source: Source, *, kind: CrossKind, share: int) -> Any:
    """What a kind keeps of a source. The layers' keys and values of it are what they ask for in one call; the rest of
    the call is not used, and XLA leaves it out."""
    source = source.checked()

    def ask() -> tuple[Any, ...]:
        asked, start = Asked(source), jnp.zeros_like(source.lengths)
        span = Span(start, jnp.ones_like(start), start[:, None])
        layers = tuple(Recompute() for _ in model.layer_shapes(source))
        model.apply(model.params, model.config, OpenCache(layers, {SOURCE: asked}, span), start[:, None], span.valid)
        if wrong := asked.made.keys() - range(len(layers)):
            raise InputError(
                f"Model.apply attends to the source at layer {min(wrong)}, but it has {len(layers)} layers"
            )
        return tuple(asked.made.get(i) for i in range(len(layers)))

    return kind.of(source, share, ask)


def init_cache(
    model: Model,
    plan: Any = None,
    *,
    batch: int | None = None,
    capacity: int,
    prefix: Cache | None = None,
    source: Source | None = None,
    cross: Any = None,
) -> Cache:
    """An empty cache, or one whose rows all go on from a prefix.

    Args:
        model: any model.
        plan: a kind (`caches.dense()`), a tuple with one a layer, or None for `caches.default`.
        batch: B, rows; None is one, or one for each row of a source. Rows that read one source stand side by side.
        capacity: T, tokens that a row can hold, a prefix included.
        prefix: a cache of one row that holds what all rows share, or of R rows, each for B / R rows next to each other;
            None for nothing. It is kept once, is copied and stays usable. The plan is that of the suffixes, and may be
            another one. Rows read the source that their prefix reads.
        source: what the rows attend to, from `kvjax.encode`.
        cross: what is kept of it, `caches.cross()` or `caches.encoder_output()`; None is `caches.cross()`.

    Raises:
        InputError: `batch` or `capacity` is less than 1, the plan does not fit the layers, the source not the model or
            the batch, or the prefix has rows that do not divide the batch or are empty, or leaves no room.
        CacheError: a source was refused (outside `jit`).
    """
    if batch is None:
        batch = 1 if source is None else rows_of("init_cache", source)
    if batch < 1 or capacity < 1:
        raise InputError(f"init_cache: batch and capacity must be at least 1, not {batch} and {capacity}")
    kept = {}
    if prefix is None or SOURCE not in prefix.shared:
        share = check_source("init_cache", model, source, batch)
        if source is not None:
            kind = caches.cross() if cross is None else cross
            if not isinstance(kind, CrossKind):
                raise InputError(
                    f"init_cache: cross {kind!r} is not what can be kept of a source, as caches.cross() is"
                )
            kept[SOURCE] = _keep(model, source, kind=kind, share=share)
    elif source is not None:
        raise InputError("init_cache: a source is given, but the rows read that of the prefix")
    if cross is not None and source is None:
        raise InputError(f"init_cache: cross is {cross}, but no source is given")
    shapes = model.layer_shapes(source if prefix is None or source is not None else prefix.shared.get(SOURCE))
    if plan is None:
        plan = tuple(plans.for_window(shape.window) for shape in shapes)
    kinds = plans.kinds_of(plan, shapes)
    if prefix is not None:
        prefix, capacity = room_after(prefix, len(shapes), batch, capacity)
    layers = plans.init_layers(kinds, shapes, batch, capacity)
    # Three arrays, not one three times: a buffer cannot be donated twice.
    lengths, written, flags = (jnp.zeros((batch,), jnp.int32) for _ in range(3))
    if kept:
        flags = jnp.repeat(kept[SOURCE].flags, share)
    shared = plans.init_shared(kinds, shapes, batch, capacity) | kept
    cache = Cache(layers, shared, jnp.full((batch, capacity), -1, jnp.int32), lengths, written, flags, kinds)
    cache = cache.check() if is_concrete(flags) else cache  # of a source that was refused
    return cache if prefix is None else after(jax.tree.map(jnp.copy, prefix), cache)


def cache_nbytes(
    model: Model,
    plan: Any = None,
    *,
    batch: int | None = None,
    capacity: int,
    source: Source | None = None,
    cross: Any = None,
) -> int:
    """Bytes of the cache that `init_cache` would make, nothing allocated; `source` may be of `jax.ShapeDtypeStruct`."""
    begin = functools.partial(init_cache, plan=plan, batch=batch, capacity=capacity, cross=cross)
    made = jax.eval_shape(lambda source: begin(model, source=source), source)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made))


__all__ = ["encode", "source_limits", "init_cache", "branched", "cache_nbytes"]
