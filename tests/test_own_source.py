"""Promise: a model of your own reads a source through `kvjax.cross_attend`, whatever is kept of it, in every loop."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax import InputError, caches, codecs
from kvjax.bridge.nnx import Decoder
from kvjax.caches.base import SOURCE
from kvjax.ops.attention import Absorb

# --- the model, as a researcher would write it: pictures to text; the middle layer does not look at the picture

VOCAB, WIDTH, STATES = 50, 16, 6

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""float32 against float32 written out in NumPy; another picture is outside it, as a test below says."""


def initialise(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    draw = lambda *shape, by=0.3: jax.random.normal(next(keys), shape) * by  # noqa: E731
    layers = [{"qkv": draw(WIDTH, 3 * WIDTH), "out": draw(WIDTH, WIDTH)} for _ in range(3)]
    for p in (layers[0], layers[2]):
        p["look"] = {"q": draw(WIDTH, WIDTH), "kv": draw(STATES, 2 * 8), "out": draw(WIDTH, WIDTH)}
    ends = {name: draw(*size, by=0.7) for name, size in (("places", (64, WIDTH)), ("head", (WIDTH, VOCAB)))}
    return ends | {"embed": draw(VOCAB, WIDTH, by=2.0), "layers": layers}


def look(p, x, cache, layer):
    """Four query heads, two of keys and values."""

    def kv(states):
        k, v = jnp.split(states @ p["kv"], 2, axis=-1)
        return tuple(part.reshape(*states.shape[:2], 2, 4) for part in (k, v))

    absorb = lambda states: (Absorb.of(p["kv"], None, 2, states.dtype), None)  # noqa: E731
    q = (x @ p["q"]).reshape(*x.shape[:2], 4, 4)
    return kvjax.cross_attend(cache, layer, q=q, kv=kv, kv_heads=2, absorb=absorb).reshape(x.shape) @ p["out"]


def apply(params, config, cache, tokens, valid):
    x = jnp.take(params["embed"], tokens, axis=0, mode="clip")
    x = x + jnp.take(params["places"], cache.positions, axis=0, mode="clip")
    for layer, p in enumerate(params["layers"]):
        q, k, v = ((part.reshape(*x.shape[:2], 4, 4)) for part in jnp.split(x / (1 + abs(x)) @ p["qkv"], 3, axis=-1))
        out, cache = kvjax.attend(cache, layer, q=q, kv=(k, v))
        x = x + out.reshape(x.shape) @ p["out"]
        if "look" in p:
            x = x + look(p["look"], x, cache, layer)
    return x @ params["head"], cache


MODEL = kvjax.Model(initialise(0), None, apply)
LENGTHS = np.array([5, 1, 9], np.int32)
CROSS = {
    "cross": caches.cross(),
    "projected again": caches.encoder_output(),
    "absorbed": caches.encoder_output(absorb=True),
}


def pictures():
    states = np.random.default_rng(0).normal(size=(3, 9, STATES)).astype(np.float32)
    states[np.arange(9)[None, :] >= LENGTHS[:, None]] = 0
    return kvjax.Source(jnp.asarray(states), jnp.asarray(LENGTHS), jnp.zeros((3,), jnp.int32))


def numpy_logits(tokens, states):
    """Of one row, each score on its own."""
    p, n = jax.tree.map(lambda x: np.asarray(x, np.float64), MODEL.params), len(tokens)
    x = p["embed"][tokens] + p["places"][:n]

    def read(q, k, v, seen):
        out = np.zeros((n, 4, 4))
        for i, h in np.ndindex(n, 4):
            scores = k[: seen(i), h] @ q[i, h] / 2
            weights = np.exp(scores - scores.max())
            out[i, h] = weights @ v[: seen(i), h] / weights.sum()
        return out.reshape(n, WIDTH)

    for layer in p["layers"]:
        q, k, v = (part.reshape(n, 4, 4) for part in np.split(x / (1 + abs(x)) @ layer["qkv"], 3, axis=-1))
        x = x + read(q, k, v, lambda i: i + 1) @ layer["out"]
        if own := layer.get("look"):
            k, v = (part.reshape(-1, 2, 4).repeat(2, axis=1) for part in np.split(states @ own["kv"], 2, axis=-1))
            x = x + read((x @ own["q"]).reshape(n, 4, 4), k, v, lambda i: len(states)) @ own["out"]
    return x @ p["head"]


@functools.cache
def recomputed():
    """Tokens `[3, 12]` and logits `[3, 12, V]` of a greedy text from a ragged prompt."""
    prompts, rows = np.random.default_rng(1).integers(0, VOCAB, (3, 6)), []
    for row, n in enumerate((6, 4, 1)):
        text, found = prompts[row, :n].tolist(), []
        for _ in range(12):
            found.append(numpy_logits(np.array(text), np.asarray(pictures().states)[row, : LENGTHS[row]])[-1])
            text.append(int(found[-1].argmax()))
        rows.append((text[n:], found))
    return prompts, np.array([tokens for tokens, _ in rows]), np.array([found for _, found in rows])


@pytest.mark.parametrize(
    "cross", [pytest.param(x, id=n, marks=() if n == "cross" else pytest.mark.full) for n, x in CROSS.items()]
)
def test_every_loop_agrees_with_a_plain_forward_pass(cross):
    prompts, tokens, want = recomputed()
    assert min(len(set(row)) for row in tokens.tolist()) >= 5
    cache = kvjax.init_cache(MODEL, source=pictures(), cross=cross, capacity=32)
    logits, cache = kvjax.prefill(MODEL, cache, prompts, np.array([6, 4, 1]))
    np.testing.assert_allclose(logits, want[:, 0], **CLOSE)
    stepped, after = kvjax.step(MODEL, cache, tokens[:, 0])
    np.testing.assert_allclose(stepped, want[:, 1], **CLOSE)
    found, last, _ = kvjax.decode(MODEL, after, stepped, steps=10)
    np.testing.assert_array_equal(found, tokens[:, 1:11])
    np.testing.assert_allclose(last, want[:, 11], rtol=1e-3, atol=1e-3)  # after twelve tokens, each on the last


def test_without_a_cache_it_is_the_same_and_another_picture_is_not():
    prompts, _, want = recomputed()
    found = kvjax.forward(MODEL, prompts, [6, 4, 1], source=pictures())
    np.testing.assert_allclose(found[np.arange(3), [5, 3, 0]], want[:, 0], **CLOSE)
    other = pictures().replace(states=-pictures().states)
    assert (np.abs(kvjax.forward(MODEL, prompts, source=other) - found)[:, 0].max(axis=1) > 0.1).all()


def showing(params, config, cache, tokens, valid):
    logits, cache = apply(params, config, cache, tokens, valid)
    return logits, cache.record(0, "logits", logits)


@pytest.mark.full
def test_a_cache_that_has_the_source_needs_no_other_for_suffixes_nor_for_sites():
    model, (prompts, tokens, want) = MODEL.replace(apply=showing), recomputed()
    cache = kvjax.init_cache(model, source=pictures(), capacity=16)
    _, cache = kvjax.prefill(model, cache, prompts, np.array([6, 4, 1]))
    rows = kvjax.init_cache(model, prefix=cache, batch=6, capacity=16)
    logits, _ = kvjax.step(model, rows, tokens[:, 0].repeat(2))
    np.testing.assert_allclose(logits, want[:, 1].repeat(2, axis=0), **CLOSE)
    decoder = Decoder(model, sites=("logits",))
    decoder(tokens[:, :2], cache)
    (stream,) = jax.tree.leaves(nnx.pop(decoder, nnx.Intermediate))
    np.testing.assert_allclose(stream, want[:, 1:3], **CLOSE)


def test_what_is_kept_has_nothing_of_a_layer_that_does_not_look():
    cache = kvjax.init_cache(MODEL, source=pictures(), cross=caches.cross(store=codecs.int8()), capacity=8, batch=6)
    kept = cache.shared[SOURCE]
    assert [store is None for store in kept.k] == [False, True, False] and kept.share == 2
    assert kvjax.cache_nbytes(
        MODEL, source=pictures(), cross=caches.cross(store=codecs.int8()), capacity=8, batch=6
    ) == (cache.nbytes)


@pytest.mark.full
def test_it_passes_the_kit_and_comes_back_from_a_file(tmp_path):
    some, cross = [kvjax.testing.sampled(steps=24)], CROSS["absorbed"]
    how = {"seeds": [0], "distinct": 8, "splits": [(7, 9)], "source": pictures(), "cross": cross}
    report = kvjax.testing.check_equivalence(MODEL, [caches.dense()], some, **how)
    assert report.raise_if_failed()
    cache = kvjax.init_cache(MODEL, caches.dense(), source=pictures(), cross=cross, capacity=8)
    kvjax.save_cache(tmp_path / "mine.safetensors", cache, MODEL)
    back = kvjax.load_cache(tmp_path / "mine.safetensors", MODEL)
    assert jax.tree.structure(back) == jax.tree.structure(cache)


def attending(**wrong):
    def apply(params, config, cache, tokens, valid):
        b, s = tokens.shape
        right = {"q": jnp.ones((b, s, 4, 4)), "kv": lambda x: (jnp.ones((*x.shape[:2], 2, 4)),) * 2, "kv_heads": 2}
        out, cache = kvjax.attend(cache, 0, q=right["q"], kv=(right["q"], right["q"]))
        return out + kvjax.cross_attend(cache, 0, **right | wrong), cache

    return kvjax.Model({}, None, apply)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_heads": 3}, "q has 4 heads, no multiple of kv_heads 3"),
        ({"kv_heads": None}, r"k has \(2, 4\) heads of width, q makes it \(4, 4\)"),
        ({"kv": lambda x: (jnp.ones((*x.shape[:2], 2, 3)),) * 2}, r"k has \(2, 3\) heads of width"),
        ({"kv": lambda x: (jnp.ones((1, 1, 2, 4)),) * 2}, r"must be \[rows, S, heads, width\]"),
    ],
)
def test_wrong_shapes_are_clear_errors(wrong, message):
    with pytest.raises(InputError, match=message):
        kvjax.init_cache(attending(**wrong), source=pictures(), capacity=8)


def test_without_a_source_or_without_maps_it_is_a_clear_error():
    with pytest.raises(InputError, match="attends to a source, but has none"):
        kvjax.forward(MODEL, [[1]])
    cache = kvjax.init_cache(attending(), source=pictures(), cross=caches.encoder_output(absorb=True), capacity=8)
    with pytest.raises(InputError, match="leave absorb out"):
        kvjax.step(attending(), cache, [1, 2, 3])
