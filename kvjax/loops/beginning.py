"""Where a generation begins: prompts prefilled once, or an earlier result taken up; one program each."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import Cache
from kvjax.caches.branches import repeated
from kvjax.caches.cross import Source
from kvjax.caching import init_cache
from kvjax.loops import decode as loop
from kvjax.loops.generated import Generated
from kvjax.loops.noted import Noted
from kvjax.loops.prompts import beyond, padded
from kvjax.model import Model
from kvjax.types import Array

CAPACITY = 256
"""The smallest capacity of a generated cache, in tokens; it grows by doubling."""

TARGET_CAPACITY = 64
"""The same for targets, which begin with little and are rarely long."""

AHEAD = 64
"""Tokens of room beyond the prompt that the first capacity has at least."""


def prefilled(
    model: Model,
    ids: list[list[int]],
    plan: Any,
    prefix: Cache | None,
    source: Source | None,
    cross: Any,
    samples: int,
    logprobs: int | None,
) -> loop.Progress:
    """Prompts fed to a new cache, every one once."""
    longest = max(len(row) for row in ids)
    if prefix is not None:
        ids, prefix = beyond(ids, prefix)
    least = CAPACITY if source is None else TARGET_CAPACITY
    capacity = loop.bucket(longest + (AHEAD if source is None else loop.CHUNK), least)
    static = {"plan": plan, "cross": cross, "capacity": capacity, "samples": samples, "logprobs": logprobs}
    return _begin(model, *padded(ids), prefix, source, **static)


@functools.partial(jax.jit, static_argnames=("plan", "cross", "capacity", "samples", "logprobs"))
def _begin(
    model: Model,
    tokens: Array,
    lengths: Array,
    prefix: Cache | None,
    source: Source | None,
    *,
    plan: Any,
    cross: Any,
    capacity: int,
    samples: int,
    logprobs: int | None,
) -> loop.Progress:
    # One program: an empty cache made outside would cost a compilation for each kind of buffer.
    rows = tokens.shape[0]
    cache = init_cache(model, plan, batch=rows, capacity=capacity, prefix=prefix, source=source, cross=cross)
    logits, cache = loop.prefill(model, cache, tokens, lengths)
    return _branched(cache, logits, samples, logprobs)


def resumed(
    model: Model, after: Generated, more: list[list[int]] | None, samples: int, logprobs: int | None
) -> loop.Progress:
    """Where an earlier result stands, after more text if there is any; the result stays usable."""
    # The loop donates what it is given; the caller keeps its own.
    if more is None:
        return _copied(after.cache, after.logits, samples=samples, logprobs=logprobs)
    tokens, valid = padded(more)
    capacity = after.cache.enough(np.asarray(after.cache.lengths) + valid)
    return _fed(model, after.cache, tokens, valid, capacity=capacity, samples=samples, logprobs=logprobs)


@jax.jit
def copied(tree: Any) -> Any:
    """Arrays that nobody else has; one program."""
    return jax.tree.map(jnp.copy, tree)


@functools.partial(jax.jit, static_argnames=("samples", "logprobs"))
def _copied(cache: Cache, logits: Array, *, samples: int, logprobs: int | None) -> loop.Progress:
    return jax.tree.map(jnp.copy, _branched(cache, logits, samples, logprobs))


@functools.partial(jax.jit, static_argnames=("capacity", "samples", "logprobs"))
def _fed(
    model: Model, cache: Cache, tokens: Array, valid: Array, *, capacity: int, samples: int, logprobs: int | None
) -> loop.Progress:
    cache = cache if capacity == cache.capacity else cache.resize(capacity)
    logits, cache = loop.prefill(model, cache, tokens, valid)
    return _branched(cache, logits, samples, logprobs)


def _branched(cache: Cache, logits: Array, samples: int, logprobs: int | None) -> loop.Progress:
    """Every row `samples` times, which share what is there if the kind can, and room for what is noted."""
    if samples > 1:
        cache = repeated(cache, samples)
        logits = jnp.repeat(logits, samples, axis=0)
    noted = None if logprobs is None else Noted.empty(cache.batch, cache.capacity, logprobs, logits)
    return loop.Progress.begin(cache, logits, noted=noted)


__all__ = ["prefilled", "resumed", "copied"]
