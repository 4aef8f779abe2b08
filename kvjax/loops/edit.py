"""Edit: another piece of text in the middle of a cache, exactly; what can change is run again, and nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import Cache
from kvjax.caches.flags import CAPACITY, COUNT, POSITIONS, REWIND
from kvjax.checks import array, is_concrete, whole
from kvjax.errors import CacheError, InputError
from kvjax.loops import rework
from kvjax.model import Model, check_ids, check_valid
from kvjax.types import Array


def edit(
    model: Model,
    cache: Cache,
    start: Any,
    stop: Any,
    tokens: Any = None,
    valid: Any = None,
    *,
    _run: rework.Programs = rework.VALUE,
) -> tuple[Array, Cache]:
    """Puts other tokens in the place of `start:stop` of each row: replaces, inserts where the two are equal, deletes
    where there are none. The cache and the logits are those of the whole new text.

    What lies before `start` is kept. The rest of the text is fed again, in chunks of the sizes of `prefill`'s buckets,
    whose programs it shares. Layers that have lost what the rest must see (a ring beyond its slack) are filled again
    from the tokens, up to L · (w - 1) positions further back; nothing is refused for it. A model with an `apply` of its
    own is then fed from the beginning.

    Where layers of this library see windows and keep every position, as many new tokens as old ones change layer l only
    up to l · (w - 1) positions behind them: all others stay bitwise as they are, and the last token is fed again for
    its logits. With a trace of every layer's input (`caches.hybrid()`, layer inputs) each layer runs on its own part
    only. If only distances matter to the model and keys are kept un-turned, the text may also grow or shrink: what
    follows moves, equal to rounding. All rows must allow it. This compiles once for each bucket of new tokens (near the
    end, and where a layer sees everything, of what follows too), and once for the last one. Under `jit`, where lengths
    are not known, all from `start` on is one chunk, of the capacity.

    Args:
        model: any model.
        cache: stays usable.
        start, stop: whole number, or one a row; 0 ≤ start ≤ stop ≤ the row's length.
        tokens: `[n]` for every row, or `[B, n]` int32, padded at the end; none, or None, deletes.
        valid: `[B]` int32, how many of a row's tokens are real, or None for all.

    Returns:
        Logits `[B, V]` after each row's last token, and the cache, its flags cleared as by `rewind`. A row where
        nothing is to be done stays as it is, but for its last token, which is fed again. Logits of a row that is empty
        then mean nothing; those of one that ends with a prefix which rows share, and which is not fed again, are NaN.

    Raises:
        InputError: shapes or dtypes are wrong, `start` is negative or after `stop`, `valid` is outside 0 to n, or an id
            is outside the vocabulary.
        CacheError: `stop` is past a row's length, the new text does not fit the capacity or the model's positions,
            pages run out, or a prefix that rows share would change (under `jit` the row is flagged and its logits are
            NaN).
    """
    cache = _checked_cache("edit", cache)
    b = cache.batch
    start, stop = (whole(f"edit: {name}", x, ((), (b,))) for name, x in (("start", start), ("stop", stop)))
    new, valid = _tokens("edit", model, tokens, valid, b)
    host = all(map(is_concrete, (start, stop, new, valid, cache.lengths, cache.tokens)))
    numeric: Any = np if host else jnp
    start, stop, new, valid, old, lengths = map(numeric.asarray, (start, stop, new, valid, cache.tokens, cache.lengths))
    start, stop = numeric.broadcast_to(start, (b,)), numeric.broadcast_to(stop, (b,))
    flags = jnp.zeros_like(cache.flags)
    changed = (start < stop) | (valid > 0)
    if host:
        _check(model, cache, start, stop, lengths, lengths - (stop - start) + valid, changed)
    else:
        flags = _flags(model, cache, start, stop, valid, new.shape[1], changed)
        start, stop = (jnp.where(flags != 0, lengths, x) for x in (start, stop))
        valid = jnp.where(flags != 0, 0, valid)
    start = numeric.where((start < stop) | (valid > 0), start, lengths)
    stop = numeric.where((start < stop) | (valid > 0), stop, lengths)
    more = valid - (stop - start)
    text = _spliced(numeric, old, new, start, valid, more)
    work = rework.plan(model, cache, *(x.astype(np.int32) for x in (start, start + valid, lengths + more, more)))
    return rework.run(model, cache.replace(flags=flags), text, work, _run)


def sync(
    model: Model, cache: Cache, tokens: Any, valid: Any = None, *, _run: rework.Programs = rework.VALUE
) -> tuple[Array, Cache]:
    """Makes a cache that of `tokens`, with the least work: what an editor calls at every keystroke.

    What each row has in common with its new text at the beginning is kept; where not all layers see everything, what
    they have in common at the end too. The rest is an `edit`.

    Args:
        model: any model.
        cache: stays usable.
        tokens: `[B, n]` int32, the whole new texts, padded at the end.
        valid: `[B]` int32, how many of a row's tokens are real, or None for all.

    Returns:
        Logits `[B, V]` after each row's last token, and the cache; see `edit`.

    Raises:
        InputError: shapes or dtypes are wrong, `valid` is outside 0 to n, or an id is outside the vocabulary.
        CacheError: see `edit`.
    """
    cache = _checked_cache("sync", cache)
    new, valid = _tokens("sync", model, tokens, valid, cache.batch)
    numeric: Any = np if all(map(is_concrete, (new, valid, cache.lengths, cache.tokens))) else jnp
    new, valid, old, lengths = map(numeric.asarray, (new, valid, cache.tokens, cache.lengths))
    columns = max(old.shape[1], new.shape[1])
    old, wide = (numeric.pad(x, ((0, 0), (0, columns - x.shape[1]))) for x in (old, new))
    at, both = np.arange(columns, dtype=np.int32)[None, :], numeric.minimum(lengths, valid)[:, None]
    start = numeric.cumprod((old == wide) & (at < both), axis=1).sum(1)
    ends = (
        numeric.take_along_axis(x, (n[:, None] - 1 - at).clip(0), axis=1) for x, n in ((old, lengths), (wide, valid))
    )
    tail = numeric.cumprod(numeric.equal(*ends) & (at < both - start[:, None]), axis=1).sum(1)
    start, stop, end = (x.astype(np.int32) for x in (start, lengths - tail, valid - tail))
    if new.shape[1]:
        from_start = (at[:, : new.shape[1]] + start[:, None]).clip(0, new.shape[1] - 1)
        new = numeric.take_along_axis(new, from_start, axis=1)
    return edit(model, cache, start, stop, new, end - start, _run=_run)


def _spliced(numeric: Any, old: Any, new: Any, start: Any, valid: Any, more: Any) -> Any:
    """`[B, T]`: of `old[B, T]` up to `start[B]`, `valid[B]` of `new[B, n]`, and the rest of `old`, moved by `more[B]`.
    A gather: an overlapping slice-set is silently wrong under `jit` on CPU."""
    at = np.arange(old.shape[1], dtype=np.int32)[None, :]
    start, end, more = start[:, None], (start + valid)[:, None], more[:, None]
    rest = numeric.take_along_axis(old, (at - more).clip(0, old.shape[1] - 1), axis=1)
    if not new.shape[1]:
        return numeric.where(at < start, old, rest)
    put = numeric.take_along_axis(new, (at - start).clip(0, new.shape[1] - 1), axis=1)
    return numeric.where(at < start, old, numeric.where(at < end, put, rest))


def _checked_cache(name: str, cache: Any) -> Cache:
    if not isinstance(cache, Cache):
        raise InputError(f"{name}: cache is no cache but {cache!r}")
    return cache


def _tokens(name: str, model: Model, tokens: Any, valid: Any, b: int) -> tuple[Any, Any]:
    """`tokens[B, n]` and `valid[B]` as int32."""
    tokens = np.zeros((b, 0), np.int32) if tokens is None else tokens
    new: Any = tokens if isinstance(tokens, jax.Array) else array(f"{name}: tokens", tokens)
    if not new.size:  # of an empty list NumPy makes floats
        new = np.zeros(new.shape if new.ndim == 2 else (b, 0), np.int32)
    new = whole(f"{name}: tokens", new)
    new = (np if is_concrete(new) else jnp).asarray(new)
    if new.ndim == 1:
        new = np.broadcast_to(new, (b, *new.shape)) if is_concrete(new) else jnp.broadcast_to(new, (b, *new.shape))
    if new.ndim != 2 or new.shape[0] != b:
        raise InputError(f"{name}: tokens has shape {list(new.shape)}, it must be [n] or [{b}, n]")
    valid = check_valid(name, valid, b, new.shape[1])
    check_ids(name, model.vocab_size, new, valid)
    return new, valid


def _check(model: Model, cache: Cache, start: Any, stop: Any, lengths: Any, ends: Any, changed: Any) -> None:
    """Raises what `edit` says it does, of the first row where it is so."""
    most = np.inf if model.max_positions is None else model.max_positions
    room, shared = np.asarray(cache.room), np.broadcast_to(rework.least(cache), lengths.shape)
    for row in range(len(lengths)):
        at, to, have, end = (int(x[row]) for x in (start, stop, lengths, ends))
        if at < 0 or at > to:
            raise InputError(f"edit: row {row} has start {at}, it must lie between 0 and its stop {to}")
        if to > have:
            raise CacheError(f"edit: row {row} has stop {to}, but the row has {have} tokens")
        if changed[row] and at < shared[row]:
            raise CacheError(
                f"edit: row {row} from {at} on goes into what other rows share, its first {shared[row]} tokens"
            )
        if changed[row] and end > min(room[row], most):
            limit = f"there is room for {room[row]}" if room[row] <= most else f"the model has {most} positions"
            raise CacheError(f"edit: row {row} of {have} tokens would have {end}, {limit}")


def _flags(model: Model, cache: Cache, start: Any, stop: Any, valid: Any, columns: int, changed: Any) -> Array:
    """`[B]` int32, the bits of rows that cannot be edited."""
    ends = cache.lengths - (stop - start) + valid
    shared = rework.least(cache)
    outside = (start < 0) | (start > stop) | (stop > cache.lengths) | (changed & (start < shared))
    flags = jnp.where(outside, REWIND, 0) | jnp.where((valid < 0) | (valid > columns), COUNT, 0)
    flags |= jnp.where(changed & (ends > cache.room), CAPACITY, 0)
    if model.max_positions is not None:
        flags |= jnp.where(changed & (ends > model.max_positions), POSITIONS, 0)
    return flags.astype(jnp.int32)


__all__ = ["edit", "sync"]
