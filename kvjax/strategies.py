"""What could be kept of a text, side by side: bytes, FLOPs and time of each, predicted and found."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import caches, costs, donating
from kvjax.caches.base import Cache
from kvjax.caching import init_cache
from kvjax.config import Config
from kvjax.costs import Flops
from kvjax.errors import CacheError, InputError, KvjaxError
from kvjax.loops.decode import VALUE
from kvjax.model import Model, decoder, forward
from kvjax.ops.positions import Learned
from kvjax.params import init_params
from kvjax.types import Array, DType

TIE = 1e-5
"""A first difference is a tie where the recomputed scores of the two choices differ by less than this, times the
largest: rounding decides there."""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What is kept, and what that should cost.

    Args:
        name: for people.
        plan: kind of cache.
        nbytes: `(config, batch=, capacity=, store=) -> int`.
        flops: `(config, batch=, slots=) -> Flops` of one step.
    """

    name: str
    plan: Any
    nbytes: Callable[..., int]
    flops: Callable[..., Flops]


def _nothing(config: Config, *, batch: int, capacity: int, store: Any) -> int:
    return costs.recompute_nbytes(config, batch=batch, capacity=capacity)


def _with_factor(config: Config, *, batch: int, capacity: int, store: Any) -> int:
    factor = jnp.promote_types(jnp.float32, store).itemsize
    return costs.layer_input_nbytes(config, batch=batch, capacity=capacity, store=store, factor=factor)


ABSORBED = "input, absorbed"
STRATEGIES = (
    Strategy("none", caches.recompute(), _nothing, costs.recompute_flops),
    Strategy("K/V", caches.dense(), costs.dense_nbytes, costs.kv_flops),
    Strategy("input, projected", caches.layer_input(), costs.layer_input_nbytes, costs.reprojected_flops),
    Strategy(ABSORBED, caches.layer_input(absorb=True), _with_factor, costs.absorbed_flops),
    Strategy("output", caches.output(), costs.output_nbytes, costs.reprojected_flops),
    Strategy("hybrid", caches.hybrid(), costs.hybrid_nbytes, costs.kv_flops),
)
"""The first one is the reference for the tokens, the second one for the figures."""

OPERATIONS = ("token", "rewind", "reorder", "edit", "resume")
"""What is timed: a decoded token, going back, exchanging rows, going back to feed other tokens, and running the same
positions again from the middle layer on."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One strategy's figures.

    Args:
        name: of the strategy.
        refused: why the model does not allow it; then there is nothing else.
        predicted_nbytes, nbytes: of the cache.
        predicted, counted: FLOPs of one step of all rows.
        seconds: by operation, one figure a round; `token` is a step of all rows. No `resume` where no stream is kept.
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
class Comparison:
    """All strategies on one model.

    Args:
        config: of the model.
        batch, context, new, edited: rows; tokens each has before anything is timed; tokens decoded a round; tokens that
            an edit goes back and feeds anew.
        capacity: slots that every step reads: context and new.
        rows: one a strategy.
    """

    config: Config
    batch: int
    context: int
    new: int
    edited: int
    capacity: int
    rows: tuple[Row, ...]


def without_rotation(config: Config, size: int, dtype: DType = jnp.float32, seed: int = 0) -> Model:
    """A random model of the same shape with learned positions and no norm of heads: layer inputs can be absorbed.

    Args:
        config: of the model that it is like.
        size: positions that it knows.
        dtype: of its parameters.
        seed: of its parameters, which are large enough that it does not repeat itself.
    """
    like = dataclasses.replace(config, positions=Learned(size), layer_positions=(), max_positions=size, qk_norm=None)
    factor = 100 * config.width**-0.5  # a deviation of 2 / sqrt(M)
    params = init_params(like, jax.random.key(seed), dtype)
    return decoder(like, jax.tree.map(lambda x: x * factor if x.ndim > 1 else x, params))


def compare(
    model: Model,
    *,
    batch: int = 2,
    context: int = 128,
    new: int = 32,
    edited: int = 8,
    rounds: int = 5,
    strategies: Iterable[Strategy] = STRATEGIES,
    seed: int = 0,
    watch: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Comparison:
    """Runs every strategy on one text of random tokens, greedily, and times them in turn, round by round.

    Args:
        model: of this library's own decoder: predictions need its `Config`.
        batch: B.
        context: tokens that every row has.
        new: tokens decoded in each round, in one scan; time per token is its mean.
        edited: tokens that an edit goes back and feeds anew, and a resumed run computes again; at most `context`.
        rounds: how often each is timed; what is compiled is compiled before.
        strategies: the first one is the reference for the tokens.
        seed: of the text.
        watch: told `(what, done, of)` before each piece of work.

    Raises:
        InputError: a number is out of range, or context and new tokens pass the model's positions.
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
    chosen = tuple(strategies)
    ids, others = np.random.default_rng(seed).integers(0, config.vocab_size, (2, batch, context)).astype(np.int32)
    text = _Text(ids, others[:, :edited], new, capacity)
    total = len(chosen) * (1 + rounds)
    courses: list[_Course] = []
    for i, strategy in enumerate(chosen):
        watch(f"{strategy.name}, compiling", i, total)
        courses.append(_Course(strategy, model, text))
    for i, course in enumerate(courses * rounds, len(chosen)):
        watch(course.strategy.name, i, total)
        course.round()
    watch("done", total, total)
    return Comparison(config, batch, context, new, edited, capacity, tuple(c.row(courses[0]) for c in courses))


@dataclasses.dataclass(frozen=True)
class _Text:
    """What is fed: `ids[B, context]`, `others[B, edited]` in an edit, then `new` tokens of the model's own."""

    ids: np.ndarray
    others: np.ndarray
    new: int
    capacity: int


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
        self.beams = jnp.arange(batch, dtype=jnp.int32)[::-1]
        try:
            cache = init_cache(model, strategy.plan, batch=batch, capacity=text.capacity)
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
        cache = run("reorder", _reordering, cache, self.beams)
        _, self.cache = run("edit", self._edit, cache)
        if self.resumes:
            _, self.cache = run("resume", self._resume, self.cache)
        return tokens

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
        config, batch, capacity = self.model.config, len(self.text.ids), self.text.capacity
        store = self.model.layer_shapes()[0].dtype
        return Row(
            self.strategy.name,
            None,
            self.strategy.nbytes(config, batch=batch, capacity=capacity, store=store),
            self.nbytes,
            self.strategy.flops(config, batch=batch, slots=capacity),
            self.counted,
            self.seconds,
            _agreement(self.model, self.text.ids, reference.tokens, self.tokens),
        )


def _agreement(model: Model, ids: np.ndarray, known: np.ndarray, made: np.ndarray) -> str:
    """How new tokens `[B, new]` stand to the reference's."""
    worst = "equal"
    for row, at in ((row, int(np.argmax(known[row] != made[row]))) for row in range(len(ids))):
        if known[row, at] == made[row, at]:
            continue
        text = np.concatenate([ids[row], known[row, :at]])
        scores = np.asarray(forward(model, text[None])[0, -1], np.float64)
        gap = abs(scores[known[row, at]] - scores[made[row, at]])
        if gap >= TIE * np.abs(scores).max():
            return f"differ at {at}"
        worst = f"tie at {at}"
    return worst


def sentences(made: Comparison) -> list[str]:
    """What the figures say of keeping the streams between layers instead of keys and values."""
    config, rows = made.config, {row.name: row for row in made.rows if row.refused is None}
    if not {"none", "K/V", "output"} <= set(rows):
        return []
    kv, output = rows["K/V"], rows["output"]
    ratio = costs.layer_input_ratio(config)
    again = 4 * config.width * config.kv_heads * config.head_dim
    work = output.counted.contractions / kv.counted.contractions
    share = 1 / costs.patch_sweep_share(config.num_layers, made.capacity)
    compared = "the larger" if ratio > 1 else "the smaller" if ratio < 1 else "as large"
    said = [
        f"Bytes: a layer's input is {ratio:.2f} of its keys and values (width over 2 · kv heads · head width), "
        f"{compared} of the two; the whole output cache has {output.nbytes / kv.nbytes:.2f} of the bytes of K/V.",
        f"Output caches lose in decoding: one saves no FLOP over K/V, and making keys and values again adds {again:,} "
        f"(4 · width · kv heads · head width) for each cached position, layer and step. A step did {work:.1f} times "
        f"the work of K/V and took {_times(output, kv)} times as long.",
        f"Output caches win in resuming: a run goes on from any layer and position, which K/V alone does not allow. "
        f"The last {made.edited} positions again from the middle layer took {_milliseconds(output, 'resume')}; the "
        f"whole text anew took {_milliseconds(rows['none'], 'edit')}. Where keys and values are kept as well, patching "
        f"each (layer, position) of {made.capacity} tokens is {share:.1f} times less linear work than whole runs.",
    ]
    if ABSORBED in rows:
        said.append(
            f"Absorbed, nothing is made again and scores are {config.width / config.head_dim:.0f} times the work "
            f"(width over head width): {_times(rows[ABSORBED], kv)} times as long as K/V."
        )
    return said


def _milliseconds(row: Row, operation: str) -> str:
    return f"{1e3 * (row.median(operation) or 0):.1f} ms"


def _times(row: Row, than: Row) -> str:
    return f"{(row.median('token') or 0) / (than.median('token') or 1):.1f}"


__all__ = ["sentences", "Strategy", "STRATEGIES", "OPERATIONS", "Row", "Comparison", "compare", "without_rotation"]
