"""Promise: bytes predicted from the configuration equal the bytes of the arrays."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import kinds
import pytest
from models import FULL, MIXED, WINDOWED, tiny

import kvjax
from kvjax import caches, codecs, costs
from kvjax.config import Config
from kvjax.ops.positions import Learned

LEARNED = dataclasses.replace(FULL, positions=Learned(128))
STORES = [pytest.param(None, 4, id="float32"), pytest.param(jnp.bfloat16, 2, id="bfloat16")]


def three_ways(config, plan, batch, capacity):
    """Bytes of the arrays, and as `cache_nbytes` and shapes tell them; equal."""
    model = tiny(config)
    real = kvjax.init_cache(model, plan, batch=batch, capacity=capacity)
    measured = sum(x.nbytes for x in jax.tree.leaves(real))
    assert measured == real.nbytes == kvjax.cache_nbytes(model, plan, batch=batch, capacity=capacity)
    return measured


@pytest.mark.parametrize(("store", "size"), STORES)
@pytest.mark.parametrize(("batch", "capacity"), [(1, 40), (3, 96)])
def test_predicted_bytes_are_those_of_the_arrays(store, size, batch, capacity):
    dtype, shape = store or jnp.float32, {"batch": batch, "capacity": capacity}
    container = 4 * batch * capacity + 12 * batch
    slot = 2 * 2 * 8 * size  # keys and values, 2 heads, width 8
    got = three_ways(FULL, caches.dense(store=store), batch, capacity)
    assert got == costs.dense_nbytes(FULL, store=dtype, **shape) == 2 * slot * batch * capacity + container
    ring = {"window": 6, "sinks": 2, "slack": 3}
    got = three_ways(WINDOWED, caches.ring(store=store, **ring), batch, capacity)
    assert got == costs.ring_nbytes(WINDOWED, store=dtype, **ring, **shape) == 2 * slot * batch * 11 + container
    got = three_ways(FULL, caches.recompute(), batch, capacity)
    assert got == costs.recompute_nbytes(FULL, **shape) == container


@pytest.mark.parametrize(("store", "size"), STORES)
def test_predicted_bytes_of_pages_are_those_of_the_arrays(store, size):
    shape, dtype = {"batch": 3, "capacity": 40}, store or jnp.float32
    container, slot = 4 * 3 * 40 + 12 * 3, 2 * 2 * 2 * 8 * size  # layers, keys and values, heads, width
    got = three_ways(FULL, caches.paged(16, store=store), **shape)
    predicted = costs.paged_nbytes(FULL, pages=9, page_size=16, store=dtype, **shape)
    assert got == predicted == 9 * 16 * slot + 4 * 9 + 2 * 4 * 9 + container
    got = three_ways(FULL, caches.paged(8, 12, share=3, store=store), **shape)
    assert got == costs.paged_nbytes(FULL, pages=12, page_size=8, per_page=4, store=dtype, **shape)


@pytest.mark.parametrize(("store", "size"), STORES)
def test_predicted_bytes_of_a_shared_prefix_are_those_of_the_arrays(store, size):
    model, plan = tiny(FULL), caches.dense(store=store)
    prompt = kvjax.init_cache(model, plan, capacity=16).replace(lengths=jnp.array([16], jnp.int32))
    cache = kvjax.init_cache(model, plan, prefix=prompt, batch=3, capacity=40)
    predicted = costs.shared_prefix_nbytes(FULL, batch=3, capacity=40, prefix=16, store=store or jnp.float32)
    kv = (16 + 3 * 24) * 2 * 2 * 2 * 8 * size
    assert cache.nbytes == predicted == kv + 4 * 17 + 4 * 3 * 40 + 12 * 3


GROUPS = {"group": 8, "residual": 12, "slack": 3}
CODES = {
    "int8": (codecs.int8(), costs.Stored(8, scales=4), None),
    "fp8, bfloat16 scale": (codecs.fp8(scale=jnp.bfloat16), costs.Stored(8, scales=2), None),
    "int4": (codecs.int4(), costs.Stored(4, scales=4), None),
    "int4 per channel": (
        codecs.int4_channels(8, residual=12, slack=3),
        costs.Stored(4, channel=8, **GROUPS),
        costs.Stored(4, scales=4, **GROUPS),
    ),
}


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(("batch", "capacity"), [(1, 40), (2, 10)])
def test_predicted_bytes_of_codes_are_those_of_the_arrays(name, batch, capacity):
    codec, keys, values = CODES[name]
    shape = {"batch": batch, "capacity": capacity}
    got = three_ways(FULL, caches.dense(store=codec), batch, capacity)
    assert got == costs.dense_nbytes(FULL, store=keys, values=values, **shape)
    if values is None:
        ring = {"window": 6, "sinks": 2, "slack": 3}
        got = three_ways(WINDOWED, caches.ring(store=codec, **ring), batch, capacity)
        assert got == costs.ring_nbytes(WINDOWED, store=keys, **ring, **shape)


@pytest.mark.parametrize(("store", "size"), STORES)
@pytest.mark.parametrize(("batch", "capacity"), [(1, 40), (3, 96)])
def test_predicted_bytes_of_kept_streams_are_those_of_the_arrays(store, size, batch, capacity):
    shape = {"batch": batch, "capacity": capacity}
    container = 4 * batch * capacity + 12 * batch
    stream = 32 * size * batch * capacity  # one of width 32
    dtype = store or jnp.float32
    got = three_ways(FULL, caches.layer_input(store=store), batch, capacity)
    assert got == costs.layer_input_nbytes(FULL, store=dtype, **shape) == 2 * stream + container
    got = three_ways(LEARNED, caches.layer_input(absorb=True, store=store), batch, capacity)
    factors = 2 * 4 * batch * capacity
    assert got == costs.layer_input_nbytes(LEARNED, store=dtype, factor=4, **shape) == 2 * stream + factors + container
    got = three_ways(FULL, caches.output(store=store), batch, capacity)
    assert got == costs.output_nbytes(FULL, store=dtype, **shape) == 3 * stream + container
    both = caches.hybrid(caches.dense(store=store), store=store)
    kv = costs.dense_nbytes(FULL, store=dtype, **shape)
    got = three_ways(FULL, both, batch, capacity)
    assert got == costs.hybrid_nbytes(FULL, store=dtype, **shape) == kv + 5 * stream
    one = caches.traced(caches.dense(store=store), ("after_ffn",), store=store)
    trace = costs.trace_nbytes(FULL, sites=1, embedding=0, store=dtype, **shape)
    assert three_ways(FULL, one, batch, capacity) == kv + trace == kv + 2 * stream


@kinds.each()
def test_nothing_that_a_loop_does_changes_the_bytes(case):
    before = three_ways(case.config, case.plan, 3, 96)
    model = case.model
    cache = jax.eval_shape(lambda: kvjax.init_cache(model, case.plan, batch=3, capacity=96))
    for _ in range(2):
        _, cache = jax.eval_shape(kvjax.step, model, cache, jax.ShapeDtypeStruct((3,), jnp.int32))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) == before


def test_a_default_plan_costs_a_ring_and_a_dense_layer():
    slot = 2 * 2 * 8 * 4
    assert three_ways(MIXED, None, 2, 64) == 2 * slot * (6 + 16) + 2 * slot * 64 + 4 * 2 * 64 + 12 * 2


@pytest.mark.parametrize(("store", "size", "total"), [(None, 4, 9_830_400), (jnp.bfloat16, 2, 4_915_200)])
def test_the_textbook_example(store, size, total):
    """d 512, 6 layers, batch 4, 100 positions: half of the book's 19,660,800 bytes, which count cross-attention too."""
    config = Config(1000, 6, 512, query_heads=8, kv_heads=8, head_dim=64, ffn_width=2048)
    model = jax.eval_shape(lambda: kvjax.decoder(config, kvjax.init_params(config, jax.random.key(0))))
    container = costs.container_nbytes(4, 100)
    assert 2 * 6 * 8 * 64 * 100 * 4 * size == total
    assert costs.dense_nbytes(config, batch=4, capacity=100, store=store or jnp.float32) == total + container
    assert kvjax.cache_nbytes(model, caches.dense(store=store), batch=4, capacity=100) == total + container
    assert container == 4 * 400 + 12 * 4


def test_grouped_queries_divide_and_llama_3_8b_is_what_everyone_knows():
    llama = Config(128_256, 32, 4096, query_heads=32, kv_heads=8, head_dim=128, ffn_width=14_336, tied=False)
    assert costs.slot_nbytes(llama, jnp.bfloat16) * 32 == 131_072, "128 KiB a token"
    eight = costs.dense_nbytes(llama, batch=1, capacity=8192, store=jnp.bfloat16) - costs.container_nbytes(1, 8192)
    assert eight == 2**30
