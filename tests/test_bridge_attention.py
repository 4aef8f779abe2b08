"""Promise: attention for modules of one's own has Flax's parameters and outputs, and runs over every kind of cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from flax import nnx
from models import CAPACITY, PROMPTS, VOCAB, WINDOW, prompt_ids

import kvjax
from kvjax import InputError, caches
from kvjax.bridge import linen as in_linen
from kvjax.bridge import nnx as in_nnx
from kvjax.ops.positions import Learned, Rope

X = jax.random.normal(jax.random.key(0), (2, 7, 32))
CAUSAL = nn.make_causal_mask(jnp.ones((2, 7)))


OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"normalize_qk": True, "use_bias": False, "qkv_features": 16}, marks=pytest.mark.full)],
    ids=["as it is", "normed"],
)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()))


@jax.jit
def scattered(tree):
    """Biases and scales that are not what they are at first."""
    keys = jax.random.split(jax.random.key(7), len(jax.tree.leaves(tree)))
    keys = jax.tree.unflatten(jax.tree.structure(tree), list(keys))
    return jax.tree.map(lambda x, key: x + jax.random.normal(key, x.shape) * 0.3, tree, keys)


# ---------------------------------------------------------------- Flax's own, uncached, causal


@pytest.mark.corner
@OPTIONS
def test_flax_parameters_give_flax_outputs_in_linen(options):
    own = nn.MultiHeadDotProductAttention(num_heads=4, out_features=24, **options)
    cached = in_linen.CachedAttention(num_heads=4, out_features=24, **options)
    variables = scattered(jax.jit(own.init)(jax.random.key(1), X))
    assert jax.eval_shape(cached.init, jax.random.key(1), X) == jax.eval_shape(own.init, jax.random.key(1), X)
    run = jax.jit(lambda v, x: (own.apply(v, x, mask=CAUSAL), own.apply(v, x), *cached.apply(v, x)))  # the same tree
    want, unmasked, out, cache = run(variables, X)
    close(out, want)
    assert cache is None and np.abs(unmasked - want).max() > 0.01


@pytest.mark.full
@pytest.mark.corner
@OPTIONS
def test_flax_parameters_give_flax_outputs_in_nnx(options):
    own = nnx.MultiHeadAttention(4, 32, out_features=24, decode=False, rngs=nnx.Rngs(0), **options)
    cached = in_nnx.CachedAttention(4, 32, out_features=24, rngs=nnx.Rngs(1), **options)
    nnx.update(own, scattered(nnx.state(own, nnx.Param)))
    want = own(X, mask=CAUSAL)
    assert np.abs(cached(X)[0] - want).max() > 0.01
    nnx.update(cached, nnx.state(own, nnx.Param))  # the same tree
    close(cached(X)[0], want)
    nnx.update(own, jax.tree.map(lambda x: x / 2, nnx.state(cached, nnx.Param)))  # and back
    assert np.abs(own(X, mask=CAUSAL) - want).max() > 0.01
    linen = in_linen.CachedAttention(num_heads=4, out_features=24, **options)
    close(linen.apply({"params": nnx.to_pure_dict(nnx.state(cached, nnx.Param))}, X)[0], want)


@pytest.mark.full
@pytest.mark.corner
def test_fewer_heads_for_keys_rotations_and_windows_are_those_of_plain_attention():
    cached = in_linen.CachedAttention(num_heads=4, num_kv_heads=2, rope=Rope(100.0), window=3)
    variables = scattered(jax.jit(cached.init)(jax.random.key(1), X))
    want = jax.jit(by_hand)(variables["params"])
    close(jax.jit(cached.apply)(variables, X)[0], want)
    other = jax.jit(cached.clone(rope=None).apply)(variables, X)[0]
    assert np.abs(other - want).max() > 0.01
    module = in_nnx.CachedAttention(4, 32, num_kv_heads=2, rope=Rope(100.0), window=3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, variables["params"])
    close(jax.jit(lambda state: nnx.merge(graph, state)(X)[0])(state), want)


def by_hand(p):
    """Two heads for keys, Rope(100.0) and a window of 3."""
    at = jnp.broadcast_to(jnp.arange(7)[None, :], (2, 7))
    maps = lambda name: jnp.einsum("bsm,mhd->bshd", X, p[name]["kernel"]) + p[name]["bias"][None, None]  # noqa: E731
    q, k = (Rope(100.0).rotate(maps(name), Rope(100.0).tables(at, 8, X.dtype)) for name in ("query", "key"))
    near = CAUSAL * (at[:, None, :, None] - at[:, None, None, :] < 3)
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, maps("value")))
    want = jnp.einsum("bshd,hdm->bsm", nn.dot_product_attention(q, k, v, mask=near), p["out"]["kernel"])
    return want + p["out"]["bias"][None, None]


def test_heads_that_do_not_divide_and_an_empty_window_are_clear_errors():
    x = jnp.ones((1, 2, 16))
    made = {
        "linen": lambda heads, window: in_linen.CachedAttention(heads, window=window).init(jax.random.key(0), x),
        "nnx": lambda heads, window: in_nnx.CachedAttention(heads, 16, window=window, rngs=nnx.Rngs(0))(x),
    }
    for make in made.values():
        make(4, 1)
        with pytest.raises(InputError, match="16 features do not divide among num_heads 3"):
            make(3, None)
        with pytest.raises(InputError, match="window 0 at layer 0 must be at least 1"):
            make(4, 0)


def test_a_rope_that_turns_nothing_is_a_clear_error():
    with pytest.raises(InputError, match=r"rope Learned\(size=8\) turns nothing"):
        in_linen.CachedAttention(num_heads=4, rope=Learned(8)).init(jax.random.key(0), X)


# ---------------------------------------------------------------- models of one's own


class LinenLM(nn.Module):
    """As a researcher would write it; without a rotation it has a table of positions, and no norms."""

    windows: tuple[int | None, ...] = (WINDOW, None)
    rope: Rope | None = Rope()

    @nn.compact
    def __call__(self, tokens, cache=None):
        x = nn.Embed(VOCAB, 32, name="embed")(tokens)
        if self.rope is None:
            at = jnp.arange(tokens.shape[1])[None, :] if cache is None else cache.positions
            x = x + nn.Embed(CAPACITY, 32, name="places")(at)
        cache = None if cache is None else cache.record(0, "embedding", x)
        for layer, window in enumerate(self.windows):
            attention = in_linen.CachedAttention(4, num_kv_heads=2, rope=self.rope, window=window)
            y, cache = attention(x, cache, layer, None if self.rope is None else nn.RMSNorm())
            x = x + y
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(48)(x)))
            cache = None if cache is None else cache.record(layer, "after_ffn", x)
        return nn.Dense(VOCAB, name="head")(x), cache


class NnxLM(nnx.Module):
    """The same, with norms and rotations."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.head = nnx.Embed(VOCAB, 32, rngs=rngs), nnx.Linear(32, VOCAB, rngs=rngs)
        self.norms = nnx.data([nnx.RMSNorm(32, rngs=rngs) for _ in range(2)])
        self.attention = nnx.data(
            [in_nnx.CachedAttention(4, 32, num_kv_heads=2, rope=Rope(), window=w, rngs=rngs) for w in (WINDOW, None)]
        )

    def __call__(self, tokens, cache=None):
        x = self.embed(tokens)
        cache = None if cache is None else cache.record(0, "embedding", x)
        for layer, (norm, attention) in enumerate(zip(self.norms, self.attention, strict=True)):
            y, cache = attention(x, cache, layer, norm)
            x = x + y
            cache = None if cache is None else cache.record(layer, "after_ffn", x)
        return self.head(x), cache


def run_linen(params, config, cache, tokens, valid):
    return LinenLM().apply({"params": params}, tokens, cache)


def run_any_linen(params, config, cache, tokens, valid):
    return config.apply({"params": params}, tokens, cache)


def run_nnx(params, config, cache, tokens, valid):
    return nnx.merge(config, params)(tokens, cache)


@jax.jit
def wild(tree):
    """At initialisation a model repeats a few tokens."""
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, tree)


@functools.cache
def params_of(module):
    return wild(jax.jit(module.init)(jax.random.key(0), prompt_ids())["params"])


def linen_model():
    return kvjax.Model(params_of(LinenLM()), None, run_linen)


def nnx_model():
    graph, params = nnx.split(NnxLM(nnx.Rngs(0)))
    return kvjax.Model(wild(params), graph, run_nnx)


@pytest.mark.corner
@pytest.mark.parametrize("make", [linen_model, pytest.param(nnx_model, marks=pytest.mark.full)])
def test_a_module_of_ones_own_runs_in_the_loops(make):
    model, plan = make(), (caches.ring(WINDOW, slack=4), caches.layer_input())
    cache = kvjax.init_cache(model, plan, batch=3, capacity=32)
    logits, cache = kvjax.prefill(model, cache, prompt_ids(), PROMPTS)
    tokens, _, cache = kvjax.decode(model, cache, logits, steps=16)
    assert min(len(set(row)) for row in tokens.tolist()) > 4
    again = kvjax.forward(model, np.maximum(cache.tokens, 0)).argmax(axis=-1)
    for row, n in enumerate(PROMPTS):
        np.testing.assert_array_equal(again[row, n - 1 : n + 15], tokens[row])
    shapes = model.layer_shapes()
    assert [(x.kv_heads, x.key_dim, x.window, x.width) for x in shapes] == [(2, 8, WINDOW, 32), (2, 8, None, 32)]
    assert all(x.chained for x in shapes)  # a norm inside: the stream can be kept, and taken up again


@pytest.mark.full
def test_without_a_cache_a_module_gives_what_forward_gives():
    model = linen_model()
    got, cache = LinenLM().apply({"params": model.params}, prompt_ids())
    close(got, kvjax.forward(model, prompt_ids()))
    assert cache is None


@dataclasses.dataclass(frozen=True)
class Own:
    """A plan on a Linen model with as many layers and the same windows as its case of the contract suite has."""

    module: LinenLM
    plan: Any

    def logits(self):
        """After a ragged prompt, after many more tokens, after one; the caller knows which tokens."""
        model = kvjax.Model(params_of(self.module), self.module, run_any_linen)
        first, cache = kvjax.prefill(
            model, kvjax.init_cache(model, self.plan, batch=3, capacity=CAPACITY), prompt_ids(), PROMPTS
        )
        second, cache = kvjax.prefill(model, cache, prompt_ids(1, length=9))
        third, cache = kvjax.step(model, cache, prompt_ids(2)[:, 0])
        return np.stack([first, second, third]), cache.check()


WANTED: dict[Any, np.ndarray] = {}


@pytest.mark.full
@pytest.mark.parametrize("case", kinds.MUTATED, ids=lambda case: case.name)  # every kind and codec, on one layer
def test_every_kind_of_cache_goes_under_a_module_of_ones_own(case):
    config = case.config
    module = LinenLM(config.windows, Rope() if config.positions.rotates else None)
    reference = Own(module, case.reference)
    if reference not in WANTED:
        WANTED[reference] = reference.logits()[0]
    (got, cache), want = Own(module, case.plan).logits(), WANTED[reference]
    off = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert off <= (1e-5 if case.exact else 2 * case.error), f"off by {off:.1e}"
    np.testing.assert_array_equal(cache.lengths, PROMPTS + 10)
    assert np.abs(got - np.roll(want, 1, axis=0)).max() > 0.1  # other tokens give other logits


@pytest.mark.full
def test_a_kind_with_another_window_is_found():
    module = LinenLM((None,))
    got, want = (Own(module, plan).logits()[0] for plan in (caches.recompute(window=WINDOW), caches.recompute()))
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) > 1e-3
