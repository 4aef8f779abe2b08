"""Speculative decoding for `generate(algorithm=…)`: the loop on the device is in `kvjax.loops.verified`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import costs
from kvjax.caches.base import Cache
from kvjax.caches.flags import meaning
from kvjax.caching import encode
from kvjax.errors import CacheError, InputError
from kvjax.loops import verified
from kvjax.loops.algorithms import Wanted
from kvjax.loops.decode import Progress, prefill
from kvjax.loops.drafters import Drafter
from kvjax.loops.noted import Noted
from kvjax.loops.prompts import fed, padded
from kvjax.loops.verified import Speculation, Tally
from kvjax.model import Model
from kvjax.sampling.drawing import draws
from kvjax.types import Array

DRAFTED = (1, 2, 4, 8)
"""Numbers of drafts that a round may have: one program each."""

FIRST = 4
"""With which it begins, before anything was measured."""

CHECKED = {"cpu": 0.25}
"""What one more position costs the model in a call of few, in steps, by platform: the estimate by which drafts are
chosen. Of a small model, measured by `benchmarks/speculative.py`; elsewhere a position more costs next to nothing."""

LOOK = 4
"""Chunks before the first choice of a number of drafts; twice as many before the next."""


@dataclasses.dataclass(frozen=True, eq=False)
class Speculated:
    """What drafts were worth, on the host.

    Args:
        calls: `[B]`, of the model after the prompt.
        proposed: `[B]`, drafts that were fed.
        tested: `[B]`, drafts up to the first of a call that was not kept, that one included.
        kept: `[B]`, drafts that became text.
        drafting: `[B]`, calls with a draft at all.
        tokens: `[B]`, new tokens.
        rounds: by number of drafts, rounds that ran.
    """

    calls: np.ndarray
    proposed: np.ndarray
    tested: np.ndarray
    kept: np.ndarray
    drafting: np.ndarray
    tokens: np.ndarray
    rounds: dict[int, int]

    @property
    def acceptance(self) -> float:
        """α, the share of tested drafts that were kept; NaN where none was tested."""
        return float(self.kept.sum() / self.tested.sum()) if self.tested.sum() else float("nan")

    @property
    def tokens_per_call(self) -> float:
        """New tokens of a row for each call of the model; the first comes with the prompt and is left out."""
        made = np.maximum(self.tokens - 1, 0).sum()
        return float(made / self.calls.sum()) if self.calls.sum() else float("nan")


@dataclasses.dataclass(frozen=True, eq=False)
class Speculate:
    """See `speculate`."""

    drafter: Any
    drafted: int | None
    same_tokens: bool

    draws = True

    def begin(self, progress: Progress, wanted: Wanted) -> Speculating:
        """See `Algorithm`.

        Raises:
            InputError: the drafter does not fit the model, or there are no sources for it to read.
        """
        most = max(DRAFTED) if self.drafted is None else self.drafted
        self.drafter.check(wanted.model)
        sampler = wanted.drawing
        rejects = self.drafter.drawn and draws(sampler) and not self.same_tokens
        source, own = None, self.drafter.encoder
        if own is not None:
            if wanted.sources is None:
                raise InputError("draft_model: the draft attends to sources, which are known with prompts, not after=")
            source = encode(own, *padded(wanted.sources))
        far = progress.cache.max_rewind
        begin = _begin if far is None or far >= most else _begin_wider
        begun = np.asarray(progress.cache.lengths)
        state = begin(self.drafter, progress, source, drafted=most)
        drafted = FIRST if self.drafted is None else most
        each = CHECKED.get(jax.default_backend(), 0.02) + self.drafter.cost(wanted.model)
        return Speculating(state, begun, wanted, self, sampler, rejects, wanted.limits, drafted, each)


def speculate(drafter: Drafter, *, drafted: int | None = None, same_tokens: bool = False) -> Speculate:
    """Speculative decoding, for `generate(algorithm=…)`: several tokens are drafted, the model checks them in one call,
    and each row keeps what it would have said (Leviathan et al. 2023, 2211.17192). With every kind of cache: rings get
    a slack for what is taken back.

    Greedy, and with drafts that nobody drew (`prompt_lookup`), tokens are those without speculation. Where drafts are
    drawn, a draft is kept with probability min(1, p / q), or replaced: the law is that of the sampler, but a seed gives
    other tokens than without, and, while the number of drafts is chosen by what was accepted, other tokens beside
    other rows. `same_tokens` and a fixed `drafted` exclude that.

    Args:
        drafter: `kvjax.prompt_lookup()`, `kvjax.draft_model(…)`, `kvjax.early_exit(…)`, or a `kvjax.Drafter` of your
            own.
        drafted: γ, drafts of a call: 1, 2, 4 or 8, a program each; None chooses by measured acceptance.
        same_tokens: model and draft draw with the same noise, and a draft is kept where both gave the same: tokens are
            those without speculation, for every sampler; fewer are kept, at least (1 - d) / (1 + d) where rejection
            keeps 1 - d, d the total variation (Daliri et al. 2024, 2408.07978).

    Raises:
        InputError: no drafter, or another number of drafts.
    """
    if not isinstance(drafter, Drafter):
        raise InputError(f"speculate: {drafter!r} is no drafter, as kvjax.prompt_lookup() is")
    if drafted is not None and (type(drafted) is not int or drafted not in DRAFTED):
        raise InputError(f"speculate: drafted must be one of {DRAFTED} or None, not {drafted!r}")
    return Speculate(drafter, drafted, bool(same_tokens))


@dataclasses.dataclass(frozen=True, eq=False)
class Speculating:
    """See `UnderWay`.

    Args:
        state: where it stands.
        begun: `[B]`, tokens of each row before the new ones.
        wanted: see `Algorithm.begin`.
        how: what was asked for.
        sampler: with the model's filters.
        rejects: see `verified.advance`.
        ends: `[B]`, lengths at which rows rest.
        drafted: drafts of the next round.
        each: what one more draft costs, in steps: drafting it, and checking it.
        counted: the sums of `state.tally`, as they were at the last look.
        rounds: by number of drafts, those that ran.
        looks: how often the number was chosen.
        before: the state before the last chunk, if it may have to run again.
    """

    state: Speculation
    begun: np.ndarray
    wanted: Wanted
    how: Speculate
    sampler: Any
    rejects: bool
    ends: np.ndarray
    drafted: int
    each: float
    counted: Any = 0
    rounds: dict[int, int] = dataclasses.field(default_factory=dict)
    looks: int = 0
    before: Speculating | None = None

    grows = True

    def look(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `UnderWay`."""
        state, cache = self.state, self.state.cache
        cache.check()
        for each in self.how.drafter.caches(state.draft):
            flags, lengths = np.asarray(each.flags), np.asarray(each.lengths)
            for row in np.flatnonzero(flags).tolist():
                raise CacheError(f"speculate: the draft's row {row}, length {lengths[row]}: {meaning(int(flags[row]))}")
        # In NumPy: an operation of JAX takes longer than a look.
        fed, room, pending, stopped = map(np.asarray, (cache.lengths, cache.room, state.pending, state.stopped))
        lengths = fed + (pending >= 0)
        return lengths, ~stopped & (lengths < self.ends), np.minimum(fed + 2 + self.drafted, self.wanted.limits) > room

    def grow(self) -> Speculating:
        """See `UnderWay`."""
        state = _resized(self.how.drafter, self.state, capacity=self.state.cache.doubled)
        return dataclasses.replace(self, state=state)

    def advance(self, model: Model, chunks: int) -> Speculating:
        """See `UnderWay`."""
        return self._run(VALUE if self.wanted.again else DONATING, model, chunks)

    def again(self, model: Model, chunks: int, ends: Sequence[int | None]) -> Speculating:
        """See `Drawing.again`."""
        least = np.array([m if end is None else min(m, end) for m, end in zip(self.ends, ends, strict=True)], np.int32)
        if self.before is None or (np.asarray(self.state.emitted) <= least).all():
            return dataclasses.replace(self, ends=least)
        return dataclasses.replace(self.before, ends=least)._run(VALUE, model, chunks)

    def _run(self, program: Any, model: Model, chunks: int) -> Speculating:
        wanted, fixed, drafted = self.wanted, self.how.drafted is not None, self.drafted
        chunks = chunks if fixed else min(chunks, LOOK << min(self.looks, 8))
        state = program(
            model,
            self.state,
            self.how.drafter,
            self.sampler,
            wanted.seeds,
            wanted.stops,
            wanted.limits,
            self.ends,
            np.int32(chunks),
            drafted=drafted,
            rounds=max(wanted.every // (drafted + 1), 1),
            rejects=self.rejects,
        )
        counted = np.asarray([np.asarray(x).sum() for x in jax.tree.leaves(state.tally)])
        made = int(np.asarray(state.rounds)) - sum(self.rounds.values())
        return dataclasses.replace(
            self,
            state=state,
            rounds=self.rounds | {drafted: self.rounds.get(drafted, 0) + made},
            drafted=drafted if fixed else self._chosen(counted - self.counted),
            counted=counted,
            looks=self.looks + 1,
            before=self if wanted.again else None,
        )

    def _chosen(self, new: np.ndarray) -> int:
        """Drafts for the next rounds, by what became of the last ones, in the order of `Tally`."""
        calls, _, tested, kept, drafting = new.tolist()
        if not calls:
            return self.drafted
        share, accepted = drafting / calls, (kept + 1) / (tested + 2)  # as if one of two had been kept

        def gain(drafted: int) -> float:
            return (1 + share * (costs.expected_tokens(drafted, accepted) - 1)) / (1 + drafted * self.each)

        return max(DRAFTED, key=gain)

    def count(self) -> tuple[int, int]:
        """See `UnderWay`: rounds."""
        wasted = int(self.state.wasted)
        return sum(self.rounds.values()) + wasted, wasted

    def texts(self) -> list[list[int]]:
        """See `UnderWay`."""
        last = np.asarray(self.state.pending).tolist()
        return [row + [one] * (one >= 0) for row, one in zip(fed(self.state.cache), last, strict=True)]

    def ranked(self) -> None:
        """See `UnderWay`."""

    def report(self) -> Speculated:
        """See `UnderWay`."""
        tally: Any = jax.tree.map(np.asarray, self.state.tally)
        made = np.asarray(self.state.emitted) - self.begun
        parts = tally.calls, tally.proposed, tally.tested, tally.kept, tally.drafting
        return Speculated(*parts, made, dict(sorted(self.rounds.items())))

    def end(self, model: Model) -> tuple[Cache, Array, Noted | None]:
        """See `UnderWay`. The last token of each row is fed."""
        logits, cache = _ended(model, self.state)
        return cache.check(), logits, self.state.noted


_begin_wider = jax.jit(verified.begin, static_argnames="drafted")
_begin = jax.jit(verified.begin, static_argnames="drafted", donate_argnums=1)
"""Where rings grow, and where the prompts' buffers can be used up."""


@functools.partial(jax.jit, static_argnames="capacity")
def _resized(drafter: Drafter, state: Speculation, *, capacity: int) -> Speculation:
    noted = None if state.noted is None else state.noted.resize(capacity)
    draft = drafter.resize(state.draft, capacity)
    return state.replace(cache=state.cache.resize(capacity), draft=draft, noted=noted)


@jax.jit
def _ended(model: Model, state: Speculation) -> tuple[Array, Cache]:
    some = (state.pending >= 0).astype(jnp.int32)
    logits, cache = prefill(model, state.cache, jnp.maximum(state.pending, 0)[:, None], some)
    return jnp.where((some > 0)[:, None], logits, state.logits), cache


_STATIC = ("drafted", "rounds", "rejects")
VALUE = jax.jit(verified.advance, static_argnames=_STATIC)
DONATING = jax.jit(verified.advance, static_argnames=_STATIC, donate_argnums=1)
"""With the state as a value, and with its buffers used up."""

__all__ = ["Speculate", "Speculated", "Speculating", "Tally", "speculate", "DRAFTED"]
