"""What an edit makes a cache run again: which positions of which layers, in which calls."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import Cache, OpenCache, Span
from kvjax.caches.flags import ask, meaning
from kvjax.checks import BUCKET, MOST, bucket, is_concrete
from kvjax.config import Config
from kvjax.errors import CacheError
from kvjax.layers import Rotation, decoder_layer
from kvjax.loops import cone as cones
from kvjax.loops import decode as loop
from kvjax.loops.cone import Cone, cone_of
from kvjax.loops.feed import finish
from kvjax.model import Model
from kvjax.transformer import apply_decoder, embed, final_norm
from kvjax.types import Array

CALL = 24
"""What a call costs beside the columns that it computes, in columns: 5 ms and 0.23 (15M parameters, 2,048 slots, two
cores)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What runs again; NumPy arrays on the host, traced ones under `jit`.

    Args:
        start: `[B]` int32, where each row's text begins to differ.
        lengths: `[B]` int32, tokens that a row has in the end.
        first: `[L, B]` int32, the first position that each layer takes in.
        written: `[B]` int32, `Cache.written` in the end.
        cone: what runs instead where no more can change; the last token is then fed again.
        by_layer: whether layers begin at different positions.
    """

    start: Any
    lengths: Any
    first: Any
    written: Any
    cone: Cone | None
    by_layer: bool

    @property
    def begin(self) -> Any:
        """`[B]` int32, the first position that any layer takes in."""
        return self.first.min(0)

    @property
    def count(self) -> Any:
        """`[B]` int32, positions that are fed."""
        return self.lengths - self.begin

    @property
    def positions(self) -> Any:
        """`[L, B]` int32, positions of each row that each layer runs; where a layer keeps nothing, it is all of
        them, in every layer."""
        if self.cone is None:
            return self.lengths - self.first
        return np.maximum(self.cone.ends - self.start, 0) + (self.lengths > 0)

    @property
    def columns(self) -> tuple[int, ...]:
        """Of each layer, positions of a row that are computed: of the longest, and padding."""
        if self.cone is None:
            return (sum(cut(max(int(self.count.max()), 1))),) * len(self.first)
        return tuple(size + 1 for size in self.cone.sizes)


def own(model: Model) -> bool:
    """Whether the layers of a model are this library's, so that each can be run by itself."""
    return model.apply is apply_decoder and isinstance(model.config, Config)


def least(cache: Cache) -> Any:
    """Tokens that rows cannot lose, for they share them: a number, or int32 `[1]` or `[B]`."""
    most: Any = 0
    for entry in cache.shared.values():
        most = jnp.maximum(most, entry.least)
    return np.asarray(most) if is_concrete(most) else most


def plan(model: Model, cache: Cache, start: Any, stop: Any, lengths: Any, by: Any) -> Work:
    """What must run again where texts differ in `start:stop`, `[B]` each, and have `lengths[B]` tokens in the end; what
    follows has moved by `by[B]`.

    From the last layer down: what a layer must give decides what it takes in, and that is what the one below must give.
    """
    host = isinstance(lengths, np.ndarray) and isinstance(start, np.ndarray)
    numeric: Any = np if host else jnp
    floor = least(cache)
    written: Any = np.asarray(cache.written) if host else cache.written
    if cache.max_rewind is not None:  # shorter than the least slack allows: rings of more slack are filled again, too
        written = numeric.where(lengths < written - cache.max_rewind, MOST, written)
    last = (lengths - 1).clip(0)
    wanted, first, anew = last, [], lengths >= 0
    for node in reversed(cache.layers):
        whole = wanted.clip(None, start)
        at = last if cache.replays else node.again(wanted, start, lengths, written, cache.shared)
        at = numeric.minimum(numeric.maximum(at, floor), lengths).astype(numeric.int32)
        first.append(at)
        if node.max_rewind is not None:  # else what was written does not matter to it
            anew = anew & ((at != whole) | (at <= floor) | (whole < written - node.max_rewind - 1))
        wanted = at
    begins = numeric.stack(first[::-1])
    by_layer = own(model) and not cache.replays
    if not by_layer and not cache.replays:
        lost = numeric.any(begins < start.clip(None, last)[None], axis=0)
        begin = numeric.where(lost, numeric.minimum(floor, lengths), begins.min(0)).astype(numeric.int32)
        begins, anew = numeric.broadcast_to(begin, begins.shape), anew | (begin <= floor)
    by_layer &= bool((begins != begins.min(0)).any()) if host else cache.max_rewind is not None
    written = numeric.where(anew, lengths, numeric.maximum(written, lengths)).astype(numeric.int32)
    work = Work(start, lengths, begins, written, None, by_layer)
    cone = cone_of(model, cache, start, stop, lengths, by) if host and own(model) else None
    with_cone = dataclasses.replace(work, cone=cone)
    return with_cone if cone is not None and with_cone.positions.sum() < work.positions.sum() else work


def cut(count: int) -> list[int]:
    """Sizes of the chunks that `count` positions, at least one, are fed in: buckets of `prefill`, so that they compile
    nothing new; as few columns as calls cost."""
    size = bucket(count)
    if size == BUCKET:
        return [size]
    parts = [size // 2, *cut(count - size // 2)]
    return parts if sum(parts) + CALL * len(parts) < size + CALL else [size]


class Programs(NamedTuple):
    """The compiled functions: one that feeds all layers alike, one that feeds each from its own on, and one that
    runs a cone."""

    prefill: Any
    layers: Any
    cone: Any


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


VALUE = Programs(loop.VALUE.prefill, jax.jit(_layers), cones.VALUE)
DONATING = Programs(loop.DONATING.prefill, jax.jit(_layers, donate_argnums=1), cones.DONATING)
"""With the cache as a value, and with its buffers used up."""


def run(model: Model, cache: Cache, text: Any, work: Work, programs: Programs) -> tuple[Array, Cache]:
    """Goes back and feeds `text[B, T]` again as `work` says."""
    host = isinstance(work.first, np.ndarray)
    numeric: Any = np if host else jnp
    if work.cone is not None:
        lengths, written = jnp.asarray(work.lengths), jnp.asarray(work.written)
        cache = cache.replace(tokens=jnp.asarray(text), lengths=lengths, written=written)
        return _last(model, cones.run(model, cache, work.start, work.cone, programs.cone), work, programs)
    begin, count = work.begin, work.count
    keep = numeric.minimum(work.start, work.lengths if work.by_layer else begin)
    tokens, written = cache.tokens, cache.written
    cache, refused = _back(cache, keep, work)
    count = numeric.where(refused, 0, count)
    tokens, written = numeric.where(refused[:, None], tokens, text), numeric.where(refused, written, work.written)
    cache = cache.replace(tokens=jnp.asarray(tokens))
    extra: tuple[Any, ...] = ()
    if work.by_layer:
        pairs = zip(work.first, cache.layers, strict=True)
        since = [new if node.max_rewind is not None else work.start for new, node in pairs]
        extra = (work.first, numeric.stack(since), work.start)
    logits: Any = None
    done = 0
    for size in cut(max(int(count.max()), 1)) if host else [cache.capacity]:
        valid = (count - done).clip(0, size).astype(numeric.int32)
        at = (begin + done)[:, None] + np.arange(size, dtype=np.int32)[None, :]
        tokens = numeric.take_along_axis(text, at.clip(0, text.shape[1] - 1), axis=1)
        call = programs.layers if work.by_layer else programs.prefill
        new, cache = call(model, cache, tokens, valid, *extra)
        kept = logits is not None and not (valid > 0).all()
        logits = jnp.where(valid[:, None] > 0, new, logits) if kept else new
        done += size
    unknown = (count == 0) & (work.lengths > 0)
    if not host or unknown.any():
        logits = jnp.where(unknown[:, None], jnp.nan, logits)
    return logits, cache.replace(written=jnp.asarray(written))


def _last(model: Model, cache: Cache, work: Work, programs: Programs) -> tuple[Array, Cache]:
    """The last token fed again, for its logits; nothing is written."""
    at = np.maximum(work.lengths - 1, least(cache)).astype(np.int32)
    valid = np.minimum(work.lengths - at, work.lengths).clip(0).astype(np.int32)
    tokens = np.take_along_axis(np.asarray(cache.tokens), at[:, None].clip(None, cache.capacity - 1), axis=1)
    first = np.broadcast_to(at, (len(cache.layers), len(at)))
    since = np.broadcast_to(work.lengths, first.shape).astype(np.int32)
    again = cache.replace(lengths=jnp.asarray(at))
    logits, cache = programs.layers(model, again, tokens, valid, first, since, work.lengths)
    unknown = (valid == 0) & (work.lengths > 0)
    return jnp.where(unknown[:, None], jnp.nan, logits) if unknown.any() else logits, cache


def _back(cache: Cache, keep: Any, work: Work) -> tuple[Cache, Any]:
    """The cache at the position that is fed first, each layer rewound to what it takes in first, and what layers share
    to `keep[B]`; and which rows were refused.

    Raises:
        CacheError: one was, or what layers share has no room for the rest, where this can be looked at.
    """
    begin, flags, shared = work.begin, cache.flags, cache.shared
    refused: Any = begin < 0
    if any(not entry.still for entry in shared.values()):
        to = jnp.asarray(keep)
        shared, bits = ask(shared, lambda entry: entry.rewind(to), jnp.zeros_like(flags))
        if cache.replays:  # the last token is fed, and all before it is written anew
            before = Span(to, jnp.asarray(begin - keep), cache.tokens)
            shared, bits = ask(shared, lambda entry: entry.reserve(before), bits)
        if is_concrete(bits) and is_concrete(begin):
            room = jnp.zeros((cache.batch, max(int(work.count.max()), 1)), jnp.int32)
            asked = Span(jnp.asarray(begin), jnp.asarray(work.count), room)
            bits = ask(shared, lambda entry: entry.reserve(asked), bits)[1]
            for row in np.flatnonzero(bits).tolist():
                raise CacheError(f"edit: row {row} from {work.start[row]} on: {meaning(int(bits[row]))}")
        refused, flags = bits != 0, flags | bits
    back: Any = work.first if work.by_layer else work.first[:1]
    back = [jnp.where(refused, cache.lengths, x) if not is_concrete(x) else jnp.asarray(x) for x in back]
    pairs = zip(cache.layers, back if work.by_layer else back * len(cache.layers), strict=True)
    layers = tuple(node.rewind(at, cache.shared, shared) for node, at in pairs)
    lengths = jnp.where(refused, cache.lengths, begin) if not is_concrete(begin) else jnp.asarray(begin)
    return cache.replace(layers=layers, shared=shared, lengths=lengths, flags=flags), refused


__all__ = ["Work", "Programs", "plan", "run", "cut", "own", "least", "VALUE", "DONATING"]
