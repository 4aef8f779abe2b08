"""How a cache's buffers lie in memory, decided in this one place.

A buffer of T slots for B rows and K heads is `[B * K, T, ...]`, and `[T, ...]` when B * K is 1: XLA updates these in
place and contracts them as stored, while `[B, T, K, D]`, `[B, K, T, D]` with a size-1 axis, and anything reshaped
between update and contraction is copied whole at every step (measured, docs/decisions.md).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.types import Array, DType

LANES = 128
"""Numbers side by side in a register of a TPU. Where the last axis is not whole lanes, XLA puts the slots there."""

ROWS = 32
"""Rows up to which each is written by itself on a TPU."""


def empty(rows: int, heads: int, slots: int, rest: tuple[int, ...], dtype: DType) -> Array:
    """Zeros for `slots` slots: `[rows * heads, slots, *rest]`, without the first axis when it would be 1."""
    lead = (rows * heads,) if rows * heads > 1 else ()
    return jnp.zeros((*lead, slots, *rest), dtype)


def rows_of(buffer: Array, heads: int, rest: int) -> int:
    """Rows that a buffer holds; `rest` is the number of axes after the slots."""
    return buffer.shape[0] // heads if buffer.ndim - rest > 1 else 1


def pack(x: Array) -> Array:
    """`[B, S, K, ...]` to `[B * K, S, ...]` or `[S, ...]`. Small: new tokens only, never a whole cache in a step."""
    b, s, k = x.shape[:3]
    x = x.swapaxes(1, 2).reshape(b * k, s, *x.shape[3:])
    return x[0] if b * k == 1 else x


def unpack(buffer: Array, heads: int, rest: int) -> Array:
    """A buffer as `[B, K, T, ...]`; copies, for looking, saving and moving rows only."""
    rows = rows_of(buffer, heads, rest)
    return buffer.reshape(rows, heads, *buffer.shape[-1 - rest :])


def repack(x: Array) -> Array:
    """`[B, K, T, ...]` back to how it is stored."""
    b, k = x.shape[:2]
    return x.reshape(b * k, *x.shape[2:]) if b * k > 1 else x[0, 0]


def put(buffer: Array, x: Array, slots: Array, rows: Array | None = None) -> Array:
    """Writes new tokens in place; what has a slot outside the buffer is dropped.

    Args:
        buffer: `[B * K, T, ...]` or `[T, ...]`; with `rows` of any number of rows (pages).
        x: `[B, S, K, ...]`, cast to the buffer's dtype.
        slots: `[B, S]` int32, where each token goes; any value outside `[0, T)` drops it. Those inside are distinct.
        rows: `[B, S]` int32, the buffer's row that each token goes to; None is its own.

    Returns:
        The buffer with the tokens written.
    """
    b, s, k = x.shape[:3]
    on_tpu = jax.default_backend() == "tpu"
    if on_tpu and s == 1 and b <= ROWS and _across_lanes(buffer, x):
        return _put_aligned(buffer, x.astype(buffer.dtype), slots, rows)
    if rows is not None:
        return _put_in(buffer, x.astype(buffer.dtype), slots, rows)
    new = pack(x).astype(buffer.dtype)
    if b * k == 1:
        t = buffer.shape[0]
        if s == 1:
            return _put_one(buffer, new, slots[0, 0])
        return buffer.at[_inside(slots[0], t)].set(new, mode="drop")
    t = buffer.shape[1]
    if b == 1 and s == 1 and not on_tpu:
        return jax.vmap(_put_one, in_axes=(0, 0, None))(buffer, new, slots[0, 0])
    at = jnp.repeat(_inside(slots, t), k, axis=0)  # [B * K, S]
    return buffer.at[jnp.arange(b * k)[:, None], at].set(new, mode="drop")


def _put_in(buffer: Array, x: Array, slots: Array, rows: Array) -> Array:
    k = x.shape[2]
    lone = buffer.ndim == x.ndim - 2  # one row of one head
    full = buffer[None] if lone else buffer
    at = jnp.where(rows < 0, full.shape[0], rows)[:, :, None] * k + jnp.arange(k)[None, None, :]  # [B, S, K]
    slots = _inside(slots, full.shape[1])[:, :, None]
    full = full.at[at, slots].set(x, mode="drop")
    return full[0] if lone else full


def pick(buffer: Array, slots: Array, heads: int, rest: int, rows: Array | None = None) -> Array:
    """Some tokens out of a buffer, `[B, S, K, ...]`, as stored; the counterpart of `put`."""
    b, s = slots.shape
    full = buffer if buffer.ndim - rest > 1 else buffer[None]
    own = jnp.broadcast_to(jnp.arange(b)[:, None], (b, s)) if rows is None else rows
    at = own[:, :, None] * heads + jnp.arange(heads)[None, None, :]
    return full.at[at, slots[:, :, None]].get(mode="clip")


def _put_one(buffer: Array, new: Array, slot: Array) -> Array:
    # dynamic_update_slice clamps: what has no slot writes back what stands where it would land.
    inside = (slot >= 0) & (slot < buffer.shape[0])
    at = jnp.clip(slot, 0, buffer.shape[0] - 1)
    old = lax.dynamic_slice_in_dim(buffer, at, 1, axis=0)
    return lax.dynamic_update_slice_in_dim(buffer, jnp.where(inside, new, old), at, axis=0)


def _across_lanes(buffer: Array, x: Array) -> bool:
    """Whether XLA:TPU lays the slots of a buffer along its lanes."""
    return x.ndim > 3 and buffer.shape[-1] % LANES != 0 and buffer.shape[2 - x.ndim] % LANES == 0


def _put_aligned(buffer: Array, x: Array, slots: Array, rows: Array | None) -> Array:
    # Row by row a slot with the lanes around it: for a slot alone, or a scatter, XLA:TPU may turn the whole buffer.
    k, lone = x.shape[2], buffer.ndim == x.ndim - 2
    full = buffer[None] if lone else buffer
    count, t, rest = full.shape[0] // k, full.shape[1], full.shape[2:]
    for i in range(x.shape[0]):
        row, slot = jnp.asarray(i, jnp.int32) if rows is None else rows[i, 0], slots[i, 0]
        at = jnp.clip(slot, 0, t - 1) // LANES * LANES
        hit = (at + jnp.arange(LANES, dtype=jnp.int32) == slot) & (row >= 0) & (row < count)
        start: list[Any] = [jnp.clip(row, 0, count - 1) * k, at, *[0] * len(rest)]
        old = lax.dynamic_slice(full, start, (k, LANES, *rest))
        new = jnp.where(hit.reshape(1, LANES, *(1,) * len(rest)), x[i].swapaxes(0, 1), old)
        full = lax.dynamic_update_slice(full, new, start)
    return full[0] if lone else full


def _inside(slots: Array, size: int) -> Array:
    # A negative index would count from the end; distinct indices past the end stay distinct.
    return jnp.where(slots < 0, size, slots)


def take(buffer: Array, rows: Array, heads: int, rest: int) -> Array:
    """Rows `rows[n]` of a buffer, `n` rows; copies."""
    return repack(jnp.take(unpack(buffer, heads, rest), rows, axis=0, mode="clip"))


def join(buffer: Array, heads: int, rest: int, other: Array) -> Array:
    """The rows of one buffer, then those of another with as many slots; copies."""
    return repack(jnp.concatenate([unpack(buffer, heads, rest), unpack(other, heads, rest)]))


def resize(buffer: Array, slots: int, rest: int) -> Array:
    """A buffer with `slots` slots: zeros added at the end, or the last slots cut off."""
    axis = buffer.ndim - rest - 1
    have = buffer.shape[axis]
    if slots <= have:
        return lax.slice_in_dim(buffer, 0, slots, axis=axis)
    pad = [(0, 0)] * buffer.ndim
    pad[axis] = (0, slots - have)
    return jnp.pad(buffer, pad)


__all__ = ["empty", "rows_of", "pack", "unpack", "repack", "put", "pick", "take", "join", "resize"]
