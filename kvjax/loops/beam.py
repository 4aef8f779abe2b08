"""Beam search over any model and any kind of cache, on the device.

The rules, scores and stopping are those of Hugging Face Transformers 5 (`_beam_search` in generation/utils.py), row by
row: a prompt does not see when its neighbours end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax import struct
from kvjax.caches.base import Cache
from kvjax.checks import either, is_concrete, whole
from kvjax.errors import CacheError, InputError
from kvjax.loops import decode as loop
from kvjax.loops.algorithms import Wanted, resized
from kvjax.loops.feed import feed, finish
from kvjax.loops.prompts import fed, padded
from kvjax.model import Model
from kvjax.sampling import Text
from kvjax.sampling.drawing import filtered, own
from kvjax.stopping import Stops, stops_of
from kvjax.types import Array


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
        starts: `[B]` int32, tokens of the prompts: what comes after them counts in the length of a text.
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
    limits: Array
    done: Array
    steps: Array
    wasted: Array

    @classmethod
    def begin(cls, cache: Cache, logits: Array, *, width: int, max_new_tokens: Any) -> Beams:
        """From prompts that were prefilled once: `cache` of B rows and `logits[B, V]`, which stay usable.

        Args:
            cache: forked, `width` rows for each of its own.
            logits: for the first token.
            width: W, static.
            max_new_tokens: int, or one int32 a prompt; a prompt with 0 is done, with itself as the only text.

        Raises:
            InputError: shapes, dtypes or `width` are wrong.
        """
        loop.check_logits("Beams.begin", cache, logits)
        budget = jnp.asarray(whole("Beams.begin: max_new_tokens", max_new_tokens, ((), (cache.batch,))))
        most = jnp.iinfo(jnp.int32).max - cache.lengths  # "no limit" must not wrap around
        limits = cache.lengths + jnp.minimum(budget.astype(jnp.int32), most)
        return _begun(cache, logits, cache.lengths, limits, cache.lengths >= limits, width=whole_width(width))

    @property
    def reached(self) -> Array:
        """`[B]` int32, tokens of each prompt's running beams, which are equally long; prompt included."""
        return self.cache.lengths[:: self.running.shape[1]]

    def resize(self, capacity: int) -> Beams:
        """The same with room for `capacity` tokens a row.

        Raises:
            CacheError: a row is longer than `capacity`.
        """
        grown = self.cache.resize(capacity)
        rest = ((0, 0), (0, 0), (0, max(capacity - self.cache.capacity, 0)))
        return self.replace(cache=grown, texts=jnp.pad(self.texts[..., :capacity], rest, constant_values=-1))


@functools.partial(jax.jit, static_argnames="width")
def _begun(cache: Cache, logits: Array, starts: Any, limits: Any, done: Any, *, width: int) -> Beams:
    dtype = jnp.promote_types(jnp.float32, logits.dtype)
    cache, rows = loop.flag_nan(cache, logits), (cache.batch, width)
    first = jnp.arange(width)[None, :] == 0
    none, some = jnp.zeros((), jnp.int32), jnp.where(first, 0, -jnp.inf)
    beams = Beams(
        cache.fork(width),
        jnp.repeat(logits, width, axis=0),
        jnp.broadcast_to(some, rows).astype(dtype),
        jnp.broadcast_to(cache.tokens[:, None], (*rows, cache.capacity)),
        jnp.broadcast_to(cache.lengths[:, None], rows),
        jnp.where(done[:, None], some, -jnp.inf).astype(dtype),
        starts,
        limits,
        done | (cache.flags != 0),
        none,
        none,
    )
    # Nothing in common with the prompts' cache: a loop donates what it is given.
    return jax.tree.map(jnp.copy, beams)


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
    show at `beams.cache.check()`, where row p · W + w is beam w of prompt p.

    Args:
        model: any model.
        beams: from `Beams.begin` or an earlier call; stay usable.
        stop_ids: ids that end a text, itself included.
        stop_sequences: lists of ids that end a text when it has all of one.
        filters: of `kvjax.sampling`; they see log-probabilities, and what they leave is summed.
        length_penalty: float; a score is the sum of log-probabilities over the number of tokens to this power.
        early_stopping: bool. True: a prompt is done when it has W finished texts. False: when moreover its best
            running beam, were it to end now, would not be among them.
        chunk: static, steps between two looks at whether all prompts are done.

    Returns:
        Where the search stands.

    Raises:
        InputError: `stop_ids` are no ids, or `chunk` is less than 1.
    """
    if chunk < 1:
        raise InputError(f"beam_search: chunk must be at least 1, not {chunk}")
    numbers, stops = _numbers(length_penalty, early_stopping), stops_of("beam_search", stop_ids, stop_sequences)
    chosen = tuple(own(each) for each in filters)
    return VALUE(model, beams, *numbers, stops, chosen, np.int32(loop.ALL), chunk=chunk)


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
    room = beams.cache.capacity

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
    rests = beams.done | (beams.reached >= cache.capacity)
    count = beams.reached - beams.starts + 1  # [B], new tokens with this one
    last = beams.reached + 1 >= beams.limits
    starts, limits = (jnp.repeat(x, w) for x in (beams.starts, beams.limits))
    text = Text(cache.tokens, cache.lengths, starts, limits, stops.ids, copies=w)
    each = filtered(filters, jax.nn.log_softmax(beams.logits.astype(minus.dtype), axis=-1), text)
    total = each.reshape(b, w, v) + beams.running[:, :, None]

    # The W best that go on, and the W best that end: between them are the W best of all.
    ends = stops.ends(text, v).reshape(b, w, v)
    going, at = lax.top_k(jnp.where(ends, minus, total).reshape(b, w * v), w)
    ending, last_at = lax.top_k(jnp.where(ends, total, minus).reshape(b, w * v), w)
    every, places = (jnp.concatenate(pair, axis=1) for pair in ((going, ending), (at, last_at)))
    best, which = lax.top_k(every, w)
    ended = ((which >= w) | last[:, None]) & ~rests[:, None]
    new = jnp.where(ended, best / count.astype(minus.dtype)[:, None] ** penalty.astype(minus.dtype), minus)

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

    # A beam that went on now might end with the score that it has.
    hope = going[:, 0] / count.astype(minus.dtype) ** penalty.astype(minus.dtype)
    enough = (hope <= scores[:, -1]) | (early & (scores[:, -1] > minus))
    done = beams.done | (~rests & (last | enough))

    rows = jnp.where(rests[:, None], jnp.arange(w)[None, :], at // v) + w * jnp.arange(b)[:, None]
    fed = jnp.repeat(~rests & ~done, w)
    cache = cache.reorder(rows.reshape(-1).astype(jnp.int32))
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


def whole_width(width: Any) -> int:
    """`width` as it is.

    Raises:
        InputError: no whole number of at least 1.
    """
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise InputError(f"beam: width must be a whole number of at least 1, not {width!r}")
    return width


def _numbers(penalty: Any, early: Any) -> tuple[Any, Any]:
    # Of one dtype whatever is given, so that another number compiles nothing.
    pairs = (penalty, jnp.result_type(float)), (early, bool)
    return tuple((np if is_concrete(x) else jnp).asarray(x, dtype) for x, dtype in pairs)  # type: ignore[return-value]


# ---------------------------------------------------------------- for `generate`


@dataclasses.dataclass(frozen=True)
class Beam:
    """See `beam`."""

    width: int
    length_penalty: float
    early_stopping: bool
    returned: int

    def begin(self, progress: loop.Progress, wanted: Wanted) -> Searching:
        """See `Algorithm`."""
        done = np.asarray(progress.stopped) | (np.asarray(progress.cache.lengths) >= wanted.limits)
        starts = progress.starts
        beams = _begun(progress.cache, progress.logits, starts, wanted.limits, done, width=self.width)
        return Searching(progress, beams, self, wanted)


def beam(width: int, *, length_penalty: float = 1.0, early_stopping: bool = False, returned: int = 1) -> Beam:
    """Beam search, for `generate(algorithm=…)`: the rules and scores of Hugging Face Transformers.

    What a folder's generation_config.json asks of every text (`LM.filters`: a forced last token, no repeated n-grams,
    least lengths and so on) is applied, to log-probabilities as there; its `num_beams`, `length_penalty` and
    `early_stopping` are not: give them yourself.

    Only `width` compiles. A width above the vocabulary's size is fine: there are as many beams as there are texts.

    Args:
        width: W, beams of each prompt.
        length_penalty: a score is the sum of log-probabilities over the number of tokens to this power; 0 is the sum.
        early_stopping: True ends a prompt when it has W finished texts; False goes on while its best running beam,
            were it to end now, would be among them.
        returned: how many of the best are `Generated.candidates`, at most W.

    Raises:
        InputError: a number is no number or out of range.
    """
    whole_width(width)
    if not isinstance(returned, int) or isinstance(returned, bool) or not 1 <= returned <= width:
        raise InputError(f"beam: returned must be a whole number from 1 to the width {width}, not {returned!r}")
    if not isinstance(length_penalty, int | float) or not math.isfinite(length_penalty):
        raise InputError(f"beam: length_penalty must be a finite number, not {length_penalty!r}")
    return Beam(width, float(length_penalty), either("beam: early_stopping", early_stopping), returned)


@dataclasses.dataclass(frozen=True, eq=False)
class Searching:
    """See `UnderWay`.

    Args:
        first: the prompts, prefilled once, before they were forked.
        beams: where the search stands.
        beam: its numbers.
        wanted: see `Algorithm.begin`.
    """

    first: loop.Progress
    beams: Beams
    beam: Beam
    wanted: Wanted

    grows = False

    def look(self) -> tuple[np.ndarray, np.ndarray, int]:
        """See `UnderWay`."""
        width = self.beam.width
        try:
            cache = self.beams.cache.check()
        except CacheError as error:
            raise CacheError(f"beam search, where {width} rows are one prompt: {error}") from None
        return np.asarray(cache.lengths)[::width], ~np.asarray(self.beams.done), cache.capacity

    def grow(self, capacity: int) -> Searching:
        """See `UnderWay`."""
        return dataclasses.replace(self, beams=resized(self.beams, capacity=capacity))

    def advance(self, model: Model, chunks: int) -> Searching:
        """See `UnderWay`."""
        numbers, wanted = _numbers(self.beam.length_penalty, self.beam.early_stopping), self.wanted
        beams = DONATING(
            model, self.beams, *numbers, wanted.stops, wanted.filters, np.int32(chunks), chunk=wanted.every
        )
        return dataclasses.replace(self, beams=beams)

    def count(self) -> tuple[int, int]:
        """See `UnderWay`."""
        return int(self.beams.steps), int(self.beams.wasted)

    def texts(self) -> list[list[int]]:
        """See `UnderWay`. The best finished one, or where there is none the best that runs."""
        best = [row[0][0] if row else None for row in self.ranked()]
        running = fed(self.beams.cache)[:: self.beam.width]
        return [going if done is None else done for done, going in zip(best, running, strict=True)]

    def end(self, model: Model) -> tuple[Cache, Array]:
        """See `UnderWay`. The best are fed to what the prompts left: no cache was kept of each finished text."""
        begins, texts = fed(self.first.cache), self.texts()
        tokens, valid = padded([text[len(begin) :] for text, begin in zip(texts, begins, strict=True)])
        cache, capacity = self.first.cache, self.beams.cache.capacity
        cache = cache if cache.capacity == capacity else resized(cache, capacity=capacity)
        logits, cache = _fed(model, cache, self.first.logits, tokens, valid)
        return cache.check(), logits

    def noted(self) -> None:
        """See `UnderWay`."""

    def ranked(self) -> list[list[tuple[list[int], float]]]:
        """See `UnderWay`."""
        texts, lengths, scores = (np.asarray(x) for x in (self.beams.texts, self.beams.lengths, self.beams.scores))
        each = (zip(*row, strict=True) for row in zip(texts, lengths, scores, strict=True))
        found = [[(ids[:n].tolist(), float(score)) for ids, n, score in row if np.isfinite(score)] for row in each]
        return [row[: self.beam.returned] for row in found]


@jax.jit
def _fed(model: Model, cache: Cache, logits: Array, tokens: Array, valid: Array) -> tuple[Array, Cache]:
    new, cache = loop.prefill(model, cache, tokens, valid)
    return jnp.where((valid > 0)[:, None], new, logits), cache


__all__ = ["Beam", "Beams", "beam", "beam_search", "Searching"]
