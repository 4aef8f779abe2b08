"""What the cached attention of both kinds of modules does between its projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kvjax.caches.base import OpenCache, Span
from kvjax.caches.recompute import Recompute
from kvjax.errors import InputError
from kvjax.model import attend
from kvjax.ops.attention import Absorb
from kvjax.ops.positions import Positions
from kvjax.types import Array

Pair = tuple[Array, Array]


def attended(
    x: Array,
    cache: OpenCache | None,
    layer: int,
    *,
    q: Array,
    own: Pair,
    again: Callable[[Array], Pair],
    maps: Pair | None,
    biases: Pair | None,
    rope: Positions | None,
    window: int | None,
) -> tuple[Array, OpenCache | None]:
    """Writes, masks, reads.

    Args:
        x: `[B, S, M]`, the layer's stream.
        cache: what `Model.apply` was given, or the last layer returned; None sees `x` alone, causally.
        layer: counts from 0.
        q: `[B, S, H, D]`, before any rotation.
        own: keys and values `[B, S, K, D]` of `x`.
        again: the same of another stream `[B, T, M]`.
        maps: kernels `[M, K, D]` of keys and values where both are linear in the stream; else None.
        biases: of keys and values, `[K, D]`, or None.
        rope: how queries and keys turn.
        window: positions that a query sees, its own included; None is all.

    Returns:
        `[B, S, H, D]`, and the cache for the next layer.

    Raises:
        InputError: shapes disagree, or `rope` turns nothing.
    """
    if rope is not None and not rope.rotates:
        raise InputError(f"attention: rope {rope} turns nothing; add it to the embedding, at cache.positions")

    def rotate(x: Array, positions: Array) -> Array:
        return x if rope is None else rope.rotate(x, rope.tables(positions, x.shape[-1], x.dtype))

    def absorb(stream: Any) -> tuple[Absorb, None]:
        assert maps is not None
        kernel = jnp.concatenate([each.reshape(each.shape[0], -1) for each in maps], axis=1)  # [M, 2 * K * D]
        bias = None if biases is None else jnp.concatenate([each.reshape(-1) for each in biases])
        return Absorb.of(kernel, bias, maps[0].shape[1], stream.dtype), None

    opened = alone(*x.shape[:2]) if cache is None else cache
    out, opened = attend(
        opened,
        0 if cache is None else layer,
        q=q,
        kv=lambda stream: own if stream is x else again(stream),
        h=x,
        rotate=rotate,
        absorb=absorb if maps is not None and rope is None else None,
        window=window,
    )
    return out, None if cache is None else opened


def head_width(features: int, num_heads: int) -> int:
    """D.

    Raises:
        InputError: the heads do not divide the features.
    """
    if num_heads < 1 or features % num_heads:
        raise InputError(f"attention: {features} features do not divide among num_heads {num_heads}")
    return features // num_heads


def alone(batch: int, length: int) -> OpenCache:
    """Open for one layer that keeps nothing: `length` new tokens a row, the first at position 0."""
    start, steps = jnp.zeros((batch,), jnp.int32), jnp.arange(length, dtype=jnp.int32)
    span = Span(start, jnp.full_like(start, length), jnp.broadcast_to(steps[None, :], (batch, length)))
    return OpenCache((Recompute(),), {}, span)


__all__ = ["attended", "head_width", "alone"]
