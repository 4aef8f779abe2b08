"""Edits that are not exact, and say so: what stands after the edit keeps keys and values that were computed before it.

Only what is new is computed. What follows saw another text, or stood elsewhere, when its keys and values were made;
they are moved as they are, and keys that are kept turned to their positions are turned on to the new ones. `refresh`
computes some of it again, `Approximated.divergence` says how far the result is from the truth. Splicing blocks of keys
and values is known from Prompt Cache (Gim et al. 2023, 2311.04934) and CacheBlend (Yao et al. 2024, 2405.16444), which
computes a part again; shifting the context from llama.cpp.

Positions that are added to the stream (learned tables, sines) went into keys and values when these were computed, and
stay there: what moves still says that it stands where it stood.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import Cache, Span
from kvjax.caches.flags import CAPACITY, COUNT, POSITIONS, REWIND, ask
from kvjax.checks import array, bucket, either, is_concrete, whole
from kvjax.config import Config
from kvjax.errors import CacheError, InputError
from kvjax.loops.decode import prefill
from kvjax.loops.feed import feed, finish
from kvjax.loops.rework import least
from kvjax.model import Model, check_ids, check_valid
from kvjax.ops.attention import EMPTY
from kvjax.types import Array


class Divergence(NamedTuple):
    """How far next-token distributions are from those after a fresh prefill of the same tokens in the same plan.

    Args:
        logits: `[B]`, the largest difference of a logit.
        kl: `[B]`, KL(exact || approximate) in nats.
        agrees: `[B]` bool, whether the same token has the largest logit.
    """

    logits: Array
    kl: Array
    agrees: Array


class Approximated(NamedTuple):
    """What an approximate edit gives; `logits, cache = …` unpacks it.

    Args:
        logits: `[B, V]`, after each row's last token; of a row that has none they mean nothing. NaN where that is the
            last of a prefix which rows share, and is not fed again.
        cache: of the edited text.
    """

    logits: Array
    cache: Cache

    def divergence(self, model: Model) -> Divergence:
        """How far the logits are from the exact ones: prefills the whole text again, which costs what was saved."""
        bare = self.cache.release(np.arange(self.cache.batch, dtype=np.int32))
        count = self.cache.lengths - bare.lengths
        columns = bucket(int(count.max())) if is_concrete(count) else self.cache.capacity
        places = bare.lengths[:, None] + jnp.arange(columns, dtype=jnp.int32)[None, :]
        tokens = jnp.take_along_axis(self.cache.tokens, jnp.clip(places, 0, self.cache.capacity - 1), axis=1)
        exact, _ = prefill(model, bare, tokens, count)
        return _divergence(exact, self.logits)


@jax.jit
def _divergence(exact: Array, near: Array) -> Divergence:
    a, b = jax.nn.log_softmax(exact, axis=-1), jax.nn.log_softmax(near, axis=-1)
    p = jnp.exp(a)
    kl = jnp.sum(jnp.where(p > 0, p * (a - b), 0), axis=-1)
    same = jnp.argmax(exact, axis=-1) == jnp.argmax(near, axis=-1)
    return Divergence(jnp.max(jnp.abs(exact - near), axis=-1), kl, same)


def _refresh(model: Model, cache: Cache, start: Array, count: Array, *, columns: int) -> Approximated:
    # start, count [B]; at most `columns` tokens a row
    steps, last = jnp.arange(columns, dtype=jnp.int32)[None, :], cache.lengths[:, None] - 1
    floor = jnp.reshape(least(cache), (-1, 1))
    wrong = (start < least(cache)) | (count < 0) | (start + count > cache.lengths) | (count > columns)
    places = jnp.where(steps < count[:, None], start[:, None] + steps, EMPTY)
    places = jnp.where(wrong[:, None], EMPTY, jnp.concatenate([places, jnp.where(last < floor, EMPTY, last)], axis=1))
    cache, refused = _own(cache, places)
    flags = refused | jnp.where(wrong, REWIND, 0)
    return _fed_again(model, _flagged(cache, flags), start, count, flags == 0, columns)


def _fed_again(model: Model, cache: Cache, start: Array, count: Array, good: Array, columns: int) -> Approximated:
    """The tokens at `start[B]`, `count[B]` of them, and the last one, computed again in `good[B]` rows."""
    lengths = cache.lengths
    good &= lengths > least(cache)
    if columns:
        places = start[:, None] + jnp.arange(columns, dtype=jnp.int32)[None, :]
        tokens = jnp.take_along_axis(cache.tokens, jnp.clip(places, 0, cache.capacity - 1), axis=1)
        at = cache.replace(lengths=jnp.where(good, start, lengths))
        _, cache = feed(model, at, tokens, jnp.where(good, count, 0))
    one = good.astype(jnp.int32)
    last = jnp.take_along_axis(cache.tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
    x, cache = feed(model, cache.replace(lengths=lengths - one), last, one)
    logits, cache = finish(model, cache.replace(lengths=lengths), x, one)
    unknown = (one == 0) & (lengths > 0)
    return Approximated(jnp.where(unknown[:, None], jnp.nan, logits[:, 0]), cache)


def _splice(
    model: Model,
    cache: Cache,
    start: Array,
    stop: Array,
    tokens: Array,
    valid: Array,
    *,
    moved: int,
    rerotate: bool,
) -> Approximated:
    # start, stop, valid [B], tokens [B, S]; in rows whose length changes, at most `moved` tokens follow `stop`
    had, by, columns = cache.lengths, valid - (stop - start), tokens.shape[1]
    flags = jnp.where((start < least(cache)) | (stop < start) | (stop > had), REWIND, 0)
    flags |= jnp.where((valid < 0) | (valid > columns), COUNT, 0) | jnp.where(had + by > cache.room, CAPACITY, 0)
    if model.max_positions is not None:
        flags |= jnp.where(had + by > model.max_positions, POSITIONS, 0)
    more = jnp.where(flags == 0, jnp.maximum(by, 0), 0)
    ahead = had[:, None] + jnp.arange(max(columns, 1), dtype=jnp.int32)[None, :]
    shared, refused = cache.reserve(Span(had, more, ahead))
    flags |= refused
    room = jnp.arange(cache.capacity, dtype=jnp.int32)[None, :]
    end = jnp.where(by == 0, start + valid, had + by)
    changed = (room >= start[:, None]) & (room < end[:, None])
    changed |= (room == (had + by)[:, None] - 1) & (room >= jnp.reshape(least(cache), (-1, 1)))
    acts = (flags == 0) & ((start < stop) | (valid > 0))
    cache, refused = _own(cache.replace(shared=shared), jnp.where(changed & acts[:, None], room, EMPTY))
    flags |= refused
    good = flags == 0
    by = jnp.where(good, by, 0)
    if moved:
        source = stop[:, None] + jnp.arange(moved, dtype=jnp.int32)[None, :]
        target = jnp.where((source < had[:, None]) & (by != 0)[:, None], source + by[:, None], EMPTY)
        cache = _moved(model, cache, source, target, by, rerotate)
    new = start[:, None] + jnp.arange(columns, dtype=jnp.int32)[None, :]
    new = jnp.where(good[:, None] & (new < (start + valid)[:, None]), new, EMPTY)
    cache = cache.replace(
        tokens=cache.tokens.at[jnp.arange(cache.batch)[:, None], new].set(tokens, mode="drop"),
        lengths=jnp.maximum(had, had + by),
        written=jnp.maximum(cache.written, had + by),
    )
    before, cache = cache.flags, cache.rewind(had + by)  # what was given back
    return _fed_again(model, _flagged(cache, before | flags), start, valid, good, columns)


def _flagged(cache: Cache, flags: Array) -> Cache:
    return cache.replace(flags=(cache.flags | flags).astype(jnp.int32))


def _own(cache: Cache, places: Array) -> tuple[Cache, Array]:
    """With what lies at `places[B, n]` the rows' own, and flags of the rows where it cannot be."""
    shared, refused = ask(cache.shared, lambda entry: entry.claim(places), jnp.zeros_like(cache.flags))
    layers = tuple(node.rewind(cache.lengths, cache.shared, shared) for node in cache.layers)
    return cache.replace(shared=shared, layers=layers), refused


def _moved(model: Model, cache: Cache, source: Array, target: Array, by: Array, rerotate: bool) -> Cache:
    """What stands at `source[B, n]` stands at `target[B, n]`, gathered before it is written; keys turned `by[B]`."""
    tokens = jnp.take_along_axis(cache.tokens, jnp.clip(source, 0, cache.capacity - 1), axis=1)
    layers = tuple(node.move(source, target, cache.shared) for node in cache.layers)
    if rerotate:
        turns = _turns(model, len(layers), jnp.broadcast_to(by[:, None], target.shape))
        layers = tuple(node.turn(target, turn, cache.shared) for node, turn in zip(layers, turns, strict=True))
    rows = jnp.arange(cache.batch)[:, None]
    return cache.replace(layers=layers, tokens=cache.tokens.at[rows, target].set(tokens, mode="drop"))


def _turns(model: Model, layers: int, by: Array) -> list[Callable[[Array], Array]]:
    """How the keys `[B, n, K, D]` of each layer are turned on."""
    if isinstance(model.config, Config):
        return [functools.partial(kind.turn, by=by) for kind in model.config.turns]
    return [_opaque] * layers


def _opaque(keys: Array) -> Array:
    raise InputError(
        "approximate: how an apply of one's own turns keys is not known; give rerotate=False if it turns none, or keep "
        "keys as they are projected: caches.dense(rotated=False)"
    )


SPLICE = jax.jit(_splice, static_argnames=("moved", "rerotate"))
REFRESH = jax.jit(_refresh, static_argnames="columns")


def splice(
    model: Model, cache: Cache, start: Any, stop: Any, tokens: Any = None, valid: Any = None, *, rerotate: bool = True
) -> Approximated:
    """Puts `tokens` in place of the text from `start` to `stop`, and computes these tokens only, and the last one.

    What stands before sees none of it and stays as it is, the new tokens see it: they are exact. What follows is moved
    as it is stored, and keys that are kept turned are turned once from there (codes: decoded, turned, coded again);
    where the length does not change, it stays bitwise. It still knows the old text, traces of it too: the result is
    approximate. `kvjax.edit` is exact.

    Compiles once for each bucket (16, 32, 64, …) of new tokens and of the longest text that moves; under `jit`, where
    these are not known, the latter is the capacity.

    Args:
        model: any model. How an `apply` of one's own turns keys is not known: see `rerotate`.
        cache: stays usable. Of kinds that keep every token singly: dense, paged, layer inputs, traces of these, and
            what follows a shared prefix; with any codec but `int4_channels`.
        start, stop: whole number, or one a row; 0 ≤ start ≤ stop ≤ the row's length. Equal: an insertion.
        tokens: `[n]` for every row, or `[B, n]` int32, padded at the end; none, or None, deletes.
        valid: `[B]` int32, how many of a row's tokens are real, or None for all.
        rerotate: False leaves moved keys turned to where they stood: for models that turn none it is right, for others
            another approximation. Keys that are kept un-turned, and layer inputs, need neither.

    Returns:
        Logits `[B, V]` after each row's last token, and the cache.

    Raises:
        InputError: shapes, dtypes or ids are wrong, `start` is negative or after `stop`; an `apply` of one's own, and
            keys that would have to be turned.
        CacheError: a kind that cannot do it; a range outside the row, or inside a prefix that rows share; the text does
            not fit (under `jit` the row is flagged, stays as it was, and its logits are NaN).
    """
    _check("splice", cache)
    start, stop = (_a_row(f"splice: {name}", x, cache.batch) for name, x in (("start", start), ("stop", stop)))
    tokens, valid = _new(model, cache.batch, tokens, valid)
    moved = cache.capacity
    if all(map(is_concrete, (start, stop, valid, cache.lengths))):
        moved = _check_range(model, cache, start, stop, valid)
    return SPLICE(model, cache, start, stop, tokens, valid, moved=moved, rerotate=either("splice: rerotate", rerotate))


def shift(model: Model, cache: Cache, drop: Any, keep: Any = 0, *, rerotate: bool = True) -> Approximated:
    """Drops `drop` tokens after the first `keep` of every row, so that a text can go on past its capacity.

    What follows moves up, as `splice` moves it; with `keep` the first tokens stay, which many models need (attention
    sinks, Xiao et al. 2023, 2309.17453). The context shift of llama.cpp. Repeated, turning drifts in stores of few
    bits (`docs/editing.md`); keys that are kept un-turned, as by `caches.dense(rotated=False)`, do not.

    Args:
        model, cache, rerotate: as for `splice`.
        drop, keep: whole numbers, or one a row.

    Returns:
        Logits `[B, V]` after each row's last token, and the cache.

    Raises:
        InputError, CacheError: as `splice`.
    """
    keep, drop = (_a_row(f"shift: {name}", x, cache.batch) for name, x in (("keep", keep), ("drop", drop)))
    return splice(model, cache, keep, keep + drop, rerotate=rerotate)


def refresh(model: Model, cache: Cache, start: Any, count: Any) -> Approximated:
    """Computes `count` tokens from `start` on again, and the last one, from what the cache has before them.

    After a splice, the tokens right behind it depend on it most. All that follows refreshed, the result is exact.
    Compiles once for each bucket of the largest count; under `jit`, where it is not known, it is the capacity.

    Args:
        model: any model.
        cache: as for `splice`.
        start, count: whole numbers, or one a row; `start + count` is at most the row's length.

    Returns:
        Logits `[B, V]` after each row's last token, and the cache.

    Raises:
        InputError: no whole numbers, or not one a row.
        CacheError: as for `splice`.
    """
    _check("refresh", cache)
    start, count = (_a_row(f"refresh: {name}", x, cache.batch) for name, x in (("start", start), ("count", count)))
    columns = cache.capacity
    if all(map(is_concrete, (start, count, cache.lengths))):
        _check_inside("refresh", cache, start, start + count)
        columns = _columns(int(count.max()), cache.capacity)
    return REFRESH(model, cache, start, count, columns=columns)


def _check(name: str, cache: Cache) -> None:
    for layer, (node, kind) in enumerate(zip(cache.layers, cache.plan, strict=True)):
        if not node.patches:
            raise CacheError(
                f"{name}: layer {layer} is kept by {kind}, which does not keep every token by itself; "
                "kvjax.edit is exact, and for every kind"
            )


def _a_row(name: str, x: Any, batch: int) -> Any:
    x = whole(name, x, ((), (batch,)))
    numeric: Any = np if is_concrete(x) else jnp
    return numeric.broadcast_to(numeric.asarray(x), (batch,))


def _new(model: Model, batch: int, tokens: Any, valid: Any) -> tuple[Any, Any]:
    """New tokens `[B, S]`, S a bucket where they can be looked at, and how many are real."""
    if not isinstance(tokens, jax.Array):
        tokens = array("splice: tokens", [] if tokens is None else tokens)
        tokens = tokens if tokens.size else np.zeros(tokens.shape, np.int32)  # of an empty list NumPy makes floats
    tokens = whole("splice: tokens", tokens)
    if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and tokens.shape[0] != batch):
        raise InputError(f"splice: tokens has shape {list(tokens.shape)}, it must be [n] or [{batch}, n]")
    known = is_concrete(tokens)
    numeric: Any = np if known else jnp
    tokens = numeric.broadcast_to(numeric.asarray(tokens), (batch, tokens.shape[-1]))
    valid = check_valid("splice", valid, batch, tokens.shape[1])
    check_ids("splice", model.vocab_size, tokens, valid)
    if known and is_concrete(valid):
        columns = int(valid.max())
        size = bucket(columns) if columns else 0
        tokens = np.pad(tokens[:, :columns], ((0, 0), (0, size - columns)))
    return tokens, valid


def _columns(count: int, most: int) -> int:
    return bucket(count, most=most) if count else 0


def _check_inside(name: str, cache: Cache, start: np.ndarray, stop: np.ndarray) -> None:
    own = np.broadcast_to(least(cache), start.shape)
    for row, (a, b, length, first) in enumerate(zip(start, stop, np.asarray(cache.lengths), own, strict=True)):
        if not 0 <= a <= b:
            raise InputError(f"{name}: row {row} has start {a}, it must lie between 0 and its stop {b}")
        if b > length:
            raise CacheError(f"{name}: row {row} has stop {b}, but the row has {length} tokens")
        if a < first:
            raise CacheError(f"{name}: row {row} from {a} on goes into what other rows share, its first {first} tokens")


def _check_range(model: Model, cache: Cache, start: Any, stop: Any, valid: Any) -> int:
    """How many tokens move at most, as a bucket; 0 where no row's length changes."""
    _check_inside("splice", cache, start, stop)
    lengths, by = np.asarray(cache.lengths), valid - (stop - start)
    most = np.inf if model.max_positions is None else model.max_positions
    for row, (n, room) in enumerate(zip(lengths + by, np.asarray(cache.room), strict=True)):
        if n > min(room, most):
            limit = f"room for {room}: resize the cache" if room <= most else f"positions of the model {most}"
            raise CacheError(f"splice: row {row} would have {n} tokens, {limit}")
    return _columns(int(np.where(by != 0, lengths - stop, 0).max()), cache.capacity)


__all__ = ["Approximated", "Divergence", "refresh", "shift", "splice"]
