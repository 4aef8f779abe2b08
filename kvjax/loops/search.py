"""Beam search over any model and any kind of cache, on the device. A prompt is kept once; what its beams add moves.

The rules, scores and stopping are those of Hugging Face Transformers 5 (`_beam_search` in generation/utils.py), row by
row: a prompt does not see when its neighbours end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax import struct
from kvjax.caches.base import Cache
from kvjax.caches.branches import ROOM, repeated
from kvjax.caches.flags import NO_TOKEN
from kvjax.checks import count, is_concrete, whole
from kvjax.errors import CacheError, InputError
from kvjax.loops import decode as loop
from kvjax.loops.feed import feed, finish
from kvjax.model import Model
from kvjax.sampling import Text
from kvjax.sampling.drawing import filtered, own
from kvjax.stopping import Stops, stops_of
from kvjax.types import Array

RULES = {False: 0, True: 1, "never": 2}
"""When a prompt is done (`early_stopping`), as a number on the device."""


@struct.node
class Beams(struct.Value):
    """Where a beam search stands: W beams of each of B prompts, a prompt's beams side by side.

    Args:
        cache: of B · W rows; what the running beams emitted is fed.
        logits: `[B * W, V]`, for the next token of each.
        running: `[B, W]`, sum of a running beam's log-probabilities, best first; -inf where there is none.
        texts: `[B, W, T]` int32, the finished ones, prompt included, -1 past their end.
        lengths: `[B, W]` int32, tokens of each finished one, prompt included.
        scores: `[B, W]`, of the finished ones, best first: sums of log-probabilities divided by a power of how many
            were summed; -inf where there is none. At least float32.
        starts: `[B]` int32, tokens of the prompts: for filters and stop sequences, new ones begin there.
        scored: `[B]` int32, the same for the length of a text: more where a search goes on from an earlier generation.
        limits: `[B]` int32, tokens that a text may have, prompt included.
        done: `[B]` bool, prompts that want no more.
        steps: int32, taken so far.
        wasted: int32, of these the ones that no prompt needed: a chunk runs to its end.
    """

    cache: Cache
    logits: Array
    running: Array
    texts: Array
    lengths: Array
    scores: Array
    starts: Array
    scored: Array
    limits: Array
    done: Array
    steps: Array
    wasted: Array

    @classmethod
    def begin(cls, cache: Cache, logits: Array, *, width: int, max_new_tokens: Any, room: int = ROOM) -> Beams:
        """From prompts that were prefilled once: `cache` of B rows and `logits[B, V]`, which stay usable.

        Args:
            cache: copied once, and `width` rows go on from each of its own (`kvjax.branched`); where a kind sees more
                than its own tokens, `width` rows are made of each (`Cache.fork`).
            logits: for the first token.
            width: W, static.
            max_new_tokens: int, or one int32 a prompt; a prompt with 0 is done, with itself as the only text.
            room: tokens that a beam can add before a `resize`, static.

        Raises:
            InputError: shapes, dtypes or `width` are wrong.
        """
        loop.check_logits("Beams.begin", cache, logits)
        budget = jnp.asarray(whole("Beams.begin: max_new_tokens", max_new_tokens, ((), (cache.batch,))))
        most = jnp.iinfo(jnp.int32).max - cache.lengths  # "no limit" must not wrap around
        limits = cache.lengths + jnp.minimum(budget.astype(jnp.int32), most)
        given = cache.lengths, cache.lengths, limits, cache.lengths >= limits
        return _begun(cache, logits, *given, width=count("beam: width", width), room=room)

    @property
    def reached(self) -> Array:
        """`[B]` int32, tokens of each prompt's running beams, which are equally long; prompt included."""
        return self.cache.lengths[:: self.running.shape[1]]

    @property
    def room(self) -> Array:
        """`[B]` int32, tokens that the running beams of each prompt can have; prompt included."""
        return self.cache.room[:: self.running.shape[1]]

    def resize(self, capacity: int) -> Beams:
        """The same with another capacity; `cache.doubled` is one with twice the room for what beams add.

        Raises:
            CacheError: a row is longer than it then can be, or a finished text than `capacity`.
        """
        grown = self.cache.resize(capacity)
        if is_concrete(self.lengths) and (longest := int(np.asarray(self.lengths).max())) > capacity:
            raise CacheError(f"resize: capacity {capacity} is less than the length {longest} of a finished text")
        rest = ((0, 0), (0, 0), (0, max(capacity - self.cache.capacity, 0)))
        return self.replace(cache=grown, texts=jnp.pad(self.texts[..., :capacity], rest, constant_values=-1))


def begin(
    cache: Cache, logits: Array, starts: Any, scored: Any, limits: Any, done: Any, *, width: int, room: int
) -> Beams:
    """See `Beams.begin`; `starts` to `done` are `[B]`, as `Beams` has them. Under `jit` only."""
    dtype = jnp.promote_types(jnp.float32, logits.dtype)
    live = jnp.arange(cache.capacity)[None, :] < cache.lengths[:, None]
    cache = cache.replace(tokens=jnp.where(live, cache.tokens, -1))  # a rewind leaves ids behind
    cache, rows = loop.flag_nan(cache, logits), (cache.batch, width)
    first = jnp.arange(width)[None, :] == 0
    none, some = jnp.zeros((), jnp.int32), jnp.where(first, 0, -jnp.inf)
    many = repeated(cache, width, room=room)
    return Beams(
        many,
        jnp.repeat(logits, width, axis=0),
        jnp.broadcast_to(some, rows).astype(dtype),
        many.tokens.reshape(*rows, -1),
        jnp.broadcast_to(cache.lengths[:, None], rows),
        jnp.where(done[:, None], some, -jnp.inf).astype(dtype),
        jnp.asarray(starts),
        jnp.asarray(scored),
        jnp.asarray(limits),
        done | (cache.flags != 0),
        none,
        none,
    )


@functools.partial(jax.jit, static_argnames=("width", "room"))
def _begun(cache: Cache, *given: Any, width: int, room: int) -> Beams:
    # Nothing in common with the prompts' cache: a loop donates what it is given.
    return jax.tree.map(jnp.copy, begin(cache, *given, width=width, room=room))


def beam_search(
    model: Model,
    beams: Beams,
    *,
    stop_ids: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    filters: Sequence[Any] = (),
    length_penalty: Any = 1.0,
    early_stopping: Any = False,
    chunk: int = loop.CHUNK,
) -> Beams:
    """Goes on until every prompt is done, all on the device.

    Each step sums log-probabilities, keeps the W best texts that go on, and puts those of the W best that end with a
    stop id, or at their budget, among the finished ones. Scans of `chunk` steps inside a `while_loop`. It also ends
    when a prompt has no room left (`done` is not all true): `resize` and go on. For loops of one's own: flags of rows
    show at `beams.cache.check()`, where row p · W + w is beam w of prompt p. A prompt none of whose texts can go on or
    end, because filters left no token, is flagged.

    Args:
        model: any model.
        beams: from `Beams.begin` or an earlier call; stay usable.
        stop_ids: ids that end a text, itself included.
        stop_sequences: lists of ids that end a text when it has all of one.
        filters: of `kvjax.sampling`; they see log-probabilities, and what they leave is summed.
        length_penalty: float; a score is the sum of log-probabilities over the number of tokens to this power.
        early_stopping: True: a prompt is done when it has W finished texts. False: when moreover its best running beam,
            were it to end now, would not be among them. "never": when no running beam could be among them, however it
            went on within its budget.
        chunk: static, steps between two looks at whether all prompts are done.

    Returns:
        Where the search stands.

    Raises:
        InputError: `stop_ids` are no ids, `filters` no filters, `length_penalty` is no finite number, `early_stopping`
            none of the three, or `chunk` less than 1.
    """
    if chunk < 1:
        raise InputError(f"beam_search: chunk must be at least 1, not {chunk}")
    how, stops = numbers(length_penalty, early_stopping), stops_of("beam_search", stop_ids, stop_sequences)
    chosen = owned("beam_search", filters)
    return VALUE(model, beams, *how, stops, chosen, np.int32(loop.ALL), chunk=chunk)


def _search(
    model: Model,
    beams: Beams,
    penalty: Array,
    early: Array,
    stops: Stops,
    filters: tuple[Any, ...],
    chunks: Array,
    chunk: int,
) -> Beams:
    # at most `chunks` scans of `chunk` steps
    room = beams.room

    def one(beams: Beams, _: None) -> tuple[Beams, None]:
        return _step(model, beams, penalty, early, stops, filters), None

    def more(carry: tuple[Array, Beams]) -> Array:
        wants = ~carry[1].done
        return (carry[0] < chunks) & jnp.any(wants) & ~jnp.any(wants & (carry[1].reached >= room))

    def run(carry: tuple[Array, Beams]) -> tuple[Array, Beams]:
        return carry[0] + 1, lax.scan(one, carry[1], None, length=chunk)[0]

    return lax.while_loop(more, run, (jnp.zeros((), jnp.int32), beams))[1]


def _step(model: Model, beams: Beams, penalty: Array, early: Array, stops: Stops, filters: tuple[Any, ...]) -> Beams:
    cache, (b, w) = beams.cache, beams.running.shape
    v, minus = beams.logits.shape[-1], jnp.asarray(-jnp.inf, beams.running.dtype)
    rests = beams.done | (beams.reached >= beams.room)
    made = beams.reached - beams.scored + 1  # [B], new tokens with this one
    last = beams.reached + 1 >= beams.limits
    starts, limits = (jnp.repeat(x, w) for x in (beams.starts, beams.limits))
    text = Text(cache.tokens, cache.lengths, starts, limits, stops.ids, copies=w)
    each = filtered(filters, jax.nn.log_softmax(beams.logits.astype(minus.dtype), axis=-1), text)
    total = each.reshape(b, w, v) + beams.running[:, :, None]

    # The W best that go on, and the W best that end: between them are the W best of all.
    ends = stops.ends(text, v).reshape(b, w, v)
    # Without the barrier XLA:CPU sorts W · V numbers for one of the two (jax 0.7.2 to 0.12.0; tests/test_beam.py).
    chosen = (lax.top_k(jnp.where(x, minus, total).reshape(b, w * v), w) for x in (ends, ~ends))
    (going, at), (ending, last_at) = lax.optimization_barrier(tuple(chosen))
    every, places = (jnp.concatenate(pair, axis=1) for pair in ((going, ending), (at, last_at)))
    best, which = lax.top_k(every, w)
    ended = ((which >= w) | last[:, None]) & ~rests[:, None]
    new = jnp.where(
        ended & (best > minus), best / made.astype(minus.dtype)[:, None] ** penalty.astype(minus.dtype), minus
    )

    # The W best of the old and the new finished texts.
    scores, kept = lax.top_k(jnp.concatenate([beams.scores, new], axis=1), w)
    places = jnp.take_along_axis(places, which, axis=1)
    parent, token = places // v, (places % v).astype(jnp.int32)
    texts = jnp.take_along_axis(cache.tokens.reshape(b, w, -1), parent[:, :, None], axis=1)
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)[None, None, :]
    texts = jnp.where(slots == beams.reached[:, None, None], token[:, :, None], texts)
    texts = jnp.take_along_axis(jnp.concatenate([beams.texts, texts], axis=1), kept[:, :, None], axis=1)
    now = jnp.broadcast_to(beams.reached[:, None] + 1, (b, w))
    lengths = jnp.take_along_axis(jnp.concatenate([beams.lengths, now], axis=1), kept, axis=1)

    # What the best running beam may come to: a sum only falls, and where longer texts score higher, the longest may.
    power, longest = penalty.astype(minus.dtype), jnp.where((early == RULES["never"]) & (penalty > 0), beams.limits, 0)
    length = jnp.maximum(made, longest - beams.scored).astype(minus.dtype)
    enough = (going[:, 0] / length**power <= scores[:, -1]) | ((early == RULES[True]) & (scores[:, -1] > minus))
    done = beams.done | (~rests & (last | enough))
    stuck = ~rests & jnp.isneginf(best[:, 0]) & jnp.isneginf(scores[:, 0])

    rows = jnp.where(rests[:, None], jnp.arange(w)[None, :], at // v) + w * jnp.arange(b)[:, None]
    fed = jnp.repeat(~rests & ~done, w)
    cache = cache.reorder(rows.reshape(-1).astype(jnp.int32)) if w > 1 else cache
    cache = cache.replace(flags=cache.flags | jnp.where(jnp.repeat(stuck, w), NO_TOKEN, 0).astype(jnp.int32))
    valid = fed.astype(jnp.int32)
    x, cache = feed(model, cache, (at % v).reshape(-1, 1).astype(jnp.int32), valid)
    logits, cache = finish(model, cache, x, valid)
    broken = jnp.any((cache.flags != 0).reshape(b, w), axis=1)
    return beams.replace(
        cache=cache,
        logits=jnp.where(fed[:, None], logits[:, 0], beams.logits),
        running=jnp.where(rests[:, None], beams.running, going),
        texts=texts,
        lengths=lengths,
        scores=scores,
        done=done | broken,
        steps=beams.steps + 1,
        wasted=beams.wasted + jnp.all(rests).astype(jnp.int32),
    )


VALUE = jax.jit(_search, static_argnames="chunk")
DONATING = jax.jit(_search, static_argnames="chunk", donate_argnums=1)
"""With the beams as a value, and with their buffers used up."""


def owned(name: str, filters: Any) -> tuple[Any, ...]:
    """`filters` as samplers have them.

    Raises:
        InputError: no sequence of filters.
    """
    if not isinstance(filters, list | tuple):
        raise InputError(f"{name}: filters must be a list or tuple of them, not {filters!r}")
    return tuple(own(each) for each in filters)


def rule_of(early: Any) -> int:
    """The number of `early_stopping`.

    Raises:
        InputError: neither True, False nor "never".
    """
    if not isinstance(early, bool | str) or early not in RULES:
        raise InputError(f'beam: early_stopping must be True, False or "never", not {early!r}')
    return RULES[early]


def numbers(penalty: Any, early: Any) -> tuple[Any, Any]:
    """Length penalty and rule, of one dtype whatever is given, so that another number compiles nothing.

    Raises:
        InputError: the penalty is no finite number, or there is no such rule.
    """
    if np.shape(penalty) or (is_concrete(penalty) and not np.isfinite(penalty)):
        raise InputError(f"beam: length_penalty must be a finite number, not {penalty!r}")
    dtype = jnp.result_type(float)
    return (np if is_concrete(penalty) else jnp).asarray(penalty, dtype), np.int32(rule_of(early))


__all__ = ["Beams", "beam_search", "begin", "DONATING", "VALUE", "owned", "rule_of"]
__all__ += ["numbers"]
