"""Speculative decoding on the device: drafts are fed to the model in one call, and each row keeps what it would have
said itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax import sampling, struct
from kvjax.caches.base import Cache, Span
from kvjax.caches.cross import Source
from kvjax.caches.flags import NAN, NO_TOKEN
from kvjax.caches.loosening import loosened
from kvjax.errors import InputError
from kvjax.loops.decode import Progress, back_to, flag_nan, flag_none
from kvjax.loops.drafters import Drafter
from kvjax.loops.noted import Noted
from kvjax.model import Model
from kvjax.sampling import Text
from kvjax.sampling.drawing import chosen, drawn, noisy
from kvjax.sampling.rejection import ACCEPT, DRAFT, accepts, probabilities, residual
from kvjax.stopping import Stops
from kvjax.types import Array

drafted_with = probabilities
"""What a draft was drawn with, `[B, V]` from its law: as exactly as the target's, or the law is another."""


@struct.node
class Tally(struct.Value):
    """What became of drafts, of each row; `[B]` int32.

    Args:
        calls: of the model for the row.
        proposed: drafts that were fed.
        tested: of these, the ones that were looked at: all up to the first that was not kept.
        kept: of these, the ones that became text.
        drafting: calls with a draft at all.
    """

    calls: Array
    proposed: Array
    tested: Array
    kept: Array
    drafting: Array

    @classmethod
    def none(cls, rows: int) -> Tally:
        """Of no call."""
        return cls(*(jnp.zeros((rows,), jnp.int32) for _ in range(5)))


@struct.node
class Speculation(struct.Value):
    """Where a speculative loop stands. What a row emitted is `cache.tokens[row, start:length]`, and then `pending`.

    Args:
        cache: of the model; everything emitted is fed but the last token.
        pending: `[B]` int32, emitted and not fed; -1 before the first.
        logits: `[B, V]`, for the first token of each row.
        draft: the drafter's state.
        stopped: `[B]` bool, rows that emitted what stops them.
        starts: `[B]` int32, tokens of each row that were given.
        tally: so far.
        wasted: int32, rounds that no row needed: a chunk runs to its end.
        noted: log-probabilities of the new tokens, or None where nobody asked.
        copies: rows next to each other that are of one prompt.
    """

    cache: Cache
    pending: Array
    logits: Array
    draft: Any
    stopped: Array
    starts: Array
    tally: Tally
    wasted: Array
    noted: Noted | None = None
    copies: int = struct.static(default=1)

    @property
    def emitted(self) -> Array:
        """`[B]` int32, tokens of each row, prompt included."""
        return self.cache.lengths + (self.pending >= 0).astype(jnp.int32)

    def done(self, ends: Array) -> Array:
        """`[B]` bool, rows that want no more: stopped, at their end, or flagged."""
        return self.stopped | (self.emitted >= ends) | (self.cache.flags != 0)

    def full(self, limits: Array, drafted: int) -> Array:
        """`[B]` bool, rows that have no room for so many drafts, and for what they emit, the last one fed as well."""
        return jnp.minimum(self.cache.lengths + 2 + drafted, limits) > self.cache.room


def begin(drafter: Drafter, progress: Progress, source: Source | None, *, drafted: int) -> Speculation:
    """From prefilled prompts; at most `drafted` drafts a call. Under `jit` only."""
    cache = loosened(flag_nan(progress.cache, progress.logits), drafted)
    starts = cache.lengths if progress.starts is None else jnp.asarray(progress.starts)
    return Speculation(
        cache,
        jnp.full((cache.batch,), -1, jnp.int32),
        progress.logits,
        drafter.begin(cache, source, drafted),
        jnp.asarray(progress.stopped),
        starts,
        Tally.none(cache.batch),
        jnp.zeros((), jnp.int32),
        progress.noted,
        progress.copies,
    )


def advance(
    model: Model,
    state: Speculation,
    drafter: Drafter,
    sampler: Any,
    seeds: Array,
    stops: Stops,
    limits: Array,
    ends: Array,
    chunks: Array,
    *,
    drafted: int,
    rounds: int,
    rejects: bool,
) -> Speculation:
    """At most `chunks` scans of `rounds` rounds, until all rows rest or one has no room. Under `jit` only.

    Args:
        model, state, drafter, sampler, seeds, stops: as they are.
        limits: `[B]` int32, lengths that filters see, and by which drafts are counted.
        ends: `[B]` int32, lengths at which rows rest, no longer. Up to there tokens do not depend on them.
        chunks: int32.
        drafted: static, drafts of a round.
        rounds: static, of a chunk.
        rejects: static; whether drawn drafts are kept or replaced so that the law is the sampler's. Otherwise they are
            kept where they are what the sampler gives with the key of their position: its own tokens come out.
    """
    keys = sampling.row_keys(seeds)
    state = _first(state, sampler, keys, stops, limits, ends)

    def one(state: Speculation, _: None) -> tuple[Speculation, None]:
        return _round(model, state, drafter, sampler, keys, stops, limits, ends, drafted, rejects), None

    def more(carry: tuple[Array, Speculation]) -> Array:
        wants = ~carry[1].done(ends)
        return (carry[0] < chunks) & jnp.any(wants) & ~jnp.any(wants & carry[1].full(limits, drafted))

    def run(carry: tuple[Array, Speculation]) -> tuple[Array, Speculation]:
        return carry[0] + 1, lax.scan(one, carry[1], None, length=rounds)[0]

    return lax.while_loop(more, run, (jnp.zeros((), jnp.int32), state))[1]


def _first(state: Speculation, sampler: Any, keys: Array, stops: Stops, limits: Array, ends: Array) -> Speculation:
    """Rows that have emitted nothing draw their first token."""
    cache, noted = state.cache, state.noted
    begins = (state.pending < 0) & ~state.done(ends)
    text = Text(cache.tokens, cache.lengths, state.starts, limits, stops.ids, copies=state.copies)
    tokens = drawn(sampler, state.logits, sampling.position_keys(keys, cache.lengths), text)
    cache = flag_none(cache, jnp.where(begins, tokens, 0))
    begins &= tokens >= 0
    if noted is not None:
        noted = noted.note(state.logits, tokens, jnp.where(begins, cache.lengths, cache.capacity))
    return state.replace(
        cache=cache,
        pending=jnp.where(begins, tokens, state.pending),
        stopped=state.stopped | (begins & stops.hit(text, tokens)),
        noted=noted,
    )


def _round(
    model: Model,
    state: Speculation,
    drafter: Drafter,
    sampler: Any,
    keys: Array,
    stops: Stops,
    limits: Array,
    ends: Array,
    drafted: int,
    rejects: bool,
) -> Speculation:
    cache, n, rows = state.cache, state.cache.lengths, jnp.arange(state.cache.batch)
    active = ~state.done(ends) & ~state.full(limits, drafted)
    # The last one emitted is not fed. Where a row rests changes no draft: what comes before must come again.
    most = jnp.where(active, jnp.clip(limits - n - 2, 0, drafted), 0)
    if cache.shared:  # of a pool of pages with too few for all the drafts nobody drafts: what is said needs them
        places = n[:, None] + jnp.arange(drafted + 1, dtype=jnp.int32)[None, :]
        refused = cache.reserve(Span(n, jnp.where(active, 1 + most, 0), places))[1]
        most = jnp.where(jnp.any(refused != 0), 0, most)
    tokens = cache.tokens.at[rows, jnp.where(active, n, cache.capacity)].set(state.pending, mode="drop")

    def text(tokens: Array, lengths: Array) -> Text:
        return Text(tokens, lengths, state.starts, limits, stops.ids, copies=state.copies)

    def choose(logits: Array, tokens: Array, lengths: Array) -> tuple[Array, Any]:
        at = sampling.position_keys(keys, lengths)
        if not rejects:
            return drawn(sampler, logits, at, text(tokens, lengths)), None
        law = sampler.law(logits, text(tokens, lengths))
        return chosen(noisy(law, jax.vmap(jax.random.fold_in, (0, None))(at, DRAFT))), law

    drafts = drafter.propose(model, cache, state.draft, tokens, most, active, drafted, choose)
    steps = jnp.arange(drafted, dtype=jnp.int32)[None, :]
    known = (drafts.tokens >= 0) & (drafts.tokens < state.logits.shape[1]) & (steps < most[:, None])
    count = jnp.sum(jnp.cumprod(known.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    fed = jnp.concatenate([state.pending[:, None], drafts.tokens], axis=1)
    x, taken = drafter.verify(model, cache, drafts, jnp.maximum(fed, 0), jnp.where(active, 1 + count, 0))
    logits = model.head(model.params, model.config, x)

    def look(walk: Walk, given: Any) -> tuple[Walk, None]:
        i, logits, draft, law = given
        return _look(walk, n + 1 + i, logits, i < count, draft, law, text, taken, sampler, keys, stops, ends), None

    begun = active & (taken.flags == 0)
    walk = Walk(begun, state.pending, n, jnp.zeros_like(n), jnp.zeros_like(n), state.stopped, taken.flags, state.noted)
    last = jnp.full((cache.batch, 1), -1, jnp.int32)
    laws = None
    if rejects:
        if drafts.laws is None:
            raise InputError(f"speculate: {type(drafter).__name__} gives no laws; say `drawn = False` of its drafts")
        laws = jnp.swapaxes(drafts.laws, 0, 1)
        laws = jnp.concatenate([laws, jnp.zeros_like(laws[:1])])  # of no draft, and not looked at
    given = (
        jnp.arange(drafted + 1, dtype=jnp.int32),
        jnp.swapaxes(logits, 0, 1),
        jnp.concatenate([drafts.tokens, last], axis=1).T,
        laws,
    )
    walk = lax.scan(look, walk, given)[0]
    tally = state.tally
    return state.replace(
        cache=back_to(taken.replace(flags=walk.flags), walk.lengths),
        pending=walk.last,
        draft=drafter.settle(drafts.state, walk.lengths),
        stopped=walk.stopped,
        wasted=state.wasted + jnp.all(~active).astype(jnp.int32),
        noted=walk.noted,
        tally=Tally(
            tally.calls + active,
            tally.proposed + count,
            tally.tested + walk.tested,
            tally.kept + walk.kept,
            tally.drafting + (count > 0),
        ),
    )


@struct.node
class Walk(struct.Value):
    """Rows on their way through their drafts.

    Args:
        going: `[B]` bool, rows whose drafts were all kept so far.
        last: `[B]` int32, emitted last.
        lengths: `[B]` int32, tokens before that one.
        tested, kept: see `Tally`.
        stopped, flags, noted: as they will be.
    """

    going: Array
    last: Array
    lengths: Array
    tested: Array
    kept: Array
    stopped: Array
    flags: Array
    noted: Noted | None


def _look(
    walk: Walk,
    at: Array,
    logits: Array,
    has: Array,
    draft: Array,
    law: Array | None,
    text: Any,
    taken: Cache,
    sampler: Any,
    keys: Array,
    stops: Stops,
    ends: Array,
) -> Walk:
    """One position further: what stands at `at[B]`, after `logits[B, V]`, where some rows have a draft."""
    here, key = text(taken.tokens, at), sampling.position_keys(keys, at)
    broken = walk.going & jnp.any(jnp.isnan(logits), axis=1)
    if law is None:
        token = drawn(sampler, logits, key, here)
        same = has & (token == draft)
    else:
        own = sampler.law(logits, here)
        p, q = probabilities(own), drafted_with(law)
        coins = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, ACCEPT), dtype=p.dtype))(key)
        same = has & accepts(p, q, draft, coins)
        left = jnp.where(has[:, None], jnp.log(residual(p, q)).astype(own.dtype), own)
        token = jnp.where(same, draft, chosen(noisy(left, key)))
    none = walk.going & ~broken & (token < 0)
    emits = walk.going & ~broken & ~none
    noted = walk.noted
    if noted is not None:
        noted = noted.note(logits, token, jnp.where(emits, at, taken.capacity))
    hit = emits & stops.hit(here, token)
    return Walk(
        emits & same & ~hit & (at + 1 < ends),
        jnp.where(emits, token, walk.last),
        jnp.where(emits, at, walk.lengths),
        walk.tested + (emits & has),
        walk.kept + (emits & same),
        walk.stopped | hit,
        walk.flags | jnp.where(broken, NAN, 0).astype(jnp.int32) | jnp.where(none, NO_TOKEN, 0).astype(jnp.int32),
        noted,
    )


__all__ = ["Speculation", "Tally", "begin", "advance"]
