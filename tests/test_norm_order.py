"""Where norms stand: the order of a layer is that of a forward pass written in NumPy, and absorption knows it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import POST, VOCAB, prompt_ids

import kvjax
from kvjax.caches.base import OpenCache, Span
from kvjax.config import NormOrder
from kvjax.layers import Rotation, self_attention
from kvjax.ops.norms import LayerNorm, OffsetRMSNorm, RMSNorm

LENGTH = 12
TOLERANCE = 1e-5
"""Of the largest logit; these models are 1e-6 from float64."""


@functools.cache
def model_of(order, norm=POST.norm):
    """Every parameter random, scales, offsets and biases too."""
    config = dataclasses.replace(POST, norm_order=order, norm=norm)
    leaves, tree = jax.tree.flatten(kvjax.init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(1)
    return kvjax.decoder(
        config, jax.tree.unflatten(tree, [x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) for x in leaves])
    )


def by_hand(model, ids, order):
    """Logits `[N, V]` of one row in float64, from nothing but the equations."""
    c = model.config
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    n, h, k, d = len(ids), c.query_heads, c.kv_heads, c.head_dim

    def norm(params, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm.eps) * params["scale"] + params["bias"]

    def linear(params, x):
        return x @ params["kernel"] + params["bias"]

    def attention(params, x):
        q, keys, values = np.split(linear(params["qkv"], x), [h * d, (h + k) * d], axis=-1)
        out = []
        for head in range(h):
            of = slice(head // (h // k) * d, (head // (h // k) + 1) * d)
            scores = q[:, head * d : (head + 1) * d] @ keys[:, of].T / np.sqrt(d)
            scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(weights / weights.sum(-1, keepdims=True) @ values[:, of])
        return linear(params["out"], np.concatenate(out, axis=-1))

    def ffn(params, x):
        return linear(params["down"], np.maximum(linear(params["up"], x), 0))

    x = p["embed"]["table"][ids] + p["positions"]["table"][:n]
    for i in range(c.num_layers):
        layer = p["layers"][str(i)]
        for part, f in (("attn", attention), ("ffn", ffn)):
            first, last = layer[f"{part}_norm"], layer.get(f"{part}_post_norm")
            if order is NormOrder.PRE:
                x = x + f(layer[part], norm(first, x))
            elif order is NormOrder.POST:
                x = norm(first, x + f(layer[part], x))
            else:
                x = x + norm(last, f(layer[part], norm(first, x)))
    if order is not NormOrder.POST:
        x = norm(p["final_norm"], x)
    return x @ p["head"]["kernel"]


@pytest.mark.parametrize("order", [NormOrder.POST, NormOrder.SANDWICH], ids=lambda o: o.name)
def test_a_forward_pass_has_the_norms_where_the_order_says(order):
    model, ids = model_of(order), prompt_ids(0, 1, LENGTH)
    found = np.asarray(kvjax.forward(model, ids)[0])
    want = by_hand(model, ids[0], order)
    assert np.abs(found - want).max() <= TOLERANCE * np.abs(want).max()
    # Another order of the same parameters would be seen; the last norm then is that of the last layer.
    full = model.params | {"final_norm": model.params["layers"]["1"]["ffn_norm"]}
    other = by_hand(kvjax.decoder(model.config, full), ids[0], NormOrder.PRE)
    assert np.abs(found - other).max() > 1000 * TOLERANCE * np.abs(other).max()


def test_parameters_are_declared_for_the_order():
    names = {order: set(model_of(order).params) for order in NormOrder}
    layer = {order: set(model_of(order).params["layers"]["0"]) for order in NormOrder}
    assert names[NormOrder.PRE] == names[NormOrder.SANDWICH] == names[NormOrder.POST] | {"final_norm"}
    assert layer[NormOrder.PRE] == layer[NormOrder.POST] == {"attn_norm", "attn", "ffn_norm", "ffn"}
    assert layer[NormOrder.SANDWICH] == layer[NormOrder.PRE] | {"attn_post_norm", "ffn_post_norm"}


class Seen(Exception):
    pass


class Watch:
    """Stands in for a node; what it is given comes back in an exception."""

    def extend(self, h, project, span, shared):
        raise Seen(h, project)


def given(model):
    """What the first layer gives its node: the stream `[1, S, M]` and what it can do."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, LENGTH, model.config.width)), jnp.float32)
    at = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    cache = OpenCache((Watch(),), {}, Span(jnp.zeros(1, jnp.int32), jnp.full(1, LENGTH), at))
    rotation = Rotation.of_layers(model.config, at, x.dtype)[0]
    with pytest.raises(Seen) as seen:
        self_attention(model.params["layers"]["0"], model.config, x, cache, 0, rotation)
    return seen.value.args


def absorbed_error(model, factor_of=lambda factor: factor):
    """Keys and values by the maps against those that the layer projects, of the largest."""
    stream, project = given(model)
    maps, factor = project.absorb(stream)
    factor = factor_of(factor)
    scaled = stream if factor is None else stream * factor[..., None]
    keys = jnp.einsum("bse,kde->bskd", scaled, maps.query_map) + maps.key_bias[None, None]
    values = jnp.einsum("bse,ked->bskd", scaled, maps.value_map) + maps.value_bias[None, None]
    want = project.kv(stream, None)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip((keys, values), want, strict=True))


@pytest.mark.parametrize("norm", [RMSNorm(), OffsetRMSNorm(), LayerNorm()], ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("order", NormOrder, ids=lambda o: o.name)
def test_what_a_layer_absorbs_gives_the_keys_and_values_that_it_projects(order, norm):
    model = model_of(order, norm)
    assert absorbed_error(model) < 1e-5
    assert (given(model)[1].absorb(given(model)[0])[1] is None) == (order is NormOrder.POST)
    if order is not NormOrder.POST:
        assert absorbed_error(model, lambda factor: None) > 1e-2  # the norm's factor counts


def test_sites_are_recorded_after_the_norm_of_a_post_norm_layer():
    model, seen = model_of(NormOrder.POST), {}

    class Recorder(OpenCache):
        def attend(self, layer, q, project, h=None, **options):
            return jnp.zeros((*q.shape[:2], q.shape[2], q.shape[3])), self

        def record(self, layer, site, x):
            seen[layer, site] = np.asarray(x)
            return self

    at = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    cache = Recorder((), {}, Span(jnp.zeros(1, jnp.int32), jnp.full(1, LENGTH), at))
    out, _ = model.apply(model.params, model.config, cache, jnp.asarray(prompt_ids(0, 1, LENGTH)), cache.span.valid)
    layer = model.params["layers"]["0"]
    joined = seen[0, "embedding"] + np.asarray(layer["attn"]["out"]["bias"])
    want = model.config.norm(layer["attn_norm"], jnp.asarray(joined))
    np.testing.assert_allclose(seen[0, "after_self_attention"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out, seen[model.config.num_layers - 1, "after_ffn"])  # and no final norm
    assert model.head(model.params, model.config, out).shape == (1, LENGTH, VOCAB)
