"""How attention reads what is stored in other numbers than it computes in, and what is longer than a CPU's caches.

XLA on GPU and TPU fuses the decoding into the contraction. XLA on a CPU writes the decoded buffer out first, a copy as
large as a cache of the computing dtype at every step; there a call with few queries goes over blocks of slots, whose
results are joined as those of separate views are. So does one with many queries, whose scores would not fit the
processor's caches, and it leaves out blocks that no query sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.types import Array

SLOTS = 128
"""Slots per block, measured in docs/decisions.md ("Codecs")."""

QUERIES = 64
"""Queries per head of the view up to which a call goes over blocks of slots."""

MANY = 128
"""Queries per head of the view from which a call goes over blocks of slots, however those are stored."""

MANY_SLOTS = 512
"""Slots per block of such a call, or the next smaller number that divides the slots, down to half of it."""

Parts = tuple[Array, Array, Array]


def decoded(
    x: Array, scale: Array | None, zero: Array | None, decode: Any, dtype: Any
) -> tuple[tuple[Array, ...], Array | None]:
    """What the contraction reads, in parts along the channels, and the factors per slot that scores or weights take.

    Args:
        x: `[*lead, T, D']`, as stored.
        scale, zero, decode: as the view has them.
        dtype: of the computation.
    """
    per_slot = scale is None or scale.ndim < x.ndim
    wide = dtype if per_slot else jnp.promote_types(jnp.float32, dtype)  # zero points are not rounded to half precision
    parts = ((x if x.dtype == wide else x.astype(wide)),) if decode is None else decode(x, wide)
    if scale is None or scale.ndim < x.ndim:
        return parts, scale
    done, at = [], 0
    for part in parts:
        own = slice(at, at + part.shape[-1])
        groups = part.reshape(*scale.shape[:-1], -1, part.shape[-1])  # [*lead, T / g, g, D]
        groups = groups * scale[..., None, own].astype(wide)
        if zero is not None:
            groups = groups + zero[..., None, own].astype(wide)
        done.append(groups.reshape(part.shape).astype(dtype))
        at += part.shape[-1]
    return tuple(done), None


def headroom(weights: Array, dtype: Any) -> Array | None:
    """`[..., 1]`, what to divide weights `[..., T]` by before they are cast, so that small scales are not lost.

    Float16 ends at 6e-8: a weight of 1e-3 times a scale of 1e-4 would keep one bit. None for dtypes with the reach of
    float32.
    """
    if jnp.dtype(dtype) != jnp.float16:
        return None
    return jnp.maximum(jnp.max(weights, axis=-1, keepdims=True), jnp.finfo(weights.dtype).tiny)


def block_size(q: Array, view: Any, rotate: Any) -> int | None:
    """Slots per block in which queries `[B, S, H, D]` go over the view, None for all at once; known while tracing."""
    slots = view.k.shape[-2]
    lead = max(view.k.size // (view.k.shape[-1] * slots), 1)
    queries = q.shape[0] * q.shape[1] * q.shape[2] // lead
    if jax.default_backend() != "cpu":
        return None
    if queries >= MANY and slots > MANY_SLOTS:
        sizes = range(MANY_SLOTS, MANY_SLOTS // 2 - 1, -1)
        return next((size for size in sizes if slots % size == 0 and size % _group(view) == 0), None)
    as_stored = view.k.dtype == view.v.dtype == q.dtype and view.k_decode is None and view.v_decode is None
    as_stored = as_stored and (view.rotated or rotate is None)
    few = queries <= QUERIES and slots > 2 * _size(view)
    return _size(view) if few and not as_stored else None


def by_blocks(
    attend: Callable[[Any], Parts], view: Any, empty: int, size: int, seen: Callable[[Any], Array] | None = None
) -> Parts:
    """Maxima, sums and unnormalised results of a view, block by block of its slots.

    Args:
        attend: gives them for a view of some of the slots.
        view: the whole.
        empty: position of a slot that holds nothing.
        size: slots per block.
        seen: whether any query may see a block, given as a view; those that none sees are left out. None: look at all.
            A block that a row does not see leaves its result as it is, to the bit.
    """
    slots = view.k.shape[-2]

    def block(i: Array | int) -> Any:
        # The last block overlaps the one before it where sizes do not divide: what was seen is not seen again.
        start = jnp.minimum(i * size, slots - size)
        at = start + jnp.arange(size, dtype=jnp.int32)
        part = _cut(view, start, size)
        return part.replace(positions=jnp.where((at >= i * size)[None, :], part.positions, empty))

    def join(i: Array, found: Parts) -> Parts:
        def also(found: Parts) -> Parts:
            (top, total, out), (own, n, o) = found, attend(block(i))
            high = jnp.maximum(top, own)
            old, new = jnp.exp(top - high), jnp.exp(own - high)
            return high, _weighed(total, old) + _weighed(n, new), _weighed(out, old) + _weighed(o, new)

        return also(found) if seen is None else lax.cond(seen(block(i)), also, lambda found: found, found)

    return lax.fori_loop(1, -(-slots // size), join, attend(block(0)))


def _weighed(x: Array, weight: Array) -> Array:
    # A block that no query sees has the sum of whatever lies there, and weight 0.
    weight = weight.reshape(*weight.shape, *(1,) * (x.ndim - weight.ndim))
    return jnp.where(weight == 0, 0, x * weight)


def _group(view: Any) -> int:
    """Slots that share one scale per channel."""
    sizes = [view.k.shape[-2] // x.shape[-2] for x in (view.k_scale, view.v_scale) if _per_channel(view, x)]
    return max(sizes, default=1)


def _per_channel(view: Any, scale: Array | None) -> bool:
    return scale is not None and scale.ndim == view.k.ndim


def _size(view: Any) -> int:
    group = _group(view)
    return -(-SLOTS // group) * group


def _cut(view: Any, start: Array, size: int) -> Any:
    """Some slots of a view."""

    def cut(x: Array | None, after: int, per: int = 1) -> Array | None:
        if x is None:
            return None
        return lax.dynamic_slice_in_dim(x, start // per, size // per, axis=x.ndim - 1 - after)

    def factors(x: Array | None) -> Array | None:
        return cut(x, 1, _group(view)) if _per_channel(view, x) else cut(x, 0)

    return view.replace(
        k=cut(view.k, 1),
        v=cut(view.v, 1),
        positions=cut(view.positions, 0),
        visible=cut(view.visible, 0),
        k_scale=factors(view.k_scale),
        v_scale=factors(view.v_scale),
        k_zero=factors(view.k_zero),
        v_zero=factors(view.v_zero),
    )


__all__ = ["decoded", "headroom", "block_size", "by_blocks"]
