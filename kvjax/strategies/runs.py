"""Runs strategies on one text, in turn, and measures them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import costs, donating
from kvjax.caches.base import Cache
from kvjax.caches.cross import Source
from kvjax.caching import encode, init_cache
from kvjax.config import Config
from kvjax.costs import Flops
from kvjax.errors import CacheError, InputError, KvjaxError
from kvjax.loops.decode import VALUE
from kvjax.model import Model, forward
from kvjax.strategies.kept import STRATEGIES, WITH_SOURCE, Strategy
from kvjax.types import Array

TIE = 1e-5
"""A first difference is a tie where the recomputed scores of the two choices differ by less than this, times the
largest: rounding decides there."""


OPERATIONS = ("token", "step", "rewind", "reorder", "edit", "resume")
"""What is timed: a token decoded in one loop, the same as a call of its own, going back, exchanging rows, going back to
feed other tokens, and running the same positions again from the middle layer on."""

STEPS = 8
"""Calls of their own in a round."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One strategy's figures.

    Args:
        name: of the strategy.
        refused: why the model does not allow it; then there is nothing else.
        predicted_nbytes, nbytes: of the cache.
        predicted, counted: FLOPs of one step of all rows.
        seconds: by operation, one figure a round; `token` and `step` are of all rows. No `resume` where no stream is
            kept.
        tokens: "equal", "tie at I" or "differ at I": the I-th new token is the first that is not that of "none".
    """

    name: str
    refused: str | None = None
    predicted_nbytes: int = 0
    nbytes: int = 0
    predicted: Flops = Flops()
    counted: Flops = Flops()
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    tokens: str = ""

    def median(self, operation: str) -> float | None:
        """The middle of the rounds, in seconds; None for what is not possible."""
        rounds = self.seconds.get(operation)
        return statistics.median(rounds) if rounds else None


@dataclasses.dataclass(frozen=True)
class SourceShape:
    """What the rows read besides their text.

    Args:
        rows: how many sources; as many rows of the batch read each.
        tokens, slots: of each source, without and with padding.
    """

    rows: int
    tokens: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All strategies on one model.

    Args:
        config: of the model.
        batch, context, new, edited: rows; tokens each has before anything is timed; tokens decoded a round; tokens that
            an edit goes back and feeds anew.
        capacity: slots that every step reads: context and new.
        rows: one a strategy.
        source: of a model with an encoder.
        interrupted: whether an interrupt ended the timing after fewer rounds.
    """

    config: Config
    batch: int
    context: int
    new: int
    edited: int
    capacity: int
    rows: tuple[Row, ...]
    source: SourceShape | None = None
    interrupted: bool = False


def compare(
    model: Model,
    *,
    batch: int = 2,
    context: int = 128,
    new: int = 32,
    edited: int = 8,
    rounds: int = 5,
    source: int | None = None,
    sources: int | None = None,
    strategies: Iterable[Strategy] | None = None,
    seed: int = 0,
    watch: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Comparison:
    """Runs every strategy on one text of random tokens, greedily, and times them in turn, round by round.

    An interrupt keeps the rounds that are whole, if there is one: then it ends the timing, and is not raised.

    Args:
        model: of this library's own decoder: predictions need its `Config`.
        batch: B.
        context: tokens that every row has.
        new: tokens decoded in each round, in one scan; time per token is its mean.
        edited: tokens that an edit goes back and feeds anew, and a resumed run computes again; at most `context`.
        rounds: how often each is timed; what is compiled is compiled before.
        source: tokens of each source of a model with an encoder; None: as many as the context, or as it has positions.
        sources: how many there are, a divisor of B; None: one for each row.
        strategies: the first one is the reference for the tokens; None: `STRATEGIES`, or `WITH_SOURCE`.
        seed: of the text.
        watch: told `(what, done, of)` before each piece of work.

    Raises:
        InputError: a number is out of range, context and new tokens pass the model's positions, a source those of the
            encoder, or there is a source and no encoder.
    """
    config = model.config
    if not isinstance(config, Config):
        raise InputError("compare: costs are predicted from kvjax.Config; this model has none")
    for name, value, least in (("batch", batch, 1), ("new", new, 1), ("rounds", rounds, 1), ("edited", edited, 1)):
        if value < least:
            raise InputError(f"compare: {name} must be at least {least}, not {value}")
    if context < edited:
        raise InputError(f"compare: context {context} is less than the {edited} tokens that an edit goes back")
    capacity = context + new
    if config.max_positions is not None and capacity > config.max_positions:
        raise InputError(f"compare: context {context} and {new} new tokens pass the {config.max_positions} positions")
    if config.encoder is None and not source == sources == None:  # noqa: E711
        raise InputError(f"compare: source is {source} and sources {sources}, but the model has no encoder")
    random = np.random.default_rng(seed)
    ids, others = random.integers(0, config.vocab_size, (2, batch, context)).astype(np.int32)
    read, shape = None, None
    if config.encoder is not None:
        length = min(context, config.encoder.max_positions or context) if source is None else source
        read, shape = _encoded(model, random, batch, batch if sources is None else sources, length)
    known = STRATEGIES if read is None else WITH_SOURCE
    chosen = known if strategies is None else tuple(strategies)
    text = _Text(ids, others[:, :edited], new, capacity, read)
    total = len(chosen) * (1 + rounds)
    courses: list[_Course] = []
    interrupted = False
    for i, strategy in enumerate(chosen):
        watch(f"{strategy.name}, compiling", i, total)
        courses.append(_Course(strategy, model, text))
    try:
        for i, course in enumerate(courses * rounds, len(chosen)):
            watch(course.strategy.name, i, total)
            course.round()
        watch("done", total, total)
    except KeyboardInterrupt:
        whole, interrupted = i // len(chosen) - 1, True
        if whole < 1:
            raise
        for course in courses:
            course.seconds = {name: each[:whole] for name, each in course.seconds.items()}
    rows = tuple(course.row(courses[0]) for course in courses)
    return Comparison(config, batch, context, new, edited, capacity, rows, shape, interrupted)


def _encoded(
    model: Model, random: np.random.Generator, batch: int, rows: int, tokens: int
) -> tuple[Source, SourceShape]:
    """Random sources, and their shape."""
    for name, value in (("source", tokens), ("sources", rows)):
        if value < 1:
            raise InputError(f"compare: {name} must be at least 1, not {value}")
    if batch % rows:
        raise InputError(f"compare: batch {batch} is no multiple of {rows} sources")
    made = encode(model, random.integers(0, model.config.encoder.vocab_size, (rows, tokens)).astype(np.int32))
    return made, SourceShape(rows, tokens, made.states.shape[1])


@dataclasses.dataclass(frozen=True)
class _Text:
    """What is fed: `ids[B, context]`, `others[B, edited]` in an edit, then `new` tokens of the model's own; and what is
    read besides."""

    ids: np.ndarray
    others: np.ndarray
    new: int
    capacity: int
    source: Source | None


def _rewind(cache: Cache, lengths: Array) -> Cache:
    return cache.rewind(lengths)


def _reorder(cache: Cache, beams: Array) -> Cache:
    return cache.reorder(beams)


# Donated, so that what is timed is the work and not a copy of the cache.
_rewinding, _reordering = (jax.jit(f, donate_argnums=0) for f in (_rewind, _reorder))


class _Course:
    """One strategy on its way: everything is compiled when it is made, then every round is timed."""

    def __init__(self, strategy: Strategy, model: Model, text: _Text) -> None:
        self.strategy, self.model, self.text = strategy, model, text
        self.seconds: dict[str, list[float]] = {name: [] for name in OPERATIONS}
        self.refused = ""
        batch = len(text.ids)
        self.lengths = jnp.full((batch,), text.ids.shape[1], jnp.int32)
        # Rows that read one source exchange places; where none share, all rows do.
        share = 1 if text.source is None else batch // text.source.lengths.shape[0]
        order = np.arange(batch, dtype=np.int32).reshape(-1, share if share > 1 else batch)
        self.beams = jnp.asarray(order[:, ::-1].ravel())
        try:
            kept = None if strategy.source is None else strategy.source.cross
            plan, source = strategy.plan, text.source
            cache = init_cache(model, plan, batch=batch, capacity=text.capacity, source=source, cross=kept)
            self.counted = costs.count_flops(VALUE.step, model, cache, self.lengths)
        except KvjaxError as error:
            self.refused = str(error)
            return
        self.nbytes = cache.nbytes
        self.logits, self.cache = donating.prefill(model, cache, text.ids)
        try:
            _, self.cache = self._resume(self.cache)
            self.resumes = True
        except CacheError:
            self.resumes = False
        self.tokens = np.asarray(self.round())
        self.seconds = {name: [] for name in OPERATIONS if name != "resume" or self.resumes}

    def round(self) -> Array:
        """Times each operation once; the new tokens. The cache ends as long as it was."""
        if self.refused:
            return self.lengths
        run = self._timed
        tokens, _, cache = run("token", donating.decode, self.model, self.cache, self.logits, steps=self.text.new)
        self.seconds["token"][-1] /= self.text.new
        cache = run("rewind", _rewinding, cache, self.lengths)
        cache = _rewinding(run("step", self._steps, cache), self.lengths)
        self.seconds["step"][-1] /= min(STEPS, self.text.new)
        cache = run("reorder", _reordering, cache, self.beams)
        _, self.cache = run("edit", self._edit, cache)
        if self.resumes:
            _, self.cache = run("resume", self._resume, self.cache)
        return tokens

    def _steps(self, cache: Cache) -> Cache:
        for _ in range(min(STEPS, self.text.new)):
            _, cache = donating.step(self.model, cache, self.text.others[:, 0])
        return cache

    def _edit(self, cache: Cache) -> tuple[Array, Cache]:
        others = self.text.others
        return donating.prefill(self.model, _rewinding(cache, self.lengths - others.shape[1]), others)

    def _resume(self, cache: Cache) -> tuple[Array, Cache]:
        back = self.text.others.shape[1]
        return donating.resume(self.model, cache, self.model.config.num_layers // 2, self.text.ids.shape[1] - back)

    def _timed(self, operation: str, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        began = time.perf_counter()
        made = jax.block_until_ready(function(*args, **static))
        self.seconds[operation].append(time.perf_counter() - began)
        return made

    def row(self, reference: _Course) -> Row:
        """Its figures."""
        if self.refused:
            return Row(self.strategy.name, self.refused)
        batch, read = len(self.text.ids), self.text.source
        source = None if read is None else (read.states.shape[0], read.states.shape[1])
        nbytes, flops = predicted(self.strategy, self.model, batch=batch, capacity=self.text.capacity, source=source)
        agreement = _agreement(self.model, self.text.ids, reference.tokens, self.tokens, self.text.source)
        return Row(self.strategy.name, None, nbytes, self.nbytes, flops, self.counted, self.seconds, agreement)


def predicted(
    strategy: Strategy, model: Model, *, batch: int, capacity: int, source: tuple[int, int] | None = None
) -> tuple[int, Flops]:
    """Bytes of a strategy's cache, and FLOPs of one step of all rows; nothing is run.

    Args:
        strategy: what is kept.
        model: of this library's own decoder.
        batch: B.
        capacity: T, slots of the text.
        source: rows and slots of what is read besides, or None.
    """
    config, store = model.config, model.layer_shapes()[0].dtype
    nbytes = strategy.nbytes(config, batch=batch, capacity=capacity, store=store)
    flops = strategy.flops(config, batch=batch, slots=capacity)
    if strategy.source is not None and source is not None:
        kept, (rows, slots) = strategy.source, source
        nbytes += kept.nbytes(config, source=slots, rows=rows, store=store)
        queries = capacity if strategy.whole else 1
        flops += kept.flops(config, source=slots, rows=rows, batch=batch, queries=queries)
    return nbytes, flops


def _agreement(model: Model, ids: np.ndarray, known: np.ndarray, made: np.ndarray, source: Source | None = None) -> str:
    """How new tokens `[B, new]` stand to the reference's."""
    worst = "equal"
    for row, at in ((row, int(np.argmax(known[row] != made[row]))) for row in range(len(ids))):
        if known[row, at] == made[row, at]:
            continue
        text = np.concatenate([ids[row], known[row, :at]])
        read = None
        if source is not None:
            at_source = row * len(source.lengths) // len(ids)
            read = jax.tree.map(lambda x, i=at_source: x[i : i + 1], source)
        scores = np.asarray(forward(model, text[None], source=read)[0, -1], np.float64)
        gap = abs(scores[known[row, at]] - scores[made[row, at]])
        if gap >= TIE * np.abs(scores).max():
            return f"differ at {at}"
        worst = f"tie at {at}"
    return worst


__all__ = ["OPERATIONS", "Row", "Comparison", "SourceShape", "compare", "predicted"]
