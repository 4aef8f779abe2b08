"""The worked example with four tokens: Q = K, three of them cached, then one more."""

from __future__ import annotations

import jax.numpy as jnp
import kinds
import numpy as np
import pytest

import kvjax
from kvjax import caches
from kvjax.ops.attention import Absorb

Q = K = np.array([[1, 0], [0, 1], [1, 1], [2, 2]], np.float32)
V = np.array([[0, 1], [1, 0], [1, 1], [2, 2]], np.float32)


def absorb(x):
    """Keys and values are the first and the last half of the layer's input: linear in it."""
    both = jnp.eye(4)
    return Absorb(both[None, :2], both[None, :, 2:]), None


def apply(params, config, cache, tokens, valid):
    """One head; token i has query `K[i]`, key `K[i]` and value `V[i]`, which its embedding holds side by side."""
    x = jnp.take(params, tokens, axis=0, mode="clip")
    cache = cache.record(0, "embedding", x)
    kv = lambda h: (h[:, :, None, :2], h[:, :, None, 2:])  # noqa: E731
    out, cache = kvjax.attend(cache, 0, q=kv(x)[0], kv=kv, h=x, absorb=absorb, scale=1.0)
    x = jnp.pad(out[:, :, 0], ((0, 0), (0, 0), (0, 2)))  # as wide as the vocabulary: logits of four ids
    return x, cache.record(0, "after_ffn", x)


MODEL = kvjax.Model(jnp.asarray(np.concatenate([K, V], axis=1)), None, apply)
PLANS = {"dense": caches.dense(), "ring": caches.ring(4)}


@pytest.mark.corner
@pytest.mark.parametrize("plan", PLANS)
def test_the_cache_returns_k_and_v_after_three_tokens_and_one_more(plan):
    cache = kvjax.init_cache(MODEL, PLANS[plan], capacity=4)
    out, cache = kvjax.prefill(MODEL, cache, [[0, 1, 2]])
    np.testing.assert_array_equal(cache.keys(0)[0, 0, :3], K[:3])
    np.testing.assert_array_equal(cache.values(0)[0, 0, :3], V[:3])
    assert cache.positions(0)[0].tolist() == [0, 1, 2, 2**31 - 1] and cache.lengths.tolist() == [3]
    weights = np.exp(K[:3] @ Q[2]) / np.exp(K[:3] @ Q[2]).sum()
    np.testing.assert_allclose(out[0, :2], weights @ V[:3], rtol=1e-6)

    out, cache = kvjax.step(MODEL, cache, [3])
    keys, values = np.asarray(cache.keys(0)[0, 0]), np.asarray(cache.values(0)[0, 0])
    np.testing.assert_array_equal(keys, K)
    np.testing.assert_array_equal(values, V)
    np.testing.assert_array_equal(Q[3] @ keys.T, [2, 2, 4, 8])
    np.testing.assert_array_equal(Q[3] @ keys.T @ values, [22, 22])
    weights = np.exp(K @ Q[3]) / np.exp(K @ Q[3]).sum()
    np.testing.assert_allclose(out[0, :2], weights @ V, rtol=1e-6)


def test_what_was_cached_is_what_is_computed_at_once():
    whole = kvjax.forward(MODEL, [[0, 1, 2, 3]])
    for case in kinds.cases():
        if isinstance(case.plan, tuple) or not case.exact:  # the example has one layer
            continue
        cache = kvjax.init_cache(MODEL, case.plan, capacity=4)
        for token in range(4):
            out, cache = kvjax.step(MODEL, cache, [token])
            np.testing.assert_allclose(out, whole[:, token], rtol=1e-6)
