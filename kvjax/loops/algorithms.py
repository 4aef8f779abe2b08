"""How `generate` chooses tokens: what an algorithm is, and the one that draws a token at a time."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.loops import decode as loop
from kvjax.loops.prompts import fed
from kvjax.model import Model
from kvjax.types import Array


class Candidate(NamedTuple):
    """One of several answers to a prompt.

    Args:
        text: of the new tokens; None without a tokenizer.
        tokens: the new tokens.
        score: what the algorithm ranks by; larger is better.
        stop: "eos" or "length".
    """

    text: str | None
    tokens: list[int]
    score: float
    stop: str


class UnderWay(Protocol):
    """A generation between two looks of the host."""

    def look(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens of each row `[B]`, which rows want more `[B]` bool, and the capacity; raises what was flagged."""

    def grow(self, capacity: int) -> Any:
        """The same with room for more. Uses itself up."""

    def advance(self, model: Model, stops: np.ndarray, chunks: int) -> Any:
        """At most `chunks` chunks further, or until all rows are done or one has no room. Uses itself up."""

    def count(self) -> tuple[int, int]:
        """Steps so far, and of these the ones that no row needed."""

    def texts(self) -> list[list[int]]:
        """Ids of each row so far, prompts included."""

    def ranked(self) -> list[list[tuple[list[int], float]]] | None:
        """Of each row several texts with scores, best first; None where nothing is ranked."""

    def end(self, model: Model) -> tuple[Any, Array]:
        """The cache of `texts()`, and the logits after them."""


class Algorithm(Protocol):
    """What `generate(algorithm=…)` takes: immutable, and hashable."""

    def begin(
        self, progress: loop.Progress, starts: np.ndarray, limits: np.ndarray, never: np.ndarray | None
    ) -> UnderWay:
        """From prefilled prompts.

        Args:
            progress: with the prompts fed.
            starts: `[B]`, tokens of each row that were given: the prompt, without what the model forces on every text.
            limits: `[B]`, tokens that each row may have, prompt included.
            never: `[n]` int32, ids that are never chosen, -1 for none; None where there are none at all.
        """


@dataclasses.dataclass(frozen=True)
class Draw:
    """One token after the other, by a sampler: what `generate` does without an algorithm.

    Args:
        sampler: see `kvjax.sampling`.
        seeds: `[B]` uint32.
    """

    sampler: Any
    seeds: np.ndarray

    def begin(
        self, progress: loop.Progress, starts: np.ndarray, limits: np.ndarray, never: np.ndarray | None
    ) -> Drawing:
        """See `Algorithm`."""
        sampler = self.sampler if never is None else Barred(jnp.asarray(never), self.sampler)
        return Drawing(progress, np.asarray(progress.cache.lengths), limits, sampler, self.seeds)


@struct.node
class Barred(struct.Value):
    """A sampler that never sees some ids.

    Args:
        ids: `[n]` int32, -1 for none.
        sampler: see `kvjax.sampling`.
    """

    ids: Array
    sampler: Any

    def __call__(self, logits: Array, keys: Array) -> Array:
        """See `kvjax.sampling.Sampler`."""
        return self.sampler(without(self.ids, logits), keys)


def without(ids: Array | None, scores: Array) -> Array:
    """`[..., V]` with -inf at some ids, `[n]` int32, -1 for none."""
    if ids is None:
        return scores
    v = scores.shape[-1]
    barred = jnp.zeros((v,), bool).at[jnp.where(ids < 0, v, ids)].set(True, mode="drop")
    return jnp.where(barred.reshape((1,) * (scores.ndim - 1) + (v,)), -jnp.inf, scores)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """See `UnderWay`."""

    progress: loop.Progress
    starts: np.ndarray
    limits: np.ndarray
    sampler: Any
    seeds: np.ndarray

    def look(self) -> tuple[np.ndarray, np.ndarray, int]:
        """See `UnderWay`."""
        cache = self.progress.cache.check()
        lengths = np.asarray(cache.lengths)
        return lengths, ~np.asarray(self.progress.stopped) & (lengths < self.limits), cache.capacity

    def grow(self, capacity: int) -> Drawing:
        """See `UnderWay`."""
        grown = resized(self.progress.cache, capacity=capacity)
        return dataclasses.replace(self, progress=self.progress.replace(cache=grown))

    def advance(self, model: Model, stops: np.ndarray, chunks: int) -> Drawing:
        """See `UnderWay`."""
        count, chunk = np.int32(chunks), loop.CHUNK
        progress = loop.DONATING.until(
            model, self.progress, self.sampler, self.seeds, stops, self.limits, count, chunk=chunk
        )
        return dataclasses.replace(self, progress=progress)

    def count(self) -> tuple[int, int]:
        """See `UnderWay`."""
        wasted = int(self.progress.wasted)  # a row goes on at every step until it is done
        return int((np.asarray(self.progress.cache.lengths) - self.starts).max()) + wasted, wasted

    def texts(self) -> list[list[int]]:
        """See `UnderWay`."""
        return fed(self.progress.cache)

    def ranked(self) -> None:
        """See `UnderWay`."""

    def end(self, model: Model) -> tuple[Any, Array]:
        """See `UnderWay`."""
        return self.progress.cache, self.progress.logits


@functools.partial(jax.jit, static_argnames="capacity")
def resized(cache: Any, *, capacity: int) -> Any:
    """What has a `resize`, with room for `capacity` tokens a row; one program."""
    return cache.resize(capacity)


__all__ = ["Candidate", "UnderWay", "Algorithm", "Draw", "Drawing", "without", "resized"]
