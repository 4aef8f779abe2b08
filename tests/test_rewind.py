"""Promise: after a rewind the live part is bitwise what it would be had the dropped tokens never been seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import CAPACITY, MIXED, PROMPTS, fed, filled, prompt_ids, tiny

import kvjax
from kvjax import CacheError, caches
from kvjax.caches.base import REWIND
from kvjax.ops.attention import EMPTY

KEPT = prompt_ids(3, 10)[:, :3]  # [10 steps, B], fed in the end
DROPPED = prompt_ids(4, 8)[:, :3]


def step_over(model, cache, steps):
    """Logits of each step, and the cache."""
    found = []
    for tokens in steps:
        logits, cache = kvjax.step(model, cache, tokens)
        found.append(np.asarray(logits))
    return np.array(found), cache


def same(cache, other):
    """Lengths, tokens fed, and what live slots hold, bit by bit."""
    np.testing.assert_array_equal(cache.lengths, other.lengths)
    fed = np.arange(cache.capacity)[None, :] < np.asarray(cache.lengths)[:, None]
    np.testing.assert_array_equal(np.asarray(cache.tokens)[fed], np.asarray(other.tokens)[fed])
    for layer, node in enumerate(cache.layers):
        if not node.replays:
            at = np.asarray(cache.positions(layer))
            np.testing.assert_array_equal(at, other.positions(layer))
            live = np.broadcast_to((at != EMPTY)[:, None, :], cache.keys(layer).shape[:3])
            for a, b in ((cache.keys(layer), other.keys(layer)), (cache.values(layer), other.values(layer))):
                assert np.asarray(a)[live].tobytes() == np.asarray(b)[live].tobytes()


def drops(case):
    """How many tokens the rows take back: at once, ragged, as many as possible."""
    most = min(case.slack if case.slack is not None else len(DROPPED), len(DROPPED))
    return sorted({(most,) * 3, (most, 0, most // 2), (1 if most else 0, most, 0)})


@pytest.mark.corner
@kinds.each()
def test_a_rewound_cache_is_bitwise_one_that_never_saw_the_dropped_tokens(case):
    model = case.model
    _, start = filled(model, case.plan)
    _, start = step_over(model, start, KEPT[:2])  # rings have wrapped in the longest row, not in the shortest
    want, end = step_over(model, start, KEPT[2:])
    for drop in drops(case):
        drop = np.array(drop)
        _, ahead = step_over(model, start, DROPPED[: max(drop)])
        # rows that drop fewer saw fewer: they are rewound to where the others' text parts
        back = ahead.rewind(start.lengths)
        same(back, start)
        got, cache = step_over(model, back, KEPT[2:])
        assert got.tobytes() == want.tobytes()
        same(cache, end)


@kinds.each()
def test_rows_rewind_to_lengths_of_their_own(case):
    model = case.model
    _, start = filled(model, case.plan)
    rows = [step_over(model, start, KEPT[:n])[1] for n in range(len(KEPT) + 1)]
    for drop in drops(case):
        back = rows[8].rewind(rows[8].lengths - jnp.array(drop))
        for row, n in enumerate(drop):
            same(back.take([row]), rows[8 - n].take([row]))
        steps = np.stack([KEPT[8 - np.array(drop) + i, np.arange(3)] for i in range(2)])
        logits, _ = step_over(model, back, steps)
        for row, n in enumerate(drop):
            want, _ = step_over(model, rows[8 - n], KEPT[8 - n : 10 - n])
            assert logits[:, row].tobytes() == want[:, row].tobytes()


@kinds.each(lambda case: case.slack is None or case.slack >= 2)
def test_two_rewinds_in_a_row_are_one(case):
    model = case.model
    _, start = filled(model, case.plan)
    _, ahead = step_over(model, start, DROPPED[:2])
    same(ahead.rewind(ahead.lengths - 1).rewind(start.lengths), start)
    # back, forth on another way, and back again: the slack counts from the furthest token
    _, again = step_over(model, ahead.rewind(start.lengths), KEPT[:2])
    back = again.rewind(start.lengths)
    same(back, start)
    want, _ = step_over(model, start, KEPT[2:6])
    got, _ = step_over(model, back, KEPT[2:6])
    assert got.tobytes() == want.tobytes()


@kinds.each()
def test_a_prompt_fed_in_one_chunk_can_be_rewound_too(case):
    n = 3 if case.slack is None else min(case.slack, 3)
    model, lengths = case.model, PROMPTS - np.minimum(n, PROMPTS)
    _, cache = filled(model, case.plan)
    back = cache.rewind(lengths)
    _, short = filled(model, case.plan, valid=lengths)
    same(back, short)
    got, _ = step_over(model, back, KEPT[:4])
    want, _ = step_over(model, short, KEPT[:4])
    assert got.tobytes() == want.tobytes()


def ring():
    model, plan = tiny(MIXED), (caches.ring(6, slack=4), caches.dense())
    _, cache = filled(model, plan)
    return model, cache  # lengths 16, 7, 1


def test_a_rewind_beyond_the_slack_is_an_error_on_the_host():
    model, cache = ring()
    cache.rewind([12, 3, 0])
    with pytest.raises(CacheError, match=r"row 0 to length 11 is 5 behind .* \(16\).* keeps 4.*slack"):
        cache.rewind([11, 7, 1])
    back = cache.rewind([14, 7, 1])
    with pytest.raises(CacheError, match="row 0 to length 11 is 5 behind"):
        back.rewind([11, 7, 1])
    with pytest.raises(CacheError, match="row 0 to length 11"):  # a resize does not bring back what is lost
        back.resize(14).rewind([11, 7, 1])
    _, back = step_over(model, back, KEPT[:1])
    with pytest.raises(CacheError, match="row 0 to length 11 is 5 behind"):
        back.rewind([11, 7, 1])


def test_a_rewind_beyond_the_slack_is_flagged_under_jit():
    model, cache = ring()
    back = jax.jit(lambda cache, to: cache.rewind(to))(cache, jnp.array([11, 5, 0]))
    np.testing.assert_array_equal(back.flags, [REWIND, 0, 0])
    logits, after = kvjax.step(model, back, KEPT[0])
    assert np.isnan(logits[0]).all() and not np.isnan(logits[1:]).any()
    want, _ = kvjax.step(model, cache.rewind([12, 5, 0]), KEPT[0])
    assert np.asarray(logits[1:]).tobytes() == np.asarray(want[1:]).tobytes()
    with pytest.raises(CacheError, match="row 0.*rewound further"):
        after.check()


@kinds.each()
def test_lengths_are_absolute_and_mistakes_are_errors(case):
    _, cache = filled(case.model, case.plan)
    for wrong, row in (([17, 7, 1], 0), ([16, -1, 1], 1), (-1, 0), (cache.lengths + 1, 0), ([16, 7, 2], 2)):
        with pytest.raises(CacheError, match=rf"row {row} to length -?\d+, but the row has {PROMPTS[row]} tokens"):
            cache.rewind(jnp.asarray(wrong))
    flagged = jax.jit(lambda cache, to: cache.rewind(to))(cache, jnp.array([17, 7, -1]))
    np.testing.assert_array_equal(flagged.flags, [REWIND, 0, REWIND])
    np.testing.assert_array_equal(cache.rewind(cache.lengths).lengths, PROMPTS)
    with pytest.raises(CacheError, match="lengths"):
        cache.rewind(jnp.array([1, 2]))
    with pytest.raises(CacheError, match="lengths"):
        cache.rewind(jnp.array([1.5, 2.0, 1.0]))


def test_a_rewind_clears_flags_and_a_full_cache_goes_on():
    model, full = tiny(MIXED), np.full(3, CAPACITY)
    logits, cache = fed(model, caches.dense(), full)
    bad, cache = kvjax.step(model, cache, KEPT[0])
    assert np.isnan(bad).all()
    back = cache.rewind(CAPACITY - 1)
    assert not np.asarray(back.flags).any()
    again, _ = kvjax.step(model, back, cache.tokens[:, -1])
    np.testing.assert_allclose(again, logits, rtol=1e-3, atol=1e-3)
