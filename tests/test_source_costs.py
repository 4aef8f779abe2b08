"""Promise: what a source text costs an encoder-decoder model, in bytes and FLOPs, is what `kvjax.costs` predicts."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FULL

import kvjax
from kvjax import caches, caching, codecs, costs
from kvjax.config import Config, NormOrder
from kvjax.errors import InputError
from kvjax.loops.decode import VALUE
from kvjax.ops.norms import LayerNorm, RMSNorm
from kvjax.ops.positions import Learned, Relative

GROUPED = dataclasses.replace(FULL, encoder=dataclasses.replace(FULL, width=40, num_layers=3, windows=()))
PLAIN = Config(
    96, 3, 40, query_heads=5, kv_heads=5, head_dim=8, ffn_width=160, norm=LayerNorm(), gated=False, qkv_bias=True,
    positions=Learned(2048), max_positions=2048, out_bias=True, ffn_bias=True, embed_norm=True,
)  # fmt: skip
BART = dataclasses.replace(PLAIN, norm_order=NormOrder.POST, head_bias=True)
T5 = dataclasses.replace(PLAIN, norm=RMSNorm(), positions=Relative(), scale=1.0, qkv_bias=False, embed_norm=False)

CONFIGS = {
    "grouped, encoder wider and deeper": GROUPED,
    "norms before, biases": dataclasses.replace(PLAIN, encoder=PLAIN),
    "norms after": dataclasses.replace(
        BART, encoder=dataclasses.replace(BART, head_bias=False, num_layers=2, windows=())
    ),
    "relative positions": dataclasses.replace(T5, encoder=T5),
    "norms of heads": dataclasses.replace(FULL, qk_norm=RMSNorm(), encoder=FULL),
    "norms on both sides": dataclasses.replace(FULL, norm_order=NormOrder.SANDWICH, encoder=FULL),
}
CONFIGS = {
    name: dataclasses.replace(c, encoder=dataclasses.replace(c.encoder, tied=c.encoder.width == c.width))
    for name, c in CONFIGS.items()
}
GROUPED = CONFIGS["grouped, encoder wider and deeper"]
each = pytest.mark.parametrize("name", CONFIGS)
KINDS = {
    "cross": (caches.cross(), costs.cross_flops),
    "projected again": (caches.encoder_output(), costs.cross_reprojected_flops),
    "absorbed": (caches.encoder_output(absorb=True), costs.cross_absorbed_flops),
}


def model_of(config, dtype=jnp.float32):
    """Nothing allocated."""
    return kvjax.decoder(config, kvjax.params.abstract_params(config, dtype))


def source_of(config, rows, slots, dtype=jnp.float32):
    """Any number of positions: what `kvjax.encode` would pad."""
    one = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return kvjax.Source(jax.ShapeDtypeStruct((rows, slots, config.encoder.width), dtype), one, one)


def cache_of(config, plan, cross, *, batch, capacity, rows, slots):
    model, source = model_of(config), source_of(config, rows, slots)
    begin = lambda source: kvjax.init_cache(model, plan, batch=batch, capacity=capacity, source=source, cross=cross)  # noqa: E731
    return model, jax.eval_shape(begin, source)


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def stepped(config, cross, *, batch=1, slots=24, rows=1, plan=None, queries=1, within=None):
    """FLOPs in one call that feeds `queries` tokens a row; traced, not run."""
    model, cache = cache_of(config, plan or caches.dense(), cross, batch=batch, capacity=40, rows=rows, slots=slots)
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if queries == 1:
        return costs.count_flops(VALUE.step, model, cache, row, within=within)
    tokens = jax.ShapeDtypeStruct((batch, queries), jnp.int32)
    return costs.count_flops(VALUE.prefill, model, cache, tokens, row, within=within)


@pytest.mark.corner
@each
def test_a_step_over_a_source_does_what_is_predicted(name):
    config = CONFIGS[name]
    for kind, predict in KINDS.values():
        if config.qk_norm is not None and kind == caches.encoder_output(absorb=True):
            with pytest.raises(InputError, match="norm of each key"):
                stepped(config, kind)
            continue
        own = costs.kv_flops(config, slots=40, batch=4)
        shared = {} if predict is not costs.cross_reprojected_flops else {"rows": 2}
        cross = predict(config, source=33, batch=4, **shared)
        assert stepped(config, kind, batch=4, rows=2, slots=33) == own + cross
    assert stepped(config, caches.cross(), within="cross_attention") == costs.cross_flops(config, source=24)


@each
def test_a_prefill_and_a_step_that_keeps_nothing_do_what_is_predicted(name):
    config = CONFIGS[name]
    made = stepped(config, caches.cross(), batch=2, rows=2, queries=16)
    own = costs.kv_flops(config, slots=40, batch=2, queries=16)
    assert made == own + costs.cross_flops(config, source=24, batch=2, queries=16)
    made = stepped(config, caches.encoder_output(), batch=2, rows=1, plan=caches.recompute())
    cross = costs.cross_reprojected_flops(config, source=24, rows=1, batch=2, queries=40)
    assert made == costs.recompute_flops(config, slots=40, batch=2) + cross


@each
def test_the_encoder_does_what_is_predicted(name):
    config = CONFIGS[name]
    tokens, valid = jax.ShapeDtypeStruct((3, 24), jnp.int32), jax.ShapeDtypeStruct((3,), jnp.int32)
    made = costs.count_flops(kvjax.encode, model_of(config), tokens, valid)
    assert made == costs.encoder_flops(config, source=24, rows=3)
    assert made.head == 0 < made.scores


def test_flops_are_counted_within_a_scope():
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    for within, wanted in (("encoder", costs.encoder_flops(GROUPED, source=16)), ("cross_attention", costs.Flops())):
        assert (
            costs.count_flops(
                kvjax.encode, model_of(GROUPED), tokens, jax.ShapeDtypeStruct((1,), jnp.int32), within=within
            )
            == wanted
        )


def test_long_sources_are_read_in_blocks_of_queries():
    config = CONFIGS["norms before, biases"]
    for kind, predict in (KINDS["cross"], KINDS["absorbed"]):
        made = stepped(config, kind, slots=1030, queries=300, within="cross_attention")
        assert made == predict(config, source=1030, queries=300)
    assert predict(config, source=1030, queries=300).scores == 2 * predict(config, source=1030, queries=256).scores


@pytest.mark.parametrize(
    "change", [{"kv_heads": 4}, {"qkv_bias": True}, {"norm": LayerNorm()}, {"head_dim": 10}, {"num_layers": 1}], ids=str
)
def test_a_wrong_formula_is_found(change):
    wrong = dataclasses.replace(GROUPED, windows=(), **change)
    told = [(kind, predict(wrong, source=24)) for kind, predict in KINDS.values()]
    assert any(stepped(GROUPED, kind, within="cross_attention") != made for kind, made in told)


def test_keys_and_values_of_a_source_are_projected_once():
    """What the compiler keeps of the one call in which the layers are asked for them."""
    config = CONFIGS["norms before, biases"]
    compiled = caching._keep.lower(model_of(config), source_of(config, 2, 64), kind=caches.cross(), share=1).compile()
    assert costs.projecting_flops(config, source=64, rows=2).contractions == 4 * 40 * 40 * 3 * 64 * 2
    dots = re.findall(r"f32\[(\d+),(\d+)\]\S* (?:dot|custom-call)\(", compiled.as_text())
    assert dots == [("128", "80")] * 3, "rows and positions by keys and values, for each layer and nothing else"


@each
def test_predicted_bytes_of_a_source_are_those_of_the_arrays(name):
    config = CONFIGS[name]
    for store, size in ((None, 4), (jnp.bfloat16, 2)):
        for batch, rows, slots in ((6, 2, 33),):
            shape, dtype = {"source": slots, "rows": rows}, store or jnp.float32
            kv = 2 * config.num_layers * config.kv_heads * 8 * slots * rows * size
            states = config.encoder.width * slots * rows * size
            assert costs.cross_nbytes(config, store=dtype, **shape) == kv + 8 * rows
            assert costs.encoder_output_nbytes(config, store=dtype, **shape) == states + 8 * rows
            assert costs.cross_ratio(config) == kv / states
            for cross, wanted in (
                (caches.cross(store=store), kv),
                (caches.encoder_output(store=store), states),
                (caches.encoder_output(absorb=True, store=store), states),
            ):
                model, cache = cache_of(config, None, cross, batch=batch, capacity=40, rows=rows, slots=slots)
                assert nbytes(cache.shared["source"]) == wanted + 8 * rows, "however many rows share it"
                own = costs.dense_nbytes(config, batch=batch, capacity=40)
                told = kvjax.cache_nbytes(
                    model, batch=batch, capacity=40, source=source_of(config, rows, slots), cross=cross
                )
                assert nbytes(cache) == told == own + wanted + 8 * rows


CODES = {
    "int8": (codecs.int8(), costs.Stored(8, scales=4), None),
    "fp8, bfloat16 scale": (codecs.fp8(scale=jnp.bfloat16), costs.Stored(8, scales=2), None),
    "int4": (codecs.int4(), costs.Stored(4, scales=4), None),
    "int4 per channel": (
        codecs.int4_channels(8, residual=12, slack=3),
        costs.Stored(4, channel=8, group=8, residual=12, slack=3),
        costs.Stored(4, scales=4, group=8, residual=12, slack=3),
    ),
}


@pytest.mark.parametrize("name", CODES)
def test_predicted_bytes_of_coded_sources_are_those_of_the_arrays(name):
    codec, keys, values = CODES[name]
    for rows, slots in ((1, 33), (2, 10)):
        shape = {"source": slots, "rows": rows}
        _, cache = cache_of(GROUPED, None, caches.cross(store=codec), batch=2, capacity=40, rows=rows, slots=slots)
        assert nbytes(cache.shared["source"]) == costs.cross_nbytes(GROUPED, store=keys, values=values, **shape)
        if values is None:
            kind = caches.encoder_output(absorb=True, store=codec)
            _, cache = cache_of(GROUPED, None, kind, batch=2, capacity=40, rows=rows, slots=slots)
            assert nbytes(cache.shared["source"]) == costs.encoder_output_nbytes(GROUPED, store=keys, **shape)


def test_predicted_bytes_of_outputs_of_sub_layers_are_those_of_the_arrays():
    shape, row = {"batch": 2, "capacity": 40}, 32 * 4 * 2 * 40
    sources = costs.cross_nbytes(GROUPED, source=24, rows=2)
    container = costs.container_nbytes(**shape)
    sub_layers = caches.traced(caches.output(), ("after_self_attention", "after_cross_attention"))
    for plan, predicted, streams in (
        (sub_layers, costs.trace_nbytes(GROUPED, sites=3, **shape) + container, 3 * 2 + 1),
        (caches.hybrid(), costs.hybrid_nbytes(GROUPED, **shape), 3 * 2 + 1 + 2),  # K/V: half a width each, 2 layers
        (caches.layer_input(), costs.layer_input_nbytes(GROUPED, **shape), 2),
        (caches.output(), costs.output_nbytes(GROUPED, **shape), 3),
    ):
        _, cache = cache_of(GROUPED, plan, None, rows=2, slots=24, **shape)
        assert nbytes(cache) == predicted + sources == streams * row + container + sources


def test_sources_are_padded_to_buckets_and_to_no_more_than_the_encoder_has():
    short = dataclasses.replace(GROUPED, encoder=dataclasses.replace(GROUPED.encoder, max_positions=50))
    for config, tokens, slots in ((GROUPED, 1, 16), (GROUPED, 33, 64), (short, 33, 50), (short, 20, 32)):
        ids = np.ones((2, tokens), np.int32)  # at hand, so that it is padded
        source = jax.eval_shape(lambda model, ids=ids: kvjax.encode(model, ids), model_of(config))
        assert source.states.shape[1] == costs.source_slots(config, tokens) == slots


@pytest.mark.parametrize(("store", "size"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_the_textbook_integers_are_those_of_arrays(store, size):
    """d 512, 6 layers, batch 4, 100 + 100 positions, nothing padded."""
    config, lines = costs.TEXTBOOK, {line.kept: getattr(line, store.__name__) for line in costs.textbook()}
    beside = costs.container_nbytes(4, 100) + costs.source_nbytes(4)

    def made(plan, cross=None, slots=100):
        begin = lambda source: kvjax.init_cache(  # noqa: E731
            model_of(config, store), plan, batch=4, capacity=slots, source=source, cross=cross
        )
        return jax.eval_shape(begin, source_of(config, 4, slots, store))

    kv = nbytes(made(caches.dense())) - beside
    assert kv == lines["K/V of text and source"] == 4_915_200 * size == {4: 19_660_800, 2: 9_830_400}[size]
    outputs = nbytes([node.sites for node in made(caches.traced(sites=("after_ffn",))).layers])
    assert outputs == lines["outputs of the layers"] == 1_228_800 * size == {4: 4_915_200, 2: 2_457_600}[size]
    assert kv == 4 * outputs, "4 : 1"
    sites = ("after_self_attention", "after_cross_attention", "after_ffn")
    sub = nbytes([node.sites for node in made(caches.traced(sites=sites)).layers])
    assert sub == lines["outputs of all sub-layers"] == 3 * 6 * 4 * 100 * 512 * size
    assert kv + sub == lines["K/V and all sub-layers"] == 7 * outputs
    states = nbytes(made(caches.dense(), caches.encoder_output())) - beside
    assert states == lines["text K/V, encoder output"] == kv // 2 + 4 * 100 * 512 * size
    padded = nbytes(made(caches.dense(), slots=128)) - costs.container_nbytes(4, 128) - costs.source_nbytes(4)
    assert padded == lines["K/V, padded to 128"] == {4: 24 * 2**20, 2: 12 * 2**20}[size]
    assert lines["both of these"] == kv + outputs


def test_what_circulates_fits_no_element():
    said = [line for line in costs.textbook() if line.said is not None]
    assert [line.said for line in said] == [24, 12, 36]
    for line in said:
        nearest = min((1, 2, 4, 8), key=lambda size: abs(line.element - size))
        assert abs(line.element - nearest) > 0.8
    assert said[0].element == 24e6 / 4_915_200


def test_a_model_without_an_encoder_has_no_source():
    for f in (costs.encoder_flops, costs.cross_flops, costs.projecting_flops, costs.encoder_output_nbytes):
        with pytest.raises(InputError, match="no encoder"):
            f(FULL, source=8)
