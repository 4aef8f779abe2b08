"""Samplers: thresholds as by sorting, draws as distributed, seeds that mean the same in any row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ONE_LAYER, VOCAB, tiny
from scipy import stats

import kvjax
from kvjax import CacheError, InputError, sampling
from kvjax.caches.flags import NO_TOKEN
from kvjax.timing import Compilations

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


def text(tokens, starts):
    lengths = [len(row) for row in tokens]
    padded = np.full((len(tokens), 12), 1, np.int32)
    for row, ids in zip(padded, tokens, strict=True):
        row[: len(ids)] = ids
    values = (padded, lengths, starts, np.add(lengths, 9), [5])
    return sampling.Text(*(np.asarray(x, np.int32) for x in values))


filtered = jax.jit(lambda each, logits, text: each(logits, text))
X = np.random.default_rng(9).normal(size=(3, V)).astype(np.float32)
TEXT = text([[1, 2, 2, 3], [2, 2, 2, 2, 7, 7], [4]], [2, 0, 1])


def test_presence_and_frequency_count_new_tokens_and_not_the_prompt():
    counts = np.zeros((3, V), np.float32)
    counts[0, [2, 3]] = 1
    counts[1, [2, 7]] = 4, 2
    for numbers in ([0.5, -1.5, 2.0], 0.75):
        each = np.broadcast_to(np.float32(numbers), 3)[:, None]
        got = filtered(sampling.presence_penalty(numbers), X, TEXT)
        np.testing.assert_allclose(got, X - each * (counts > 0), rtol=1e-6)
        got = filtered(sampling.frequency_penalty(numbers), X, TEXT)
        np.testing.assert_allclose(got, X - each * counts, rtol=1e-6)
    whole = filtered(sampling.frequency_penalty(1.0), X, TEXT.replace(starts=0 * TEXT.starts))
    assert (np.asarray(whole)[0, 1] != X[0, 1]) and np.asarray(whole)[2, 4] != X[2, 4], "the prompt would show"


def test_biases_and_allowed_ids_are_those_of_a_plain_loop():
    want, kept = X.copy(), np.full((3, V), -np.inf, np.float32)
    biases = [{3: 1.5, 0: -2.0}, {}, {V - 1: -np.inf, 4: 0.25, V + 3: 9.0}]  # the last is past the vocabulary
    ids = [[0], [3, 4, 3], [V - 1, V + 3, 2]]
    for row in range(3):
        for i, bias in biases[row].items():
            want[row, i : i + 1] += bias
        for i in ids[row]:
            kept[row, i : i + 1] = X[row, i : i + 1]
    np.testing.assert_array_equal(filtered(sampling.logit_bias(biases), X, TEXT), want)
    np.testing.assert_array_equal(filtered(sampling.allowed(ids), X, TEXT), kept)
    one = filtered(sampling.logit_bias(biases[0]), X, TEXT)
    np.testing.assert_array_equal(one[0], want[0])
    assert (np.asarray(one)[1, [0, 3]] != want[1, [0, 3]]).all()


def test_among_several_forced_tokens_probabilities_are_as_they_were_and_a_ban_before_does_not_count():
    got = np.asarray(filtered(sampling.forced_first([2, 9]), X, TEXT.replace(starts=TEXT.lengths)))
    p = np.exp(X[:, [2, 9]].astype(np.float64))
    np.testing.assert_allclose(np.exp(got[:, [2, 9]]), p / p.sum(axis=1, keepdims=True), rtol=1e-5)
    assert np.isneginf(np.delete(got, [2, 9], axis=1)).all()
    both = sampling.greedy(sampling.banned([2]), sampling.forced_first([2]))
    assert call_on(both, X, TEXT.replace(starts=TEXT.lengths)).tolist() == [2, 2, 2]


@jax.jit
def call_on(sampler, logits, text):
    return sampler(logits, sampling.row_keys(jnp.arange(logits.shape[0], dtype=jnp.uint32)), text)


def halved(logits, text):
    return jnp.where(text.new[:, None] > 1, -logits, logits)


def weighted(weights, logits, text):
    return logits + weights


def third(logits, keys, text):
    return jnp.full((logits.shape[0],), 3, jnp.int32) + text.new


def never(logits, text):
    raise AssertionError("not called")


def test_a_filter_and_a_sampler_of_ones_own_are_functions_or_partials_and_other_arrays_compile_nothing():
    assert call_on(sampling.greedy(halved), X, TEXT).tolist() == [X[0].argmin(), X[1].argmin(), X[2].argmax()]
    made = [jax.tree_util.Partial(weighted, np.eye(V, dtype=np.float32)[[i] * 3] * 99) for i in (4, 8)]
    assert call_on(sampling.greedy(made[0], sampling.temperature(0.5)), X, TEXT).tolist() == [4] * 3
    with Compilations() as counted:
        assert call_on(sampling.greedy(made[1], sampling.temperature(0.1)), X, TEXT).tolist() == [8] * 3
        assert call_on(sampling.greedy(halved), -X, TEXT).tolist()[2] == X[2].argmin()
    assert counted.count == 0
    assert call_on(sampling.checked(third), X, TEXT).tolist() == [5, 9, 3]
    assert sampling.checked(made[0]) is made[0] and sampling.checked(None) == sampling.greedy()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sampling.chain(sampling.greedy()), "is no filter"),
        (lambda: sampling.chain(0.8), "0.8 is no filter"),
        (lambda: sampling.greedy(sampling.chain(never)), "is no filter"),
        (lambda: sampling.checked(sampling.top_k(3)), "TopK is a filter; wrap it"),
        (lambda: sampling.checked(0.8), "cannot be called"),
        (lambda: sampling.min_p(1.5), "min_p: p 1.5"),
        (lambda: sampling.typical(-0.1), "typical: p -0.1"),
        (lambda: sampling.repetition_penalty(0), "repetition_penalty: penalty 0"),
        (lambda: sampling.repetition_penalty(np.inf), "repetition_penalty: penalty inf"),
        (lambda: sampling.presence_penalty(np.nan), "presence_penalty: penalty nan"),
        (lambda: sampling.frequency_penalty([1, np.inf]), "frequency_penalty: penalty"),
        (lambda: sampling.frequency_penalty("much"), "frequency_penalty: penalty 'much' is no number"),
        (lambda: sampling.no_repeat_ngram(-1), "no_repeat_ngram: n -1"),
        (lambda: sampling.no_repeat_ngram(2.0), "no_repeat_ngram: n 2.0 must be whole"),
        (lambda: sampling.min_length(-1), "min_length: n -1"),
        (lambda: sampling.min_new_tokens(3, ids=[-1]), "min_new_tokens: ids has id -1"),
        (lambda: sampling.banned(5), "banned: ids must be a list of ids, not 5"),
        (lambda: sampling.banned([1.5]), "banned: ids .* must be whole numbers"),
        (lambda: sampling.banned([[1], [2, -3]]), "banned: ids: row 1 has id -3"),
        (lambda: sampling.banned([[1], 2]), "banned: ids"),
        (lambda: sampling.banned("12"), "banned: ids must be a list"),
        (lambda: sampling.allowed([]), "allowed: ids: has no id"),
        (lambda: sampling.forced_last([[1], []]), "forced_last: ids: row 1 has no id"),
        (lambda: sampling.banned_first([1], least=-1), "banned_first: least -1"),
        (lambda: sampling.logit_bias([1, 2]), "logit_bias: biases must be a dict"),
        (lambda: sampling.logit_bias({1: np.inf}), "logit_bias: biases: that of 1 must be a finite number"),
        (lambda: sampling.logit_bias([{}, {1: np.nan}]), "row 1: that of 1 must be"),
        (lambda: sampling.logit_bias({1: 1e39}), "must be a finite number of float32"),
        (lambda: sampling.logit_bias({"a": 1.0}), "logit_bias: biases"),
        (lambda: sampling.sequence_bias([((1,), 2.0)]), "sequence_bias: biases must be a dict"),
        (lambda: sampling.sequence_bias({(1, 2): np.inf}), r"that of \(1, 2\) must be"),
        (lambda: sampling.sequence_bias({(): 1.0}), "sequence_bias: sequence 0 is"),
        (lambda: sampling.sequence_bias({3: 1.0}), "sequence_bias: sequence 0 is 3"),
        (lambda: sampling.bad_words([[1], []]), "bad_words: sequence 1 is"),
        (lambda: sampling.bad_words([[1, -2]]), "bad_words: sequence 0 is"),
        (lambda: sampling.bad_words([["a"]]), "bad_words: sequence 0"),
        (lambda: sampling.bad_words(7), "bad_words: sequences must be a list"),
        (lambda: sampling.no_repeat_ngram(2)(X, None), "no_repeat_ngram reads the text so far"),
        (lambda: sampling.chain(sampling.top_k([1, 2]))(X, None, TEXT.replace(copies=3)), "2 values for 1 rows"),
    ],
)
def test_what_is_no_filter_and_settings_that_make_no_sense_are_errors_that_name_them(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_where_every_token_is_banned_none_is_chosen():
    none = sampling.banned([list(range(V)), [1], [2]])
    for sampler in (
        sampling.greedy(none),
        sampling.chain(sampling.temperature(0), none),
        sampling.chain(none, sampling.temperature([0, 1, 1]), sampling.top_p(0.9), sampling.min_p(0.1)),
    ):
        got = call_on(sampler, X, TEXT).tolist()
        assert got[0] == -1 and min(got[1:]) >= 0


NO_MORE = sampling.greedy(sampling.banned([[], list(range(VOCAB))]))
SAID = "row 1, length 2.*no token may be chosen"


def test_a_generation_in_which_every_token_is_banned_is_an_error_that_names_the_row():
    with pytest.raises(CacheError, match=SAID):
        kvjax.generate(tiny(ONE_LAYER), [[1, 2, 3], [4, 5]], max_new_tokens=3, sampler=NO_MORE)


@pytest.mark.full
def test_loops_in_which_every_token_is_banned_flag_the_row_and_go_on_with_the_others():
    model = tiny(ONE_LAYER)
    tokens, valid = np.array([[1, 2, 3], [4, 5, 0]]), np.array([3, 2])
    logits, cache = kvjax.prefill(model, kvjax.init_cache(model, batch=2, capacity=256), tokens, valid)
    new, _, after = kvjax.decode(model, cache, logits, steps=3, sampler=NO_MORE)
    assert new[1].tolist() == [-1] * 3 and min(new[0].tolist()) >= 0
    state = kvjax.decode_until(model, cache, logits, max_new_tokens=3, sampler=NO_MORE)
    np.testing.assert_array_equal(state.cache.tokens[0, :6], after.tokens[0, :6])
    for made in (after, state.cache):
        assert made.lengths.tolist() == [6, 2] and made.flags.tolist() == [0, NO_TOKEN]
        with pytest.raises(CacheError, match=SAID):
            made.check()
