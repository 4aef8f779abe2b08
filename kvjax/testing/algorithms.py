"""Algorithms whose tokens are compared, and ways to feed a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from kvjax import sampling
from kvjax.errors import InputError
from kvjax.loops.decode import decode, prefill, step
from kvjax.model import Model
from kvjax.types import Array


class Algorithm(Protocol):
    """Makes tokens; anything with a name and these two functions is one."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def steps(self) -> int:
        """New tokens a row."""

    def tokens(self, model: Model, cache: Any, logits: Array, seeds: np.ndarray) -> tuple[np.ndarray, Array]:
        """From a prefilled cache and its logits: new tokens `[B, steps]`, and the logits after the last."""

    def scores(self, logits: Array, length: int, seeds: np.ndarray) -> Array:
        """What it compares when it chooses the token after `length` tokens: `[B, V]` from logits `[B, V]`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Greedy:
    """See `greedy`."""

    steps: int
    scan: bool
    name: str = "greedy"
    sampler: Any = dataclasses.field(default_factory=sampling.greedy)

    def tokens(self, model: Model, cache: Any, logits: Array, seeds: np.ndarray) -> tuple[np.ndarray, Array]:
        """See `Algorithm`."""
        if self.scan:
            made, logits, cache = decode(model, cache, logits, steps=self.steps, sampler=self.sampler, seed=seeds)
        else:
            made, logits, cache = step_loop(model, cache, logits, self.steps, self.sampler, seeds)
        cache.check()
        return np.asarray(made), logits

    def scores(self, logits: Array, length: int, seeds: np.ndarray) -> Array:
        """See `Algorithm`."""
        return logits


class Sampled(Greedy):
    """See `sampled`."""

    def scores(self, logits: Array, length: int, seeds: np.ndarray) -> Array:
        """See `Algorithm`."""
        keys = sampling.position_keys(sampling.row_keys(jnp.asarray(seeds, jnp.uint32)), jnp.full(len(seeds), length))
        return self.sampler.scores(logits, keys)


def greedy(steps: int = 64, *, scan: bool = True) -> Greedy:
    """The most probable token, `steps` times; in one scan, or in a loop of `kvjax.step`."""
    return Greedy(steps, scan, "greedy" if scan else "greedy, steps")


def sampled(sampler: Any = None, steps: int = 64, *, scan: bool = True) -> Sampled:
    """Draws, `steps` times; row r of seed s is drawn with seed s + r.

    Args:
        sampler: a chain of filters, None for `chain(temperature(0.9))`.
        steps: new tokens a row.
        scan: in one scan, or in a loop of `kvjax.step`.
    """
    chosen = sampling.chain(sampling.temperature(0.9)) if sampler is None else sampler
    if not isinstance(chosen, sampling.Chain):
        raise InputError(f"testing.sampled: sampler must be a sampling.chain(…), not {sampler!r}")
    return Sampled(steps, scan, "sampled" if scan else "sampled, steps", chosen)


def step_loop(
    model: Model, cache: Any, logits: Array, steps: int, sampler: Any, seeds: np.ndarray
) -> tuple[Any, Array, Any]:
    """What `kvjax.decode` does in one scan, as a loop of `kvjax.step`: tokens `[B, steps]`, logits and the cache."""
    keys, found = sampling.row_keys(jnp.asarray(seeds, jnp.uint32)), []
    for _ in range(steps):
        found.append(sampler(logits, sampling.position_keys(keys, cache.lengths)))
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


__all__ = ["Algorithm", "Greedy", "Sampled", "greedy", "sampled", "step_loop", "fed_in_chunks", "cuts_of"]
