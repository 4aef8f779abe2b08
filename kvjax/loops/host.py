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
from kvjax.caches.base import Cache
from kvjax.caching import init_cache
from kvjax.errors import InputError
from kvjax.lm import LM
from kvjax.loops import decode as loop
from kvjax.model import Model
from kvjax.timing import Compilations
from kvjax.types import Array

CAPACITY = 256
"""The smallest capacity of a generated cache, in tokens; it grows by doubling."""

BUDGET = 128
"""New tokens of a row for which no budget is given, at most."""

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
) -> Generated:
    """Continues prompts until an end-of-sequence token or a budget.

    Compiles two programs for a prompt bucket and a capacity; other prompts, seeds, samplers' numbers, stop ids and
    budgets compile none.

    Args:
        lm: from `kvjax.load`; or a bare `Model`, for prompts of ids.
        prompts: a str, a list of str, or a list of lists of ids; rows may differ in length.
        after: what an earlier call gave, instead of prompts: goes on as one longer call would have, and leaves it
            usable. Seeds, sampler and stop ids are its own unless given.
        max_new_tokens: int, or one a row; 0 gives nothing new. None is 128, or what the model's positions leave a row
            if that is less.
        sampler: see `kvjax.sampling`; None is greedy.
        seed: int, or one a row; the same seed samples the same alone and in any row.
        plan: kind of cache; None is `caches.default`.
        stop_ids: tokens that end a row, themselves included in what is emitted; None is those of `lm`.
        prefix: a cache of one row whose text every prompt begins with. Only what follows is fed, and the prefix is
            kept once for all rows; it stays usable. The result is the same without it.

    Returns:
        Texts, tokens, and a cache to go on from.

    Raises:
        InputError: a prompt is empty, has ids outside the vocabulary or does not go on from `prefix`, or budgets pass
            the model's positions.
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
    )
    for run in run.chunks(loop.ALL):
        pass
    return run.result()


@dataclasses.dataclass(frozen=True)
class Run:
    """A generation under way. `chunks` gives it again after every so many steps; `result` ends it."""

    lm: LM | Model
    state: loop.Progress
    prompts: list[list[int]]
    limits: np.ndarray
    sampler: Any
    seeds: np.ndarray
    stop_ids: tuple[int, ...]
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
    ) -> Run:
        """Encodes and prefills, or takes up an earlier result."""
        if (prompts is None) == (after is None):
            raise InputError("generate: give either prompts or after")
        if after is not None and not (plan is None and prefix is None):
            raise InputError("generate: after has a cache already; plan and prefix go with prompts")
        model = model_of(lm)
        if after is not None and len(after.cache.layers) != len(model.layer_shapes()):
            here, there = len(model.layer_shapes()), len(after.cache.layers)
            raise InputError(f"generate: after has a cache of {there} layers, the model has {here}")
        plan = tuple(plan) if isinstance(plan, list) else plan
        if after is None:
            ids = _encode(lm, prompts)
            sampler = sampling.checked(sampler)
            stops = tuple(getattr(lm, "eos_ids", ()) if stop_ids is None else stop_ids)
            seeds = np.asarray(loop.seeds_of(0 if seed is None else seed, len(ids)))
        else:
            ids = _fed(after.cache)
            sampler = after.sampler if sampler is None else sampler
            stops = after.stop_ids if stop_ids is None else tuple(stop_ids)
            seeds = after.seeds if seed is None else np.asarray(loop.seeds_of(seed, len(ids)))
        limits = _limits(model, ids, max_new_tokens)
        began = time.perf_counter()
        with Compilations() as made:
            if after is None:
                state = _prefilled(model, ids, plan, prefix)
            else:
                last = np.asarray([row[-1] for row in ids])
                emitted = (np.asarray(after.lengths) > 0) | (np.asarray(after.stop) == "eos")  # not of the prompt
                stopped = np.isin(last, stops) & emitted
                # The loop donates what it is given; the caller keeps its own.
                cache, logits = _copy((after.cache, after.logits))
                state = loop.Progress(cache, logits, stopped, np.int32(0))  # type: ignore[arg-type]
            jax.block_until_ready(state)
        state.cache.check()
        spent = time.perf_counter() - began - made.seconds
        timings = Timings(compile=made.seconds, prefill=max(spent, 0.0), programs=made.count)
        return cls(lm, state, ids, limits, sampler, seeds, stops, timings)

    def chunks(self, chunks: int) -> Iterator[Run]:
        """Goes on, `chunks` times 16 steps between two looks, until all rows are done. Earlier runs are used up."""
        run = self
        model = model_of(self.lm)
        stops = loop.padded_stops(self.stop_ids)
        while True:
            lengths = np.asarray(run.state.cache.lengths)
            wants = ~np.asarray(run.state.stopped) & (lengths < run.limits)
            if not wants.any():
                return
            began = time.perf_counter()
            with Compilations() as made:
                state = run.state
                if (wants & (lengths >= state.cache.capacity)).any():
                    grown = _grow(state.cache, capacity=2 * state.cache.capacity)
                    state = state.replace(cache=grown)
                state = loop.DONATING.until(
                    model, state, run.sampler, run.seeds, stops, run.limits, np.int32(chunks), chunk=loop.CHUNK
                )
                jax.block_until_ready(state)
            state.cache.check()
            old = run.timings
            longest = int((np.asarray(state.cache.lengths) - lengths).max())
            wasted = int(state.wasted)
            run = dataclasses.replace(
                run,
                state=state,
                timings=Timings(
                    compile=old.compile + made.seconds,
                    prefill=old.prefill,
                    decode=old.decode + max(time.perf_counter() - began - made.seconds, 0.0),
                    programs=old.programs + made.count,
                    steps=old.steps + longest + wasted - old.wasted,
                    wasted=wasted,
                ),
            )
            yield run

    def new(self) -> list[list[int]]:
        """Ids emitted so far, of each row."""
        return [row[len(prompt) :] for row, prompt in zip(_fed(self.state.cache), self.prompts, strict=True)]

    def result(self) -> Generated:
        """What there is now, as `generate` returns it."""
        new = self.new()
        lengths = np.asarray([len(row) for row in new], np.int32)
        tokens = np.full((len(new), int(np.max(lengths, initial=0))), -1, np.int32)
        for row, ids in enumerate(new):
            tokens[row, : len(ids)] = ids
        tokenizer = getattr(self.lm, "tokenizer", None)
        text = None
        if tokenizer is not None:
            text = [tokenizer.continuation(prompt, ids) for prompt, ids in zip(self.prompts, new, strict=True)]
        stopped = np.asarray(self.state.stopped)
        return Generated(
            text=text,
            tokens=tokens,
            lengths=lengths,
            stop=["eos" if row else "length" for row in stopped],
            cache=self.state.cache,
            logits=self.state.logits,
            prompts=self.prompts,
            seeds=self.seeds,
            sampler=self.sampler,
            stop_ids=self.stop_ids,
            timings=self.timings,
        )


def model_of(lm: LM | Model) -> Model:
    """The pytree of a language model, or the model itself."""
    return lm.model if isinstance(lm, LM) else lm


def _prefilled(model: Model, ids: list[list[int]], plan: Any, prefix: Cache | None) -> loop.Progress:
    longest = max(len(row) for row in ids)
    if prefix is not None:
        ids, prefix = _beyond(ids, prefix)
    lengths = np.asarray([len(row) for row in ids], np.int32)
    tokens = np.zeros((len(ids), loop.bucket(int(np.max(lengths)))), np.int32)
    for row, values in enumerate(ids):
        tokens[row, : len(values)] = values
    capacity = loop.bucket(longest + AHEAD, CAPACITY)
    cache, logits, stopped, wasted = _begin(model, tokens, lengths, prefix, plan=plan, capacity=capacity)
    return loop.Progress(cache, logits, stopped, wasted)


def _beyond(ids: list[list[int]], prefix: Cache) -> tuple[list[list[int]], Cache]:
    """What each row feeds after a prefix, and the prefix without slots that it does not need."""
    begin = _fed(prefix.check())[0]
    for row, values in enumerate(ids):
        if values[: len(begin)] != begin or len(values) == len(begin):
            same = int(np.argmin([a == b for a, b in zip(values, begin, strict=False)] + [False]))
            raise InputError(
                f"generate: prompt {row} has {len(values)} tokens and goes with the prefix for {same}; it must begin "
                f"with all {len(begin)} and have one more"
            )
    # A caller's cache of any size compiles what one that is just long enough does.
    return [values[len(begin) :] for values in ids], prefix.resize(len(begin)) if begin else prefix


@functools.partial(jax.jit, static_argnames=("plan", "capacity"))
def _begin(
    model: Model, tokens: Array, lengths: Array, prefix: Cache | None, *, plan: Any, capacity: int
) -> tuple[Any, ...]:
    # One program: an empty cache made outside would cost a compilation for each kind of buffer.
    cache = init_cache(model, plan, batch=tokens.shape[0], capacity=capacity, prefix=prefix)
    logits, cache = loop.prefill(model, cache, tokens, lengths)
    return cache, logits, jnp.zeros(lengths.shape, bool), jnp.zeros((), jnp.int32)


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@functools.partial(jax.jit, static_argnames="capacity")
def _grow(cache: Cache, *, capacity: int) -> Cache:
    return cache.resize(capacity)


def _fed(cache: Cache) -> list[list[int]]:
    tokens, lengths = np.asarray(cache.tokens), np.asarray(cache.lengths)
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def _limits(model: Model, ids: list[list[int]], max_new_tokens: Any) -> np.ndarray:
    lengths = np.asarray([len(row) for row in ids], np.int64)
    if max_new_tokens is None:
        room = BUDGET if model.max_positions is None else np.maximum(model.max_positions - lengths, 0)
        max_new_tokens = np.minimum(BUDGET, room)
    budget = np.asarray(max_new_tokens)
    if budget.shape not in ((), (len(ids),)) or not np.issubdtype(budget.dtype, np.integer) or (budget < 0).any():
        raise InputError(f"generate: max_new_tokens {max_new_tokens!r} must be 0 or more, one or {len(ids)} numbers")
    limits = lengths + np.minimum(budget, np.iinfo(np.int32).max).astype(np.int64)
    if model.max_positions is not None and (limits > model.max_positions).any():
        row = int(np.argmax(limits))
        more = int(limits[row]) - len(ids[row])
        raise InputError(
            f"generate: row {row} has {len(ids[row])} tokens, and max_new_tokens {more} more pass the model's "
            f"{model.max_positions} positions"
        )
    return np.minimum(limits, np.iinfo(np.int32).max).astype(np.int32)


def _encode(lm: LM | Model, prompts: Any) -> list[list[int]]:
    if isinstance(prompts, str):
        prompts = [prompts]
    rows = []
    vocab = getattr(model_of(lm).config, "vocab_size", None)
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if not isinstance(lm, LM):
                raise InputError(f"generate: prompt {row} is text, but a bare Model has no tokenizer; give ids")
            prompt = lm.encode(prompt)
        ids = np.asarray(prompt)
        if ids.size == 0:
            raise InputError(f"generate: prompt {row} is empty; give at least one id")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"generate: prompt {row} must be text or a list of ids, not {ids.dtype}{list(ids.shape)}")
        if ids.min() < 0 or (vocab is not None and ids.max() >= vocab):
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise InputError(f"generate: prompt {row} has id {bad}, the vocabulary has {vocab} ids")
        rows.append(ids.astype(np.int64).tolist())
    if not rows:
        raise InputError("generate: prompts is empty")
    return rows


__all__ = ["generate", "Generated", "Timings", "Run", "model_of"]
