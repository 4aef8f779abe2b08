"""Promise: a cache is an ordinary pytree: vmap, grad, eval_shape, flatten; rows can be taken and exchanged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import BATCH, MIXED, ONE_LAYER, ONE_LAYER_WINDOWED, PROMPTS, SAMPLER, STEPS, filled, prompt_ids, tiny

import kvjax
from kvjax import CacheError, caches
from kvjax.caches.base import ROWS

IDS = prompt_ids(1)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def avals(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, jax.typeof(x).weak_type if hasattr(jax, "typeof") else None), tree)


@pytest.mark.corner
@kinds.mixed()
def test_every_operation_gives_a_cache_of_the_same_type(case):
    logits, cache = filled(case.model, case.plan)
    empty = kvjax.init_cache(case.model, case.plan, batch=BATCH, capacity=96)
    _, stepped = kvjax.step(case.model, cache, IDS[:, 0])
    _, _, decoded = kvjax.decode(case.model, cache, logits, steps=STEPS, sampler=SAMPLER)
    others = [empty, stepped, decoded, cache.rewind(cache.lengths), cache.take([0, 1, 2]), cache.reorder([2, 0, 1])]
    for each in (*others, cache.resize(96), cache.resize(128).resize(96)):
        assert jax.tree.structure(each) == jax.tree.structure(cache)
        assert avals(each) == avals(cache)
        assert not any(x.weak_type for x in jax.tree.leaves(each))


@kinds.first_of_each()
def test_flatten_and_unflatten_give_the_cache_back(case):
    _, cache = filled(case.model, case.plan)
    leaves, tree = jax.tree.flatten(cache)
    again = jax.tree.unflatten(tree, leaves)
    assert bits(again) == bits(cache) and again.capacity == cache.capacity == 96
    assert hash(tree) == hash(jax.tree.structure(cache))
    with pytest.raises(Exception, match="frozen|cannot assign"):
        cache.lengths = cache.lengths


@kinds.first_of_each()
def test_eval_shape_allocates_nothing_and_tells_the_same(case):
    model = jax.eval_shape(lambda: case.model)
    cache = jax.eval_shape(lambda: kvjax.init_cache(case.model, case.plan, batch=BATCH, capacity=96))
    logits, after = jax.eval_shape(kvjax.step, model, cache, jax.ShapeDtypeStruct((BATCH,), jnp.int32))
    assert logits.shape == (BATCH, 96) and jax.tree.structure(after) == jax.tree.structure(cache)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)


@kinds.mixed()
def test_vmap_over_caches_is_a_loop_over_them(case):
    made = [filled(case.model, case.plan, seed=seed)[1] for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *made)
    tokens = np.stack([IDS[:, 0], IDS[:, 1]])

    def two(cache, token):
        logits, cache = kvjax.step(case.model, cache, token)
        return kvjax.step(case.model, cache, token + 0)[0], cache.rewind(cache.lengths - 1)

    logits, after = jax.jit(jax.vmap(two))(stacked, tokens)
    for i, cache in enumerate(made):
        _, one = kvjax.step(case.model, cache, tokens[i])
        want, _ = kvjax.step(case.model, one, tokens[i])
        np.testing.assert_allclose(logits[i], want, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(after.lengths[i], cache.lengths)


def loss_of(logits, target):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1))


@pytest.mark.corner
@pytest.mark.parametrize(
    ("config", "plan"),
    [
        pytest.param(ONE_LAYER_WINDOWED, caches.ring(6, slack=2), id="ring"),
        pytest.param(ONE_LAYER, caches.dense(), id="dense", marks=pytest.mark.full),
        pytest.param(MIXED, None, id="default-plan", marks=pytest.mark.full),
    ],
)
def test_gradients_pass_through_prefill_step_and_scan(config, plan):
    made = tiny(config)
    small = jax.tree.map(lambda x: x / 4 if x.ndim > 1 else x, made.params)
    text, target = jnp.asarray(prompt_ids(2, BATCH, 16)), jnp.asarray(prompt_ids(3, BATCH, 16))

    def cached(params, cache):
        model = made.replace(params=params)
        logits, cache = kvjax.prefill(model, cache, text[:, :9])
        found = [logits]
        logits, cache = kvjax.step(model, cache, text[:, 9])

        def one(cache, token):
            logits, cache = kvjax.step(model, cache, token)
            return cache, logits

        _, rest = jax.lax.scan(one, cache, text[:, 10:].T)
        return loss_of(jnp.concatenate([jnp.stack([*found, logits]), rest]).swapaxes(0, 1), target[:, 8:])

    def whole(params):
        return loss_of(kvjax.forward(made.replace(params=params), text)[:, 8:], target[:, 8:])

    empty = kvjax.init_cache(made, plan, batch=BATCH, capacity=32)
    got, of_cache = jax.jit(jax.grad(cached, argnums=(0, 1), allow_int=True))(small, empty)
    want = jax.jit(jax.grad(whole))(small)
    top = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * top)
    assert of_cache.lengths.dtype == jax.dtypes.float0
    assert top > 1e-4


@pytest.mark.corner
@kinds.mixed()
def test_taken_rows_decode_as_the_rows_that_they_were(case):
    model = case.model
    logits, cache = filled(model, case.plan)
    want, last, _ = kvjax.decode(model, cache, logits, steps=STEPS, sampler=SAMPLER, seed=[1, 2, 3])
    rows = np.array([2, 2, 0])
    got, end, after = kvjax.decode(
        model, cache.take(rows), logits[rows], steps=STEPS, sampler=SAMPLER, seed=np.array([1, 2, 3])[rows]
    )
    np.testing.assert_array_equal(got, want[rows])
    assert bits(end) == bits(last[rows])
    order = np.array([1, 2, 0])
    assert bits(cache.take(order)) == bits(cache.reorder(order))
    for count in (1, 5):  # fewer rows, and more
        some = cache.take(np.arange(count) % 3)
        assert some.batch == count and bits(some.take([0])) == bits(cache.take([0]))
    back = cache.take([0]).take([0, 0, 0])  # through a single row, which lies otherwise in memory
    assert bits(back) == bits(cache.take([0, 0, 0]))


def test_rows_outside_the_batch_are_errors():
    _, cache = filled(tiny(MIXED), caches.dense())
    outside, odd = "is outside a batch of 3", "whole numbers"
    shape = r"it must be \[n\]"
    for rows, message in (
        ([3], f"row 3 {outside}"),
        ([0, -1], f"row -1 {outside}"),
        ([[0]], shape),
        (np.zeros((0,), int), shape),
        ([0.5], odd),
    ):
        with pytest.raises(CacheError, match=message):
            cache.take(jnp.asarray(rows))
    with pytest.raises(CacheError, match="reorder: 2 rows given, the batch is 3"):
        cache.reorder([0, 1])
    flagged = jax.jit(lambda cache, rows: cache.take(rows))(cache, jnp.array([2, 3, -1]))
    np.testing.assert_array_equal(flagged.flags, [0, ROWS, ROWS])
    logits, _ = kvjax.step(tiny(MIXED), flagged, np.array([1, 2, 3]))
    np.testing.assert_array_equal(np.isnan(logits).all(axis=1), [False, True, True])


@kinds.mixed()
def test_resize_keeps_what_is_there_and_refuses_to_cut_it(case):
    _, cache = filled(case.model, case.plan)
    wide = cache.resize(128)
    assert wide.capacity == 128
    for layer, node in enumerate(cache.layers):
        if not node.replays:
            t = cache.keys(layer).shape[2]
            assert bits(wide.keys(layer)[:, :, :t]) == bits(cache.keys(layer))
            assert bits(wide.values(layer)[:, :, :t]) == bits(cache.values(layer))
    assert bits(wide.resize(96)) == bits(cache)
    assert cache.resize(16).capacity == 16
    with pytest.raises(CacheError, match="capacity 15 is less than the length 16 of row 0"):
        cache.resize(15)
    np.testing.assert_array_equal(wide.tokens[:, 96:], -1)


@pytest.mark.corner
@kinds.each(lambda case: case.name in ("dense", "ring", "sinks"))
def test_jit_equals_eager_for_every_operation(case):
    """An overlapping slice-set is right eagerly and silently wrong under jit on CPU (openxla/xla#49176)."""
    _, cache = filled(case.model, case.plan)
    rows, lengths = jnp.array([2, 0, 0]), PROMPTS - np.array([2, 0, 1])
    for name, call in {
        "take": lambda cache: cache.take(rows),
        "reorder": lambda cache: cache.reorder(rows),
        "grow": lambda cache: cache.resize(128),
        "shrink": lambda cache: cache.resize(16),
        "rewind": lambda cache: cache.rewind(jnp.asarray(lengths)),
        "keep": lambda cache: cache.keep(PROMPTS - 2, jnp.array([[0, 1]] * 3), jnp.array([1, 2, 2])),
    }.items():
        if name == "keep":
            cache = cache.replace(lengths=jnp.maximum(cache.lengths, 2))
        assert bits(jax.jit(call)(cache)) == bits(call(cache)), name
