"""`generate`: from prompts to text, on the host. Buckets prompts, grows the cache between chunks, raises flags."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import sampling
from kvjax.caches.base import SOURCE, Cache
from kvjax.caches.cross import Source
from kvjax.caching import encode as encoded
from kvjax.caching import init_cache
from kvjax.config import Config
from kvjax.errors import InputError
from kvjax.lm import LM
from kvjax.loops import decode as loop
from kvjax.loops.algorithms import Algorithm, Candidate, Draw, UnderWay, Wanted
from kvjax.loops.prompts import BUDGET, beyond, encode, fed, limits_of, model_of, padded, targets_of
from kvjax.model import Model
from kvjax.stopping import stops_of
from kvjax.timing import Compilations
from kvjax.types import Array

CAPACITY = 256
"""The smallest capacity of a generated cache, in tokens; it grows by doubling."""

TARGET_CAPACITY = 64
"""The same for targets, which begin with little and are rarely long."""

AHEAD = 64
"""Tokens of room beyond the prompt that the first capacity has at least."""


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of one `generate`, and what they were spent on.

    Args:
        compile: tracing, lowering and compiling, in seconds.
        prefill, decode: the rest of the time, in seconds, compiling left out.
        programs: compiled in this call.
        steps: decoding steps run.
        wasted: of these, steps that no row needed.
    """

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    programs: int = 0
    steps: int = 0
    wasted: int = 0


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` gives, and what it can go on from.

    Args:
        text: of the new tokens, one a row; None without a tokenizer.
        tokens: `[B, N]` int32 on the host, the new tokens; -1 after a row's last.
        lengths: `[B]` int32 on the host, new tokens of each row.
        stop: per row, "eos" or "length".
        cache: prompts and new tokens, all fed.
        logits: `[B, V]`, for the next token.
        prompts: ids that stood before the new tokens.
        seeds: `[B]` uint32 on the host.
        sampler: used.
        stop_ids: used.
        timings: of this call.
        candidates: of an algorithm that ranks several answers, each row's, best first; `text` and `tokens` are the
            first. None of others.
    """

    text: list[str] | None
    tokens: np.ndarray
    lengths: np.ndarray
    stop: list[str]
    cache: Cache
    logits: Array
    prompts: list[list[int]]
    seeds: np.ndarray
    sampler: Any
    stop_ids: tuple[int, ...]
    timings: Timings
    candidates: list[list[Candidate]] | None = None

    @property
    def scores(self) -> np.ndarray | None:
        """`[B]` float64 on the host, of each row's best candidate; None where nothing is ranked."""
        if self.candidates is None:
            return None
        return np.asarray([row[0].score if row else -np.inf for row in self.candidates])


def generate(
    lm: LM | Model,
    prompts: Any = None,
    *,
    after: Generated | None = None,
    max_new_tokens: Any = None,
    sampler: Any = None,
    seed: Any = None,
    plan: Any = None,
    stop_ids: Sequence[int] | None = None,
    prefix: Cache | None = None,
    algorithm: Algorithm | None = None,
    target: Any = None,
    cross: Any = None,
) -> Generated:
    """Continues prompts until an end-of-sequence token or a budget. With an encoder, prompts are source texts, and what
    is made is a target for each.

    Compiles two programs for a prompt bucket and a capacity; other prompts, seeds, samplers' numbers, stop ids and
    budgets compile none.

    Args:
        lm: from `kvjax.load`; or a bare `Model`, for prompts of ids.
        prompts: a str, a list of str, or a list of lists of ids; rows may differ in length.
        after: what an earlier call gave, instead of prompts: goes on as one longer call would have, and leaves it
            usable. Seeds, sampler and stop ids are its own unless given.
        max_new_tokens: int, or one a row; 0 gives nothing new. None is 128, or twice the source if that is more, or
            what the model's positions leave a row if that is less.
        sampler: see `kvjax.sampling`; None is greedy.
        seed: int, or one a row; the same seed samples the same alone and in any row.
        plan: kind of cache; None is `caches.default`.
        stop_ids: tokens that end a row, themselves included in what is emitted; None is those of `lm`.
        prefix: a cache of one row whose text every prompt begins with. Only what follows is fed, and the prefix is
            kept once for all rows; it stays usable. The result is the same without it.
        algorithm: how tokens are chosen, such as `kvjax.beam(4)`; None draws them with `sampler`.
        target: what targets begin with, after the model's start token: text or ids, one for all or a list with one a
            row. It is the prompt of the result, and not among the new tokens.
        cross: what is kept of the sources, `caches.cross()` or `caches.encoder_output()`; None is `caches.cross()`.

    Returns:
        Texts, tokens, and a cache to go on from.

    Raises:
        InputError: a prompt is empty, has ids outside the vocabulary or does not go on from `prefix`, a source passes
            the encoder's positions, or budgets the model's.
        CacheError: a row was flagged, for example because of NaN logits.
    """
    run = Run.start(
        lm,
        prompts,
        after=after,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        plan=plan,
        stop_ids=stop_ids,
        prefix=prefix,
        algorithm=algorithm,
        target=target,
        cross=cross,
    )
    for run in run.chunks(loop.ALL):
        pass
    return run.result()


@dataclasses.dataclass(frozen=True)
class Run:
    """A generation under way. `chunks` gives it again after every so many steps; `result` ends it."""

    lm: LM | Model
    state: UnderWay
    prompts: list[list[int]]
    sampler: Any
    seeds: np.ndarray
    stop_ids: tuple[int, ...]
    stopped: np.ndarray
    timings: Timings

    @classmethod
    def start(
        cls,
        lm: LM | Model,
        prompts: Any,
        *,
        after: Generated | None,
        max_new_tokens: Any,
        sampler: Any,
        seed: Any,
        plan: Any,
        stop_ids: Sequence[int] | None,
        prefix: Cache | None = None,
        algorithm: Algorithm | None = None,
        target: Any = None,
        cross: Any = None,
    ) -> Run:
        """Encodes and prefills, or takes up an earlier result."""
        if (prompts is None) == (after is None):
            raise InputError("generate: give either prompts or after")
        if after is not None and any(x is not None for x in (plan, prefix, target, cross)):
            raise InputError("generate: after has a cache already; plan, prefix, target and cross go with prompts")
        if algorithm is not None and not (sampler is None and seed is None):
            raise InputError("generate: sampler and seed are for drawing tokens; an algorithm chooses them itself")
        model = model_of(lm)
        if model.encode is None and not (target is None and cross is None):
            raise InputError("generate: target and cross are for models with an encoder, and this one has none")
        if model.encode is not None and prefix is not None:
            raise InputError(
                "generate: prefix is for models without an encoder; give what targets begin with as target"
            )
        plan = tuple(plan) if isinstance(plan, list) else plan
        forced, usual = 0, np.asarray(BUDGET)
        sources: list[list[int]] | None = None
        if after is None:
            ids = encode(lm, prompts)
            if model.encode is not None:
                sources, ids = ids, targets_of(lm, target, len(ids))
                usual = np.maximum(usual, [2 * len(row) for row in sources])
                forced = max(len(getattr(lm, "start_ids", ())) - 1, 0) if target is None else 0
            sampler = sampling.checked(sampler)
            stops = tuple(getattr(lm, "eos_ids", ()) if stop_ids is None else stop_ids)
            seeds = np.asarray(loop.seeds_of(0 if seed is None else seed, len(ids)))
        else:
            _check_after(model, after)
            ids = fed(after.cache)
            sampler = after.sampler if sampler is None else sampler
            stops = after.stop_ids if stop_ids is None else tuple(stop_ids)
            seeds = after.seeds if seed is None else np.asarray(loop.seeds_of(seed, len(ids)))
        limits = limits_of(model, ids, max_new_tokens, usual)
        starts = np.asarray([len(row) - forced for row in ids], np.int32)
        stopped = np.zeros(len(ids), bool) if after is None else _ended(ids, after, stops)
        chosen = Draw(sampler, seeds) if algorithm is None else algorithm
        began = time.perf_counter()
        with Compilations() as made:
            if after is None:
                source = None if sources is None else encoded(model, *padded(sources))
                progress = _prefilled(model, ids, plan, prefix, source, cross)
            else:
                # The loop donates what it is given; the caller keeps its own.
                cache, logits = _copy((after.cache, after.logits))
                progress = loop.Progress(cache, logits, stopped, np.int32(0))  # type: ignore[arg-type]
            progress = progress.replace(starts=starts)
            jax.block_until_ready(progress)
            progress.cache.check()
            wanted = Wanted(limits, stops_of("generate", stops), getattr(lm, "filters", ()))
            state = chosen.begin(progress, wanted)
        spent = time.perf_counter() - began - made.seconds
        timings = Timings(compile=made.seconds, prefill=max(spent, 0.0), programs=made.count)
        return cls(lm, state, ids, sampler, seeds, stops, stopped, timings)

    def chunks(self, chunks: int) -> Iterator[Run]:
        """Goes on, `chunks` times 16 steps between two looks, until all rows are done. Earlier runs are used up."""
        run = self
        model = model_of(self.lm)
        lengths, wants, capacity = run.state.look()
        while wants.any():
            began = time.perf_counter()
            with Compilations() as made:
                state = run.state
                if (wants & (lengths >= capacity)).any():
                    state = state.grow(2 * capacity)
                state = state.advance(model, chunks)
                lengths, wants, capacity = state.look()
            old = run.timings
            steps, wasted = state.count()
            run = dataclasses.replace(
                run,
                state=state,
                timings=Timings(
                    compile=old.compile + made.seconds,
                    prefill=old.prefill,
                    decode=old.decode + max(time.perf_counter() - began - made.seconds, 0.0),
                    programs=old.programs + made.count,
                    steps=steps,
                    wasted=wasted,
                ),
            )
            yield run

    def new(self) -> list[list[int]]:
        """Ids emitted so far, of each row."""
        return [row[len(prompt) :] for row, prompt in zip(self.state.texts(), self.prompts, strict=True)]

    def result(self) -> Generated:
        """What there is now, as `generate` returns it."""
        new = self.new()
        lengths = np.asarray([len(row) for row in new], np.int32)
        tokens = np.full((len(new), int(np.max(lengths, initial=0))), -1, np.int32)
        for row, ids in enumerate(new):
            tokens[row, : len(ids)] = ids
        cache, logits = self.state.end(model_of(self.lm))
        answers = [self._answer(row, ids) for row, ids in enumerate(new)]
        texts = [answer.text for answer in answers if answer.text is not None]
        return Generated(
            text=texts or None,
            tokens=tokens,
            lengths=lengths,
            stop=[answer.stop for answer in answers],
            cache=cache,
            logits=logits,
            prompts=self.prompts,
            seeds=self.seeds,
            sampler=self.sampler,
            stop_ids=self.stop_ids,
            timings=self.timings,
            candidates=self.candidates(),
        )

    def candidates(self) -> list[list[Candidate]] | None:
        """`Generated.candidates` so far, without the cache that `result` makes of the best."""
        ranked = self.state.ranked()
        if ranked is None:
            return None
        return [
            [self._answer(row, text[len(prompt) :], score) for text, score in texts]
            for row, (prompt, texts) in enumerate(zip(self.prompts, ranked, strict=True))
        ]

    def _answer(self, row: int, new: list[int], score: float = 0.0) -> Candidate:
        tokenizer = getattr(self.lm, "tokenizer", None)
        text = None if tokenizer is None else tokenizer.continuation(self.prompts[row], new)
        ended = self.stopped[row] or (len(new) > 0 and new[-1] in self.stop_ids)
        return Candidate(text, new, score, "eos" if ended else "length")


def _prefilled(
    model: Model, ids: list[list[int]], plan: Any, prefix: Cache | None, source: Source | None, cross: Any
) -> loop.Progress:
    longest = max(len(row) for row in ids)
    if prefix is not None:
        ids, prefix = beyond(ids, prefix)
    tokens, lengths = padded(ids)
    least = CAPACITY if source is None else TARGET_CAPACITY
    capacity = loop.bucket(longest + (AHEAD if source is None else loop.CHUNK), least)
    return loop.Progress(*_begin(model, tokens, lengths, prefix, source, plan=plan, cross=cross, capacity=capacity))


def _check_after(model: Model, after: Generated) -> None:
    if isinstance(model.config, Config) and len(after.cache.layers) != model.config.num_layers:
        here, there = model.config.num_layers, len(after.cache.layers)
        raise InputError(f"generate: after has a cache of {there} layers, the model has {here}")
    if (SOURCE in after.cache.shared) != (model.encode is not None):
        raise InputError("generate: of the model and the cache of after, only one has a source")


def _ended(ids: list[list[int]], after: Generated, stops: tuple[int, ...]) -> np.ndarray:
    last = np.asarray([row[-1] for row in ids])
    emitted = (np.asarray(after.lengths) > 0) | (np.asarray(after.stop) == "eos")  # not of the prompt
    return np.isin(last, stops) & emitted


@functools.partial(jax.jit, static_argnames=("plan", "cross", "capacity"))
def _begin(
    model: Model,
    tokens: Array,
    lengths: Array,
    prefix: Cache | None,
    source: Source | None,
    *,
    plan: Any,
    cross: Any,
    capacity: int,
) -> tuple[Any, ...]:
    # One program: an empty cache made outside would cost a compilation for each kind of buffer.
    rows = tokens.shape[0]
    cache = init_cache(model, plan, batch=rows, capacity=capacity, prefix=prefix, source=source, cross=cross)
    logits, cache = loop.prefill(model, cache, tokens, lengths)
    return cache, logits, jnp.zeros(lengths.shape, bool), jnp.zeros((), jnp.int32)


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


__all__ = ["generate", "Generated", "Timings", "Run"]
