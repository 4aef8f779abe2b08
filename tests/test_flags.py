"""Promise: what does not fit is dropped and flagged, never clamped; its row's logits are NaN, other rows unharmed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import MIXED, PROMPTS, filled, prompt_ids, tiny

import kvjax
from kvjax import CacheError, InputError, sampling
from kvjax.caches.base import CAPACITY, MEANING, NAN, POSITIONS, TOKEN

ROOM = 18  # two tokens beyond the longest prompt
FEED = prompt_ids(8, 8)[:, :3]


def bits(x):
    return np.asarray(x).tobytes()


def roomy(case, valid=PROMPTS):
    return filled(case.model, case.plan, valid=valid, capacity=ROOM)


@pytest.mark.corner
@kinds.first_of_each()
def test_a_step_past_the_capacity_is_dropped_flagged_and_nan(case):
    model = case.model
    _, cache = roomy(case)
    _, wide = filled(model, case.plan, capacity=64)
    before = None
    for i in range(5):
        before = cache if i == 2 else before
        logits, cache = kvjax.step(model, cache, FEED[i])
        want, wide = kvjax.step(model, wide, FEED[i])
        # another capacity is another program: equal to rounding
        np.testing.assert_allclose(logits[1:], want[1:], rtol=1e-3, atol=1e-4)
        assert np.isnan(logits[0]).all() == (i >= 2)
    np.testing.assert_array_equal(cache.lengths, [18, 12, 6])
    np.testing.assert_array_equal(cache.flags, [CAPACITY, 0, 0])
    np.testing.assert_array_equal(cache.tokens[0], before.tokens[0])
    if case.keeps:
        for layer in range(len(cache.layers)):
            assert bits(cache.keys(layer)[0]) == bits(before.keys(layer)[0])
            assert bits(cache.values(layer)[0]) == bits(before.values(layer)[0])
    with pytest.raises(CacheError, match="row 0, length 18, capacity 18.*past the capacity"):
        cache.check()


@kinds.first_of_each()
def test_neighbours_of_a_flagged_row_are_bitwise_unharmed(case):
    model = case.model
    _, full = roomy(case)
    _, other = roomy(case, np.array([3, 7, 1]))
    for i in range(5):
        logits, full = kvjax.step(model, full, FEED[i])
        want, other = kvjax.step(model, other, FEED[i])
        assert bits(logits[1:]) == bits(want[1:])
    assert np.asarray(full.flags).tolist() == [CAPACITY, 0, 0] and not np.asarray(other.flags).any()


@kinds.first_of_each()
def test_a_scan_past_the_capacity_gives_the_tokens_that_fit_and_flags(case):
    model = case.model
    first, cache = roomy(case)
    tokens, logits, after = kvjax.decode(model, cache, first, steps=5)
    np.testing.assert_array_equal(after.lengths, [18, 12, 6])
    np.testing.assert_array_equal(after.flags, [CAPACITY, 0, 0])
    assert np.isnan(logits[0]).all() and not np.isnan(logits[1:]).any()
    np.testing.assert_array_equal(after.tokens[0, 16:], tokens[0, :2])
    wide = cache.resize(64)
    want, _, _ = kvjax.decode(model, wide, first, steps=5)
    np.testing.assert_array_equal(tokens[1:], want[1:])
    np.testing.assert_array_equal(tokens[0, :3], want[0, :3])  # the third was chosen, and could not be fed


@kinds.first_of_each()
def test_a_chunk_that_does_not_fit_leaves_the_row_as_it_was_under_jit(case):
    model = case.model
    _, cache = roomy(case)
    chunk = jnp.asarray(prompt_ids(6)[:, :3])
    logits, after = jax.jit(kvjax.prefill)(model, cache, chunk, jnp.array([3, 3, 0]))
    np.testing.assert_array_equal(after.lengths, [16, 10, 1])
    np.testing.assert_array_equal(after.flags, [CAPACITY, 0, 0])
    np.testing.assert_array_equal(after.tokens[0], cache.tokens[0])
    assert np.isnan(logits[0]).all() and not np.isnan(logits[1]).any()
    if case.keeps:
        for layer in range(len(cache.layers)):
            for row in (0, 2):
                assert bits(after.keys(layer)[row]) == bits(cache.keys(layer)[row])


@kinds.first_of_each()
def test_flags_work_under_vmap(case):
    model = case.model
    _, cache = roomy(case)
    rows = jax.tree.map(lambda *x: jnp.stack(x), *(cache.take(jnp.array([row])) for row in range(3)))
    step = jax.jit(jax.vmap(kvjax.step, in_axes=(None, 0, 0)))
    for i in range(4):
        logits, rows = step(model, rows, jnp.asarray(FEED[i])[:, None])
        want, cache = kvjax.step(model, cache, FEED[i])
        np.testing.assert_allclose(logits[:, 0], want, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(rows.flags, [[CAPACITY], [0], [0]])
    np.testing.assert_array_equal(rows.lengths, [[18], [11], [5]])


@kinds.first_of_each()
def test_the_host_refuses_a_prompt_that_does_not_fit_before_anything_runs(case):
    _, cache = roomy(case)
    with pytest.raises(CacheError, match="row 1 has length 7, 12 more do not fit: capacity 18"):
        kvjax.prefill(case.model, cache, prompt_ids()[:, :12], np.array([2, 12, 12]))
    np.testing.assert_array_equal(cache.lengths, PROMPTS)


@kinds.first_of_each()
def test_resize_clears_the_flag_and_the_text_goes_on(case):
    model = case.model
    first, cache = roomy(case)
    want, _, _ = kvjax.decode(model, cache.resize(64), first, steps=5)
    logits, cache, fed = first, cache, []
    for _ in range(5):
        tokens = sampling.largest(logits)
        fed.append(np.asarray(tokens))
        logits, cache = kvjax.step(model, cache, tokens)
        if np.asarray(cache.flags).any():
            back = jnp.minimum(cache.lengths, PROMPTS + len(fed) - 1)
            cache = cache.resize(2 * cache.capacity)
            assert not np.asarray(cache.flags).any()
            logits, cache = kvjax.step(model, cache.replace(lengths=back), tokens)
    cache.check()
    assert cache.capacity == 36
    np.testing.assert_array_equal(np.stack(fed, axis=1), want)


def limited():
    """The shared model, made for 18 positions."""
    import dataclasses

    model = tiny(MIXED)
    return model.replace(config=dataclasses.replace(MIXED, max_positions=ROOM))


def test_tokens_past_the_model_s_positions_are_flagged():
    model = limited()
    _, cache = filled(model, kinds.cases()[0].plan, capacity=64)
    for i in range(4):
        logits, cache = kvjax.step(model, cache, FEED[i])
    np.testing.assert_array_equal(cache.lengths, [18, 11, 5])
    np.testing.assert_array_equal(cache.flags, [POSITIONS, 0, 0])
    assert np.isnan(logits[0]).all() and not np.isnan(logits[1:]).any()
    with pytest.raises(CacheError, match="row 0, length 18.*past the model's last position"):
        cache.check()
    with pytest.raises(CacheError, match="row 1 has length 11, 8 more do not fit: positions of the model 18"):
        kvjax.prefill(model, cache, prompt_ids()[:, :8], np.array([0, 8, 8]))
    with pytest.raises(InputError, match="19 tokens, but the model has 18 positions"):
        kvjax.forward(model, np.zeros((1, 19), np.int32))
    with pytest.raises(InputError, match="row 0 has 16 tokens, and max_new_tokens 3 more pass the model's 18 positions"):
        kvjax.generate(model, prompt_ids()[:1].tolist(), max_new_tokens=3)
    assert kvjax.generate(model, prompt_ids()[:1].tolist(), max_new_tokens=2).lengths.tolist() == [2]


def broken():
    """The shared model with NaN in one embedding row, which only texts with token 95 meet."""
    model = tiny(MIXED)
    params = jax.tree.map(lambda x: x, model.params)
    params["embed"]["table"] = params["embed"]["table"].at[95].set(jnp.nan)
    return model.replace(params=params)


def test_nan_logits_are_flagged_in_their_row():
    model = broken()
    ids = np.minimum(prompt_ids(), 94)
    _, cache = kvjax.prefill(model, kvjax.init_cache(model, batch=3, capacity=64), ids, PROMPTS)
    assert not np.asarray(cache.flags).any()
    logits, after = kvjax.step(model, cache, np.array([1, 95, 2]))
    np.testing.assert_array_equal(after.flags, [0, NAN, 0])
    want, _ = kvjax.step(model, cache, np.array([1, 3, 2]))
    assert bits(logits[::2]) == bits(want[::2]) and np.isnan(logits[1]).all()
    for prompts in ([[1, 95]], [[1, 95], [1, 2]]):
        with pytest.raises(CacheError, match="row 0.*NaN"):
            kvjax.generate(model, prompts, max_new_tokens=4)


def test_an_id_outside_the_vocabulary_is_flagged_under_jit_and_refused_on_the_host():
    model = tiny(MIXED)
    _, cache = filled(model, kinds.cases()[0].plan, capacity=64)
    for bad in (96, -1, 2**30):
        logits, after = kvjax.step(model, cache, np.array([1, bad, 2]))
        np.testing.assert_array_equal(after.flags, [0, TOKEN, 0])
        want, _ = kvjax.step(model, cache, np.array([1, 3, 2]))
        assert bits(logits[::2]) == bits(want[::2]) and np.isnan(logits[1]).all()
        with pytest.raises(CacheError, match="row 1.*outside the vocabulary"):
            after.check()
        with pytest.raises(InputError, match=f"row 1 has id {bad}, the vocabulary has 96 ids"):
            kvjax.prefill(model, cache, np.array([[1, 1], [2, bad], [3, 3]]))
        with pytest.raises(InputError, match=f"prompt 0 has id {bad}, the vocabulary has 96 ids"):
            kvjax.generate(model, [[1, bad]])
        kvjax.prefill(model, cache, np.array([[1, 1], [2, bad], [3, 3]]), np.array([2, 1, 2]))  # padding is no token


def test_every_flag_has_a_meaning_of_its_own():
    assert len(MEANING) == len(set(MEANING.values())) == 6
    assert all(bit & (bit - 1) == 0 for bit in MEANING)
