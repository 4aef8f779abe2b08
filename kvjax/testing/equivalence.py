"""The same tokens as recomputing from scratch, shown on any model, plan and algorithm.

A first difference counts as a tie only if the recomputed scores of the two choices differ by less than 1e-5 of the
largest logit; ties are listed, and are at most 1 in 10,000 tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import caches
from kvjax.caches.base import Cache
from kvjax.caches.cross import Source
from kvjax.caching import init_cache
from kvjax.errors import InputError
from kvjax.loops.decode import bucket, prefill, step
from kvjax.model import Model, forward
from kvjax.sampling import Text
from kvjax.testing.algorithms import Made, as_algorithm, cuts_of, fed_in_chunks, first_difference, greedy, sampled
from kvjax.types import Array

TIE, TIES, DISTINCT, SEEDS = 1e-5, 10_000, 16, (0, 1, 2)
LENGTHS = (16, 7, 1)
"""Of the prompts that are drawn when none are given."""


@dataclasses.dataclass(frozen=True)
class Against:
    """See `against`."""

    plan: Any
    reference: Any


def against(plan: Any, reference: Any) -> Against:
    """A plan whose reference is not `caches.recompute()`: a ring on layers that see everything, for one."""
    return Against(plan, reference)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where tokens first differ in a row.

    Args:
        seed, row, position: of the run, in the batch, among the new tokens.
        want, got: ids of the reference and of the plan, -1 for an end.
        gap: between their recomputed scores: of the two tokens, or of two texts that were ranked.
        top: the largest recomputed logit, in magnitude.
    """

    seed: int
    row: int
    position: int
    want: int
    got: int
    gap: float
    top: float

    @property
    def tie(self) -> bool:
        """Whether the two choices were equally good."""
        return self.gap < TIE * self.top

    def __str__(self) -> str:
        where = f"seed {self.seed}, row {self.row}, new token {self.position}"
        return f"{where}: {self.want} became {self.got}, gap {self.gap:.2g}, top {self.top:.3g}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One plan under one algorithm.

    Args:
        plan, algorithm: their names.
        tokens: compared, up to the first difference of a row.
        differences: first differences of rows, ties among them.
        worst: largest |Δlogit| over the largest |logit|, after prompts and over the reference's tokens fed one by one.
        limit: what `worst` must not pass: 1e-12 in float64, None in other precisions.
        distinct: fewest distinct tokens in a compared row.
        least: how many there must be for the row to prove anything.
        scores: of texts that are the same and were ranked, those whose score is not.
    """

    plan: str
    algorithm: str
    tokens: int
    differences: tuple[Difference, ...]
    worst: float
    limit: float | None
    distinct: int
    least: int
    scores: tuple[str, ...] = ()

    @property
    def ties(self) -> tuple[Difference, ...]:
        """First differences that count as ties."""
        return tuple(each for each in self.differences if each.tie)

    @property
    def wrong(self) -> tuple[str, ...]:
        """Everything that is not as promised, in words."""
        found = [*(str(each) for each in self.differences if not each.tie), *self.scores]
        if len(self.ties) * TIES > self.tokens:
            found.append(f"{len(self.ties)} ties in {self.tokens} tokens are more than 1 in {TIES}")
        if self.limit is not None and not self.worst <= self.limit:
            found.append(f"logits differ by {self.worst:.1e} of the largest, more than {self.limit:.0e}")
        if self.distinct < self.least:
            found.append(f"a row has {self.distinct} distinct tokens, fewer than {self.least}: this would prove little")
        return tuple(found)

    @property
    def ok(self) -> bool:
        """Whether it keeps the promise."""
        return not self.wrong


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check_equivalence` found; `str(report)` is a table of at most 80 columns.

    Args:
        outcomes: one for each plan and algorithm.
    """

    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """Whether every plan keeps the promise under every algorithm."""
        return all(each.ok for each in self.outcomes)

    def raise_if_failed(self) -> Report:
        """Itself.

        Raises:
            AssertionError: with the table, if something is not as promised.
        """
        if not self.ok:
            raise AssertionError(f"check_equivalence\n{self}")
        return self

    def __str__(self) -> str:
        lines = [f"{'plan':<30} {'algorithm':<16} {'tokens':>7} {'ties':>4} {'worst':>8}  result"]
        for each in self.outcomes:
            name, how = (
                text if len(text) <= n else text[: n - 1] + "…" for text, n in ((each.plan, 30), (each.algorithm, 16))
            )
            result = "equal" if each.ok else "FAILED"
            lines.append(f"{name:<30} {how:<16} {each.tokens:>7} {len(each.ties):>4} {each.worst:>8.1e}  {result}")
            lines += [f"  {text}" for text in each.wrong] + [f"  tie: {tie}" for tie in each.ties]
        return "\n".join(lines)


def check_equivalence(
    model: Model,
    plans: Any,
    algorithms: Sequence[Any] | None = None,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] = SEEDS,
    splits: Sequence[Sequence[int]] | None = None,
    distinct: int = DISTINCT,
    source: Source | None = None,
    cross: Any = None,
) -> Report:
    """Shows that plans give a model's tokens as recomputing everything from scratch does.

    Every plan runs every algorithm on a ragged batch, at every seed, with the prompts fed whole and in chunks.

    Args:
        model: any `Model`.
        plans: a list of plans, or a dict from names to plans; each a kind, a tuple with one a layer, None for the
            default, or `testing.against(plan, reference)`.
        algorithms: what the public loops take, a sampler or `kvjax.beam(4)`; or with numbers of their own
            `testing.greedy()`, `sampled()`, `until()`, `beam()`, or anything like `testing.Algorithm`. None is greedy
            and sampled.
        prompts: a batch of lists of ids; None draws random ids, 16, 7 and 1 in a row, anew for each seed.
        seeds: of prompts that are drawn and of sampling. The promise is made for 0, 1 and 2.
        splits: ways to cut the prompts into chunks of so many tokens; None is whole, in two uneven pieces, in three,
            and one by one.
        distinct: how many distinct tokens a compared row must have. A model that repeats itself proves little.
        source: from `kvjax.encode`, what the rows attend to; as for `init_cache`.
        cross: what the plans keep of it; the reference projects it again at every call.

    Returns:
        A report; `print(report)`, `report.ok`, `report.raise_if_failed()`.

    Raises:
        InputError: no plans, or an empty prompt.
    """
    named = _named(plans)
    chosen = (greedy(), sampled()) if algorithms is None else tuple(as_algorithm(each) for each in algorithms)
    if not named or not chosen:
        raise InputError("check_equivalence: give at least one plan and one algorithm")
    rows = 1 if source is None else source.lengths.shape[0]
    vocab = jax.eval_shape(forward, model, jax.ShapeDtypeStruct((rows, 1), jnp.int32), source=source).shape[-1]
    batches = {seed: _batch(prompts, seed, vocab) for seed in seeds}
    cuts = cuts_of(max(int(lengths.max()) for _, lengths in batches.values())) if splits is None else splits
    found, wanted = [], {}
    for name, plan, reference in named:
        for algorithm in chosen:
            one: list[_One] = []
            for seed, (ids, lengths) in batches.items():
                run = _Run(model, algorithm, ids, lengths, seed, source, cross)
                key = (reference, id(algorithm), seed)
                if key not in wanted:
                    wanted[key] = run.reference(reference)
                one += [run.compare(plan, reference, wanted[key], cut) for cut in cuts]
            found.append(_outcome(name, algorithm.name, one, distinct))
    return Report(tuple(found))


class _One(NamedTuple):
    """What one run of a plan gave."""

    tokens: int
    differences: list[Difference]
    scores: list[str]
    worst: float
    distinct: int
    dtype: Any


def _outcome(plan: str, algorithm: str, runs: list[_One], least: int) -> Outcome:
    return Outcome(
        plan,
        algorithm,
        sum(run.tokens for run in runs),
        tuple(each for run in runs for each in run.differences),
        max(run.worst for run in runs),
        1e-12 if all(run.dtype == jnp.float64 for run in runs) else None,
        min(run.distinct for run in runs),
        least,
        tuple(each for run in runs for each in run.scores),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """One algorithm on one batch of prompts; it may make several rows of each."""

    model: Model
    algorithm: Any
    ids: np.ndarray
    lengths: np.ndarray
    seed: int
    source: Source | None
    cross: Any

    @property
    def seeds(self) -> np.ndarray:
        return (self.seed + np.arange(len(self.ids) * self.algorithm.copies)).astype(np.uint32)

    @property
    def capacity(self) -> int:
        return -(-(self.ids.shape[1] + self.algorithm.steps) // 32) * 32

    @property
    def recomputed(self) -> Any:
        return None if self.source is None else caches.encoder_output()

    def prefilled(self, plan: Any, cross: Any, cut: Sequence[int]) -> tuple[Array, Any]:
        batch = len(self.ids)
        cache = _empty(self.model, self.source, plan=plan, cross=cross, batch=batch, capacity=self.capacity)
        return fed_in_chunks(self.model, cache, self.ids, self.lengths, cut)

    def made(self, plan: Any, cross: Any, cut: Sequence[int]) -> Made:
        logits, cache = self.prefilled(plan, cross, cut)
        return self.algorithm.run(self.model, cache, logits, self.seeds)

    def reference(self, plan: Any) -> tuple[Made, np.ndarray]:
        """What it made, and logits of every position over each prompt's first row of that."""
        whole = (self.ids.shape[1],)
        made = self.made(plan, self.recomputed, whole)
        return made, self.taught(plan, self.recomputed, made.tokens, whole)

    def taught(self, plan: Any, cross: Any, tokens: np.ndarray, cut: Sequence[int]) -> np.ndarray:
        """Logits `[1 + steps, B, V]` after the prompt and after each new token; zeros are fed after a row's last."""
        logits, cache = self.prefilled(plan, cross, cut)
        found = [np.asarray(logits)]
        for each in np.maximum(tokens[:: self.algorithm.copies], 0).T:
            logits, cache = step(self.model, cache, each)
            found.append(np.asarray(logits))
        return np.stack(found)

    def compare(self, plan: Any, reference: Any, wanted: tuple[Made, np.ndarray], cut: Sequence[int]) -> _One:
        want, logits = wanted
        got = self.made(plan, self.cross, cut)
        mine = self.taught(plan, self.cross, want.tokens, cut)
        high = float(np.max(np.abs(logits)))
        tokens, distinct = 0, []
        differences, scores = [], []
        for row in range(len(want.tokens)):
            a, b = ([int(token) for token in made.tokens[row] if token >= 0] for made in (want, got))
            distinct.append(len(set(a)))
            tokens += len(a)
            if a != b:
                at = first_difference(a, b)
                tokens += at + 1 - len(a)
                gap, top = self.algorithm.gap(functools.partial(self.rescored, reference, row), a, b)
                x, y = (text[at] if at < len(text) else -1 for text in (a, b))
                differences.append(Difference(self.seed, row, at, x, y, gap, top))
            elif want.scores is not None and got.scores is not None:
                mean, other = float(want.scores[row]), float(got.scores[row])
                if not abs(mean - other) < TIE * high:
                    scores.append(f"seed {self.seed}, row {row}: the same text, score {mean:.7g} became {other:.7g}")
        return _One(
            tokens, differences, scores, float(np.max(np.abs(mine - logits)) / (high or 1)), min(distinct), mine.dtype
        )

    def rescored(self, plan: Any, row: int, new: list[int]) -> tuple[np.ndarray, float]:
        """Recomputed from scratch: what the algorithm compares after some new tokens, and the largest logit."""
        copies, size = self.algorithm.copies, bucket(self.capacity)
        begun = int(self.lengths[row // copies])
        text = [*self.ids[row // copies, :begun].tolist(), *new]
        rows = np.tile(np.pad(np.asarray(text, np.int32), (0, size - len(text))), (len(self.ids), 1))
        cross = self.recomputed
        cache = _empty(self.model, self.source, plan=plan, cross=cross, batch=len(rows), capacity=size)
        logits, _ = prefill(self.model, cache, rows, np.full(len(rows), len(text), np.int32))
        many = len(rows) * copies
        lengths, starts, limits = (
            jnp.full(many, n, jnp.int32) for n in (len(text), begun, begun + self.algorithm.steps)
        )
        tokens = jnp.asarray(np.repeat(rows, copies, axis=0))
        state = Text(tokens, lengths, starts, limits, jnp.zeros(0, jnp.int32), copies=copies)
        found = self.algorithm.scores(jnp.repeat(logits, copies, axis=0), state, self.seeds)
        return np.asarray(found)[row], float(jnp.max(jnp.abs(logits[row // copies])))


@functools.partial(jax.jit, static_argnames=("plan", "cross", "batch", "capacity"))
def _empty(model: Model, source: Source | None, *, plan: Any, cross: Any, batch: int, capacity: int) -> Cache:
    # One program: made outside of one, each kind of buffer would be another.
    return init_cache(model, plan, batch=batch, capacity=capacity, source=source, cross=cross)


def _batch(prompts: Sequence[Sequence[int]] | None, seed: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    if prompts is None:
        ids = np.random.default_rng(seed).integers(0, vocab, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
        return ids, np.array(LENGTHS, np.int32)
    lengths = np.array([len(row) for row in prompts], np.int32)
    if not lengths.size or not lengths.all():
        raise InputError("check_equivalence: a prompt is empty; give at least one id a row")
    ids = np.zeros((len(lengths), int(lengths.max())), np.int32)
    for row, values in enumerate(prompts):
        ids[row, : len(values)] = values
    return ids, lengths


def _named(plans: Any) -> list[tuple[str, Any, Any]]:
    items = plans.items() if isinstance(plans, Mapping) else [(None, plan) for plan in plans]
    found = []
    for name, plan in items:
        pair = plan if isinstance(plan, Against) else Against(plan, caches.recompute())
        pair = Against(*(tuple(each) if isinstance(each, list) else each for each in (pair.plan, pair.reference)))
        found.append((name or plan_name(pair.plan), pair.plan, pair.reference))
    return found


def plan_name(plan: Any) -> str:
    """A plan in a few words: `ring(window=6, slack=4)`, and what is empty or off left out."""
    if plan is None:
        return "default"
    if isinstance(plan, tuple | list):
        return " + ".join(plan_name(kind) for kind in plan)
    if not dataclasses.is_dataclass(plan):
        return str(plan)
    values = ((field.name, getattr(plan, field.name)) for field in dataclasses.fields(plan))
    shown = ", ".join(f"{name}={value}" for name, value in values if type(value) is int and value)
    return f"{type(plan).__name__.removesuffix('Kind').lower()}({shown})"


__all__ = [
    "check_equivalence",
    "Report",
    "Outcome",
    "Difference",
    "against",
    "Against",
    "plan_name",
]
