"""Speculative decoding on the device: drafts are fed to the model in one call, and each row keeps what it would have
said itself."""

from __future__ import annotations

from typing import Any, NamedTuple

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
        rounds, wasted: int32, rounds so far that some row needed, and that none did: a chunk runs to its end.
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
    rounds: Array
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

    at = n[None, :] + jnp.arange(1, drafted + 2, dtype=jnp.int32)[:, None]  # [n + 1, B], where each token will stand
    has = jnp.arange(drafted + 1, dtype=jnp.int32)[:, None] < count[None, :]
    given = jnp.concatenate([drafts.tokens.T, jnp.full((1, cache.batch), -1, jnp.int32)])
    laws = None
    if rejects:
        if drafts.laws is None:
            raise InputError(f"speculate: {type(drafter).__name__} gives no laws; say `drawn = False` of its drafts")
        laws = jnp.swapaxes(drafts.laws, 0, 1)
        laws = jnp.concatenate([laws, jnp.zeros_like(laws[:1])])  # of no draft, and not looked at

    def judged(logits: Array, at: Array, draft: Array, law: Array | None) -> Judged:
        here, key = text(taken.tokens, at), sampling.position_keys(keys, at)
        token = drawn(sampler, logits, key, here) if law is None else draft
        same = token == draft if law is None else _kept(sampler.law(logits, here), law, draft, key)
        return Judged(token, same, stops.hit(here, token), jnp.isnan(jnp.max(logits, axis=1)))

    made = jax.vmap(judged, in_axes=(1, 0, 0, 0))(logits, at, given, laws)
    same = made.same & has
    on = same & ~made.hit & ~made.broken & (made.tokens >= 0) & (at + 1 < ends[None, :])
    begun = active & (taken.flags == 0)
    # A row goes as far as its drafts are kept; there one more token is its own, or a draft that ends it.
    far = jnp.sum(jnp.cumprod(on[:-1].astype(jnp.int32), axis=0), axis=0, dtype=jnp.int32)
    pick = lambda x: jnp.take_along_axis(x, far.reshape(1, -1, *(1,) * (x.ndim - 2)), axis=0)[0]  # noqa: E731
    token, here = pick(made.tokens), text(taken.tokens, pick(at))
    if laws is not None:
        key = sampling.position_keys(keys, pick(at))
        own = _replaced(sampler.law(logits[rows, far], here), pick(laws), pick(has), key)
        token = jnp.where(pick(same), token, own)
    broken, none = begun & pick(made.broken), begun & ~pick(made.broken) & (token < 0)
    good = begun & ~broken & ~none
    before = jnp.take_along_axis(fed, far[:, None], axis=1)[:, 0]  # the last of the drafts that were kept, if any
    new = jnp.where(begun, far + good.astype(jnp.int32), 0)
    noted = state.noted
    for i in range(drafted + 1):
        said = jnp.where(i < far, given[i], token)
        place = jnp.where(i < new, at[i], cache.capacity)
        noted = None if noted is None else noted.note(logits[:, i], said, place)
    flags = taken.flags | jnp.where(broken, NAN, 0) | jnp.where(none, NO_TOKEN, 0)
    tally, some = state.tally, begun.astype(jnp.int32)
    return state.replace(
        cache=back_to(taken.replace(flags=flags.astype(jnp.int32)), n + new),
        pending=jnp.where(good, token, jnp.where(begun, before, state.pending)),
        draft=drafter.settle(drafts.state, n + new),
        stopped=state.stopped | (good & stops.hit(here, token)),
        rounds=state.rounds + jnp.any(active).astype(jnp.int32),
        wasted=state.wasted + jnp.all(~active).astype(jnp.int32),
        noted=noted,
        tally=Tally(
            tally.calls + active,
            tally.proposed + count,
            tally.tested + some * far + (good & pick(has)),
            tally.kept + some * far + (good & pick(same)),
            tally.drafting + (count > 0),
        ),
    )


class Judged(NamedTuple):
    """What the model says at one position of each row, `[B]`: a token (of a law, the draft), whether that is the draft,
    whether it stops the row, and whether the logits were no numbers."""

    tokens: Array
    same: Array
    hit: Array
    broken: Array


def _kept(own: Array, law: Array, drafts: Array, keys: Array) -> Array:
    """`[B]` bool, which drafts of `law[B, V]` are kept by the law `own[B, V]`."""
    p, q = probabilities(own), drafted_with(law)
    coins = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, ACCEPT), dtype=p.dtype))(keys)
    return accepts(p, q, drafts, coins)


def _replaced(own: Array, law: Array, has: Array, keys: Array) -> Array:
    """`[B]` int32, what takes the place of a draft of `law[B, V]` in rows that `has[B]` says have one."""
    left = jnp.log(residual(probabilities(own), drafted_with(law))).astype(own.dtype)
    return chosen(noisy(jnp.where(has[:, None], left, own), keys))


__all__ = ["Speculation", "Tally", "begin", "advance"]
