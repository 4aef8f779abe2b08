"""The cone: what an edit can change where layers see a window only, and what runs for it.

Layer l, counted from 0, keeps other keys and values from the first new token on, up to l · (w - 1) positions after the
last; all others stay bitwise as they are. Where what lies beyond is recorded, each layer runs on its own part only.
Where the text grows or shrinks, what lies beyond moves, if what is kept does not depend on where it stands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import Cache, Node, OpenCache, Span
from kvjax.caches.flags import ask, meaning
from kvjax.checks import bucket
from kvjax.errors import CacheError
from kvjax.layers import Rotation, decoder_layer
from kvjax.loops.resume import source_of
from kvjax.model import Model
from kvjax.ops.attention import EMPTY
from kvjax.transformer import embed
from kvjax.types import Array


class Cone(NamedTuple):
    """What runs of it.

    Args:
        until: `[L + 1, B]` int32, where what each layer takes in ceases to change, and after the last what that gives.
        ends: `[L, B]` int32, up to where each layer runs.
        sizes: columns of each layer, padding among them: those of any edit of as many tokens.
        sources: of which layers the input beyond what changes is recorded.
        by: `[B]` int32, by how much what lies beyond moves; None where nothing does.
    """

    until: np.ndarray
    ends: np.ndarray
    sizes: tuple[int, ...]
    sources: tuple[bool, ...]
    by: np.ndarray | None


def cone_of(
    model: Model, cache: Cache, start: np.ndarray, stop: np.ndarray, lengths: np.ndarray, by: np.ndarray
) -> Cone | None:
    """What new tokens at `start:stop` of texts that have `lengths` then, `[B]` each, can change; the model has the
    library's layers. None where a layer does not keep all that the others must see, or cannot move it by `by[B]`."""
    if cache.replays or not all(node.patches for node in cache.layers):
        return None
    if by.any():
        turns = zip(model.config.turns, cache.layers, strict=True)
        fixed = (not turn.relative or (turn.rotates and not node.shifts) for turn, node in turns)
        if any(fixed) or not model.config.positions.relative or not all(x.still for x in cache.shared.values()):
            return None
    until, columns = [stop.astype(np.int64)], [bucket(max(int((stop - start).max()), 1))]
    most = bucket(max(int((lengths - start).max()), 1))
    for own, node in zip(model.config.windows, cache.layers, strict=True):
        seen = min([w for w in (own, node.sees) if w is not None], default=EMPTY)
        until.append(np.minimum(until[-1] + seen - 1, lengths))
        columns.append(min(columns[-1] + seen - 1, most))
    dtype = model.params["embed"]["table"].dtype
    kept = [source_of(cache, i) for i in range(len(cache.layers))]
    # a store of one buffer of the model's own dtype: what it gives back is what it was given
    sources = tuple(i > 0 and [x.dtype for x in jax.tree.leaves(x)] == [dtype] for i, x in enumerate(kept))
    shows = type(cache.layers[-1]).record is not Node.record
    ends, sizes = _down(until, sources, shows, np.maximum), _down(columns, sources, shows, max)
    return Cone(
        np.stack(until).astype(np.int32),
        np.stack(ends).astype(np.int32),
        tuple(sizes),
        sources,
        by if by.any() else None,
    )


def _down(levels: list[Any], sources: tuple[bool, ...], shows: bool, larger: Any) -> list[Any]:
    """Up to where each layer runs: it must give what changes, and what the next takes in that is not recorded. Of the
    last layer only keys and values are wanted, but for what it shows."""
    found = [levels[-1] if shows else levels[-2]]
    for i in range(len(sources) - 2, -1, -1):
        found.append(levels[i + 1] if sources[i + 1] else larger(levels[i + 1], found[-1]))
    return found[::-1]


def _cone(
    model: Model,
    cache: Cache,
    start: Array,
    until: Array,
    ends: Array,
    by: Array | None,
    *,
    sizes: tuple[int, ...],
    sources: tuple[bool, ...],
) -> Cache:
    # start [B], until [L + 1, B], ends [L, B], by [B]; `cache` has the tokens and the lengths of the new text
    c, params = model.config, model.params
    if by is not None:
        cache = cache.replace(layers=tuple(_moved(cache, i, until[i], by) for i in range(c.num_layers)))
    opened = OpenCache(cache.layers, cache.shared, Span(start, ends[0] - start, start[:, None]))
    x: Any = None
    for i, size in enumerate(sizes):
        here = start[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
        at = jnp.minimum(here, cache.capacity - 1)
        span = Span(start, ends[i] - start, here, changes=here < until[i][:, None])
        opened = opened.replace(span=span, shown=span.replace(changes=here < until[i + 1][:, None]))
        if i == 0:
            x = embed(params, c, jnp.where(span.real(), jnp.take_along_axis(cache.tokens, at, axis=1), 0), here)
            opened = opened.replace(layers=(opened.layers[0].record("embedding", x, span), *opened.layers[1:]))
        else:
            x = x[:, :size] if size <= x.shape[1] else jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0)))
        if sources[i]:
            kept = source_of(cache, i).unpacked(cache.lengths)[:, 0]  # [B, T, M]
            kept = jnp.take_along_axis(kept, at[:, :, None], axis=1)
            x = jnp.where((here < until[i][:, None])[:, :, None], x, kept)
        turn = Rotation.of_layers(params, c, here, x.dtype)[i]
        x, opened = decoder_layer(params["layers"][str(i)], c, x, opened, i, turn)
    return cache.replace(layers=opened.layers)


def _moved(cache: Cache, layer: int, first: Array, by: Array) -> Node:
    """The layer with what lies from `first[B]` on where it stood `by[B]` before; gathers."""
    at = jnp.arange(cache.capacity, dtype=jnp.int32)[None, :]
    there = (at >= first[:, None]) & (at < cache.lengths[:, None]) & (by != 0)[:, None]
    source = jnp.clip(at - by[:, None], 0, cache.capacity - 1)
    node: Node = cache.layers[layer].move(source, jnp.where(there, at, EMPTY), cache.shared)
    return node


_STATIC = ("sizes", "sources")
VALUE, DONATING = jax.jit(_cone, static_argnames=_STATIC), jax.jit(_cone, static_argnames=_STATIC, donate_argnums=1)
"""With the cache as a value, and with its buffers used up."""


def run(model: Model, cache: Cache, start: np.ndarray, cone: Cone, program: Any) -> Cache:
    """Computes anew what changes.

    Raises:
        CacheError: what is written is shared, and there is no room for a row's own.
    """
    if any(not entry.still for entry in cache.shared.values()):
        end = cone.until[-2]  # of what the last layer keeps
        at = start[:, None] + np.arange(bucket(int((end - start).max())))
        places = jnp.asarray(np.where(at < end[:, None], at, EMPTY), jnp.int32)
        shared, refused = ask(cache.shared, lambda entry: entry.claim(places), jnp.zeros_like(cache.flags))
        for row in np.flatnonzero(refused).tolist():
            raise CacheError(f"edit: row {row} from {start[row]} on: {meaning(int(refused[row]))}")
        layers = tuple(node.rewind(cache.lengths, cache.shared, shared) for node in cache.layers)
        cache = cache.replace(layers=layers, shared=shared)
    return program(model, cache, start, cone.until, cone.ends, cone.by, sizes=cone.sizes, sources=cone.sources)


__all__ = ["Cone", "cone_of", "run", "VALUE", "DONATING"]
