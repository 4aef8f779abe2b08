"""A generation under way, on the host: `generate` runs it to its end, `stream` and the command line look in between."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kvjax import sampling
from kvjax.caches.base import SOURCE, Cache
from kvjax.caching import encode as encoded
from kvjax.checks import array, count
from kvjax.config import Config
from kvjax.errors import InputError
from kvjax.lm import LM
from kvjax.loops import decode as loop
from kvjax.loops.algorithms import Algorithm, Candidate, Draw, UnderWay, Wanted
from kvjax.loops.beginning import prefilled, resumed
from kvjax.loops.generated import Generated, Logprobs, Timings
from kvjax.loops.noted import Noted
from kvjax.loops.prompts import (
    BUDGET,
    encode,
    fed,
    limits_of,
    model_of,
    more_of,
    padded,
    stop_at_of,
    targets_of,
    with_tokenizer,
)
from kvjax.loops.watch import Strings, Watch
from kvjax.model import Model
from kvjax.sampling.contract import id_list
from kvjax.stopping import Stops, completed, stops_of
from kvjax.timing import Compilations


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """What a generation was asked for, a row each where it says so.

    Args:
        prompts: ids before the new tokens, of each row.
        starts: `[B]` int32, how many of them were not made by this generation or the one that it goes on from.
        sampler: see `kvjax.sampling`.
        seeds: `[B]` uint32.
        stop_ids, stop_at: see `Generated`.
        stops: both, as the device looks for them.
        strings: those of `stop_at`.
        samples: rows of each prompt.
        ended: per row, how it had ended before anything was made, or None.
    """

    prompts: list[list[int]]
    starts: np.ndarray
    sampler: Any
    seeds: np.ndarray
    stop_ids: tuple[int, ...]
    stop_at: tuple[str | tuple[int, ...], ...]
    stops: Stops
    strings: Strings
    samples: int
    ended: list[str | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """`chunks` gives it again after every so many steps, and uses earlier ones up; `result` is what there is now.

    Args:
        lm: as given to `generate`.
        given: what was asked for.
        state: of the algorithm.
        timings: so far.
        watches: of each row its text, where somebody looks at it while it is made.
    """

    lm: LM | Model
    given: Given
    state: UnderWay
    timings: Timings
    watches: tuple[Watch, ...] | None = None

    @classmethod
    def start(
        cls,
        lm: LM | Model,
        prompts: Any = None,
        *,
        after: Generated | None = None,
        max_new_tokens: Any = None,
        sampler: Any = None,
        seed: Any = None,
        plan: Any = None,
        stop_ids: Sequence[int] | None = None,
        stop: Any = None,
        samples: int = 1,
        logprobs: int | None = None,
        prefix: Cache | None = None,
        algorithm: Algorithm | None = None,
        target: Any = None,
        cross: Any = None,
        every: int = loop.CHUNK,
    ) -> Run:
        """Encodes and prefills, or takes up an earlier result."""
        model = model_of(lm)
        _agree(
            model,
            prompts=prompts,
            after=after,
            sampler=sampler,
            seed=seed,
            plan=plan,
            samples=samples,
            logprobs=logprobs,
            prefix=prefix,
            algorithm=algorithm,
            target=target,
            cross=cross,
            every=every,
        )
        plan = tuple(plan) if isinstance(plan, list) else plan
        if stop_ids is not None:
            id_list("generate: stop_ids", stop_ids)
        sources: list[list[int]] | None = None
        more: list[list[int]] | None = None
        forced, usual = 0, np.asarray(BUDGET)
        if after is None:
            ids = encode(lm, prompts)
            if model.encode is not None:
                sources, ids = ids, targets_of(lm, target, len(ids))
                usual = np.maximum(usual, [2 * len(row) for row in sources])
                forced = max(len(getattr(lm, "start_ids", ())) - 1, 0) if target is None else 0
            starts = np.asarray([len(row) - forced for row in ids], np.int32)
            sampler = sampling.checked(sampler)
            stop_ids = tuple(getattr(lm, "eos_ids", ()) if stop_ids is None else stop_ids)
            stop_at = stop_at_of(lm, stop)
            copies = samples
        else:
            _check_after(model, after)
            ids, starts = fed(after.cache), after.starts
            if prompts is not None:
                more = more_of(lm, prompts, len(ids))
                ids = [row + new for row, new in zip(ids, more, strict=True)]
                starts = np.asarray([len(row) for row in ids], np.int32)
            sampler = after.sampler if sampler is None else sampling.checked(sampler)
            stop_ids = after.stop_ids if stop_ids is None else tuple(stop_ids)
            stop_at = after.stop_at if stop is None else stop_at_of(lm, stop)
            copies = after.samples * samples
        seeds = _seeds(seed, after, len(ids), samples)
        stops = stops_of("generate", stop_ids, [each for each in stop_at if not isinstance(each, str)])
        strings = Strings([each for each in stop_at if isinstance(each, str)])
        if strings and algorithm is not None and not algorithm.draws:
            raise InputError("generate: stop strings are for drawing tokens; give an algorithm lists of ids as stop")
        limits = limits_of(model, ids, max_new_tokens, usual)
        prompted, ids = ids, [row for row in ids for _ in range(samples)]
        starts, limits = np.repeat(starts, samples), np.repeat(limits, samples)
        ended: list[str | None] = [None] * len(ids)
        if after is not None and more is None:
            ended = [_ended(row[start:], stop_ids, stops) for row, start in zip(ids, starts, strict=True)]
        watches = _watches(lm, ids, starts, strings) if strings else None
        if watches is not None:
            ended = ["stop" if watch.ended else each for watch, each in zip(watches, ended, strict=True)]
        given = Given(ids, starts, sampler, seeds, stop_ids, stop_at, stops, strings, copies, ended)
        stopped = np.asarray([each is not None for each in ended])
        chosen = Draw() if algorithm is None else algorithm
        began = time.perf_counter()
        with Compilations() as made:
            if after is None:
                source = None if sources is None else encoded(model, *padded(sources))
                progress = prefilled(model, prompted, plan, prefix, source, cross, samples, logprobs)
            else:
                progress = resumed(model, after, more, samples, logprobs)
            progress = progress.replace(starts=starts, stopped=stopped, copies=copies)
            jax.block_until_ready(progress)
            progress.cache.check()
            scored = np.asarray([len(row) - forced for row in ids], np.int32)
            filters, again = getattr(lm, "filters", ()), bool(strings)
            wanted = Wanted(limits, scored, stops, filters, every, again, model, sampler, seeds, sources)
            state = chosen.begin(progress, wanted)
        spent = time.perf_counter() - began - made.seconds
        timings = Timings(compile=made.seconds, prefill=max(spent, 0.0), programs=made.count)
        return cls(lm, given, state, timings, watches)

    @property
    def prompts(self) -> list[list[int]]:
        """Ids before the new tokens, of each row."""
        return self.given.prompts

    def watched(self) -> Run:
        """The same with an eye on the text of each row, if there is a tokenizer and texts only grow."""
        if self.watches is not None or getattr(self.lm, "tokenizer", None) is None or not self.state.grows:
            return self
        given = self.given
        return dataclasses.replace(self, watches=_watches(self.lm, given.prompts, given.starts, given.strings))

    def chunks(self, chunks: int) -> Iterator[Run]:
        """Goes on, `chunks` scans between two looks, until all rows are done. Earlier runs are used up."""
        run = self
        model = model_of(self.lm)
        chunks = 1 if self.given.strings else chunks
        lengths, wants, full = run.state.look()
        while wants.any():
            began = time.perf_counter()
            with Compilations() as made:
                state = run.state
                if (wants & full).any():
                    state = state.grow()
                state = run._watch(model, state.advance(model, chunks), lengths, chunks)
                lengths, wants, full = state.look()
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

    def _watch(self, model: Model, state: Any, lengths: np.ndarray, chunks: int) -> Any:
        """What there is after a chunk, without what follows a stop string."""
        if self.watches is None:
            return state
        texts = state.texts()
        keep = [watch.push(ids[int(begin) :]) for watch, ids, begin in zip(self.watches, texts, lengths, strict=True)]
        ends = [None if n is None else int(begin) + n for n, begin in zip(keep, lengths, strict=True)]
        return state if all(end is None for end in ends) else state.again(model, chunks, ends)

    def new(self) -> list[list[int]]:
        """Ids emitted so far, of each row."""
        return [row[len(prompt) :] for row, prompt in zip(self.state.texts(), self.prompts, strict=True)]

    def pieces(self) -> list[str | None]:
        """Of each row, what became certain of its text since the last call; None where nobody looks."""
        return [None] * len(self.prompts) if self.watches is None else [watch.piece() for watch in self.watches]

    def rest(self) -> list[str | None]:
        """Of each row, what of its text is left to give, when nothing more is made."""
        if self.watches is not None:
            return [watch.finish() for watch in self.watches]
        return [self._answer(row, ids).text for row, ids in enumerate(self.new())]

    def result(self) -> Generated:
        """What there is now, as `generate` returns it."""
        given, new = self.given, self.new()
        lengths = np.asarray([len(row) for row in new], np.int32)
        tokens = np.full((len(new), int(np.max(lengths, initial=0))), -1, np.int32)
        for row, ids in enumerate(new):
            tokens[row, : len(ids)] = ids
        cache, logits, noted = self.state.end(model_of(self.lm))
        answers = [self._answer(row, ids) for row, ids in enumerate(new)]
        texts = [answer.text for answer in answers if answer.text is not None]
        return Generated(
            text=texts or None,
            tokens=tokens,
            lengths=lengths,
            stop=[answer.stop for answer in answers],
            cache=cache,
            logits=logits,
            prompts=given.prompts,
            seeds=given.seeds,
            sampler=given.sampler,
            stop_ids=given.stop_ids,
            timings=self.timings,
            starts=given.starts,
            stop_at=given.stop_at,
            samples=given.samples,
            logprobs=None if noted is None else self._logprobs(noted, tokens.shape[1], lengths),
            candidates=self.candidates(),
            speculated=self.state.report(),
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
        given, cut = self.given, False
        tokenizer = getattr(self.lm, "tokenizer", None)
        text = None if tokenizer is None else tokenizer.continuation(given.prompts[row], new)
        if self.watches is not None:
            text, cut = self.watches[row].whole()
        if cut:
            return Candidate(text, new, score, "stop")
        made = given.prompts[row][int(given.starts[row]) :] + new
        how = _ended(made, given.stop_ids, given.stops) if new else given.ended[row]
        return Candidate(text, new, score, how or "length")

    def _logprobs(self, noted: Noted, width: int, lengths: np.ndarray) -> Logprobs:
        at = np.asarray([len(row) for row in self.prompts])[:, None] + np.arange(width)
        gone = np.arange(width) >= lengths[:, None]
        rows = np.arange(len(lengths))[:, None]
        chosen, ids, values = (np.asarray(x)[rows, np.where(gone, 0, at)] for x in jax.tree.leaves(noted))
        chosen[gone], ids[gone], values[gone] = np.nan, -1, np.nan
        return Logprobs(chosen, ids, values)


def _agree(model: Model, **given: Any) -> None:
    """Raises InputError where two arguments of `generate` do not go together."""

    def some(*names: str) -> bool:
        return any(given[name] is not None for name in names)

    if not some("prompts", "after"):
        raise InputError("generate: give prompts, or after, or both")
    if some("after") and some("plan", "prefix", "target", "cross"):
        raise InputError("generate: after has a cache already; plan, prefix, target and cross go with prompts alone")
    drawn = not some("algorithm") or given["algorithm"].draws
    if not drawn and (some("sampler", "seed") or given["samples"] != 1):
        raise InputError("generate: sampler, seed and samples are for drawing tokens; an algorithm chooses them itself")
    if model.encode is None and some("target", "cross"):
        raise InputError("generate: target and cross are for models with an encoder, and this one has none")
    if model.encode is not None and some("prefix"):
        raise InputError("generate: prefix is for models without an encoder; give what targets begin with as target")
    for name, least in (("samples", 1), ("every", 1), ("logprobs", 0)):
        if given[name] is not None:  # logprobs may be
            count(f"generate: {name}", given[name], least)


def _check_after(model: Model, after: Generated) -> None:
    if not isinstance(after, Generated):
        raise InputError(f"generate: after must be what generate gave, not {type(after).__name__}")
    if isinstance(model.config, Config) and len(after.cache.layers) != model.config.num_layers:
        here, there = model.config.num_layers, len(after.cache.layers)
        raise InputError(f"generate: after has a cache of {there} layers, the model has {here}")
    if (SOURCE in after.cache.shared) != (model.encode is not None):
        raise InputError("generate: of the model and the cache of after, only one has a source")


def _seeds(seed: Any, after: Generated | None, rows: int, samples: int) -> np.ndarray:
    """`[rows * samples]` uint32: one a sample as given, or those of rows, and of sample i these plus i."""
    if seed is None and after is not None:
        each = after.seeds
    elif samples > 1 and array("seed", seed).shape == (rows * samples,):
        return np.asarray(loop.seeds_of(seed, rows * samples))
    else:
        each = np.asarray(loop.seeds_of(0 if seed is None else seed, rows))
    every = each.astype(np.int64)[:, None] + np.arange(samples)
    return np.asarray(loop.seeds_of(every.reshape(-1).tolist(), rows * samples))


def _watches(lm: LM | Model, ids: list[list[int]], starts: np.ndarray, strings: Strings) -> tuple[Watch, ...]:
    tokenizer = with_tokenizer(lm, "stop")  # also where an earlier result says what it is

    def watch(row: list[int], start: int) -> Watch:
        made = [tokenizer.continuation(row[:start], row[start:end]) for end in (len(row), max(len(row) - 1, start))]
        return Watch(tokenizer, row, strings, made[0], len(os.path.commonprefix(made)))

    return tuple(watch(row, int(start)) for row, start in zip(ids, starts, strict=True))


def _ended(made: list[int], stop_ids: tuple[int, ...], stops: Stops) -> str | None:
    """How tokens that were made ended a row, or None."""
    if made and made[-1] in stop_ids:
        return "eos"
    return "stop" if completed(stops.sequences, made) else None


__all__ = ["Run", "Given"]
