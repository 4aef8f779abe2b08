"""How `generate` chooses tokens: what an algorithm is, and the one that draws a token at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from kvjax.loops import decode as loop
from kvjax.loops.noted import Noted
from kvjax.loops.prompts import fed
from kvjax.model import Model
from kvjax.sampling.drawing import Filtered
from kvjax.stopping import Stops
from kvjax.types import Array


class Candidate(NamedTuple):
    """One of several answers to a prompt.

    Args:
        text: of the new tokens; None without a tokenizer.
        tokens: the new tokens.
        score: what the algorithm ranks by; larger is better.
        stop: "eos", "stop" or "length", as `Generated.stop`.
    """

    text: str | None
    tokens: list[int]
    score: float
    stop: str


class UnderWay(Protocol):
    """A generation between two looks of the host.

    Args:
        grows: whether `texts` only get longer, so that a piece can be shown before the end.
    """

    grows: bool

    def look(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of each row `[B]`; which want more, and which have no room, `[B]` bool; raises what was flagged."""

    def grow(self) -> Any:
        """The same with room for more. Uses itself up."""

    def advance(self, model: Model, chunks: int) -> Any:
        """At most `chunks` chunks further, or until all rows are done or one has no room. Uses itself up."""

    def count(self) -> tuple[int, int]:
        """Steps so far, and of these the ones that no row needed."""

    def texts(self) -> list[list[int]]:
        """Ids of each row so far, prompts included."""

    def ranked(self) -> list[list[tuple[list[int], float]]] | None:
        """Of each row several texts with scores, best first; None where nothing is ranked."""

    def report(self) -> Any:
        """What became of drafts; None where nothing is drafted."""

    def end(self, model: Model) -> tuple[Any, Array, Noted | None]:
        """The cache of `texts()`, the logits after them, and log-probabilities of their tokens where somebody asked."""


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """What every algorithm is asked for.

    Args:
        limits: `[B]`, tokens that each row may have, prompt included.
        scored: `[B]`, tokens of each row before those that count in a score: all that there were, but for what the
            model forces on every text.
        stops: what ends a row.
        filters: that belong to the model, in order; they come before those of a sampler.
        every: static, steps of a chunk.
        again: whether a chunk may have to run again, so that what was before it is kept; of those that draw only.
        model: that is asked.
        sampler, seeds: see `kvjax.sampling`; `[B]` uint32. Of those that draw only.
        sources: ids of the sources, if there are any and they are known.
    """

    limits: np.ndarray
    scored: np.ndarray
    stops: Stops
    filters: tuple[Any, ...] = ()
    every: int = loop.CHUNK
    again: bool = False
    model: Any = None
    sampler: Any = None
    seeds: Any = None
    sources: list[list[int]] | None = None

    @property
    def drawing(self) -> Any:
        """The sampler, after the model's filters."""
        return Filtered(self.filters, self.sampler) if self.filters else self.sampler


class Algorithm(Protocol):
    """What `generate(algorithm=…)` takes: immutable.

    Args:
        draws: whether tokens are drawn by a sampler, one row at a time; else it chooses them itself.
    """

    draws: bool

    def begin(self, progress: loop.Progress, wanted: Wanted) -> UnderWay:
        """From prefilled prompts; `progress.starts` are the tokens of each row that were given: the prompt, without
        what the model forces on every text."""


@dataclasses.dataclass(frozen=True, eq=False)
class Draw:
    """One token after the other, by a sampler: what `generate` does without an algorithm."""

    draws = True

    def begin(self, progress: loop.Progress, wanted: Wanted) -> Drawing:
        """See `Algorithm`."""
        return Drawing(progress, np.asarray(progress.cache.lengths), wanted, wanted.drawing, wanted.limits)


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """See `UnderWay`; `ends[B]` are lengths at which rows rest: their limits, or where a stop string was found."""

    progress: loop.Progress
    starts: np.ndarray
    wanted: Wanted
    sampler: Any
    ends: np.ndarray
    before: loop.Progress | None = None

    grows = True

    def look(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `UnderWay`."""
        cache = self.progress.cache.check()
        lengths = np.asarray(cache.lengths)
        wants = ~np.asarray(self.progress.stopped) & (lengths < self.ends)
        return lengths, wants, lengths >= np.asarray(cache.room)

    def grow(self) -> Drawing:
        """See `UnderWay`."""
        return dataclasses.replace(self, progress=resized(self.progress, capacity=self.progress.cache.doubled))

    def advance(self, model: Model, chunks: int) -> Drawing:
        """See `UnderWay`."""
        return self._run(loop.VALUE if self.wanted.again else loop.DONATING, model, chunks)

    def again(self, model: Model, chunks: int, ends: Sequence[int | None]) -> Drawing:
        """The last `advance` once more, with rows that rest at some length, or None.

        The same tokens come again: the cache before the chunk is a value, and so are the keys.
        """
        least = np.array([m if end is None else min(m, end) for m, end in zip(self.ends, ends, strict=True)], np.int32)
        ended = dataclasses.replace(self, ends=least)
        if self.before is None or (np.asarray(self.progress.cache.lengths) <= least).all():
            return ended
        return dataclasses.replace(ended, progress=self.before)._run(loop.VALUE, model, chunks)

    def _run(self, programs: loop.Programs, model: Model, chunks: int) -> Drawing:
        wanted, chunk = self.wanted, self.wanted.every
        bounds = wanted.stops, wanted.limits, self.ends, np.int32(chunks)
        progress = programs.until(model, self.progress, self.sampler, wanted.seeds, *bounds, chunk=chunk)
        return dataclasses.replace(self, progress=progress, before=self.progress if wanted.again else None)

    def count(self) -> tuple[int, int]:
        """See `UnderWay`."""
        wasted = int(self.progress.wasted)  # a row goes on at every step until it is done
        return int((np.asarray(self.progress.cache.lengths) - self.starts).max()) + wasted, wasted

    def texts(self) -> list[list[int]]:
        """See `UnderWay`."""
        return fed(self.progress.cache)

    def ranked(self) -> None:
        """See `UnderWay`."""

    def report(self) -> None:
        """See `UnderWay`."""

    def end(self, model: Model) -> tuple[Any, Array, Noted | None]:
        """See `UnderWay`."""
        return self.progress.cache, self.progress.logits, self.progress.noted


@functools.partial(jax.jit, static_argnames="capacity")
def resized(cache: Any, *, capacity: int) -> Any:
    """What has a `resize`, with room for `capacity` tokens a row; one program."""
    return cache.resize(capacity)


__all__ = ["Candidate", "UnderWay", "Wanted", "Algorithm", "Draw", "Drawing", "resized"]
