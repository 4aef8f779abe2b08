"""Samplers: thresholds as by sorting, draws as distributed, seeds that mean the same in any row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvjax import InputError, sampling

V = 13
top_k, top_p = jax.jit(lambda x, k: sampling.top_k(k)(x)), jax.jit(lambda x, p: sampling.top_p(p)(x))
LEVELS = st.sampled_from([-np.inf, -50.0, -2.5, -1.0, -0.0, 0.0, 0.5, 1.0, 1.5, 3.0, 3.0000002, 40.0])
"""Few values, so that there are many ties."""
LOGITS = st.lists(st.lists(LEVELS, min_size=V, max_size=V), min_size=2, max_size=2).filter(
    lambda rows: all(np.isfinite(row).any() for row in rows)
)


def by_sorting_k(row, k):
    """Those at least as large as the k-th largest."""
    return np.ones(V, bool) if k <= 0 or k >= V else row >= np.sort(row)[::-1][k - 1]


def by_sorting_p(row, p):
    """The fewest largest whose probabilities reach p, and those equal to the least of them."""
    e = np.exp(row.astype(np.float64) - row.max())
    order = np.argsort(-row, kind="stable")
    sums = np.cumsum((e / e.sum())[order])
    if p >= 1:
        return np.ones(V, bool), np.inf
    least = row[order[int(np.argmax(sums >= p)) if p > 0 else 0]]
    return row >= least, np.abs(sums - p).min()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOGITS, st.lists(st.integers(0, V + 3), min_size=2, max_size=2))
def test_top_k_keeps_what_sorting_keeps_and_ties(logits, k):
    x = np.array(logits, np.float32)
    got = np.asarray(top_k(x, np.array(k, np.int32)))
    for row in range(2):
        kept = by_sorting_k(x[row], k[row])
        np.testing.assert_array_equal(got[row], np.where(kept, x[row], -np.inf))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOGITS, st.lists(st.sampled_from([0.0, 1e-6, 0.3, 0.5, 0.9, 0.999, 1.0]), min_size=2, max_size=2))
def test_top_p_keeps_what_sorting_keeps_and_ties(logits, p):
    x = np.array(logits, np.float32)
    got = np.asarray(top_p(x, np.array(p, np.float32)))
    for row in range(2):
        kept, margin = by_sorting_p(x[row], np.float32(p[row]))
        if margin > 1e-6:  # nearer than that, float32 sums may fall on either side
            np.testing.assert_array_equal(got[row], np.where(kept, x[row], -np.inf))
        assert np.isfinite(got[row]).any() and got[row][x[row].argmax()] == x[row].max()


def test_thresholds_on_a_large_vocabulary_with_numbers_of_each_row():
    x = np.random.default_rng(0).normal(size=(4, 50_257)).astype(np.float32) * 3
    ks, ps = [1, 40, 0, 60_000], [0.1, 0.5, 0.95, 1.0]
    kept = np.isfinite(np.asarray(top_k(x, np.array(ks, np.int32)))).sum(axis=1)
    np.testing.assert_array_equal(kept, [1, 40, 50_257, 50_257])
    got = np.isfinite(np.asarray(top_p(x, np.array(ps, np.float32))))
    for row, p in enumerate(ps):
        order = np.argsort(-x[row])
        e = np.exp(x[row, order].astype(np.float64))
        want = int(np.argmax(np.cumsum(e / e.sum()) >= p)) + 1 if p < 1 else 50_257
        assert abs(int(got[row].sum()) - want) <= 1 + want // 10_000
        assert got[row, order[: int(got[row].sum())]].all()


call = jax.jit(lambda sampler, logits, keys: sampler(logits, keys))


def draw(sampler, logits, seeds):
    keys = sampling.row_keys(jnp.asarray(seeds, jnp.uint32))
    return np.asarray(call(sampler, logits, keys))


def test_temperature_zero_is_greedy_whatever_follows_and_per_row():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, V)), jnp.float32)
    greedy = draw(sampling.greedy(), x, range(64))
    np.testing.assert_array_equal(greedy, np.asarray(x).argmax(axis=1))
    assert greedy.dtype == np.int32
    for sampler in (
        sampling.chain(sampling.temperature(0.0), sampling.top_k(5), sampling.top_p(0.9)),
        sampling.chain(sampling.temperature(5.0), sampling.top_k(1), sampling.top_p(1.0)),
        sampling.chain(sampling.temperature(5.0), sampling.top_k(0), sampling.top_p(0.0)),
        sampling.chain(sampling.temperature(0)),
        sampling.chain(sampling.temperature(1e-30)),
        sampling.chain(sampling.temperature(2e-38)),  # 60 / 2e-38 is infinite in float32
    ):
        np.testing.assert_array_equal(draw(sampler, x * 20, range(64)), greedy)
    mixed = sampling.chain(sampling.temperature(np.where(np.arange(64) % 2, 3.0, 0.0)))
    got = draw(mixed, x, range(64))
    np.testing.assert_array_equal(got[::2], greedy[::2])
    assert (got[1::2] != greedy[1::2]).mean() > 0.3


def test_the_first_of_equal_logits_is_the_largest():
    x = jnp.asarray([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, -7.0], [0.0, -0.0, 0.0]])
    np.testing.assert_array_equal(sampling.largest(x), [1, 2, 0])


def p_value(sampler, logits, expected, n=20_000):
    """Chi-square of n draws, one seed each, against a distribution."""
    drawn = draw(sampler, jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits))), range(n))
    counts = np.bincount(drawn, minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    real = expected > 0
    return stats.chisquare(counts[real], expected[real] * n).pvalue


def test_draws_follow_the_filtered_distribution():
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -np.inf])
    plain = np.exp(logits) / np.exp(logits).sum()
    warm = np.exp(logits / 2) / np.exp(logits / 2).sum()
    top3 = np.where(np.arange(6) < 3, warm, 0) / warm[:3].sum()
    assert p_value(sampling.chain(), logits, plain) > 1e-3
    assert p_value(sampling.chain(sampling.temperature(2.0)), logits, warm) > 1e-3
    assert p_value(sampling.chain(sampling.temperature(2.0), sampling.top_k(3)), logits, top3) > 1e-3
    assert p_value(sampling.chain(sampling.temperature(2.0), sampling.top_p(0.7)), logits, top3) > 1e-3
    assert p_value(sampling.chain(sampling.temperature(1.7)), logits, warm) < 1e-3, "the test has no power"


def test_a_seed_draws_the_same_alone_in_any_row_and_differs_by_position():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 200)), jnp.float32)
    sampler, seeds, places = sampling.chain(sampling.temperature(1.0)), np.arange(5), np.array([3, 9, 0, 100, 7])
    keys = sampling.position_keys(sampling.row_keys(jnp.asarray(seeds, jnp.uint32)), jnp.asarray(places))
    together = np.asarray(sampler(x, keys))
    for row in range(5):
        key = sampling.position_keys(sampling.row_keys(jnp.asarray([row], jnp.uint32)), jnp.asarray([places[row]]))
        np.testing.assert_array_equal(sampler(x[row : row + 1], key), together[row : row + 1])
    order = np.array([4, 1, 0, 3, 2])
    np.testing.assert_array_equal(sampler(x[order], keys[order]), together[order])
    later = sampling.position_keys(sampling.row_keys(jnp.asarray(seeds, jnp.uint32)), jnp.asarray(places + 1))
    assert (np.asarray(sampler(x, later)) != together).any()


def test_numbers_out_of_range_are_errors_that_name_them():
    for call, message in (
        (lambda: sampling.temperature(-0.1), "temperature: value -0.1 is out of range"),
        (lambda: sampling.temperature(float("nan")), "temperature"),
        (lambda: sampling.temperature(float("inf")), "temperature"),
        (lambda: sampling.top_k(-1), "top_k: k -1"),
        (lambda: sampling.top_k(2.5), "top_k: k 2.5 must be whole"),
        (lambda: sampling.top_p(1.01), "top_p: p 1.01"),
        (lambda: sampling.top_p([0.5, -0.5]), "top_p"),
        (lambda: sampling.top_p(np.ones((2, 2))), "one number or one a row"),
        (lambda: sampling.chain(sampling.top_k([1, 2]))(jnp.zeros((3, 4)), None), "2 values for 3 rows"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_a_sampler_is_a_pytree_whose_structure_does_not_depend_on_its_numbers():
    numbers = ((1, 2, 1), (0.5, 7, 0.1))
    a, b = (sampling.chain(sampling.temperature(t), sampling.top_k(k), sampling.top_p(p)) for t, k, p in numbers)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(a)] == [
        ((), jnp.float32, False),
        ((), jnp.int32, False),
        ((), jnp.float32, False),
    ]
