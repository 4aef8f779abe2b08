"""Promises of every filter: other numbers compile nothing, rows do not see each other, nothing sorts the vocabulary."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import InputError, sampling
from kvjax.timing import Compilations

ROWS, V, T = 4, 40, 12
MINUS = -np.inf

TABLE = {
    "temperature": [lambda: sampling.temperature(0.7), lambda: sampling.temperature(1.9)],
    "top_k": [lambda: sampling.top_k(5), lambda: sampling.top_k(V + 9)],
    "top_p": [lambda: sampling.top_p(0.8), lambda: sampling.top_p(0.2)],
    "min_p": [lambda: sampling.min_p(0.1), lambda: sampling.min_p(0.0)],
    "typical": [lambda: sampling.typical(0.8), lambda: sampling.typical(0.3)],
    "repetition_penalty": [lambda: sampling.repetition_penalty(1.3), lambda: sampling.repetition_penalty(0.5)],
    "presence_penalty": [lambda: sampling.presence_penalty(0.6), lambda: sampling.presence_penalty(-2)],
    "frequency_penalty": [lambda: sampling.frequency_penalty(0.6), lambda: sampling.frequency_penalty(-2)],
    "no_repeat_ngram": [lambda: sampling.no_repeat_ngram(2), lambda: sampling.no_repeat_ngram(1)],
    "logit_bias": [lambda: sampling.logit_bias({3: 2.0, 5: MINUS}), lambda: sampling.logit_bias({7: -1})],
    "allowed": [lambda: sampling.allowed([3, 4, 9]), lambda: sampling.allowed({1})],
    "banned": [lambda: sampling.banned([3, 4, 9]), lambda: sampling.banned(np.array([1]))],
    "banned_first": [lambda: sampling.banned_first([3, 4, 9]), lambda: sampling.banned_first([1], 2)],
    "bad_words": [lambda: sampling.bad_words([[1, 2], [5]]), lambda: sampling.bad_words([(3, 1, 2)])],
    "sequence_bias": [lambda: sampling.sequence_bias({(1, 2, 9): 3.0}), lambda: sampling.sequence_bias({(2,): MINUS})],
    "min_length": [lambda: sampling.min_length(7), lambda: sampling.min_length(20)],
    "min_new_tokens": [lambda: sampling.min_new_tokens(3), lambda: sampling.min_new_tokens(20)],
    "forced_first": [lambda: sampling.forced_first([3, 4, 9]), lambda: sampling.forced_first([1])],
    "forced_last": [lambda: sampling.forced_last([3, 4, 9]), lambda: sampling.forced_last([1])],
}
"""A filter by its name: a setting, and another that must compile nothing."""

A_ROW = {
    "temperature": [0.5, 1.0, 0.0, 3.0],
    "top_k": [1, 0, 7, 99],
    "top_p": [0.0, 0.5, 0.9, 1.0],
    "min_p": [0.0, 0.05, 0.5, 1.0],
    "typical": [0.0, 0.5, 0.9, 1.0],
    "repetition_penalty": [1.0, 1.5, 0.5, 9.0],
    "presence_penalty": [0.0, 1.5, -0.5, 9.0],
    "frequency_penalty": [0.0, 1.5, -0.5, 9.0],
    "no_repeat_ngram": [0, 1, 2, 3],
    "logit_bias": [{1: 1.0}, {}, {2: -3.0, 4: MINUS}, {V - 1: 5.0}],
    "allowed": [[1], [2, 3], list(range(20)), [V - 1]],
    "banned": [[1], [], list(range(20)), [V - 1]],
    "banned_first": [[1], [], list(range(20)), [V - 1]],
    "min_length": [0, 4, 7, 99],
    "min_new_tokens": [0, 1, 3, 99],
    "forced_first": [[1], [2, 3], list(range(20)), [V - 1]],
    "forced_last": [[1], [2, 3], list(range(20)), [V - 1]],
}
"""The settings that may be one a row. Sequences may not."""

NAMES = [each.__name__ for each in sampling.FILTERS]
CLOSE = 1e-6
"""Of a logit: a division by one number for all may be compiled as a product with its inverse."""


apply = jax.jit(lambda each, logits, text: each(logits, text))
"""Given NumPy arrays: whatever else runs would be compiled too, operation by operation."""


def scores(seed=0, **changes):
    x = np.random.default_rng(seed).normal(size=(ROWS, V)).astype(np.float32) * 3
    for place, value in changes.values():
        x[place] = value
    return x


def texts(**changes):
    """Row 0 has nothing new, row 1 no prompt, row 2 is at its last token, row 3 repeats itself."""
    tokens = np.random.default_rng(1).integers(0, 6, (ROWS, T))
    tokens[3] = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 39]
    tokens[0, 3:5] = [1, V + 5]  # an id past the vocabulary
    values = {
        "tokens": tokens,
        "lengths": [5, 4, 9, 11],
        "starts": [5, 0, 6, 3],
        "limits": [30, 30, 10, 30],
        "stops": [7, 2, -1],
    }
    return sampling.Text(**{name: np.asarray(x, np.int32) for name, x in (values | changes).items()})


def rows_of(text, change):
    """The same with `change` made to what is one a row."""
    return text.replace(**{name: change(name, getattr(text, name)) for name in FIELDS})


FIELDS = ("tokens", "lengths", "starts", "limits")


@functools.cache
def usual(name):
    return np.asarray(apply(TABLE[name][0](), scores(), texts()))


def same(got, want):
    got = np.asarray(got)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_allclose(got, want, rtol=CLOSE, atol=CLOSE)


def test_every_filter_stands_in_the_table():
    assert sorted(TABLE) == sorted(NAMES) and set(A_ROW) <= set(NAMES)
    assert set(NAMES) <= set(sampling.__all__)


@pytest.mark.corner
@pytest.mark.parametrize("name", NAMES)
def test_another_setting_compiles_nothing_and_changes_the_logits(name):
    first, second = (make() for make in TABLE[name])
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, False)
    one = usual(name)
    with Compilations() as made:
        other = np.asarray(apply(second, scores(3), texts(limits=[6, 5, 10, 12])))
        other = np.asarray(apply(second, scores(), texts()))
    assert made.count == 0
    assert one.shape == (ROWS, V) and (one != other).any() and (one != scores()).any()
    assert np.isfinite(one).any(axis=1).all()


@pytest.mark.parametrize("name", A_ROW)
def test_a_setting_a_row_is_that_of_each_row_alone(name):
    make = getattr(sampling, name)
    whole = np.asarray(apply(make(A_ROW[name]), scores(), texts()))
    for row in range(ROWS):
        same(apply(make(A_ROW[name][row]), scores(), texts())[row], whole[row])
    with pytest.raises(InputError, match="4 values for 3 rows"):
        jax.eval_shape(make(A_ROW[name]), scores()[:3], rows_of(texts(), lambda _, x: x[:3]))


@pytest.mark.parametrize("name", ["no_repeat_ngram", "logit_bias", "banned", "forced_last"])
def test_a_setting_a_prompt_is_that_of_its_copies(name):
    each = getattr(sampling, name)(A_ROW[name])
    text = rows_of(texts(), lambda _, x: np.repeat(x, 2, axis=0)).replace(copies=2)
    got = np.asarray(apply(each, np.repeat(scores(), 2, axis=0), text))
    np.testing.assert_array_equal(got[::2], apply(each, scores(), texts()))
    np.testing.assert_array_equal(got[1::2], got[::2])


@pytest.mark.full
@pytest.mark.optimised
@pytest.mark.parametrize("name", NAMES)
def test_compiled_is_not_compiled_and_mapped(name):
    each, x, text = TABLE[name][0](), scores(), texts()
    with jax.disable_jit():
        same(each(jnp.asarray(x), jax.tree.map(jnp.asarray, text)), usual(name))

    def alone(x, *own):
        return each(x[None], text.replace(**dict(zip(FIELDS, (y[None] for y in own), strict=True))))[0]

    same(jax.jit(jax.vmap(alone))(x, *(getattr(text, field) for field in FIELDS)), usual(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_sees_neither_its_neighbours_nor_what_lies_past_its_length(name):
    each, x, text = TABLE[name][0](), scores(), texts()
    other = {"tokens": text.tokens[::-1], "lengths": [3, 9, 1, 6], "starts": [3, 2, 0, 1], "limits": [9, 10, 9, 7]}

    def mixed(row, k, y):
        y = y.copy()
        y[np.arange(ROWS) != row] = np.asarray(other[k])[np.arange(ROWS) != row]
        return y

    for row in range(ROWS):
        rest = np.where(np.arange(ROWS)[:, None] == row, x, scores(7))
        got = apply(each, rest, rows_of(text, functools.partial(mixed, row)))
        np.testing.assert_array_equal(got[row], usual(name)[row])
    past = np.arange(T)[None, :] >= text.lengths[:, None]
    for rest in (-1, 2, 39, 2**31 - 1):
        got = apply(each, x, text.replace(tokens=np.where(past, rest, text.tokens).astype(np.int32)))
        np.testing.assert_array_equal(got, usual(name))


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_nan_unless_its_token_is_banned_and_what_is_banned_stays_banned(name):
    each = TABLE[name][0]()
    got = np.asarray(apply(each, scores(one=(np.s_[:, 8], MINUS), row=(1, MINUS)), texts()))
    assert not np.isnan(got).any()
    if not name.startswith("forced"):  # these give what is forced all the probability
        assert np.isneginf(got[:, 8]).all() and np.isneginf(got[1]).all()
    for nan in (np.nan, -np.nan):
        broken = scores(one=(np.s_[:, 10], nan), row=(2, nan))
        got = np.asarray(apply(each, broken, texts()))
        assert np.isnan(got)[np.isnan(broken) & ~np.isneginf(got)].all()
        assert np.isnan(got[2]).any()
        if name not in ("allowed", "forced_first", "forced_last"):
            assert np.isnan(got[:, 10]).all()


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from primitives(getattr(inner, "jaxpr", inner))


def sorts(each):
    made = jax.make_jaxpr(each)(scores(), texts())
    return {name for name in primitives(made.jaxpr) if "sort" in name or "top_k" in name}


@pytest.mark.corner
@pytest.mark.parametrize("name", NAMES)
def test_nothing_sorts_the_vocabulary(name):
    assert sorts(TABLE[name][0]()) == set()


def test_a_sort_would_be_found_also_inside_of_a_loop():
    def inside(x, text):
        return jax.lax.fori_loop(0, 2, lambda i, y: jnp.sort(y, axis=1), x)

    assert sorts(inside) == {"sort"}
    assert sorts(lambda x, text: jax.lax.top_k(x, 3)[0]) == {"top_k"}


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_half_and_one_token_is_a_vocabulary(name):
    for make in TABLE[name]:
        for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
            for v in (1, V):
                x = jax.ShapeDtypeStruct((ROWS, v), dtype)
                found = jax.eval_shape(make(), x, texts())
                assert (found.shape, found.dtype) == (x.shape, dtype)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_of_one_token_that_one_is_left_or_none(name):
    got = np.asarray(apply(TABLE[name][0](), scores()[:, :1], texts()))
    assert not np.isnan(got).any() and (name in ("allowed", "forced_first", "forced_last") or np.isfinite(got).all())


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_what_float32_rounds_to(name):
    for dtype in (jnp.bfloat16, jnp.float16):
        half = scores().astype(dtype)
        exact = np.asarray(apply(TABLE[name][0](), half.astype(np.float32), texts())).astype(dtype)
        np.testing.assert_array_equal(np.asarray(apply(TABLE[name][0](), half, texts())), exact)
