"""Promise: a model of your own, written with `kvjax.attend` and `Model(apply=…)` alone, runs in every loop and plan."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

import kvjax
from kvjax import InputError, caches, sampling

# --- the model, as a researcher would write it


def initialise(seed, vocab=50, width=16, layers=2):
    keys = iter(jax.random.split(jax.random.key(seed), 2 + 2 * layers))
    draw = lambda *shape: jax.random.normal(next(keys), shape) * 0.9  # noqa: E731
    return {
        "embed": draw(vocab, width) * 3,
        "head": draw(width, vocab),
        "layers": [{"qkv": draw(width, 2 * width), "out": draw(width, width)} for _ in range(layers)],
    }


def turn(x, positions):
    angle = positions[:, :, None, None] * jnp.array([1.0, 0.1])[None, None, None, :]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)


def my_layer(p, x, cache, layer):
    def heads(x):
        qkv = (x / (1 + jnp.abs(x))) @ p["qkv"]
        return jnp.split(qkv.reshape(*x.shape[:2], 8, 4), [4, 6], axis=2)  # 4 query heads, 2 for keys and values

    q, window = heads(x)[0], 6 if layer == 0 else None
    out, cache = kvjax.attend(cache, layer, q=q, kv=lambda h: heads(h)[1:], h=x, rotate=turn, window=window)
    x = x + out.reshape(x.shape) @ p["out"]
    return x, cache.record(layer, "after_ffn", x)


def my_forward(params, config, cache, tokens, valid):
    x = jnp.take(params["embed"], tokens, axis=0, mode="clip")
    cache = cache.record(0, "embedding", x)
    for layer, p in enumerate(params["layers"]):
        x, cache = my_layer(p, x, cache, layer)
    return x @ params["head"], cache


MODEL = kvjax.Model(initialise(0), config=None, apply=my_forward)

# --- the loops


@functools.cache
def recomputed():
    """Tokens and logits of 20 greedy steps from a ragged batch, each from `forward` over everything so far."""
    ids, lengths = np.zeros((3, 40), np.int32), np.array([12, 5, 1])
    ids[:, :12] = np.random.default_rng(1).integers(0, 50, (3, 12))
    prompts, found = ids[:, :12].copy(), []
    for _ in range(20):
        logits = np.asarray(kvjax.forward(MODEL, ids, lengths))[np.arange(3), lengths - 1]
        found.append(logits)
        ids[np.arange(3), lengths] = logits.argmax(axis=1)
        lengths = lengths + 1
    tokens = np.stack([x.argmax(axis=1) for x in found], axis=1)
    assert min(len(set(row)) for row in tokens.tolist()) >= 8
    return prompts, np.stack(found, axis=1), tokens


def empty(plan):
    return kvjax.init_cache(MODEL, plan, batch=3, capacity=40)


PLANS = {
    "dense": caches.dense(),
    "default": None,
    "ring": (caches.ring(6), caches.dense()),
    "paged": caches.paged(8),
    "shared_prefix": caches.shared_prefix(),
    "recompute": caches.recompute(),
    "layer_input": caches.layer_input(),
    "traced": (caches.traced(caches.ring(6)), caches.traced(caches.dense(), ("after_ffn",))),
    "output": caches.output(),
    "hybrid": caches.hybrid(),
}


def test_every_kind_is_tried_on_it():
    assert {kind.__name__ for kind in caches.KINDS} <= PLANS.keys()
    assert kinds.cases()


@pytest.mark.corner
@pytest.mark.parametrize(
    "plan", [pytest.param(p, marks=() if p in ("default", "recompute") else pytest.mark.full) for p in PLANS]
)
def test_every_loop_agrees_with_its_forward_pass(plan):
    plan, (prompts, want, tokens), lengths = PLANS[plan], recomputed(), np.array([12, 5, 1])
    logits, cache = kvjax.prefill(MODEL, empty(plan), prompts, lengths)
    np.testing.assert_allclose(logits, want[:, 0], rtol=1e-4, atol=1e-4)
    after = kvjax.decode(MODEL, cache, logits, steps=19)
    np.testing.assert_array_equal(after[0], tokens[:, :19])
    np.testing.assert_allclose(after[1], want[:, 19], rtol=1e-3, atol=1e-3)
    stepped, cache = kvjax.step(MODEL, cache, sampling.largest(logits))
    np.testing.assert_allclose(stepped, want[:, 1], rtol=1e-4, atol=1e-4)
    state = kvjax.decode_until(MODEL, cache, stepped, max_new_tokens=7)
    np.testing.assert_array_equal(state.cache.tokens[0, 13:20], tokens[0, 1:8])
    out = kvjax.generate(
        MODEL, [row[:n].tolist() for row, n in zip(prompts, lengths, strict=True)], max_new_tokens=20, plan=plan
    )
    np.testing.assert_array_equal(out.tokens, tokens)
    assert out.text is None


def test_its_layers_are_found_by_tracing():
    first, second = MODEL.layer_shapes()
    assert (first.kv_heads, first.key_dim, first.value_dim, first.dtype, first.window) == (2, 4, 4, jnp.float32, 6)
    assert second.window is None
    assert [type(node).__name__ for node in empty(None).layers] == ["Ring", "Dense"]
    assert kvjax.cache_nbytes(MODEL, batch=3, capacity=40) == empty(None).nbytes


def attending(**wrong):
    """A model whose only call of attend has these arguments instead."""

    def apply(params, config, cache, tokens, valid):
        b, s = tokens.shape
        right = {"q": jnp.ones((b, s, 4, 8)), "kv": (jnp.ones((b, s, 2, 8)), jnp.ones((b, s, 2, 8)))}
        given = right | {name: value(b, s) for name, value in wrong.items() if name != "layer"}
        out, cache = kvjax.attend(cache, wrong.get("layer", 0), **given)
        return out.reshape(b, s, -1), cache

    return kvjax.Model({}, None, apply)


def pair(*shapes):
    return lambda b, s: tuple(jnp.ones((b, s, *shape)) for shape in shapes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": lambda b, s: jnp.ones((b, s, 32))}, r"q \(1, 1, 32\)"),
        ({"q": lambda b, s: jnp.ones((b, s + 1, 4, 8))}, r"must be \[B, S, heads, width\] alike"),
        ({"kv": pair((3, 8), (3, 8))}, "heads must divide"),
        ({"kv": pair((2, 4), (2, 8))}, "widths be equal"),
        ({"kv": pair((2, 8), (4, 8))}, "alike"),
        ({"kv": pair((2, 8))}, "kv must be"),
        ({"layer": 1}, r"layers \[1\]; they must count from 0"),
    ],
)
def test_wrong_shapes_are_clear_errors(wrong, message):
    with pytest.raises(InputError, match=message):
        kvjax.init_cache(attending(**wrong), capacity=8)


def test_values_may_be_narrower_than_keys():
    model = attending(kv=pair((2, 8), (2, 5)))
    logits, cache = kvjax.prefill(model, kvjax.init_cache(model, capacity=8), [[1, 2, 3]])
    assert logits.shape == (1, 4 * 5) and cache.values(0).shape == (1, 2, 8, 5)
    np.testing.assert_allclose(logits, 1.0, rtol=1e-6)


def test_a_plan_that_does_not_fit_is_a_clear_error():
    for plan, message in (((caches.dense(),), "1 kinds for 2 layers"), (caches.dense, "call it"), ("dense", "no kind")):
        with pytest.raises(InputError, match=message):
            kvjax.init_cache(MODEL, plan, capacity=8)
    for size in ({"capacity": 0}, {"capacity": 8, "batch": 0}):
        with pytest.raises(InputError, match="at least 1"):
            kvjax.init_cache(MODEL, **size)


def test_wrong_arguments_of_the_loops_are_clear_errors():
    cache, ids = empty(None), np.zeros((3, 4), np.int32)
    for call, message in (
        (lambda: kvjax.prefill(MODEL, cache, ids[:2]), r"prefill: tokens must be whole numbers \[3, S\]"),
        (lambda: kvjax.prefill(MODEL, cache, ids[0]), "prefill: tokens"),
        (lambda: kvjax.prefill(MODEL, cache, ids * 1.0), "prefill: tokens"),
        (lambda: kvjax.prefill(MODEL, cache, ids[:, :0]), "at least one token"),
        (lambda: kvjax.prefill(MODEL, cache, ids, [5, 1, 1]), "valid .* between 0 and 4"),
        (lambda: kvjax.prefill(MODEL, cache, ids, [-1, 1, 1]), "valid .* between 0 and 4"),
        (lambda: kvjax.prefill(MODEL, cache, ids, [1, 1]), "valid has shape"),
        (lambda: kvjax.step(MODEL, cache, ids), "step: tokens"),
        (lambda: kvjax.step(MODEL, cache, [0.5, 1.0, 2.0]), "step: tokens"),
        (lambda: kvjax.decode(MODEL, cache, jnp.zeros((2, 50)), steps=1), "decode: logits"),
        (lambda: kvjax.decode(MODEL, cache, jnp.zeros((3, 50)), steps=0), "decode: steps"),
        (lambda: kvjax.decode(MODEL, cache, jnp.zeros((3, 50)), steps=1, seed=[1, 2]), "seed"),
        (lambda: kvjax.decode(MODEL, cache, jnp.zeros((3, 50)), steps=1, seed=-1), "seed"),
        (lambda: kvjax.decode(MODEL, cache, jnp.zeros((3, 50)), steps=1, seed=0.5), "seed"),
        (lambda: kvjax.forward(MODEL, ids[0]), "forward: tokens"),
    ):
        with pytest.raises(InputError, match=message):
            call()
