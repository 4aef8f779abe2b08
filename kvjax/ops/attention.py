"""Attention over what a cache hands back: one function for every kind of cache.

Queries are shaped to the keys, never the keys to the queries: between a cache's update and the two contractions here
the big buffers are not reshaped, transposed, sliced, masked or cast, because XLA would copy them whole (see
docs/decisions.md, "The contract of a cache").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kvjax import struct
from kvjax.ops import decoding
from kvjax.ops.activations import softcapped
from kvjax.ops.positions import Bias
from kvjax.types import Array

EMPTY = jnp.iinfo(jnp.int32).max
"""Position of a slot that holds nothing: no query can see it, and `query - EMPTY` does not overflow."""

MASKED = -1e30
"""Score of what a query cannot see; finite, so that a row that sees nothing averages and does not become NaN."""

BLOCK = 256
"""Queries per block once a call is blockwise; at most BLOCK * T scores per head are alive."""

BLOCKWISE_ABOVE = 1024
"""Slots above which a call with more than BLOCK queries is blockwise; half of it on a CPU."""


Decode = Callable[[Array, Any], tuple[Array, ...]]
"""Turns codes `[..., D']` as stored into numbers of a dtype, `[..., D]` in parts along D; module-level."""


@struct.node
class Absorb(struct.Value):
    """Maps that make keys and values out of what a cache stores, gone through by the query and the result instead.

    A key is `query_map · x · factor + key_bias`, a value `value_map · x · factor + value_bias`; the factor of each
    position (a norm's) is the view's `k_scale` and `v_scale`.

    Args:
        query_map, value_map: `[K, D, E]` and `[K, E, D]`; E is the width of what is stored.
        key_bias, value_bias: `[K, D]` or None.
    """

    query_map: Array
    value_map: Array
    key_bias: Array | None = None
    value_bias: Array | None = None

    @classmethod
    def of(cls, kernel: Array, bias: Array | None, kv_heads: int, dtype: Any) -> Absorb:
        """From a map `[E, 2 * K * D]`, keys then values, and its bias `[2 * K * D]` or None, in `dtype`."""
        maps = kernel.astype(dtype).reshape(kernel.shape[0], 2, kv_heads, -1)
        key_bias, value_bias = (None, None) if bias is None else bias.astype(dtype).reshape(2, kv_heads, -1)
        return cls(maps[:, 0].transpose(1, 2, 0), maps[:, 1].transpose(1, 0, 2), key_bias, value_bias)


@struct.node
class View(struct.Value):
    """What a cache hands back for one buffer: keys and values as stored, and where each slot stands in the text.

    Args:
        k, v: `[*lead, T, D]`; `lead` is `(R * K,)`, `(R, K)` or, when R * K is 1, nothing. R is the rows of the view:
            the batch, 1 (all rows read the same keys) or a divisor of it (consecutive rows share).
        positions: `[R or B or 1, T]` int32, absolute position of every slot, `EMPTY` where there is none.
        k_scale, v_scale: factors that turn stored codes into keys and values: `[*lead, T]`, one per slot, or
            `[*lead, T / g, D]`, one per channel for every g slots; or None.
        k_zero, v_zero: `[*lead, T / g, D]`, added per channel to what the scale has multiplied; or None.
        absorb: for a view whose `k` and `v` hold what keys and values are made from (one head, width E).
        pages: `(readers [P, W], places [B, n])` when the rows of the view are P pages: which rows read a page, -1 for
            none, and where in `[P * W]` each page of a row is read for it, in any order, -1 for none.
        query_positions: `[B, S]`, where the queries stand for rotation against this view; None is where they are.
        visible: `[B, S, T]` bool (P * W for pages), narrows what the arithmetic on positions allows: siblings of a tree
            share a position and do not see each other. None: arithmetic alone.
        window: a query sees positions less than `window` behind it; None sees all.
        sinks: positions below it are seen whatever the window.
        rotated: whether the keys are stored turned to their positions; if not, they are turned when they are read.
        k_decode, v_decode: `(stored, dtype) -> parts`, the numbers that packed codes stand for, their channels in one
            or several parts; None casts.
        causal: whether a query sees no key that stands after it; if not, it sees all that there are (a source text).
    """

    k: Array
    v: Array
    positions: Array
    k_scale: Array | None = None
    v_scale: Array | None = None
    absorb: Absorb | None = None
    pages: tuple[Array, Array] | None = None
    query_positions: Array | None = None
    visible: Array | None = None
    window: int | None = struct.static(default=None)
    sinks: int = struct.static(default=0)
    rotated: bool = struct.static(default=True)
    k_zero: Array | None = None
    v_zero: Array | None = None
    k_decode: Decode | None = struct.static(default=None)
    v_decode: Decode | None = struct.static(default=None)
    causal: bool = struct.static(default=True)


def visible(query: Array, key: Array, window: int | None, sinks: int, causal: bool = True) -> Array:
    """Whether a query sees a key, by arithmetic on int32 positions that broadcast against each other.

    Written as `query - key < window`: `key + window` would overflow on an empty slot. Without `causal` a window reaches
    both ways.
    """
    seen = key <= query if causal else key != EMPTY
    if window is not None:
        near = (query - key if causal else jnp.abs(query - key)) < window
        seen &= (near | (key < sinks)) if sinks else near
    return seen


def attention(
    q: Array,
    positions: Array,
    views: tuple[View, ...],
    *,
    kv_heads: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    rotate: Callable[[Array, Array], Array] | None = None,
    bias: Bias | None = None,
) -> Array:
    """Softmax attention of new queries over one or several views, joined inside the softmax.

    Args:
        q: `[B, S, H, D]`, not rotated.
        positions: `[B, S]` int32, absolute positions of the queries.
        views: what the cache handed back.
        kv_heads: K; H must be a multiple.
        scale: factor on the scores, `D ** -0.5` if None.
        window: the model's own window; a view's window narrows it further.
        softcap: bound c on scaled scores, as tanh(s / c) · c, before masking (Gemma 2, 2408.00118); None is none.
        rotate: turns `q` to positions `[B, S]`; None leaves it.
        bias: added to scaled scores, from the positions of queries and keys: `[H, ...]` for positions `[...]`.

    Returns:
        `[B, S, H, D]` in the dtype of `q`, D the width of the values.

    Scores and softmax are at least float32. Views are joined by their maxima and sums (Milakov and Gimelshein 2018,
    1805.02867; Hydragen, Juravsky et al. 2024, 2402.05099).
    """
    b, s, h, d = q.shape
    rule = _Rule(d**-0.5 if scale is None else scale, window, softcap, rotate, bias)
    if not blockwise(s, sum(_slots(view) for view in views)):
        return _attend(q, positions, views, kv_heads=kv_heads, rule=rule)
    if rotate is not None and all(view.rotated and view.query_positions is None for view in views):
        q, rule = rotate(q, positions), rule._replace(rotate=None)  # once: a block has no tables of its own
    run = functools.partial(_attend, kv_heads=kv_heads, rule=rule)
    # Blocks of queries bound the scores at BLOCK x T: temporary memory grows with S, not with S x T.
    blocks = -(-s // BLOCK)

    def cut(x: Array) -> Array:  # [B, S, ...] -> [blocks, B, BLOCK, ...]
        x = jnp.pad(x, ((0, 0), (0, blocks * BLOCK - s)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], blocks, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    def block(x: Any) -> Array:
        q, positions, own = x
        pairs = zip(views, own, strict=True)
        return run(q, positions, tuple(view.replace(query_positions=p, visible=m) for view, (p, m) in pairs))

    own = tuple((view.query_positions, view.visible) for view in views)
    block = jax.checkpoint(block)  # type: ignore[attr-defined]
    out = lax.map(block, jax.tree.map(cut, (q, positions, own)))  # [blocks, B, BLOCK, H, D]
    return out.swapaxes(0, 1).reshape(b, blocks * BLOCK, h, out.shape[-1])[:, :s]


def blockwise(queries: int, slots: int) -> bool:
    """Whether a call goes over blocks of BLOCK queries."""
    # On a CPU a block of slots that no query of a block sees is left out, and scores stay in the processor's caches.
    above = BLOCKWISE_ABOVE // 2 if jax.default_backend() == "cpu" else BLOCKWISE_ABOVE
    return queries > BLOCK and slots > above


def _slots(view: View) -> int:
    """Slots that one row's scores span."""
    return view.positions.shape[-1] * (1 if view.pages is None else view.pages[1].shape[1])


class _Rule(NamedTuple):
    """How scores are made, alike for all views; see `attention`."""

    scale: float
    window: int | None
    softcap: float | None
    rotate: Callable[[Array, Array], Array] | None
    bias: Bias | None


@jax.named_scope("scores")
def _attend(q: Array, positions: Array, views: tuple[View, ...], *, kv_heads: int, rule: _Rule) -> Array:
    b, s, h, d = q.shape
    parts = []
    for view in views:
        at = positions if view.query_positions is None else view.query_positions
        turned = q if rule.rotate is None else rule.rotate(q, at)
        parts.append(_partial(turned, positions, view, kv_heads, rule))
    top = functools.reduce(jnp.maximum, [m for m, _, _ in parts])
    weights = [jnp.exp(m - top) for m, _, _ in parts] if len(parts) > 1 else [None]
    total = functools.reduce(jnp.add, [_weigh(n, w) for (_, n, _), w in zip(parts, weights, strict=True)])
    out = functools.reduce(jnp.add, [_weigh(o, w) for (_, _, o), w in zip(parts, weights, strict=True)])
    out = out / total[..., None]  # [B, K, G * S, D], D now that of the values
    d = out.shape[-1]
    return out.reshape(b, kv_heads, h // kv_heads, s, d).transpose(0, 3, 1, 2, 4).reshape(b, s, h, d).astype(q.dtype)


def _weigh(x: Array, weight: Array | None) -> Array:
    if weight is None:
        return x
    return x * jnp.expand_dims(weight, range(weight.ndim, x.ndim))


def _partial(
    q: Array, positions: Array, view: View, kv_heads: int, rule: _Rule, lift: Array | None = None
) -> tuple[Array, Array, Array]:
    """One view's share: maxima and sums `[B, K, G * S]`, unnormalised output `[B, K, G * S, D]`.

    `lift[B, S, H]` is added to every scaled score of a query.
    """
    if view.absorb is not None:
        return _absorbed(q, positions, view, kv_heads, rule)
    if view.pages is not None:
        return _paged(q, positions, view, kv_heads, rule, lift)
    if (size := decoding.block_size(q, view, rule.rotate)) is not None:

        def attend(block: View) -> tuple[Array, Array, Array]:
            return _partial(q, positions, block, kv_heads, rule, lift)

        reached = functools.partial(_reached, positions, rule.window)
        return decoding.by_blocks(attend, view, EMPTY, size, reached)
    b, s, h, d = q.shape
    lead, k = view.k.shape[:-2], kv_heads
    g, rows = h // k, math.prod(lead) // k
    share = b // rows  # rows of the batch that read one row of the view
    precise = jnp.promote_types(jnp.float32, q.dtype)

    def queries(x: Array) -> Array:
        # [B, S, H, D] -> [R, share, S, K, G, D] -> [R, K, share, G, S, D] -> [*lead, share * G * S, D]
        return x.reshape(rows, share, s, k, g, -1).transpose(0, 3, 1, 4, 2, 5).reshape(*lead, share * g * s, -1)

    q = queries(q)
    keys, k_scale = decoding.decoded(view.k, view.k_scale, view.k_zero, view.k_decode, q.dtype)
    if not view.rotated and rule.rotate is not None:
        keys = (_turned(jnp.concatenate(keys, axis=-1), view.positions, rows, rule.rotate),)
    # Scaled here and not in q: a half-precision q would round the scale into every score.
    scores = _scores(q, keys, len(lead), precise) * rule.scale  # [*lead, share * G * S, T]
    if k_scale is not None:
        scores = scores * k_scale[..., None, :].astype(precise)
    if lift is not None:
        scores = scores + queries(lift[..., None])
    shape = (rows, k, share, g, s)
    if rule.bias is not None:
        scores = scores + _biased(positions, view, rule.bias, shape).astype(precise).reshape(scores.shape)
    if rule.softcap is not None:
        scores = softcapped(scores, rule.softcap)
    scores = jnp.where(_mask(positions, view, rule.window, shape).reshape(scores.shape), scores, MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1)
    values, v_scale = decoding.decoded(view.v, view.v_scale, view.v_zero, view.v_decode, q.dtype)
    if v_scale is not None:
        weights = weights * v_scale[..., None, :].astype(precise)
    room = decoding.headroom(weights, q.dtype) if v_scale is not None else None
    weights = (weights if room is None else weights / room).astype(q.dtype)
    parts = [_contract(weights, x, weights.ndim - 1, x.ndim - 2, len(lead), precise) for x in values]
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    out = out if room is None else out * room

    def rows_first(x: Array) -> Array:  # [*lead, share * G * S, ...] -> [B, K, G * S, ...]
        rest = x.shape[len(lead) + 1 :]
        return x.reshape(rows, k, share, g * s, *rest).swapaxes(1, 2).reshape(b, k, g * s, *rest)

    return rows_first(top[..., 0]), rows_first(total), rows_first(out)


def _scores(q: Array, keys: tuple[Array, ...], batch: int, precise: jnp.dtype) -> Array:
    """Products of queries `[*lead, m, D]` with keys `[*lead, T, D]` that come in parts along D."""
    at, out = 0, None
    for part in keys:
        width = part.shape[-1]
        own = q if width == q.shape[-1] else q[..., at : at + width]
        made = _contract(own, part, q.ndim - 1, part.ndim - 1, batch, precise)
        at, out = at + width, made if out is None else out + made
    assert out is not None
    return out


def _turned(keys: Array, positions: Array, rows: int, rotate: Callable[[Array, Array], Array]) -> Array:
    """Keys `[*lead, T, D]` that are stored as they were projected, turned to their positions."""
    heads = keys.reshape(-1, *keys.shape[-2:])[:, :, None]  # every head of every row as a row of one head
    at = positions[:: max(positions.shape[0] // rows, 1)]
    at = jnp.repeat(at, heads.shape[0] // at.shape[0], axis=0)
    return rotate(heads, at).reshape(keys.shape)


def _mask(positions: Array, view: View, window: int | None, shape: tuple[int, ...]) -> Array:
    """What each query sees, `[R, K, share, G, S, T]`."""
    rows, k, share, g, s = shape
    query, slots = _places(positions, view, shape)
    windows = [w for w in (window, view.window) if w is not None]
    seen = visible(query, slots, min(windows, default=None), view.sinks, view.causal)  # [R, share, S, T]
    if view.visible is not None:
        seen &= view.visible.reshape(rows, share, s, -1)
    return jnp.broadcast_to(seen[:, None, :, None], (rows, k, share, g, s, seen.shape[-1]))


def _reached(positions: Array, window: int | None, view: View) -> Array:
    """Whether any query at `positions[B, S]` may see any slot of the view; `[]` bool, true where it is not known."""
    slots = view.positions
    found = jnp.min(slots) <= (jnp.max(positions) if view.causal else EMPTY - 1)
    windows = [w for w in (window, view.window) if w is not None]
    if windows and not view.sinks:
        found &= jnp.min(positions) - jnp.max(jnp.where(slots == EMPTY, -1, slots)) < min(windows)
    return found


def _biased(positions: Array, view: View, bias: Bias, shape: tuple[int, ...]) -> Array:
    """What is added to each score, `[R, K, share, G, S, T]`."""
    rows, k, share, g, s = shape
    at = positions if view.query_positions is None else view.query_positions
    added = bias(*_places(at, view, shape))  # [H, R, share, S, T]; heads are K-major
    added = jnp.broadcast_to(added, (k * g, rows, share, s, added.shape[-1]))
    return added.reshape(k, g, *added.shape[1:]).transpose(2, 0, 3, 1, 4, 5)


def _places(positions: Array, view: View, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Positions of queries, `[R, share, S, 1]`, and of slots, which have one row for all, one per row of the view, or
    one per row of the batch: `[R or 1, share or 1, 1, T]`."""
    rows, _, share, _, s = shape
    slots, t = view.positions, view.k.shape[-2]
    query = jnp.broadcast_to(positions, (rows * share, s)).reshape(rows, share, s, 1)
    return query, slots.reshape((rows, share, 1, t) if slots.shape[0] == rows * share else (-1, 1, 1, t))


def _contract(a: Array, b: Array, a_axis: int, b_axis: int, batch: int, precise: jnp.dtype) -> Array:
    axes = tuple(range(batch))
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), (axes, axes)), preferred_element_type=precise)


@jax.named_scope("projections")
def _absorbed(q: Array, positions: Array, view: View, kv_heads: int, rule: _Rule) -> tuple[Array, Array, Array]:
    assert view.absorb is not None
    maps = view.absorb
    b, s, h, d = q.shape
    precise = jnp.promote_types(jnp.float32, q.dtype)
    q = q.reshape(b, s, kv_heads, -1, d)
    wide = jnp.einsum("bskgd,kde->bskge", q, maps.query_map.astype(q.dtype)).reshape(b, s, h, -1)
    lift = None
    if maps.key_bias is not None:  # the same for every slot of the view, but other views lack it, and a cap bends it
        lift = jnp.einsum("bskgd,kd->bskg", q, maps.key_bias.astype(q.dtype), preferred_element_type=precise)
        lift = lift.reshape(b, s, h) * rule.scale
    with jax.named_scope("scores"):
        top, total, out = _partial(wide, positions, view.replace(absorb=None), 1, rule._replace(rotate=None), lift)
    top, total = (x.reshape(b, kv_heads, -1) for x in (top, total))  # heads are K-major: [B, K, G * S]
    out = out.reshape(b, kv_heads, top.shape[-1], -1)
    out = jnp.einsum("bkme,ked->bkmd", out, maps.value_map.astype(out.dtype))
    if maps.value_bias is not None:
        out = out + total[..., None] * maps.value_bias[None, :, None, :].astype(out.dtype)
    return top, total, out


def _paged(
    q: Array, positions: Array, view: View, kv_heads: int, rule: _Rule, lift: Array | None
) -> tuple[Array, Array, Array]:
    # Every page attends for its readers, then each row gathers the small partial results of its pages: gathering the
    # pages themselves would copy the pool at every step.
    assert view.pages is not None
    readers, places = view.pages
    rows = jnp.maximum(readers, 0).reshape(-1)  # [P * W]
    lift = None if lift is None else lift[rows]
    parts = _partial(q[rows], positions[rows], view.replace(pages=None), kv_heads, rule, lift)
    at = jnp.where(places < 0, rows.shape[0], places)
    # Where a row has no page stands what one slot that it cannot see would give.
    pairs = zip(parts, (MASKED, 1, 0), strict=True)
    top, total, out = (x.at[at].get(mode="fill", fill_value=none) for x, none in pairs)  # [B, n, K, G * S(, D)]
    highest = jnp.max(top, axis=1)
    weight = jnp.exp(top - highest[:, None])
    # As a product, because XLA:CPU is slow at sums over an axis in the middle.
    joined = jnp.einsum("bnkm,bnkmd->bkmd", weight, out, precision=lax.Precision.HIGHEST)
    return highest, jnp.sum(total * weight, axis=1), joined


__all__ = ["View", "Absorb", "Decode", "attention", "blockwise", "visible", "EMPTY"]
