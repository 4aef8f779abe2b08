"""Beam search for `generate(algorithm=…)`: the search on the device is in `kvjax.loops.search`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import Cache
from kvjax.caches.branches import ROOM, before
from kvjax.caches.flags import meaning
from kvjax.checks import count
from kvjax.errors import CacheError, InputError
from kvjax.loops import decode as loop
from kvjax.loops.algorithms import Wanted, resized
from kvjax.loops.noted import Noted
from kvjax.loops.prompts import fed, padded
from kvjax.loops.scoring import CHUNK, scored
from kvjax.loops.search import DONATING, Beams, begin, numbers, owned, rule_of
from kvjax.model import Model
from kvjax.types import Array


@dataclasses.dataclass(frozen=True)
class Beam:
    """See `beam`."""

    width: int
    length_penalty: float
    early_stopping: bool | str
    returned: int
    filters: tuple[Any, ...] = ()

    draws = False

    def begin(self, progress: loop.Progress, wanted: Wanted) -> Searching:
        """See `Algorithm`.

        Raises:
            InputError: the number of tokens of a text, to the power of the penalty, is more than a float can hold.
        """
        longest = max(int((wanted.limits.astype(np.int64) - wanted.scored).max()), 1)
        dtype = jnp.promote_types(jnp.float32, progress.logits.dtype)
        if abs(self.length_penalty) * math.log10(longest) > math.log10(float(jnp.finfo(dtype).max)) - 8:
            raise InputError(
                f"beam: length_penalty {self.length_penalty} is too much for texts of up to {longest} tokens: "
                f"{longest}^{abs(self.length_penalty)} is more than {dtype} can hold"
            )
        done = np.asarray(progress.stopped) | (np.asarray(progress.cache.lengths) >= wanted.limits)
        given = progress.starts, wanted.scored, wanted.limits, done
        beams, prompts = _begin(progress.cache, progress.logits, *given, width=self.width, room=ROOM)
        return Searching(prompts, progress.logits, beams, self, wanted, progress.noted)


@functools.partial(jax.jit, static_argnames=("width", "room"), donate_argnums=0)
def _begin(cache: Cache, *given: Any, width: int, room: int) -> tuple[Beams, Cache]:
    """Where a search begins, and the prompts' cache, used up: without its layers where the beams have these."""
    kept = cache.replace(layers=(), shared={}) if cache.branches else cache
    return begin(cache, *given, width=width, room=room), jax.tree.map(jnp.copy, kept)


def beam(
    width: int,
    *,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    returned: int = 1,
    filters: Sequence[Any] = (),
) -> Beam:
    """Beam search, for `generate(algorithm=…)`: the rules and scores of Hugging Face Transformers.

    What a folder's generation_config.json asks of every text (`LM.filters`: a forced last token, no repeated n-grams,
    least lengths and so on) is applied, to log-probabilities as there; its `num_beams`, `length_penalty` and
    `early_stopping` are not: give them yourself.

    A prompt is kept once for all its beams, and only what they add moves. Only `width` and the kinds of filters
    compile. A width above the vocabulary's size is fine: there are as many beams as there are texts.

    Args:
        width: W, beams of each prompt.
        length_penalty: a score is the sum of log-probabilities over the number of tokens to this power; 0 is the sum.
        early_stopping: True ends a prompt when it has W finished texts; False goes on while its best running beam,
            were it to end now, would be among them; "never" while any could be, however it goes on within its budget.
        returned: how many of the best are `Generated.candidates`, at most W.
        filters: of `kvjax.sampling`, after those of the model. They see log-probabilities, and what they leave is
            summed.

    Raises:
        InputError: a number is no number or out of range, or something is no filter.
    """
    count("beam: width", width)
    rule_of(early_stopping)
    if not isinstance(returned, int) or isinstance(returned, bool) or not 1 <= returned <= width:
        raise InputError(f"beam: returned must be a whole number from 1 to the width {width}, not {returned!r}")
    if not isinstance(length_penalty, int | float) or not math.isfinite(length_penalty):
        raise InputError(f"beam: length_penalty must be a finite number, not {length_penalty!r}")
    return Beam(width, float(length_penalty), early_stopping, returned, owned("beam", filters))


@dataclasses.dataclass(frozen=True, eq=False)
class Searching:
    """See `UnderWay`.

    Args:
        prompts: their cache; layers and entries are those of `beams`, where these keep them.
        logits: `[B, V]`, after the prompts.
        beams: where the search stands.
        beam: its numbers.
        wanted: see `Algorithm.begin`.
        noted: where log-probabilities go, if somebody asked.
    """

    prompts: Cache
    logits: Array
    beams: Beams
    beam: Beam
    wanted: Wanted
    noted: Noted | None

    grows = False

    def look(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `UnderWay`."""
        cache, beams = self.beams.cache, self.beams
        flags, lengths = np.asarray(cache.flags), np.asarray(cache.lengths)
        for row in np.flatnonzero(flags).tolist():
            prompt, beam = divmod(row, self.beam.width)
            raise CacheError(
                f"beam search: prompt {prompt}, beam {beam} of length {lengths[row]}, capacity {cache.capacity}: "
                f"{meaning(flags[row])}"
            )
        reached = np.asarray(beams.reached)
        return reached, ~np.asarray(beams.done), reached >= np.asarray(beams.room)

    def grow(self) -> Searching:
        """See `UnderWay`."""
        return dataclasses.replace(self, beams=resized(self.beams, capacity=self.beams.cache.doubled))

    def advance(self, model: Model, chunks: int) -> Searching:
        """See `UnderWay`."""
        how, wanted = numbers(self.beam.length_penalty, self.beam.early_stopping), self.wanted
        filters, steps = (*wanted.filters, *self.beam.filters), np.int32(chunks)
        beams = DONATING(model, self.beams, *how, wanted.stops, filters, steps, chunk=wanted.every)
        return dataclasses.replace(self, beams=beams)

    def count(self) -> tuple[int, int]:
        """See `UnderWay`."""
        return int(self.beams.steps), int(self.beams.wasted)

    def texts(self) -> list[list[int]]:
        """See `UnderWay`. The best finished one, or where there is none the best that runs."""
        best = [row[0][0] if row else None for row in self.ranked()]
        running = fed(self.beams.cache)[:: self.beam.width]
        return [going if done is None else done for done, going in zip(best, running, strict=True)]

    def end(self, model: Model) -> tuple[Cache, Array, Noted | None]:
        """See `UnderWay`. The best are fed to what the prompts left: no cache was kept of each finished text."""
        begins, texts = fed(self.prompts), self.texts()
        tokens, valid = padded([text[len(begin) :] for text, begin in zip(texts, begins, strict=True)])
        cache = self.prompts if self.prompts.layers else before(self.beams.cache, self.prompts)
        capacity = cache.enough([len(text) for text in texts])
        cache = cache if cache.capacity == capacity else resized(cache, capacity=capacity)
        noted = None if self.noted is None else self.noted.resize(capacity)
        logits, cache, noted = _fed(model, cache, self.logits, tokens, valid, noted)
        return cache.check(), logits, noted

    def report(self) -> None:
        """See `UnderWay`."""

    def ranked(self) -> list[list[tuple[list[int], float]]]:
        """See `UnderWay`."""
        texts, lengths, scores = (np.asarray(x) for x in (self.beams.texts, self.beams.lengths, self.beams.scores))
        each = (zip(*row, strict=True) for row in zip(texts, lengths, scores, strict=True))
        found = [[(ids[:n].tolist(), float(score)) for ids, n, score in row if np.isfinite(score)] for row in each]
        return [row[: self.beam.returned] for row in found]


@jax.jit
def _fed(
    model: Model, cache: Cache, logits: Array, tokens: Array, valid: Array, noted: Noted | None
) -> tuple[Array, Cache, Noted | None]:
    if noted is None:
        new, cache = loop.prefill(model, cache, tokens, valid)
        return jnp.where((valid > 0)[:, None], new, logits), cache, None
    start, best = cache.lengths, noted.ids.shape[2]
    found, logits, cache = scored(model, cache, logits, tokens, valid, valid, best=best, chunk=CHUNK)
    return logits, cache, noted.given((found.logprobs, found.ids, found.values), start, valid)


__all__ = ["Beam", "beam", "Searching"]
