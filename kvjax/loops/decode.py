"""Prefill, one step, a scan of steps, and a loop that stops; each compiled once, as values and with the cache donated.

Nothing here knows a kind of cache, or a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax import sampling, struct
from kvjax.caches.base import Cache
from kvjax.caches.flags import NAN, NO_TOKEN
from kvjax.checks import array, bucket, count, is_concrete, whole
from kvjax.errors import CacheError, InputError
from kvjax.loops.feed import feed, finish
from kvjax.loops.noted import Noted
from kvjax.model import Model, check_ids, check_valid
from kvjax.sampling import Text
from kvjax.sampling.drawing import drawn
from kvjax.stopping import Stops, stops_of
from kvjax.types import Array

CHUNK = 16
"""Steps between two looks at whether all rows are done."""

ALL = 1 << 30
"""More chunks than any loop runs."""


def _prefill(model: Model, cache: Cache, tokens: Array, valid: Array) -> tuple[Array, Cache]:
    x, cache = feed(model, cache, tokens, valid)
    last = jnp.clip(valid - 1, 0, tokens.shape[1] - 1)
    x = jnp.take_along_axis(x, last.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)  # [B, 1, ...]
    logits, cache = finish(model, cache, x, valid)
    return logits[:, 0], cache


def flag_nan(cache: Cache, logits: Array) -> Cache:
    """Rows whose logits are NaN are flagged: nothing can be chosen from these."""
    return cache.replace(flags=cache.flags | jnp.where(jnp.isnan(jnp.max(logits, axis=1)), NAN, 0).astype(jnp.int32))


def back_to(cache: Cache, lengths: Array) -> Cache:
    """Rewound, and what was flagged stays so."""
    kept = cache.rewind(lengths)
    return kept.replace(flags=kept.flags | cache.flags)


def flag_none(cache: Cache, tokens: Array) -> Cache:
    """Rows for which a sampler found no token are flagged; the token is -1, and is not fed."""
    none = (tokens < 0) & (cache.flags == 0)  # the logits of a flagged row are NaN
    return cache.replace(flags=cache.flags | jnp.where(none, NO_TOKEN, 0).astype(jnp.int32))


def _step(model: Model, cache: Cache, tokens: Array) -> tuple[Array, Cache]:
    return _one(model, cache, tokens, jnp.ones_like(tokens))


def _one(model: Model, cache: Cache, tokens: Array, valid: Array) -> tuple[Array, Cache]:
    x, cache = feed(model, cache, tokens[:, None], valid)
    logits, cache = finish(model, cache, x, valid)
    return logits[:, 0], cache


def _decode(
    model: Model, cache: Cache, logits: Array, sampler: Any, seeds: Array, starts: Array | None = None, *, steps: int
) -> tuple[Array, Array, Cache]:
    keys = sampling.row_keys(seeds)
    cache = flag_nan(cache, logits)
    starts, limits, stops = cache.lengths if starts is None else starts, cache.lengths + steps, jnp.zeros(0, jnp.int32)

    def one(carry: tuple[Array, Cache], _: None) -> tuple[tuple[Array, Cache], Array]:
        logits, cache = carry
        text = Text(cache.tokens, cache.lengths, starts, limits, stops)
        tokens = drawn(sampler, logits, sampling.position_keys(keys, cache.lengths), text)
        return _one(model, flag_none(cache, tokens), tokens, (tokens >= 0).astype(jnp.int32)), tokens

    (logits, cache), tokens = lax.scan(one, (logits, cache), None, length=steps)
    return tokens.T, logits, cache


@struct.node
class Progress(struct.Value):
    """Where a loop that stops stands. What a row emitted is what was fed: `cache.tokens[row, start:length]`.

    Args:
        cache: with all emitted tokens fed.
        logits: `[B, V]`, for the next token of each row.
        stopped: `[B]` bool, rows that emitted what stops them.
        wasted: int32, steps that no row needed: a chunk runs to its end.
        starts: `[B]` int32, tokens of each row that were given: new ones begin there; None: all before the loop.
        noted: log-probabilities of the new tokens, or None where nobody asked.
        copies: rows next to each other that are of one prompt.
    """

    cache: Cache
    logits: Array
    stopped: Array
    wasted: Array
    starts: Array | None = None
    noted: Noted | None = None
    copies: int = struct.static(default=1)

    @classmethod
    def begin(cls, cache: Cache, logits: Array, **more: Any) -> Progress:
        """After a prefill, with nothing new."""
        return cls(cache, logits, jnp.zeros((cache.batch,), bool), jnp.zeros((), jnp.int32), **more)

    def done(self, ends: Array) -> Array:
        """`[B]` bool, rows that want no more: stopped, at their end, or flagged."""
        return self.stopped | (self.cache.lengths >= ends) | (self.cache.flags != 0)

    def resize(self, capacity: int) -> Progress:
        """The same with room for `capacity` tokens a row."""
        noted = None if self.noted is None else self.noted.resize(capacity)
        return self.replace(cache=self.cache.resize(capacity), noted=noted)


def _decode_until(
    model: Model,
    state: Progress,
    sampler: Any,
    seeds: Array,
    stops: Stops,
    limits: Array,
    ends: Array,
    chunks: Array,
    chunk: int,
) -> Progress:
    # limits [B] are absolute lengths that filters see, ends [B] those at which rows rest, no longer; at most `chunks`
    # scans of `chunk` steps
    keys = sampling.row_keys(seeds)
    room, outside = state.cache.room, state.cache.capacity
    starts = state.cache.lengths if state.starts is None else state.starts
    state = state.replace(cache=flag_nan(state.cache, state.logits), starts=starts)

    def one(state: Progress, _: None) -> tuple[Progress, None]:
        cache, noted = state.cache, state.noted
        rests = state.done(ends) | (cache.lengths >= room)
        text = Text(cache.tokens, cache.lengths, starts, limits, stops.ids, copies=state.copies)
        tokens = drawn(sampler, state.logits, sampling.position_keys(keys, cache.lengths), text)
        tokens = jnp.where(rests, 0, tokens)
        rests = rests | (tokens < 0)
        if noted is not None:
            noted = noted.note(state.logits, tokens, jnp.where(rests, outside, cache.lengths))
        logits, cache = _one(model, flag_none(cache, tokens), tokens, jnp.where(rests, 0, 1).astype(jnp.int32))
        return state.replace(
            cache=cache,
            logits=jnp.where(rests[:, None], state.logits, logits),
            stopped=jnp.where(rests, state.stopped, stops.hit(text, tokens)),
            wasted=state.wasted + jnp.all(rests).astype(jnp.int32),
            noted=noted,
        ), None

    def more(carry: tuple[Array, Progress]) -> Array:
        wants = ~carry[1].done(ends)
        return (carry[0] < chunks) & jnp.any(wants) & ~jnp.any(wants & (carry[1].cache.lengths >= room))

    def run(carry: tuple[Array, Progress]) -> tuple[Array, Progress]:
        return carry[0] + 1, lax.scan(one, carry[1], None, length=chunk)[0]

    return lax.while_loop(more, run, (jnp.zeros((), jnp.int32), state))[1]


class Programs(NamedTuple):
    """The compiled functions under the public ones."""

    prefill: Any
    step: Any
    decode: Any
    until: Any


def _programs(**donation: Any) -> Programs:
    # The cache, or the progress that holds it, is the second argument of each.
    return Programs(
        jax.jit(_prefill, **donation),
        jax.jit(_step, **donation),
        jax.jit(_decode, static_argnames="steps", **donation),
        jax.jit(_decode_until, static_argnames="chunk", **donation),
    )


VALUE, DONATING = _programs(), _programs(donate_argnums=1)
"""With the cache as a value, and with its buffers used up."""


def prefill(
    model: Model, cache: Cache, tokens: Any, valid: Any = None, *, _run: Programs = VALUE
) -> tuple[Array, Cache]:
    """Feeds any number of tokens a row and gives the logits after the last.

    Prompts are padded to buckets (16, 32, 64, …), so that lengths of one bucket share a program. Above 1,024 (CPU: 512)
    slots attention goes in blocks of queries: temporary memory grows with S, not with S times the capacity.

    Args:
        model: any model.
        cache: stays usable.
        tokens: `[B, S]` int32, padded at the end; a cache that has tokens goes on from there.
        valid: `[B]` int32, how many of a row's tokens are real, or None for all. 0 leaves a row as it is; its logits
            mean nothing.

    Returns:
        Logits `[B, V]` and the cache.

    Raises:
        InputError: shapes or dtypes are wrong, `valid` is outside 0 to S, or an id is outside the vocabulary.
        CacheError: a row's tokens do not fit the capacity (on the host; under `jit` the row is flagged).
    """
    tokens, valid = check_tokens("prefill", model, cache, tokens, valid)
    if is_concrete(tokens) and is_concrete(valid):  # else the columns are all that can be asked for
        size = bucket(tokens.shape[1])
        tokens = np.pad(np.asarray(tokens), ((0, 0), (0, size - tokens.shape[1])))
    return _run.prefill(model, cache, tokens, valid)


def step(model: Model, cache: Cache, tokens: Any, *, _run: Programs = VALUE) -> tuple[Array, Cache]:
    """Feeds one token a row, for loops of one's own. Does not wait for the device: call `cache.check()` now and then.

    Args:
        model: any model.
        cache: stays usable.
        tokens: `[B]` int32.

    Returns:
        Logits `[B, V]` and the cache.

    Raises:
        InputError: `tokens` is not `[B]` whole numbers.
    """
    tokens = jnp.asarray(whole("step: tokens", tokens, ((cache.batch,),)))
    return _run.step(model, cache, tokens.astype(jnp.int32))


def decode(
    model: Model,
    cache: Cache,
    logits: Array,
    *,
    steps: int,
    sampler: Any = None,
    seed: Any = 0,
    starts: Any = None,
    _run: Programs = VALUE,
) -> tuple[Array, Array, Cache]:
    """A fixed number of steps in one `lax.scan`: each samples a token a row and feeds it.

    Args:
        model: any model.
        cache: stays usable.
        logits: `[B, V]`, for the first token, from `prefill`, `step` or `decode`.
        steps: static.
        sampler: see `kvjax.sampling`; None is greedy.
        seed: int, or one int a row; a seed samples the same alone and in any row.
        starts: `[B]` int32, tokens of each row that were given, for filters that count new ones; None: all so far.

    Returns:
        Tokens `[B, steps]`, -1 where none may be chosen (the row is flagged), logits `[B, V]` for the next, and the
        cache.

    Raises:
        InputError: shapes are wrong.
    """
    check_logits("decode", cache, logits)
    if steps < 1:
        raise InputError(f"decode: steps must be at least 1, not {steps}")
    chosen, starts = sampling.checked(sampler), _starts("decode", cache, starts)
    return _run.decode(model, cache, logits, chosen, seeds_of(seed, cache.batch), starts, steps=steps)


def decode_until(
    model: Model,
    cache: Cache,
    logits: Array,
    *,
    max_new_tokens: Any,
    stop_ids: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    sampler: Any = None,
    seed: Any = 0,
    starts: Any = None,
    logprobs: int | None = None,
    chunk: int = CHUNK,
    _run: Programs = VALUE,
) -> Progress:
    """Samples and feeds until every row has emitted what stops it or spent its budget, all on the device.

    Scans of `chunk` steps inside a `while_loop`: a scan cannot stop, so steps that no row needed are counted. It also
    ends when a row has no room left: `resize` the cache and go on.

    Args:
        model: any model.
        cache: stays usable.
        logits: `[B, V]`, for the first token.
        max_new_tokens: int, or one int32 a row.
        stop_ids: ids that end a row; the id itself is emitted and fed.
        stop_sequences: lists of ids that end a row when it has emitted all of one.
        sampler: see `kvjax.sampling`; None is greedy.
        seed: int, or one int a row.
        starts: `[B]` int32, tokens of each row that were given, for filters and sequences; None: all so far.
        logprobs: static; log-probabilities of so many of the most probable tokens, and of those chosen, are noted at
            their positions in `Progress.noted`; None notes nothing.
        chunk: static, steps between two looks at whether all rows are done.

    Returns:
        Where the loop stands; the emitted tokens are `cache.tokens[row, old length:new length]`.

    Raises:
        InputError: shapes or dtypes are wrong.
    """
    check_logits("decode_until", cache, logits)
    for name, value, least in (("chunk", chunk, 1), ("logprobs", 0 if logprobs is None else logprobs, 0)):
        count(f"decode_until: {name}", value, least)
    budget = jnp.asarray(whole("decode_until: max_new_tokens", max_new_tokens, ((), (cache.batch,))))
    most = jnp.iinfo(jnp.int32).max - cache.lengths  # "no limit" must not wrap around
    limits = cache.lengths + jnp.minimum(budget.astype(jnp.int32), most)
    starts = _starts("decode_until", cache, starts)
    noted = None if logprobs is None else Noted.empty(cache.batch, cache.capacity, logprobs, logits)
    state = Progress.begin(cache, logits, starts=starts, noted=noted)
    chosen = sampling.checked(sampler)
    seeds, stops = seeds_of(seed, cache.batch), stops_of("decode_until", stop_ids, stop_sequences)
    return _run.until(model, state, chosen, seeds, stops, limits, limits, np.int32(ALL), chunk=chunk)


def _starts(name: str, cache: Cache, starts: Any) -> Array | None:
    if starts is None:
        return None
    return jnp.asarray(whole(f"{name}: starts", starts, ((cache.batch,),)))


def seeds_of(seed: Any, batch: int) -> Array:
    """`[B]` uint32 from an int or one int a row.

    Raises:
        InputError: a seed is outside 0 to 2³² - 1, or there are not as many as rows.
    """
    if not is_concrete(seed):
        return jnp.broadcast_to(seed.astype(jnp.uint32), (batch,))
    values = array("seed", seed)
    if values.ndim > 1 or values.shape not in ((), (batch,)) or not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"seed: {seed!r} must be an int, or one a row for {batch} rows")
    if values.size and (values.min() < 0 or values.max() > 0xFFFFFFFF):
        raise InputError(f"seed: {seed!r} must lie between 0 and {0xFFFFFFFF}")
    return np.broadcast_to(values.astype(np.uint32), (batch,))  # type: ignore[return-value]


def check_logits(name: str, cache: Cache, logits: Array) -> None:
    """Raises InputError unless logits are `[B, V]`, of the cache's batch."""
    if logits.ndim != 2 or logits.shape[0] != cache.batch:
        raise InputError(f"{name}: logits {list(logits.shape)} must be [B, V] for a batch of {cache.batch}")


def check_tokens(name: str, model: Model, cache: Cache, tokens: Any, valid: Any) -> tuple[Any, Any]:
    """`tokens[B, S]` and `valid[B]` as int32.

    Raises:
        InputError: shapes or dtypes are wrong, `valid` is outside 0 to S, or an id is outside the vocabulary.
        CacheError: a row's tokens do not fit.
    """
    tokens = whole(f"{name}: tokens", tokens)
    tokens = np.asarray(tokens) if is_concrete(tokens) else tokens
    if tokens.ndim != 2 or tokens.shape[0] != cache.batch:
        raise InputError(
            f"{name}: tokens must be whole numbers [{cache.batch}, S], not {tokens.dtype}{list(tokens.shape)}"
        )
    b, s = tokens.shape
    if s < 1:
        raise InputError(f"{name}: tokens has no columns; feed at least one token")
    valid = check_valid(name, valid, b, s)
    check_ids(name, model.vocab_size, tokens, valid)
    if is_concrete(valid) and is_concrete(cache.lengths):
        most = np.inf if model.max_positions is None else model.max_positions
        room = np.asarray(cache.room)
        for row, (have, new) in enumerate(zip(np.asarray(cache.lengths), valid, strict=True)):
            if have + new > min(room[row], most):
                what = "capacity" if room[row] == cache.capacity else "room for"
                limit = f"{what} {room[row]}" if room[row] <= most else f"positions of the model {most}"
                raise CacheError(f"{name}: row {row} has length {have}, {new} more do not fit: {limit}")
    return tokens, valid


__all__ = [
    "prefill",
    "step",
    "decode",
    "decode_until",
    "Progress",
    "Programs",
    "VALUE",
    "DONATING",
    "bucket",
    "seeds_of",
]
