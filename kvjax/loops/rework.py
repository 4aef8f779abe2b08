"""What an edit makes a cache run again: which positions of which layers, in which calls."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import Cache, OpenCache, Span
from kvjax.caches.flags import ask, meaning
from kvjax.checks import BUCKET, bucket, is_concrete
from kvjax.config import Config
from kvjax.errors import CacheError
from kvjax.layers import Rotation, decoder_layer
from kvjax.loops import decode as loop
from kvjax.loops.feed import finish
from kvjax.model import Model
from kvjax.transformer import apply_decoder, embed, final_norm
from kvjax.types import Array

SPARE = 16
"""Columns that a chunk may have too many of rather than that another one runs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What runs again; NumPy arrays on the host, traced ones under `jit`.

    Args:
        start: `[B]` int32, where each row's text begins to differ.
        lengths: `[B]` int32, tokens that a row has in the end.
        first: `[L, B]` int32, the first position that each layer takes in.
        fresh: `[L, B]` bool, where a layer has lost what came before: it is right only from a later position on.
        written: `[B]` int32, `Cache.written` in the end.
    """

    start: Any
    lengths: Any
    first: Any
    fresh: Any
    written: Any

    @property
    def begin(self) -> Any:
        """`[B]` int32, the first position that any layer takes in."""
        return self.first.min(0)

    @property
    def count(self) -> Any:
        """`[B]` int32, positions that are fed."""
        return self.lengths - self.begin


def own(model: Model) -> bool:
    """Whether the layers of a model are this library's, so that each can be run by itself."""
    return model.apply is apply_decoder and isinstance(model.config, Config)


def least(cache: Cache) -> Any:
    """Tokens that rows cannot lose, for they share them: a number, or int32 `[1]` or `[B]`."""
    most: Any = 0
    for entry in cache.shared.values():
        most = jnp.maximum(most, entry.least)
    return np.asarray(most) if is_concrete(most) else most


def plan(model: Model, cache: Cache, start: Any, lengths: Any) -> Work:
    """What must run again where texts differ from `start[B]` on and have `lengths[B]` tokens in the end.

    From the last layer down: what a layer must give decides what it takes in, and that is what the one below must give.
    """
    numeric: Any = np if is_concrete(lengths) and is_concrete(start) else jnp
    floor = least(cache)
    written: Any = np.asarray(cache.written) if numeric is np else cache.written
    last = (lengths - 1).clip(0)
    wanted, first, fresh, limited = last, [], [], []
    for node in reversed(cache.layers):
        whole = wanted.clip(None, start)
        at = last if cache.replays else node.again(wanted, start, lengths, written, cache.shared)
        at = numeric.minimum(numeric.maximum(at, floor), lengths).astype(numeric.int32)
        first.append(at)
        fresh.append((at < whole) | (at <= floor))
        limited.append(node.max_rewind is not None)
        wanted = at
    at, new = numeric.stack(first[::-1]), numeric.stack(fresh[::-1])
    anew = numeric.all(new | ~np.array(limited[::-1])[:, None], axis=0)
    if not own(model) and not cache.replays:  # its layers cannot be run one by one
        lost = numeric.any(at < start.clip(None, last), axis=0)
        begin = numeric.where(lost, numeric.minimum(floor, lengths), at.min(0)).astype(numeric.int32)
        at, new = numeric.broadcast_to(begin, at.shape), numeric.broadcast_to(begin <= floor, at.shape)
        anew = begin <= floor
    written = numeric.where(anew, lengths, numeric.maximum(written, lengths)).astype(numeric.int32)
    return Work(start, lengths, at, new, written)


def cut(count: int) -> list[int]:
    """Sizes of the chunks that `count` positions are fed in: buckets of `prefill`, so that they compile nothing new,
    with less than SPARE columns too many, or a sixteenth of all."""
    sizes, spare = [], max(SPARE, count // 16)
    while count > 0:
        size = bucket(count)
        size = size if size - count < spare or size == BUCKET else size // 2
        sizes.append(size)
        count -= size
    return sizes


class Programs(NamedTuple):
    """The compiled functions: one that feeds all layers alike, and one that feeds each from its own position on."""

    prefill: Any
    layers: Any


def _layers(
    model: Model, cache: Cache, tokens: Array, count: Array, first: Array, since: Array, shown: Array
) -> tuple[Array, Cache]:
    """Feeds `tokens[B, S]`, from `cache.lengths` on, to each layer from `first[L, B]` on.

    Keys and values are kept from `since[L, B]` on, what layers show from `shown[B]` on: before it they stand as they
    are, or are not right.
    """
    c, params, begin = model.config, model.params, cache.lengths
    s = tokens.shape[1]
    steps = jnp.arange(s, dtype=jnp.int32)[None, :]
    places = begin[:, None] + steps
    shared, refused = cache.reserve(Span(begin, count, places))
    count = jnp.where(refused != 0, 0, count)
    real = steps < count[:, None]
    x = embed(params, c, jnp.where(real, tokens, 0), places)
    opened, before = OpenCache(cache.layers, shared, Span(begin, count, places)), jnp.zeros_like(begin)
    for i in range(c.num_layers):
        offset = jnp.clip(first[i] - begin, 0, s)
        x = _moved_up(x, offset - before)
        before, at = offset, begin + offset
        here = at[:, None] + steps
        span = Span(at, jnp.maximum(count - offset, 0), here, changes=here >= since[i][:, None])
        opened = opened.replace(span=span, shown=span.replace(changes=here >= shown[:, None]))
        opened = opened.record(0, "embedding", x) if i == 0 else opened
        turn = Rotation.of_layers(params, c, here, x.dtype)[i]
        x, opened = decoder_layer(params["layers"][str(i)], c, x, opened, i, turn)
    last = jnp.clip(count - 1 - before, 0, s - 1)
    x = final_norm(params, c, jnp.take_along_axis(x, last[:, None, None], axis=1))  # [B, 1, M]
    cache = cache.replace(
        layers=opened.layers,
        shared=shared,
        lengths=begin + count,
        flags=(cache.flags | refused).astype(jnp.int32),
    )
    logits, cache = finish(model, cache, x, count)
    return logits[:, 0], cache


def _moved_up(x: Array, by: Array) -> Array:
    """`x[B, S, M]` without its first `by[B]` columns; a gather."""
    at = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] + by[:, None]
    return jnp.take_along_axis(x, jnp.minimum(at, x.shape[1] - 1)[:, :, None], axis=1)


VALUE = Programs(loop.VALUE.prefill, jax.jit(_layers))
DONATING = Programs(loop.DONATING.prefill, jax.jit(_layers, donate_argnums=1))
"""With the cache as a value, and with its buffers used up."""


def run(model: Model, cache: Cache, text: Any, work: Work, programs: Programs) -> tuple[Array, Cache]:
    """Goes back and feeds `text[B, T]` again as `work` says."""
    host = is_concrete(work.first)
    numeric: Any = np if host else jnp
    by_layer = own(model) and not cache.replays
    by_layer &= bool((work.first != work.begin).any()) if host else cache.max_rewind is not None
    begin, count = work.begin, work.count
    keep = numeric.minimum(work.start, work.lengths) if by_layer else begin
    if cache.replays:  # it reads the text, not what it has kept
        keep = numeric.minimum(work.start, begin)
    cache = cache.replace(tokens=jnp.asarray(text))
    cache, refused = _back(cache, keep, begin, count)
    count = numeric.where(refused, 0, count)
    extra: tuple[Any, ...] = ()
    if by_layer:
        since = numeric.stack(
            [
                new if node.max_rewind is not None else work.start
                for new, node in zip(work.first, cache.layers, strict=True)
            ]
        )
        extra = (work.first, since, work.start)
    logits: Any = None
    done = 0
    for size in cut(max(int(count.max()), 1)) if host else [cache.capacity]:
        valid = (count - done).clip(0, size).astype(numeric.int32)
        at = (begin + done)[:, None] + np.arange(size, dtype=np.int32)[None, :]
        tokens = numeric.take_along_axis(text, at.clip(0, text.shape[1] - 1), axis=1)
        call = programs.layers if by_layer else programs.prefill
        new, cache = call(model, cache, tokens, valid, *extra)
        kept = logits is not None and not (valid > 0).all()
        logits = jnp.where(valid[:, None] > 0, new, logits) if kept else new
        done += size
    return logits, cache.replace(written=jnp.asarray(work.written))


def _back(cache: Cache, keep: Any, begin: Any, count: Any) -> tuple[Cache, Any]:
    """The cache with what layers share rewound to `keep[B]`, and at `begin[B]`; and which rows were refused.

    Raises:
        CacheError: one was, or what layers share has no room for the rest, where this can be looked at.
    """
    flags, shared, layers = cache.flags, cache.shared, cache.layers
    refused: Any = begin < 0
    if any(not entry.still for entry in shared.values()):
        to = jnp.asarray(keep)
        shared, bits = ask(shared, lambda entry: entry.rewind(to), jnp.zeros_like(cache.flags))
        layers = tuple(node.rewind(to, cache.shared, shared) for node in layers)
        if is_concrete(bits) and is_concrete(count):
            asked = Span(
                jnp.asarray(begin), jnp.asarray(count), jnp.zeros((cache.batch, max(int(count.max()), 1)), jnp.int32)
            )
            bits = ask(shared, lambda entry: entry.reserve(asked), bits)[1]
            for row in np.flatnonzero(bits).tolist():
                raise CacheError(f"edit: row {row} from {begin[row]} on: {meaning(int(bits[row]))}")
        refused, flags = bits != 0, flags | bits
        begin = jnp.where(refused, cache.lengths, begin)
    return cache.replace(layers=layers, shared=shared, lengths=jnp.asarray(begin), flags=flags), refused


__all__ = ["Work", "Programs", "plan", "run", "cut", "own", "least", "VALUE", "DONATING"]
