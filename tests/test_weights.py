"""Weights in int8: codes with one scale for each output, in every family, and a measured distance from the original."""

import argparse
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CAPACITY, GEMMA, LEARNED, MIXED, POST, POSTNORM, RELATIVE, prompt_ids, tiny

import kvjax
from kvjax import caches, testing
from kvjax.cli import startup
from kvjax.errors import CheckpointError, InputError
from kvjax.params import declare
from kvjax.weights import Int8, dense, product, quantised, rows

TEXT = """ROMEO:
He jests at scars that never felt a wound.
But, soft! what light through yonder window breaks?
It is the east, and Juliet is the sun.
"""
CONFIGS = {"rotary": MIXED, "gemma": GEMMA, "post": POST, "relative": RELATIVE, "postnorm": POSTNORM}


def is_codes(x):
    return isinstance(x, Int8)


@functools.cache
def coded(config):
    return kvjax.int8_weights(tiny(config))


@functools.cache
def source_of(config):
    return None if config.encoder is None else kvjax.encode(coded(config), prompt_ids(3, 2, 9))


def matrix(rng, dtype=np.float32):
    """Columns of very different size, one of zeros."""
    w = rng.standard_normal((24, 10)) * 10.0 ** np.arange(-5, 5)
    w[:, 3] = 0
    return w.astype(dtype)


@pytest.mark.corner
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("inputs", [0, 1], ids=["kernel", "table"])
def test_each_element_is_within_half_a_scale_of_what_it_was(rng, dtype, inputs):
    w = matrix(rng).clip(-6e4, 6e4).astype(dtype)
    w = w if inputs == 0 else w.T
    made = quantised(jnp.asarray(w), inputs)
    scale, exact = np.asarray(made.scale, np.float64), np.asarray(w, np.float64)
    half = scale / 2 * (1 + 1e-5)
    assert (np.abs(exact - np.asarray(made.codes) * scale) <= half).all()
    assert (np.abs(exact - np.trunc(exact / np.where(scale == 0, 1, scale)) * scale) > half).any(), "cut, not rounded"
    assert (np.abs(np.asarray(made.codes, int)).max(axis=inputs) == np.where(scale == 0, 0, 127).ravel()).all()
    assert made.dtype == dtype and dense(made).dtype == dtype
    step = float(jnp.finfo(dtype).eps) * np.abs(exact)
    assert (np.abs(np.asarray(dense(made), np.float64) - exact) <= half + step).all()


def test_products_and_rows_are_those_of_the_matrix_that_the_codes_stand_for(rng):
    x = jnp.asarray(rng.standard_normal((3, 24)), jnp.float32)
    kernel = quantised(jnp.asarray(matrix(rng)), 0)
    table = quantised(jnp.asarray(matrix(rng).T), 1)
    np.testing.assert_allclose(product(x, kernel), product(x, dense(kernel)), rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(product(x, table, 1), product(x, dense(table), 1), rtol=2e-5, atol=1e-9)
    ids = np.asarray([[7, 0], [3, 99]])
    np.testing.assert_array_equal(rows(table, ids), np.asarray(dense(table))[ids.clip(0, 9)])
    half = product(x.astype(jnp.bfloat16), kernel)
    assert half.dtype == jnp.bfloat16 and product(x.astype(jnp.bfloat16), kernel, 0, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_a_byte_an_element_and_four_an_output(name):
    config, expected = CONFIGS[name], 0
    for path, shape in jax.tree_util.tree_leaves_with_path(declare(config), is_leaf=lambda x: isinstance(x, tuple)):
        *_, above, last = (p.key for p in path)
        outputs = {"kernel": shape[-1], "table": shape[0]}.get(last)
        plain = outputs is None or above == "positions"
        expected += 4 * math.prod(shape) if plain else math.prod(shape) + 4 * outputs
    assert sum(x.nbytes for x in jax.tree.leaves(coded(config).params)) == expected
    assert not any(is_codes(x) for x in jax.tree.leaves(tiny(config).params, is_leaf=is_codes)), "the original"


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.full) if x == "post" else x for x in CONFIGS])
def test_it_computes_what_the_same_numbers_as_plain_matrices_compute(name):
    """Heads tied and not, embeddings, encoders, attention to a source: everything that multiplies knows the codes."""
    model = coded(CONFIGS[name])
    plain = model.replace(params=jax.tree.map(dense, model.params, is_leaf=is_codes))
    source, ids = source_of(CONFIGS[name]), prompt_ids(1, 2, 12)
    got = kvjax.forward(model, ids, source=source)
    want = kvjax.forward(plain, ids, source=None if source is None else kvjax.encode(plain, prompt_ids(3, 2, 9)))
    limit = 2e-5 * np.abs(want).max()
    assert np.abs(got - want).max() <= limit
    original = tiny(CONFIGS[name])
    far = kvjax.forward(original, ids, source=None if source is None else kvjax.encode(original, prompt_ids(3, 2, 9)))
    assert np.abs(far - want).max() > limit, "codes change what is computed"


@pytest.mark.full
def test_it_gives_the_same_tokens_with_a_cache_as_without():
    plans = {"dense": caches.dense(), "absorbed": caches.layer_input(absorb=True)}
    report = testing.check_equivalence(coded(LEARNED), plans, [testing.greedy(24)], seeds=[0], distinct=8)
    report.raise_if_failed()


@pytest.mark.parametrize(
    ("config", "plan", "cross"),
    [
        pytest.param(MIXED, caches.layer_input(), None, marks=pytest.mark.corner),
        (LEARNED, caches.layer_input(absorb=True), None),
        (RELATIVE, caches.dense(), caches.encoder_output(absorb=True)),
    ],
    ids=["projected again", "absorbed", "source absorbed"],
)
def test_what_is_kept_is_multiplied_as_what_is_new(config, plan, cross):
    model, source, ids = coded(config), source_of(config), prompt_ids(2, 2, 12)
    given = {} if source is None else {"source": source, "cross": cross}
    cache = kvjax.init_cache(model, plan, batch=2, capacity=CAPACITY, **given)
    logits, cache = kvjax.prefill(model, cache, ids[:, :11])
    logits, cache = kvjax.step(model, cache, ids[:, 11])
    want = kvjax.forward(model, ids, source=source)[:, -1]
    assert np.abs(logits - want).max() <= 2e-5 * np.abs(want).max()


def divergence(want, got):
    """Mean KL in nats of next-token distributions."""
    p, q = (np.asarray(jax.nn.log_softmax(x, axis=-1), np.float64) for x in (want, got))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.corner
def test_the_bundled_model_says_nearly_the_same_and_does_not_where_scales_are_shared():
    lm = kvjax.load("shakespeare")
    ids = np.asarray([lm.encode(TEXT)], np.int32)
    unused = int(np.setdiff1d(np.arange(lm.model.vocab_size), ids)[0])
    table = lm.model.params["embed"]["table"]
    params = lm.model.params | {"embed": {"table": table.at[unused].mul(1000)}}  # of a token that nobody says
    model = lm.model.replace(params=params)
    kept = np.delete(np.arange(lm.model.vocab_size), unused)
    run = jax.jit(lambda model: kvjax.forward(model, ids)[0][:, kept])
    want, good = run(lm.model), kvjax.int8_weights(model)

    def shared(w):
        """One scale for a whole matrix."""
        if not is_codes(w):
            return w
        one = quantised(dense(w).reshape(-1, 1), 0)
        return w.replace(codes=one.codes.reshape(w.codes.shape), scale=jnp.full_like(w.scale, one.scale[0, 0]))

    bad = good.replace(params=jax.tree.map(shared, good.params, is_leaf=is_codes))
    assert divergence(want, run(good)) < 5e-4
    assert divergence(want, run(bad)) > 0.1


def test_a_cache_belongs_to_the_weights_that_made_it(tmp_path):
    plain, model, path = tiny(MIXED), coded(MIXED), tmp_path / "cache.safetensors"
    empty = kvjax.init_cache(model, caches.dense(), batch=3, capacity=CAPACITY)
    _, cache = kvjax.prefill(model, empty, prompt_ids())
    kvjax.save_cache(path, cache, model)
    np.testing.assert_array_equal(kvjax.load_cache(path, model).keys(0), cache.keys(0))
    with pytest.raises(CheckpointError, match="parameters"):
        kvjax.load_cache(path, plain)


def test_codes_of_codes_and_models_of_ones_own_are_refused():
    with pytest.raises(InputError, match="embed/table is int8 already"):
        kvjax.int8_weights(coded(MIXED))
    with pytest.raises(InputError, match=r"one's own; its apply must multiply by kvjax\.weights\.product"):
        kvjax.int8_weights(dataclasses.replace(tiny(MIXED), config=None))


def test_the_command_line_takes_int8_on_an_accelerator_and_says_why_not_on_a_cpu(monkeypatch):
    args = argparse.Namespace(model="shakespeare", dtype="float32", weights="int8")
    with monkeypatch.context() as patched:
        patched.setattr(jax, "default_backend", lambda: "gpu")
        assert is_codes(startup.load_lm(args).model.params["embed"]["table"])
        patched.setattr(jax, "default_backend", lambda: "cpu")
        with pytest.raises(InputError, match="is for a GPU or TPU.*leave it out"):
            startup.load_lm(args)
    args.weights = None
    assert not is_codes(startup.load_lm(args).model.params["embed"]["table"])
