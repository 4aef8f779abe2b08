"""Promise: every exact kind gives the same tokens as recomputing from scratch under the same algorithm and keys."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import (
    BATCH,
    CAPACITY,
    MIXED,
    ONE_LAYER,
    ONE_LAYER_WINDOWED,
    PROMPTS,
    VOCAB,
    WINDOW,
    prompt_ids,
    tiny,
)

import kvjax
from kvjax import caches, sampling, struct
from kvjax.caches.base import Kind
from kvjax.caches.dense import Dense
from kvjax.ops.attention import EMPTY

STEPS = 64
GREEDY = sampling.greedy()
BOTH = sampling.chain(sampling.temperature([0.0, 0.9, 0.7]), sampling.top_k(60), sampling.top_p(0.97))
"""Greedy in row 0, drawn in the others, in one program."""
SPLITS = [(16,), (5, 11), (9, 1, 6), (1,) * 16]
"""How a prompt is cut; chunks of 16, 11 and 9 are longer than every ring's window."""
SEEDS = [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)]


class Tally:
    tokens = ties = 0


@pytest.fixture(scope="module")
def tally():
    tally = Tally()
    yield tally
    assert tally.ties * 10_000 <= tally.tokens, f"{tally.ties} ties in {tally.tokens} tokens"


def run(model, plan, ids, lengths, split, sampler, seeds):
    """Prompts in chunks, then 64 steps; new tokens `[B, 64]`."""
    cache = kvjax.init_cache(model, plan, batch=len(ids), capacity=CAPACITY)
    logits, at = np.zeros((len(ids), VOCAB), np.float32), 0
    for size in split:
        valid = np.clip(lengths - at, 0, size)
        new, cache = kvjax.prefill(model, cache, ids[:, at : at + size], valid)
        logits, at = np.where(valid[:, None] > 0, new, logits), at + size
    tokens, _, cache = kvjax.decode(model, cache, jnp.asarray(logits), steps=STEPS, sampler=sampler, seed=seeds)
    cache.check()
    fed = np.asarray(cache.tokens)
    for row, length in enumerate(lengths):  # what was fed is what was sampled
        np.testing.assert_array_equal(fed[row, length : length + STEPS], tokens[row])
    return np.asarray(tokens)


def scores(model, plan, ids, sampler, seed):
    """Recomputed from scratch: what the sampler compares when it chooses the token after `ids`."""
    cache = kvjax.init_cache(model, plan, batch=1, capacity=128)
    logits, _ = kvjax.prefill(model, cache, np.pad(ids, (0, 128 - len(ids)))[None, :], np.array([len(ids)]))
    top = float(jnp.max(jnp.abs(logits)))
    if isinstance(sampler, sampling.Chain):
        for each in sampler.filters:
            logits = each(logits)
        key = jax.random.fold_in(jax.random.key(seed), len(ids))
        logits = logits + jax.random.gumbel(key, logits.shape[1:], logits.dtype)[None, :]
    return np.asarray(logits[0]), top


def check(case, model, seed, split, sampler, tally):
    """Same tokens, or a tie at the first difference of a row."""
    ids, lengths = prompt_ids(seed), PROMPTS
    seeds = [seed + row for row in range(BATCH)]
    want = run(model, case.reference, ids, lengths, (16,), sampler, seeds)
    assert min(len(set(row.tolist())) for row in want) >= 16, "the model repeats itself: this would prove little"
    got = run(model, case.plan, ids, lengths, split, sampler, seeds)
    for row in range(BATCH):
        different = np.flatnonzero(want[row] != got[row])
        tally.tokens += STEPS if not different.size else int(different[0]) + 1
        if different.size:
            at = int(different[0])
            text = np.concatenate([ids[row, : lengths[row]], want[row, :at]])
            found, top = scores(model, case.reference, text, sampler, seeds[row])
            gap = abs(float(found[want[row, at]] - found[got[row, at]]))
            assert gap < 1e-5 * top, f"row {row}, new token {at}: {want[row, at]} became {got[row, at]}, {gap=}, {top=}"
            print(f"tie: {case.name}, seed {seed}, row {row}, new token {at}, {gap=}, {top=}")
            tally.ties += 1


@pytest.mark.corner
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sampler", [BOTH, pytest.param(GREEDY, marks=pytest.mark.full)], ids=["both", "greedy"])
@kinds.each(lambda case: case.exact)
def test_a_cache_gives_the_same_tokens_as_recomputing(case, sampler, seed, tally):
    for split in SPLITS:
        check(case, tiny(case.config, seed), seed, split, sampler, tally)


@pytest.mark.parametrize("config", [ONE_LAYER, pytest.param(MIXED, marks=pytest.mark.full)], ids=["full", "mixed"])
def test_recomputing_is_the_forward_pass(config):
    model, ids = tiny(config), np.pad(prompt_ids(), ((0, 0), (0, CAPACITY - 16)))
    want = run(model, caches.recompute(), ids[:, :16], PROMPTS, (16,), GREEDY, 0)
    lengths = PROMPTS.copy()
    for i in range(STEPS):
        logits = np.asarray(kvjax.forward(model, ids, lengths))
        new = logits[np.arange(BATCH), lengths - 1].argmax(axis=1)
        np.testing.assert_array_equal(new, want[:, i])
        ids[np.arange(BATCH), lengths] = new
        lengths = lengths + 1


# Mutants: each is wrong in one small way, and the same check must catch it.


@dataclasses.dataclass(frozen=True)
class Mutant(Kind):
    node: type

    def init(self, shape, batch, capacity):
        good = caches.dense().init(shape, batch, capacity)
        return self.node(good.k, good.v, capacity)


@struct.node
class KeysRotatedOneTooFar(Dense):
    def extend(self, h, project, span, shared):
        kv = project.kv
        return super().extend(h, dataclasses.replace(project, kv=lambda h, at: kv(h, at + 1)), span, shared)


@struct.node
class MaskExcludesTheToken(Dense):
    def extend(self, h, project, span, shared):
        views, node = super().extend(h, project, span, shared)
        later = lambda at: jnp.where(at == EMPTY, EMPTY, at + 1)  # noqa: E731  key < query for key <= query
        return tuple(view.replace(positions=later(view.positions)) for view in views), node


@struct.node
class ReadsAStaleSlot(Dense):
    def extend(self, h, project, span, shared):
        views, node = super().extend(h, project, span, shared)
        old, _ = super().extend(h, project, span.replace(valid=jnp.where(span.end == 20, 0, span.valid)), shared)
        stale = old[0].replace(positions=views[0].positions)
        keep = self.replace(k=node.k.replace(data=stale.k), v=node.v.replace(data=stale.v))
        return (stale,), keep


MUTANTS = {
    "nothing": kinds.Case("nothing", Mutant(Dense), ONE_LAYER, full=True),
    "keys rotated one position too far": kinds.Case("mutant", Mutant(KeysRotatedOneTooFar), ONE_LAYER),
    "mask with < for <=": kinds.Case("mutant", Mutant(MaskExcludesTheToken), ONE_LAYER),
    "one stale slot": kinds.Case("mutant", Mutant(ReadsAStaleSlot), ONE_LAYER),
    "window too short by one": kinds.Case("mutant", caches.ring(WINDOW - 1), ONE_LAYER_WINDOWED),
    "one sink too few": kinds.Case(
        "mutant", caches.ring(WINDOW, sinks=1), ONE_LAYER, caches.recompute(window=WINDOW, sinks=2), full=True
    ),
    "a window where there is none": kinds.Case("mutant", caches.ring(70), ONE_LAYER, full=True),
}


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, marks=(pytest.mark.full,) if case.full else ()) for m, case in MUTANTS.items()]
)
def test_the_check_catches(mutant):
    case = MUTANTS[mutant]
    arguments = case, tiny(case.config), 0, (5, 11), GREEDY, Tally()
    if mutant == "nothing":
        check(*arguments)
    else:
        with pytest.raises(AssertionError, match="became"):
            check(*arguments)
