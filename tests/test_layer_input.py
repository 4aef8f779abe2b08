"""Promise: layer inputs give what keys and values give, projected again or absorbed, and say what they cost."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FULL, LEARNED, MIXED, PROMPTS, WINDOWED, filled, prompt_ids, tiny

import kvjax
from kvjax import InputError, caches
from kvjax.caches.base import LayerShape
from kvjax.caches.flags import NAN
from kvjax.config import Config
from kvjax.ops.attention import Absorb
from kvjax.ops.norms import LayerNorm

GPT = dataclasses.replace(LEARNED, norm=LayerNorm(), gated=False, qkv_bias=True, query_heads=4, kv_heads=4)


def moved(config, seed=3):
    """A model whose gains and biases differ from one and zero."""
    leaves, tree = jax.tree.flatten(tiny(config).params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return kvjax.decoder(config, jax.tree.unflatten(tree, noisy))


def differ(model, plan, want, *, chunks=(16,)):
    """Largest difference of logits over the largest, after a prompt in chunks and after a scan."""
    found, logits, at = [], np.zeros(want[0].shape, np.float32), 0
    cache = kvjax.init_cache(model, plan, batch=3, capacity=96)
    for size in chunks:
        valid = np.clip(PROMPTS - at, 0, size)
        new, cache = kvjax.prefill(model, cache, prompt_ids()[:, at : at + size], valid)
        logits, at = np.where(valid[:, None] > 0, new, logits), at + size
    tokens, after, cache = kvjax.decode(model, cache, jnp.asarray(logits), steps=8)
    for got, wanted in ((logits, want[0]), (np.asarray(after), want[1])):
        found.append(np.abs(got - wanted).max() / np.abs(wanted).max())
    return max(found)


def dense(model):
    first, cache = filled(model, caches.dense())
    return np.asarray(first), np.asarray(kvjax.decode(model, cache, first, steps=8)[1])


@pytest.mark.parametrize(
    ("config", "absorb"),
    [
        pytest.param(GPT, True, id="layer norm, biases, absorbed"),
        pytest.param(LEARNED, True, id="rms norm, grouped queries, absorbed", marks=pytest.mark.full),
        pytest.param(GPT, False, id="layer norm, biases", marks=pytest.mark.full),
        pytest.param(MIXED, False, id="rotation, a window"),
        pytest.param(WINDOWED, False, id="windows", marks=pytest.mark.full),
    ],
)
def test_layer_inputs_give_the_logits_of_keys_and_values(config, absorb):
    model = moved(config)
    want = dense(model)
    assert differ(model, caches.layer_input(absorb=absorb), want) <= 1e-5
    assert differ(model, caches.layer_input(absorb=absorb), want, chunks=(5, 11)) <= 1e-5


def test_what_a_rotation_or_a_norm_of_keys_separates_is_not_absorbed():
    for config in (FULL, dataclasses.replace(LEARNED, qk_norm=LEARNED.norm)):
        with pytest.raises(InputError, match=r"absorb=True\): layer 0: a rotation, or a norm of each key, stands"):
            kvjax.init_cache(tiny(config), caches.layer_input(absorb=True), capacity=8)


# --- a post-norm model of one's own: keys and values read the stream itself, there is no factor

WIDTH, HEADS = 12, 3


def post_norm(params, config, cache, tokens, valid):
    x = jnp.take(params["embed"], tokens, axis=0, mode="clip") + params["at"][cache.positions % 32]
    for layer in range(2):
        b, s, _ = x.shape
        q, k, v = params["layers"][layer]

        def kv(h, k=k, v=v):
            return tuple((h @ w).reshape(*h.shape[:2], HEADS, -1) for w in (k, v))

        def absorb(h, k=k, v=v):
            maps = [w.reshape(WIDTH, HEADS, -1) for w in (k, v)]
            return Absorb(maps[0].transpose(1, 2, 0), maps[1].transpose(1, 0, 2)), None

        queries = (x @ q).reshape(b, s, HEADS, -1)
        out, cache = kvjax.attend(cache, layer, q=queries, kv=kv, h=x, absorb=absorb if config else None)
        y = x + out.reshape(b, s, WIDTH)
        x = y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
        cache = cache.record(layer, "after_self_attention", x)
    return x @ params["embed"].T * 3, cache


def own(absorbs=True):
    keys = iter(jax.random.split(jax.random.key(0), 16))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    layers = [tuple(draw(WIDTH, WIDTH) for _ in range(3)) for _ in range(2)]
    return kvjax.Model({"embed": draw(20, WIDTH), "at": draw(32, WIDTH), "layers": layers}, absorbs, post_norm)


@pytest.mark.full
def test_a_post_norm_model_is_absorbed_without_a_factor():
    model = own()
    assert all(shape.absorbs and shape.width == WIDTH for shape in model.layer_shapes())
    ids, found = prompt_ids(1, 2, 9, 20), []
    for plan in (caches.dense(), caches.layer_input(), caches.layer_input(absorb=True)):
        cache = kvjax.init_cache(model, plan, batch=2, capacity=24)
        first, cache = kvjax.prefill(model, cache, ids, [9, 4])
        found.append((first, kvjax.decode(model, cache, first, steps=8)[1]))
    for got in found[1:]:
        np.testing.assert_allclose(got[0], found[0][0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got[1], found[0][1], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"absorb=True\): layer 0"):
        kvjax.init_cache(own(False), caches.layer_input(absorb=True), capacity=8)


def test_a_model_that_does_not_show_its_input_is_a_clear_error():
    def blind(params, config, cache, tokens, valid):
        x = jnp.ones((*tokens.shape, 2, 4))
        out, cache = kvjax.attend(cache, 0, q=x, kv=(x, x))
        return out.reshape(*tokens.shape, 8), cache

    with pytest.raises(InputError, match="layer 0 does not show its input; give kvjax.attend h"):
        kvjax.init_cache(kvjax.Model({}, None, blind), caches.layer_input(), capacity=8)


# --- what is not finite


@pytest.mark.parametrize("absorb", [False, True])
def test_an_input_that_is_not_finite_shows_and_leaves_nothing_behind(absorb):
    model = tiny(LEARNED)
    table = model.params["embed"]["table"]
    broken = model.replace(params=model.params | {"embed": {"table": table.at[5].set(jnp.nan)}})
    ids = np.where(prompt_ids() == 5, 6, prompt_ids())
    ids[0, 12] = 5
    plan = caches.layer_input(absorb=absorb)
    cache = kvjax.init_cache(broken, plan, batch=3, capacity=96)
    logits, cache = kvjax.prefill(broken, cache, ids, PROMPTS)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1:]).all() and int(cache.flags[0]) == NAN
    assert np.isnan(kvjax.step(broken, cache, np.array([1, 2, 3]))[0][0]).all()
    if absorb:  # the values' side holds nothing that 0 would not silence
        assert all(np.isfinite(node.x.unpacked()).all() for node in cache.layers)
    back = cache.rewind(jnp.array([12, 7, 1]))
    again, _ = kvjax.prefill(broken, back, ids[:, :2])
    _, clean = kvjax.prefill(broken, kvjax.init_cache(broken, plan, batch=3, capacity=96), ids, [12, 7, 1])
    want, _ = kvjax.prefill(broken, clean, ids[:, :2])
    assert np.isfinite(again).all() and np.asarray(again).tobytes() == np.asarray(want).tobytes()


# --- what it costs


def test_it_says_its_bytes_against_keys_and_values_and_when_it_is_the_larger():
    llama = Config(128_256, 32, 4096, query_heads=32, kv_heads=8, head_dim=128, ffn_width=14_336)
    shape = LayerShape(8, 128, 128, jnp.bfloat16, width=llama.width)
    said = caches.layer_input().remark((shape,) * 32)
    assert said == "layer inputs 262,144 bytes a token, LARGER than keys and values (131,072; 2 times)"
    alike = LayerShape(32, 128, 128, jnp.bfloat16, width=llama.width)
    assert "smaller than keys and values (524,288; 0.5 times)" in caches.layer_input().remark((alike,) * 32)
    assert "as large as" in caches.layer_input().remark(tiny(FULL).layer_shapes())


@pytest.mark.parametrize(("absorb", "beside"), [(False, 0), (True, 4)])
def test_bytes_are_one_vector_a_position_and_the_factor_of_its_norm(absorb, beside):
    made = kvjax.cache_nbytes(tiny(LEARNED), caches.layer_input(absorb=absorb), batch=3, capacity=40)
    assert made == 2 * 3 * 40 * (32 * 4 + beside) + kvjax.cache_nbytes(
        tiny(LEARNED), caches.recompute(), batch=3, capacity=40
    )


def test_what_is_kept_is_one_rounding_away_in_half_precision():
    model = tiny(MIXED)
    _, fine = filled(model, caches.layer_input())
    _, coarse = filled(model, caches.layer_input(store=jnp.bfloat16))
    want = np.asarray(fine.trace(0, "input").astype(jnp.bfloat16))
    assert (np.asarray(coarse.trace(0, "input")) == want).all()
