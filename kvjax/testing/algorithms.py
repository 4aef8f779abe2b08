"""Algorithms whose tokens are compared, and ways to feed a prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import sampling
from kvjax.caches.branches import repeated
from kvjax.errors import InputError
from kvjax.loops import decode as loop
from kvjax.loops.algorithms import Wanted
from kvjax.loops.beam import Beam
from kvjax.loops.beam import beam as public_beam
from kvjax.loops.decode import decode, decode_until, prefill, step
from kvjax.loops.speculative import Speculate
from kvjax.model import Model
from kvjax.sampling import Text
from kvjax.sampling.drawing import draws, filtered, own
from kvjax.stopping import stops_of
from kvjax.types import Array

Scored = Callable[[list[int]], tuple[np.ndarray, float]]
"""Of new tokens so far, recomputed from scratch: what an algorithm compares next, `[V]`, and the largest logit."""


class Made(NamedTuple):
    """What an algorithm made.

    Args:
        tokens: `[R, steps]` int32, new tokens of each row, -1 after its last; R is `copies` for each prompt.
        scores: `[R]`, of an algorithm that ranks texts: that of each row's best, which `tokens` are; else None.
    """

    tokens: np.ndarray
    scores: np.ndarray | None = None


class Algorithm(Protocol):
    """Makes tokens; anything with these is one."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def steps(self) -> int:
        """New tokens a row, at most."""

    @property
    def copies(self) -> int:
        """Rows that it makes of each prompt."""

    def run(self, model: Model, cache: Any, logits: Array, seeds: np.ndarray) -> Made:
        """From a prefilled cache and its logits, which it may use up; `seeds` are those of its rows."""

    def scores(self, logits: Array, text: Text, seeds: np.ndarray) -> Array:
        """What it compares when it chooses the next token: `[R, V]` from logits `[R, V]` after `text`."""

    def gap(self, scored: Scored, want: list[int], got: list[int]) -> tuple[float, float]:
        """How far apart two choices are that differ, and the largest logit there."""


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """See `greedy` and `sampled`."""

    name: str
    steps: int
    sampler: Any
    scan: bool = True
    copies: int = 1

    def run(self, model: Model, cache: Any, logits: Array, seeds: np.ndarray) -> Made:
        """See `Algorithm`."""
        if self.copies > 1:
            cache, logits = _forked(cache, logits, copies=self.copies, steps=self.steps)
        return self.loop(model, cache, logits, seeds)

    def loop(self, model: Model, cache: Any, logits: Array, seeds: np.ndarray) -> Made:
        """All rows, one token after the other."""
        if self.scan:
            made, _, cache = decode(model, cache, logits, steps=self.steps, sampler=self.sampler, seed=seeds)
        else:
            made, _, cache = step_loop(model, cache, logits, self.steps, self.sampler, seeds)
        cache.check()
        return Made(np.asarray(made))

    def scores(self, logits: Array, text: Text, seeds: np.ndarray) -> Array:
        """See `Algorithm`."""
        keys = sampling.position_keys(sampling.row_keys(jnp.asarray(seeds, jnp.uint32)), text.lengths)
        return self.sampler.scores(logits, keys, text)

    def gap(self, scored: Scored, want: list[int], got: list[int]) -> tuple[float, float]:
        """See `Algorithm`: the scores of the first two tokens that differ; of an end and none there is no tie."""
        at = first_difference(want, got)
        scores, top = scored(want[:at])
        if at >= min(len(want), len(got)):
            return float("inf"), top
        return abs(float(scores[want[at]]) - float(scores[got[at]])), top


@dataclasses.dataclass(frozen=True, eq=False)
class Until(Drawn):
    """See `until`."""

    stop_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()

    def loop(self, model: Model, cache: Any, logits: Array, seeds: np.ndarray) -> Made:
        """See `Drawn`."""
        begun = np.asarray(cache.lengths)
        done = decode_until(
            model,
            cache,
            logits,
            max_new_tokens=self.steps,
            stop_ids=self.stop_ids,
            stop_sequences=self.stop_sequences,
            sampler=self.sampler,
            seed=seeds,
        ).cache.check()
        texts = zip(np.asarray(done.tokens), begun, np.asarray(done.lengths), strict=True)
        return Made(table([row[start:end].tolist() for row, start, end in texts], self.steps))

    def scores(self, logits: Array, text: Text, seeds: np.ndarray) -> Array:
        """See `Algorithm`."""
        return super().scores(logits, text.replace(stops=_stops(self).ids), seeds)


@dataclasses.dataclass(frozen=True, eq=False)
class Drafted(Until):
    """See `drafted`."""

    algorithm: Any = None

    def loop(self, model: Model, cache: Any, logits: Array, seeds: np.ndarray) -> Made:
        """See `Drawn`."""
        begun = np.asarray(cache.lengths)
        limits, progress = begun + np.int32(self.steps), loop.Progress.begin(cache, logits, starts=begun)
        wanted = Wanted(limits, begun, _stops(self), model=model, sampler=self.sampler, seeds=seeds)
        state = _finished(self.algorithm.begin(progress, wanted), model)
        return Made(table([text[start:] for text, start in zip(state.texts(), begun, strict=True)], self.steps))


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked:
    """See `beam`."""

    name: str
    steps: int
    algorithm: Any
    filters: tuple[Any, ...] = ()
    stop_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    copies: int = 1

    def run(self, model: Model, cache: Any, logits: Array, seeds: np.ndarray) -> Made:
        """See `Algorithm`."""
        starts = np.asarray(cache.lengths)
        wanted = Wanted(starts + np.int32(self.steps), starts, _stops(self), self.filters)
        state = _finished(self.algorithm.begin(loop.Progress.begin(cache, logits, starts=starts), wanted), model)
        best = [row[0] for row in state.ranked() or ()]
        texts = [text[start:] for (text, _), start in zip(best, starts, strict=True)]
        return Made(table(texts, self.steps), np.asarray([score for _, score in best]))

    def scores(self, logits: Array, text: Text, seeds: np.ndarray) -> Array:
        """See `Algorithm`: what each next token adds to the sum of a text."""
        each = jax.nn.log_softmax(logits.astype(jnp.promote_types(jnp.float32, logits.dtype)), axis=-1)
        filters = (*self.filters, *getattr(self.algorithm, "filters", ()))
        return filtered(filters, each, text.replace(stops=_stops(self).ids))

    def gap(self, scored: Scored, want: list[int], got: list[int]) -> tuple[float, float]:
        """See `Algorithm`: the scores of two whole texts."""
        (first, top), (second, other) = self._value(scored, want), self._value(scored, got)
        return abs(first - second), max(top, other)

    def _value(self, scored: Scored, text: list[int]) -> tuple[float, float]:
        found = [scored(text[:at]) for at in range(len(text))]
        total = sum(float(scores[token]) for (scores, _), token in zip(found, text, strict=True))
        return total / len(text) ** self.algorithm.length_penalty, max(top for _, top in found)


def _finished(state: Any, model: Model) -> Any:
    while (look := state.look())[1].any():
        state = state.grow() if (look[1] & look[2]).any() else state
        state = state.advance(model, loop.ALL)
    return state


@functools.partial(jax.jit, static_argnames=("copies", "steps"))
def _forked(cache: Any, logits: Array, *, copies: int, steps: int) -> tuple[Any, Array]:
    return repeated(cache, copies, room=steps), jnp.repeat(logits, copies, axis=0)


def _stops(algorithm: Until | Ranked) -> Any:
    return stops_of("testing", algorithm.stop_ids, algorithm.stop_sequences)


def table(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """`[R, width]` int32, each row's tokens, -1 after the last."""
    found = np.full((len(rows), width), -1, np.int32)
    for line, row in zip(found, rows, strict=True):
        line[: len(row)] = row
    return found


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Where two texts first differ: the length of what they have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def greedy(steps: int = 64, *, scan: bool = True) -> Drawn:
    """The most probable token, `steps` times; in one scan, or in a loop of `kvjax.step`."""
    return Drawn("greedy" if scan else "greedy, steps", steps, sampling.greedy(), scan)


def sampled(
    sampler: Any = None, steps: int = 64, *, scan: bool = True, samples: int = 1, name: str | None = None
) -> Drawn:
    """Draws, `steps` times; row r of seed s is drawn with seed s + r.

    Args:
        sampler: a `sampling.chain(…)`, or a `sampling.greedy(…)` of filters; None for `chain(temperature(0.9))`.
        steps: new tokens a row.
        scan: in one scan, or in a loop of `kvjax.step`.
        samples: rows of each prompt, which is prefilled once and shared as `generate(samples=)` shares it.
        name: for people; None says what it does.
    """
    usual = "sampled" if scan else "sampled, steps"
    return Drawn(name or (usual if samples == 1 else f"{samples} samples"), steps, _sampler(sampler), scan, samples)


def until(
    sampler: Any = None,
    steps: int = 64,
    *,
    stop_ids: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    name: str = "until a stop",
) -> Until:
    """As `sampled`, in the loop that stops: ids and sequences of ids that end a row.

    Args:
        sampler: see `sampled`.
        steps: new tokens a row, at most.
        stop_ids, stop_sequences: see `kvjax.decode_until`.
        name: for people.
    """
    sequences = tuple(tuple(each) for each in stop_sequences)
    return Until(name, steps, _sampler(sampler), stop_ids=tuple(stop_ids), stop_sequences=sequences)


def drafted(
    algorithm: Any,
    sampler: Any = None,
    steps: int = 64,
    *,
    stop_ids: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    name: str | None = None,
) -> Drafted:
    """Speculation as `kvjax.generate(algorithm=kvjax.speculate(…))` runs it: the tokens of decoding without drafts.

    Args:
        algorithm: `kvjax.speculate(…)`; where drafts are drawn, with `same_tokens=True`.
        sampler: as in `sampled`; None is greedy.
        steps: new tokens a row, at most.
        stop_ids, stop_sequences: that end a row.
        name: for people; None says what it does.

    Raises:
        InputError: it promises no tokens: drafts are drawn, and kept or replaced.
    """
    chosen = sampling.greedy() if sampler is None else _sampler(sampler)
    if draws(chosen) and not algorithm.same_tokens and algorithm.drafter.drawn:
        raise InputError("testing.drafted: a sampled draft that may be replaced gives other tokens; same_tokens=True")
    sequences = tuple(tuple(each) for each in stop_sequences)
    label = name or ("drafts" if sampler is None else "sampled drafts")
    return Drafted(label, steps, chosen, stop_ids=tuple(stop_ids), stop_sequences=sequences, algorithm=algorithm)


def beam(
    width: int,
    steps: int = 64,
    *,
    filters: Sequence[Any] = (),
    stop_ids: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    name: str | None = None,
    **options: Any,
) -> Ranked:
    """Beam search as `kvjax.generate(algorithm=kvjax.beam(…))` runs it: the best text and its score.

    Two best texts that differ are a tie where their scores, recomputed from scratch, are as near as tokens of a tie.

    Args:
        width: W, beams of each prompt.
        steps: new tokens a text, at most.
        filters: that belong to the model, as `LM.filters`.
        stop_ids, stop_sequences: that end a text.
        name: for people; None says what it does.
        options: of `kvjax.beam`.
    """
    sequences = tuple(tuple(each) for each in stop_sequences)
    chosen = tuple(own(each) for each in filters)
    found = public_beam(width, **options)
    return Ranked(name or f"{width} beams", steps, found, chosen, tuple(stop_ids), sequences)


def as_algorithm(each: Any) -> Any:
    """One of these, of what the public loops take: a sampler, `kvjax.beam(…)` or `kvjax.speculate(…)`.

    Raises:
        InputError: it is none.
    """
    if isinstance(each, sampling.Chain | sampling.Greedy):
        return sampled(each) if each.filters else greedy()
    if isinstance(each, Beam):
        return Ranked(f"{each.width} beams", 64, each)
    if isinstance(each, Speculate):
        return drafted(each)
    if not hasattr(each, "run"):
        raise InputError(f"testing: {each!r} is no algorithm, as testing.greedy(), a sampler or kvjax.beam(4) is")
    return each


def _sampler(sampler: Any) -> Any:
    chosen = sampling.chain(sampling.temperature(0.9)) if sampler is None else sampler
    if not isinstance(chosen, sampling.Chain | sampling.Greedy):
        raise InputError(f"testing: sampler must be a sampling.chain(…) or a sampling.greedy(…), not {sampler!r}")
    return chosen


def step_loop(
    model: Model, cache: Any, logits: Array, steps: int, sampler: Any, seeds: np.ndarray
) -> tuple[Any, Array, Any]:
    """What `kvjax.decode` does in one scan, as a loop of `kvjax.step`: tokens `[B, steps]`, logits and the cache."""
    keys, found, starts = sampling.row_keys(jnp.asarray(seeds, jnp.uint32)), [], cache.lengths
    for _ in range(steps):
        text = Text(cache.tokens, cache.lengths, starts, starts + steps, jnp.zeros(0, jnp.int32))
        found.append(sampler(logits, sampling.position_keys(keys, cache.lengths), text))
        logits, cache = step(model, cache, found[-1])
    return np.stack(found, axis=1), logits, cache


def fed_in_chunks(
    model: Model, cache: Any, ids: np.ndarray, lengths: np.ndarray, cut: Sequence[int]
) -> tuple[Array, Any]:
    """Prefills `ids[B, S]` in chunks of so many tokens: logits after each row's last, and the cache."""
    logits, at = None, 0
    for size in cut:
        valid = np.clip(lengths - at, 0, size)
        new, cache = prefill(model, cache, ids[:, at : at + size], valid)
        logits = new if logits is None else jnp.where(valid[:, None] > 0, new, logits)
        at += size
    if logits is None or at < ids.shape[1]:
        raise InputError(f"splits: {tuple(cut)} are {at} tokens, the longest prompt has {ids.shape[1]}")
    return logits, cache


def cuts_of(longest: int) -> tuple[tuple[int, ...], ...]:
    """Ways to cut a prompt: whole, in two uneven pieces, in three, and one by one (at most 16 of these)."""
    third, half, ones = longest // 3, longest // 2, min(longest, 16)
    every = [(longest,), (third, longest - third), (half + 1, 1, longest - half - 2), (1,) * ones + (longest - ones,)]
    made = [tuple(size for size in cut if size > 0) for cut in every]
    return tuple(dict.fromkeys(cut for cut in made if sum(cut) == longest))


__all__ = [
    "Algorithm",
    "Made",
    "Drawn",
    "Until",
    "Drafted",
    "Ranked",
    "greedy",
    "sampled",
    "until",
    "drafted",
    "beam",
    "as_algorithm",
    "table",
    "first_difference",
    "step_loop",
    "fed_in_chunks",
    "cuts_of",
]
