"""Promise: resuming at a layer and a position gives what a whole forward pass with that patch gives."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CAPACITY, FULL, MIXED, ONE_LAYER, WINDOW, filled, prompt_ids, tiny
from naive import gap, run

import kvjax
from kvjax import CacheError, InputError, caches
from kvjax.caches.cross import Cross
from kvjax.caches.flags import REWIND
from kvjax.loops import resume as loop
from kvjax.params import abstract_params
from kvjax.timing import Compilations

VALID = np.array([16, 12, 9])
EXACT = 1e-5
PLANS = {
    "hybrid": caches.hybrid(),
    "ring": (caches.traced(caches.ring(WINDOW, slack=12)), caches.traced(caches.dense())),
    "output": caches.output(),
    "layer input": caches.layer_input(),
    "recompute": caches.traced(caches.recompute()),
    "paged": caches.traced(caches.paged(4, share=2)),
}


@functools.cache
def text(name):
    """A model and a cache with ragged prompts and four generated tokens."""
    model = tiny(MIXED)
    logits, cache = filled(model, PLANS[name], valid=VALID)
    _, _, cache = kvjax.decode(model, cache, logits, steps=4)
    return model, cache.check()


def patch_of(n, seed=0):
    return np.random.default_rng(seed).normal(size=(3, n, 32)).astype(np.float32) * 2


def wanted(cache, model, layer, position, patch):
    """Of each row, `(logits [N, V], streams)` of a plain forward pass with the patch."""
    for row, at in enumerate(np.broadcast_to(position, (3,))):
        ids = np.asarray(cache.tokens)[row, : int(cache.lengths[row])]
        yield run(model, ids, [(layer, at + i, x) for i, x in enumerate(patch[row])])


def errors(name, layer, position, n):
    """The largest differences of logits and of the traces from `layer` on, and how much the patch did."""
    model, cache = text(name)
    patch = patch_of(n)
    logits, new = kvjax.resume(model, cache, layer, position, patch if n > 1 else patch[:, 0])
    new.check()
    found, did = [], []
    for row, (want, sites) in enumerate(wanted(cache, model, layer, position, patch)):
        plain, _ = run(model, np.asarray(cache.tokens)[row, : len(want)])
        found.append(gap(logits[row], want[-1]))
        did.append(gap(plain[-1], want[-1]))
        for (i, site), x in sites.items():
            if i >= layer and site != "embedding" and new.recorded(i, site) is not None:
                found.append(gap(new.trace(i, site)[row, : len(want)], x))
    np.testing.assert_array_equal(new.lengths, cache.lengths)
    return max(found), min(did)


PLACES = [(0, 12, 1), (1, np.array([14, 10, 12]), 1), (1, 11, 2)]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param(name, i, marks=() if (name, i) in (("hybrid", 1), ("output", 0)) else pytest.mark.full)
        for name in PLANS
        for i in range(3)
    ],
)
def test_it_equals_the_whole_run_with_the_patch(name, place):
    error, did = errors(name, *PLACES[place])
    assert error <= EXACT and did > 100 * EXACT


def test_a_patch_one_position_late_is_found():
    model, cache = text("hybrid")
    patch = patch_of(1)
    logits, _ = kvjax.resume(model, cache, 1, 11, patch[:, 0])
    late = [want[-1] for want, _ in wanted(cache, model, 1, 12, patch)]
    assert min(gap(logits[row], late[row]) for row in range(3)) > 1e-3


@pytest.mark.parametrize("name", ["hybrid", pytest.param("output", marks=pytest.mark.full)])
def test_without_a_patch_nothing_changes_and_what_lies_below_is_untouched(name):
    model, cache = text(name)
    before = jax.tree.map(np.asarray, cache)
    want = jax.jit(lambda m, c: kvjax.prefill(m, c.rewind(c.lengths - 1), last_tokens(c), jnp.ones(3, jnp.int32)))(
        model, cache
    )[0]
    logits, new = kvjax.resume(model, cache, 1, 10)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-3)
    patched = kvjax.resume(model, cache, 1, 10, patch_of(1)[:, 0])[1]
    for a, b in zip(jax.tree.leaves(patched.layers[0]), jax.tree.leaves(before.layers[0]), strict=True):
        assert np.asarray(a).tobytes() == b.tobytes(), "the layer below"
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(before), strict=True):
        assert np.asarray(a).tobytes() == b.tobytes(), "the cache that was given"
    site = (1, "after_ffn")
    assert np.asarray(patched.trace(*site))[:, :10].tobytes() == np.asarray(cache.trace(*site))[:, :10].tobytes()


def last_tokens(cache):
    return jnp.take_along_axis(cache.tokens, cache.lengths[:, None] - 1, axis=1)


def test_decoding_goes_on_from_the_patched_run():
    model, cache = text("hybrid")
    patch = patch_of(1)
    logits, new = kvjax.resume(model, cache, 1, 11, patch[:, 0])
    tokens, after, _ = kvjax.decode(model, new, logits, steps=4)
    for row in range(3):
        n = int(cache.lengths[row])
        ids = np.concatenate([np.asarray(cache.tokens)[row, :n], np.asarray(tokens)[row]])
        want, _ = run(model, ids, [(1, 11, patch[row, 0])])
        np.testing.assert_array_equal(want[n - 1 : -1].argmax(axis=1), tokens[row])
        assert gap(after[row], want[-1]) <= EXACT


@pytest.mark.full
def test_rows_that_share_pages_are_patched_apart():
    found = []
    for name in ("paged", "hybrid"):
        model, cache = text(name)
        _, new = kvjax.resume(model, cache.take([0, 0, 1]), 1, [12, 19, 15], patch_of(1)[:, 0])
        found.append(kvjax.step(model, new, np.array([1, 2, 3]))[0])
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


def test_a_sweep_compiles_one_program_a_bucket():
    model = tiny(MIXED)
    _, cache = filled(model, caches.hybrid(), valid=VALID, capacity=80)  # a capacity that no other test has
    _, cache = kvjax.prefill(model, cache, prompt_ids(1), [16, 16, 4])  # lengths 32, 28, 13
    patch = patch_of(1)[:, 0]
    with Compilations() as made:
        for layer, position in itertools.product((0, 1), (0, 5, 12)):  # 32 to 20 new positions: a bucket of 32
            kvjax.resume(model, cache, layer, position, patch)
    assert made.count == 1
    rows = np.array([31, 20, 12])
    there = jnp.asarray(rows)
    with Compilations() as made:
        kvjax.resume(model, cache, 1, rows, patch)  # a bucket of 16
    assert made.count == 1
    with Compilations() as made:
        kvjax.resume(model, cache, np.int64(0), rows - 3, patch_of(3))
        kvjax.resume(model, cache, 1, there, None)
        kvjax.resume(model, cache, 0, 1, patch)
    assert made.count == 0


def test_a_sweep_does_the_share_of_the_work_that_it_should(monkeypatch):
    """Positions times layers, counted where they run: (L + 1)(n + 1) / (4 L n) of running the whole text each time."""
    model, n, done = tiny(MIXED), 5, []
    _, cache = kvjax.prefill(model, kvjax.init_cache(model, caches.hybrid(), capacity=16), prompt_ids(0, 1, n))

    def counted(params, config, x, cache, layer, rotation):
        jax.debug.callback(lambda n: done.append(int(n)), cache.span.valid[0])
        return x, cache

    monkeypatch.setattr(loop, "decoder_layer", counted)
    program = jax.jit(lambda *x: loop._resume(*x))
    for layer, position in itertools.product(range(2), range(n)):
        kvjax.resume(model, cache, layer, position, _run=program)
    jax.effects_barrier()
    naive = 2 * n * (2 * n)  # as many runs of as many layers and positions
    assert sum(done) / naive == (2 + 1) * (n + 1) / (4 * 2 * n)


def test_a_position_further_back_than_a_ring_keeps_is_refused():
    model = tiny(MIXED)
    plan = (caches.traced(caches.ring(WINDOW, slack=2)), caches.traced(caches.dense()))
    _, cache = filled(model, plan, valid=VALID)
    with pytest.raises(CacheError, match=r"row 0 at position 8 is 8 behind .* \(16\), and layer 0 keeps 2"):
        kvjax.resume(model, cache, 0, 8)
    got, _ = kvjax.resume(model, cache, 1, 8)  # the ring lies below
    assert np.isfinite(got).all()
    logits, new = jax.jit(kvjax.resume)(model, cache, 0, jnp.array([8, 10, 8]), patch_of(1))
    np.testing.assert_array_equal(new.flags, [REWIND, 0, 0])
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1:]).all()


@pytest.mark.full
def test_layers_and_patches_may_be_traced_vmapped_and_differentiated():
    model, cache = text("hybrid")
    patches = np.stack([patch_of(1, seed)[:, 0] for seed in range(2)])
    layers, places = jnp.array([0, 1]), jnp.array([[11, 11, 11], [14, 10, 12]])
    many = jax.jit(jax.vmap(lambda i, at, x: kvjax.resume(model, cache, i, at, x)[0]))(layers, places, patches)
    for i in range(2):
        want, _ = kvjax.resume(model, cache, i, np.asarray(places[i]), patches[i])
        np.testing.assert_allclose(many[i], want, rtol=1e-3, atol=1e-3)
    score = jax.jit(lambda x: kvjax.resume(model, cache, 1, 11, x)[0][0, 7])
    x, step = jnp.asarray(patches[0]), jnp.zeros((3, 32)).at[0, 3].set(1e-2)
    slope = (score(x + step) - score(x - step)) / 2e-2
    np.testing.assert_allclose(jax.grad(score)(x)[0, 3], slope, rtol=5e-2)


@pytest.mark.full
def test_a_donated_cache_gives_the_same():
    model, cache = text("hybrid")
    want, kept = kvjax.resume(model, cache, 1, 11, patch_of(1)[:, 0])
    copy = jax.tree.map(jnp.copy, cache)
    got, used = kvjax.donating.resume(model, copy, 1, 11, patch_of(1)[:, 0])
    np.testing.assert_array_equal(got, want)
    for a, b in zip(jax.tree.leaves(used), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_cannot_be_resumed_is_a_clear_error():
    model, cache = text("hybrid")
    plain = kvjax.init_cache(model, caches.dense(), batch=3, capacity=CAPACITY)
    ffn = filled(model, caches.traced(sites=("after_ffn",)))[1]
    mine = kvjax.Model(model.params, None, lambda *x: x)
    good = patch_of(1)
    for call, error, message in (
        (lambda: kvjax.resume(model, plain, 1, 0), CacheError, "neither 'after_ffn' of layer 0 nor.*caches.hybrid"),
        (lambda: kvjax.resume(model, ffn, 0, 0), CacheError, "neither 'embedding' of layer 0"),
        (lambda: kvjax.resume(mine, cache, 0, 0), InputError, "needs a model of kvjax's own layers"),
        (lambda: kvjax.resume(model, cache, 2, 0), InputError, "layer 2 is outside the model's 0 to 1"),
        (lambda: kvjax.resume(model, cache, -1, 0), InputError, "layer -1"),
        (lambda: kvjax.resume(model, cache, 0.5, 0), InputError, "resume: layer"),
        (lambda: kvjax.resume(model, cache, 0, 13), CacheError, "position 13 is outside row 2, which has 13 tokens"),
        (lambda: kvjax.resume(model, cache, 0, -1), CacheError, "position -1 is outside row 0"),
        (lambda: kvjax.resume(model, cache, 0, [1, 2]), InputError, "resume: position"),
        (lambda: kvjax.resume(model, cache, 0, 12, patch_of(2)), InputError, "patch has 2 positions, row 2 only 1"),
        (lambda: kvjax.resume(model, cache, 0, 0, good[:2]), InputError, r"patch has shape \[2, 1, 32\]"),
        (lambda: kvjax.resume(model, cache, 0, 0, good[:, 0, :8]), InputError, r"it must be \[3, 32\] or \[3, n, 32\]"),
        (lambda: kvjax.resume(model, cache, 0, 0, [[1, 2], [3]]), InputError, "patch is no array of numbers"),
        (lambda: kvjax.resume(model, cache, 0, 0, good * 1j), InputError, "patch has dtype complex"),
        (lambda: kvjax.resume(model, 5, 0, 0), InputError, "cache is no cache but 5"),
        (lambda: kvjax.resume(tiny(ONE_LAYER), cache, 0, 0), InputError, "cache has 2 layers, the model has 1"),
        (
            lambda: kvjax.step(tiny(ONE_LAYER), cache, np.zeros(3, int)),
            InputError,
            "cache has 2 layers, the model has 1",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    late = jax.jit(kvjax.resume)(model, cache, jnp.int32(1), jnp.int32(12), jnp.asarray(patch_of(2)))
    np.testing.assert_array_equal(np.asarray(late[1].flags).astype(bool), np.asarray(cache.lengths) < 14)
    one = tiny(ONE_LAYER)
    _, below = filled(one, caches.traced(sites=("embedding",)))
    assert kvjax.resume(one, below, 0, 0)[0].shape == (3, 96)


TRANSLATOR = dataclasses.replace(FULL, encoder=FULL)


def test_with_a_source_the_layers_below_are_left_out_as_without_one(monkeypatch):
    model, row = kvjax.decoder(TRANSLATOR, abstract_params(TRANSLATOR)), jax.ShapeDtypeStruct((1,), jnp.int32)
    source = kvjax.Source(jax.ShapeDtypeStruct((1, 9, 32), jnp.float32), row, row)
    cache = jax.eval_shape(lambda x: kvjax.init_cache(model, caches.hybrid(), source=x, capacity=32), source)

    def branches():
        program = jax.make_jaxpr(lambda m, c: loop.VALUE.__wrapped__(m, c, 1, row_of(3), jnp.zeros((1, 16, 32)), 0))
        return str(program(model, cache)).count(" cond[")

    assert branches() == TRANSLATOR.num_layers
    monkeypatch.setattr(Cross, "still", False)
    assert branches() == 0


def row_of(number):
    return jnp.array([number], jnp.int32)


@pytest.mark.full
def test_with_a_source_resuming_gives_what_was_there_and_leaves_what_lies_below():
    model = tiny(TRANSLATOR)
    source = kvjax.encode(model, prompt_ids(3, 3)[:, :9], [9, 4, 1])
    cache = kvjax.init_cache(model, caches.hybrid(), source=source, capacity=32)
    logits, cache = kvjax.prefill(model, cache, prompt_ids(1, 3), VALID)
    again, same = kvjax.resume(model, cache, 1, VALID - 3)
    same.check()
    assert gap(again, logits) < EXACT
    patched, other = kvjax.resume(model, cache, 1, VALID - 3, patch_of(2))
    assert gap(patched, logits) > 100 * EXACT
    for site in ("embedding", "after_self_attention", "after_cross_attention", "after_ffn"):
        np.testing.assert_array_equal(other.trace(0, site), cache.trace(0, site))
