"""Where norms stand: the order of a layer is that of a forward pass written in NumPy, and absorption knows it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import POST, prompt_ids
from naive import gap, run

import kvjax
from kvjax.caches.contract import Span
from kvjax.caches.opened import OpenCache
from kvjax.caches.recompute import Recompute
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


def with_order(model, order):
    return kvjax.decoder(dataclasses.replace(model.config, norm_order=order), model.params)


@pytest.mark.parametrize("order", [NormOrder.POST, NormOrder.SANDWICH], ids=lambda o: o.name)
def test_a_forward_pass_has_the_norms_where_the_order_says(order):
    model, ids = model_of(order), prompt_ids(0, 1, LENGTH)
    found = kvjax.forward(model, ids)[0]
    assert gap(found, run(model, ids[0])[0]) <= TOLERANCE
    # Another order of the same parameters would be seen.
    assert gap(found, run(with_order(model, NormOrder.PRE), ids[0])[0]) > 1000 * TOLERANCE


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

    reach = None

    def extend(self, h, project, span, shared):
        raise Seen(h, project)


def given(model):
    """What the first layer gives its node: the stream `[1, S, M]` and what it can do."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, LENGTH, model.config.width)), jnp.float32)
    at = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    cache = OpenCache((Watch(),), {}, Span(jnp.zeros(1, jnp.int32), jnp.full(1, LENGTH), at))
    rotation = Rotation.of_layers(model.params, model.config, at, x.dtype)[0]
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


@pytest.mark.parametrize("order", [NormOrder.POST, NormOrder.SANDWICH], ids=lambda o: o.name)
def test_sites_show_the_stream_after_the_layers_norms(order):
    model, seen, ids = model_of(order), {}, prompt_ids(0, 1, LENGTH)

    class Recorder(OpenCache):
        def record(self, layer, site, x):
            seen[layer, site] = np.asarray(x[0])
            return self

    at = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    nodes = (Recompute(),) * model.config.num_layers
    cache = Recorder(nodes, {}, Span(jnp.zeros(1, jnp.int32), jnp.full(1, LENGTH), at))
    out, _ = model.apply(model.params, model.config, cache, jnp.asarray(ids), cache.span.valid)
    _, want = run(model, ids[0])
    assert seen.keys() == want.keys()
    assert max(gap(seen[site], want[site]) for site in want) <= TOLERANCE
    last = seen[model.config.num_layers - 1, "after_ffn"]
    assert (gap(out[0], last) == 0) == (order is NormOrder.POST)  # which has no final norm


def test_an_offset_is_kept_apart_because_one_plus_it_has_no_room_in_bfloat16():
    rng = np.random.default_rng(0)
    x, offset = (jnp.asarray(rng.normal(size=(256, 64)) * by, jnp.bfloat16) for by in (1.0, 0.2))
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact * exact).mean(-1, keepdims=True) + 1e-6) * (1 + np.asarray(offset[0], np.float64))

    def error(found):
        return np.sqrt(((np.asarray(found, np.float64) - exact) ** 2).mean())

    kept = error(OffsetRMSNorm(1e-6)({"offset": offset[0]}, x))
    folded = error(RMSNorm(1e-6)({"scale": 1 + offset[0]}, x))
    assert kept < 2**-8
    assert folded > 1.5 * kept, (kept, folded)
