"""A soft cap bends every scaled score before masking, on every way through attention, as a plain softmax has it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caches import storage
from kvjax.ops import attention as ops
from kvjax.ops.attention import Absorb, View

B, S, T, K, G, D, E, PAGE = 2, 5, 12, 2, 2, 4, 6, 4
CAP = 1.5
SCALE = 0.7
POSITIONS = np.array([[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]], np.int32)
TOLERANCE = 1e-5
"""Of the largest value: float32 sums of a few terms."""


def made():
    """Queries, and what keys and values are made of: a stream with a factor a slot, maps and biases."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    maps = Absorb(normal(K, D, E), normal(K, E, D), 2 * normal(K, D), normal(K, D))
    return normal(B, S, K * G, D), normal(B, T, E), jnp.abs(normal(B, T)) + 0.5, maps


Q, X, FACTOR, MAPS = made()
KEYS = jnp.einsum("bte,kde->btkd", X * FACTOR[..., None], MAPS.query_map) + MAPS.key_bias[None, None]
VALUES = jnp.einsum("bte,ked->btkd", X * FACTOR[..., None], MAPS.value_map) + MAPS.value_bias[None, None]
SLOTS = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))


def plain(lo=0, hi=T):
    return View(storage.pack(KEYS[:, lo:hi]), storage.pack(VALUES[:, lo:hi]), SLOTS[:, lo:hi])


def scaled():
    """Keys and values as codes with a factor a slot."""
    codes = (storage.pack(x / FACTOR[:, :, None, None]) for x in (KEYS, VALUES))
    factor = jnp.repeat(FACTOR, K, axis=0)
    return View(*codes, SLOTS, k_scale=factor, v_scale=factor)


def absorbed(lo=0, hi=T):
    x, factor = X[:, lo:hi], FACTOR[:, lo:hi]
    return View(x, x, SLOTS[:, lo:hi], k_scale=factor, v_scale=factor, absorb=MAPS)


def paged():
    """Pages of a row in backward order, as they might be owned."""
    owner, table = ownership()
    return View(in_pages(KEYS), in_pages(VALUES), page_slots(), pages=(owner, table))


def absorbed_pages():
    x, factor = in_pages(X[:, :, None]), FACTOR.reshape(-1, PAGE)[::-1]
    return View(x, x, page_slots(), k_scale=factor, v_scale=factor, absorb=MAPS, pages=ownership())


def ownership():
    n = T // PAGE
    return jnp.repeat(jnp.arange(B), n)[::-1], jnp.arange(B * n).reshape(B, n)[::-1, ::-1]


def in_pages(x):
    """`[B, T, heads, D]` to `[P * heads, PAGE, D]`."""
    return storage.pack(x.reshape(-1, PAGE, *x.shape[2:])[::-1])


def page_slots():
    return SLOTS.reshape(-1, PAGE)[::-1]


PATHS = {
    "one view": lambda: (plain(),),
    "codes": lambda: (scaled(),),
    "joined": lambda: (plain(0, 5), plain(5)),
    "absorbed": lambda: (absorbed(),),
    "absorbed, joined with a view that has no bias to add": lambda: (absorbed(0, 5), plain(5)),
    "pages": lambda: (paged(),),
    "absorbed pages": lambda: (absorbed_pages(),),
}


def reference(cap, window=None, bias_after=False):
    """`[B, S, H, D]` in float64: every score on its own; or, wrongly, with the keys' bias added to capped scores."""
    q, keys, values = (np.asarray(x, np.float64) for x in (Q, KEYS, VALUES))
    bias = np.repeat(np.asarray(MAPS.key_bias, np.float64), G, axis=0) if bias_after else np.zeros((K * G, D))
    keys, values = np.repeat(keys, G, axis=2) - bias, np.repeat(values, G, axis=2)
    scores = np.einsum("bshd,bthd->bhst", q, keys) * SCALE
    scores = np.tanh(scores / cap) * cap if cap else scores
    scores = scores + np.einsum("bshd,hd->bhs", q, bias)[..., None] * SCALE
    behind = POSITIONS[:, None, :, None] - np.arange(T)
    scores = np.where((behind >= 0) & (behind < (window or T)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdims=True), values)


def attend(views, *rules):
    """Attention over the views under each rule, a cap and a window; in one program, because compiling is what costs."""

    def run(q, at, views):
        options = {"kv_heads": K, "scale": SCALE}
        return [ops.attention(q, at, views, softcap=cap, window=window, **options) for cap, window in rules]

    return [np.asarray(x) for x in jax.jit(run)(Q, POSITIONS, views)]


def error(found, want):
    return np.abs(found - want).max() / np.abs(want).max()


@pytest.mark.parametrize(
    ("path", "blockwise"),
    [
        *((path, False) for path in PATHS),
        *(pytest.param(p, True, marks=() if "joined" in p else pytest.mark.full) for p in PATHS),
    ],
)
def test_a_capped_attention_is_a_softmax_of_capped_scores(path, blockwise, monkeypatch):
    if blockwise:
        monkeypatch.setattr(ops, "BLOCK", 2)
        monkeypatch.setattr(ops, "BLOCKWISE_ABOVE", 1)
    capped, near, plain = attend(PATHS[path](), (CAP, None), (CAP, 4), (None, None))
    assert error(capped, reference(CAP)) < TOLERANCE
    assert error(near, reference(CAP, window=4)) < TOLERANCE
    assert error(plain, reference(None)) < TOLERANCE
    assert error(plain, reference(CAP)) > 0.05, "a path without the cap would pass"


def test_a_bias_added_after_the_cap_would_be_seen():
    assert error(reference(CAP, bias_after=True), reference(CAP)) > 0.01
