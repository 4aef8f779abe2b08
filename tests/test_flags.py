"""Promise: what does not fit is dropped and flagged, never clamped; its row's logits are NaN, other rows unharmed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import MIXED, PROMPTS, SAMPLER, STEPS, WINDOW, fed, filled, prompt_ids, tiny

import kvjax
from kvjax import CacheError, InputError, caches, sampling
from kvjax.caches.flags import CAPACITY, COUNT, MEANING, NAN, POSITIONS, TOKEN

FEED = prompt_ids(8, 8)[:, :3]
NEAR = np.array([94, 7, 1])  # the first row is two tokens from the capacity
SHORT = np.array([9, 7, 1])
PLAN = kinds.cases()[0].plan


def bits(x):
    return np.asarray(x).tobytes()


def near(case, lengths=NEAR):
    return fed(case.model, case.plan, lengths)


@kinds.first_of_each()
def test_a_scan_past_the_capacity_gives_the_tokens_that_fit_and_flags(case):
    how = {"steps": STEPS, "sampler": SAMPLER, "seed": [4, 5, 6]}
    first, cache = near(case)
    tokens, logits, after = kvjax.decode(case.model, cache, first, **how)
    np.testing.assert_array_equal(after.lengths, [96, 19, 13])
    np.testing.assert_array_equal(after.flags, [CAPACITY, 0, 0])
    np.testing.assert_array_equal(after.tokens[0, 94:], tokens[0, :2])
    first, cache = near(case, SHORT)
    want, unharmed, _ = kvjax.decode(case.model, cache, first, **how)
    np.testing.assert_array_equal(tokens[1:], want[1:])
    assert np.isnan(logits[0]).all() and bits(logits[1:]) == bits(unharmed[1:])


@kinds.mixed()
def test_flags_work_under_vmap(case):
    _, cache = near(case)
    rows = jax.tree.map(lambda *x: jnp.stack(x), *(cache.take(jnp.array([row])) for row in range(3)))
    step = jax.jit(jax.vmap(kvjax.step, in_axes=(None, 0, 0)))
    for i in range(4):
        logits, rows = step(case.model, rows, jnp.asarray(FEED[i])[:, None])
        want, cache = kvjax.step(case.model, cache, FEED[i])
        np.testing.assert_allclose(logits[:, 0], want, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(rows.flags, [[CAPACITY], [0], [0]])
    np.testing.assert_array_equal(rows.lengths, [[96], [11], [5]])


@kinds.first_of_each()
def test_the_host_refuses_a_prompt_that_does_not_fit_before_anything_runs(case):
    _, cache = near(case)
    with pytest.raises(CacheError, match="row 1 has length 7, 90 more do not fit: capacity 96"):
        kvjax.prefill(case.model, cache, prompt_ids(1, 3, 90), np.array([2, 90, 12]))
    np.testing.assert_array_equal(cache.lengths, NEAR)


@kinds.mixed()
def test_resize_clears_the_flag_and_the_text_goes_on(case):
    model = case.model
    first, start = near(case)
    wide, logits, want = start.resize(128), first, []
    for _ in range(6):
        want.append(sampling.largest(logits))
        logits, wide = kvjax.step(model, wide, want[-1])
    cache, logits = start, first
    for i in range(6):
        tokens, last = sampling.largest(logits), cache
        np.testing.assert_array_equal(tokens, want[i])
        logits, cache = kvjax.step(model, cache, tokens)
        if np.asarray(cache.flags).any():
            assert i == 2 and np.asarray(cache.resize(128).flags).tolist() == [0, 0, 0]
            logits, cache = kvjax.step(model, last.resize(128), tokens)
    np.testing.assert_array_equal(cache.check().lengths, wide.lengths)
    # what was flagged goes on too: the dropped token is fed again, in its row
    _, full = kvjax.step(model, last := near(case, NEAR + [2, 0, 0])[1], FEED[0])
    logits, full = kvjax.prefill(model, full.resize(128), np.tile(FEED[0][:, None], 16), np.array([1, 0, 0]))
    want, _ = kvjax.prefill(model, last.resize(128), np.tile(FEED[0][:, None], 16), np.array([1, 0, 0]))
    assert bits(logits[0]) == bits(want[0]) and full.lengths.tolist() == [97, 8, 2]


def limited():
    """The shared model, made for 18 positions."""
    model = tiny(MIXED)
    return model.replace(config=dataclasses.replace(MIXED, max_positions=18))


def test_tokens_past_the_model_s_positions_are_flagged():
    model = limited()
    _, cache = filled(model, PLAN)
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
    with pytest.raises(
        InputError, match="row 0 has 16 tokens, and max_new_tokens 3 more pass the model's 18 positions"
    ):
        kvjax.generate(model, prompt_ids()[:1].tolist(), max_new_tokens=3)


def broken():
    """The shared model with NaN in one embedding row, which only texts with token 95 meet."""
    model = tiny(MIXED)
    params = jax.tree.map(lambda x: x, model.params)
    params["embed"]["table"] = params["embed"]["table"].at[95].set(jnp.nan)
    return model.replace(params=params)


def test_nan_logits_are_flagged_in_their_row():
    model = broken()
    ids = np.minimum(prompt_ids(), 94)
    _, cache = kvjax.prefill(model, kvjax.init_cache(model, PLAN, batch=3, capacity=96), ids, PROMPTS)
    assert not np.asarray(cache.flags).any()
    logits, after = kvjax.step(model, cache, np.array([1, 95, 2]))
    np.testing.assert_array_equal(after.flags, [0, NAN, 0])
    want, _ = kvjax.step(model, cache, np.array([1, 3, 2]))
    assert bits(logits[::2]) == bits(want[::2]) and np.isnan(logits[1]).all()
    with pytest.raises(CacheError, match="row 0.*NaN"):
        kvjax.generate(model, [[1, 95]], max_new_tokens=4)


def test_an_id_outside_the_vocabulary_is_flagged_under_jit_and_refused_on_the_host():
    model = tiny(MIXED)
    _, cache = filled(model, PLAN)
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
        tokens = np.array([[1, 1], [2, bad], [3, 3]])
        with pytest.raises(InputError, match=f"forward: row 1 has id {bad}, the vocabulary has 96 ids"):
            kvjax.forward(model, tokens)
        found = jax.jit(kvjax.forward)(model, tokens)
        np.testing.assert_array_equal(np.isnan(found).any(axis=(1, 2)), [False, True, False])


def test_what_is_still_wrong_shows_again_after_a_rewind_and_what_is_gone_does_not():
    model = tiny(MIXED)
    _, cache = filled(model, PLAN)
    good, _ = kvjax.step(model, cache, np.array([1, 3, 2]))
    _, bad = kvjax.step(model, cache, np.array([1, 2**30, 2]))
    kept, _ = kvjax.step(model, bad.rewind(bad.lengths), np.array([1, 3, 2]))
    np.testing.assert_array_equal(np.isnan(kept).all(axis=1), [False, True, False])
    gone, after = kvjax.step(model, bad.rewind(cache.lengths), np.array([1, 3, 2]))
    assert bits(gone) == bits(good) and not np.asarray(after.flags).any()
    short = int(cache.lengths.max()) - 1
    hole = jax.jit(lambda c: c.resize(short).resize(96))(cache)  # cuts the longest row
    logits, _ = kvjax.step(model, hole, np.array([1, 3, 2]))
    longest = np.asarray(cache.lengths) == int(cache.lengths.max())
    np.testing.assert_array_equal(np.isnan(logits).all(axis=1), longest)


def test_a_row_that_was_fed_nan_is_restored_by_a_rewind():
    model = tiny(MIXED)
    table = model.params["embed"]["table"]
    poisoned = model.replace(params=model.params | {"embed": {"table": table.at[5].set(jnp.nan)}})
    _, cache = filled(model, PLAN)
    logits, bad = kvjax.step(poisoned, cache, np.array([1, 5, 2]))
    np.testing.assert_array_equal(np.isnan(logits).any(axis=1), [False, True, False])
    assert all(np.isfinite(bad.values(layer)).all() for layer in range(len(bad.layers)))
    still, _ = kvjax.step(poisoned, bad.rewind(bad.lengths), np.array([1, 3, 2]))
    assert np.isnan(still[1]).all()
    want, _ = kvjax.step(poisoned, cache, np.array([1, 3, 2]))
    found, _ = kvjax.step(poisoned, bad.rewind(cache.lengths), np.array([1, 3, 2]))
    assert bits(found) == bits(want)


def test_nothing_is_sampled_from_nan():
    model = tiny(MIXED)
    logits, cache = filled(model, PLAN)
    broken = jnp.asarray(logits).at[1].set(jnp.nan)
    for after in (
        kvjax.decode(model, cache, broken, steps=2)[2],
        kvjax.decode_until(model, cache, broken, max_new_tokens=2).cache,
    ):
        assert int(after.flags[1]) & NAN and not np.asarray(after.flags[::2]).any()


def test_numbers_beyond_32_bits_do_not_wrap():
    model, wide = tiny(MIXED), 2**32 + 1
    logits, cache = filled(model, PLAN)
    for call in (
        lambda: kvjax.forward(model, np.array([[wide]])),
        lambda: kvjax.step(model, cache, np.array([wide, 1, 2])),
        lambda: kvjax.prefill(model, cache, np.array([[wide], [1], [2]])),
        lambda: kvjax.decode_until(model, cache, logits, max_new_tokens=wide),
        lambda: kvjax.decode_until(model, cache, logits, max_new_tokens=1, stop_ids=[wide]),
        lambda: sampling.top_k(np.int64(wide)),
        lambda: cache.take(np.array([wide])),
        lambda: cache.rewind(np.array([wide, 1, 1])),
    ):
        with pytest.raises(ValueError, match="beyond 32 bits"):
            call()
    assert kvjax.generate(model, [[1, 2]], max_new_tokens=3).lengths[0] == 3
    with pytest.raises(InputError, match="positions"):
        kvjax.generate(tiny(dataclasses.replace(MIXED, max_positions=90)), [[1, 2]], max_new_tokens=2**63 - 1)


def test_under_jit_a_count_below_nothing_is_flagged_and_no_hidden_rewind():
    model = tiny(MIXED)
    _, cache = filled(model, (caches.ring(WINDOW, slack=1), caches.dense()))
    run = jax.jit(lambda cache, valid: kvjax.prefill(model, cache, jnp.zeros((3, 4), jnp.int32), valid))
    _, after = run(cache, jnp.array([-8, 5, 1], jnp.int32))
    np.testing.assert_array_equal(after.lengths, np.asarray(cache.lengths) + [0, 0, 1])
    np.testing.assert_array_equal(after.flags, [COUNT, COUNT, 0])
    with pytest.raises(CacheError, match="row 0.*below 0 or above the columns"):
        after.check()


def test_every_flag_has_a_meaning_of_its_own():
    assert len(MEANING) == len(set(MEANING.values())) == 11
    assert all(bit & (bit - 1) == 0 for bit in MEANING)
