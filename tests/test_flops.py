"""Promise: the FLOPs that `kvjax.costs` predicts are those of the program, component by component."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from models import FULL, tiny

import kvjax
from kvjax import caches, costs
from kvjax.config import Config, NormOrder
from kvjax.errors import InputError
from kvjax.loops.decode import VALUE
from kvjax.ops.norms import LayerNorm, OffsetRMSNorm, RMSNorm
from kvjax.ops.positions import Learned

GROUPED = FULL
PLAIN = Config(
    96, 3, 40, query_heads=5, kv_heads=5, head_dim=8, ffn_width=160, norm=LayerNorm(), gated=False, qkv_bias=True,
    positions=Learned(2048), max_positions=2048, out_bias=True, ffn_bias=True,
)  # fmt: skip
NORMED = dataclasses.replace(FULL, qk_norm=RMSNorm())


def bundled():
    return kvjax.load("shakespeare").model


SANDWICH = dataclasses.replace(
    FULL, norm_order=NormOrder.SANDWICH, norm=OffsetRMSNorm(), attention_softcap=20.0, logit_softcap=30.0
)
POST = dataclasses.replace(PLAIN, norm_order=NormOrder.POST)

MODELS = {
    "bundled": bundled,
    "grouped": lambda: tiny(GROUPED),
    "plain": lambda: tiny(PLAIN),
    "norms of heads": lambda: tiny(NORMED),
    "norms on both sides": lambda: tiny(SANDWICH),
    "norms after": lambda: tiny(POST),
}
each = pytest.mark.parametrize("name", MODELS)


def counted(model, plan, batch, capacity, queries=1):
    """FLOPs in one call that feeds `queries` tokens a row; traced, not run."""
    abstract = lambda tree: jax.eval_shape(lambda: tree)  # noqa: E731
    cache = jax.eval_shape(lambda: kvjax.init_cache(model, plan, batch=batch, capacity=capacity))
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if queries == 1:
        return costs.count_flops(VALUE.step, abstract(model), cache, rows)
    tokens = jax.ShapeDtypeStruct((batch, queries), jnp.int32)
    return costs.count_flops(VALUE.prefill, abstract(model), cache, tokens, rows)


@pytest.mark.corner
@each
def test_a_step_over_keys_and_values_does_what_is_predicted(name):
    model = MODELS[name]()
    for batch, slots in ((1, 40), (3, 96)):
        assert counted(model, caches.dense(), batch, slots) == costs.kv_flops(model.config, batch=batch, slots=slots)


@each
def test_a_prefill_and_a_step_without_a_cache_do_what_is_predicted(name):
    model = MODELS[name]()
    predicted = costs.kv_flops(model.config, batch=2, slots=64, queries=16)
    assert counted(model, caches.dense(), 2, 64, 16) == predicted
    assert counted(model, caches.recompute(), 2, 64) == costs.recompute_flops(model.config, batch=2, slots=64)


@each
def test_a_step_over_kept_streams_does_what_is_predicted(name):
    model = MODELS[name]()
    for batch, slots in ((1, 40), (3, 96)):
        again = costs.reprojected_flops(model.config, batch=batch, slots=slots)
        assert counted(model, caches.layer_input(), batch, slots) == again
        assert counted(model, caches.output(), batch, slots) == again
        kept = costs.kv_flops(model.config, batch=batch, slots=slots)
        assert counted(model, caches.hybrid(), batch, slots) == kept != again


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        POST,
        dataclasses.replace(PLAIN, qkv_bias=False, norm=RMSNorm()),
        dataclasses.replace(FULL, positions=Learned(128), qkv_bias=True),
        dataclasses.replace(FULL, positions=Learned(128)),
    ],
    ids=["layer norm", "norms after", "full heads", "grouped, biases", "grouped"],
)
def test_an_absorbed_step_does_what_is_predicted(config):
    for batch, slots in ((1, 40), (3, 96)):
        made = counted(tiny(config), caches.layer_input(absorb=True), batch, slots)
        assert made == costs.absorbed_flops(config, batch=batch, slots=slots)
        assert made != costs.reprojected_flops(config, batch=batch, slots=slots)


def test_attention_in_blocks_rounds_its_queries_up():
    model = tiny(PLAIN)
    for slots in (1025, 1280):
        assert counted(model, caches.recompute(), 1, slots) == costs.recompute_flops(PLAIN, slots=slots)
    assert costs.recompute_flops(PLAIN, slots=1025).scores > 3 * 4 * 1025**2 * 40, "five blocks of 256"


@pytest.mark.parametrize(
    "wrong",
    [
        dataclasses.replace(FULL, kv_heads=4),  # as many kv heads as query heads
        dataclasses.replace(FULL, gated=False),  # two maps in the feed-forward
        dataclasses.replace(FULL, norm=LayerNorm()),
        dataclasses.replace(FULL, vocab_size=95),
    ],
    ids=["heads", "gate", "norm", "vocabulary"],
)
def test_a_wrong_formula_is_found(wrong):
    assert counted(tiny(FULL), caches.dense(), 1, 40) != costs.kv_flops(wrong, slots=40)


def test_slots_that_hold_nothing_are_paid_for():
    few, many = (counted(tiny(FULL), caches.dense(), 1, slots) for slots in (40, 80))
    assert many.scores == 2 * few.scores
    assert dataclasses.replace(many, scores=0) == dataclasses.replace(few, scores=0)


def square(x):
    return jnp.matmul(x, x)


X = jax.ShapeDtypeStruct((4, 4), jnp.float32)
ONCE = 2 * 4**3


def scanned(x):
    return jax.lax.scan(lambda c, _: (square(c), None), x, None, length=5)[0]


def branched(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: square(square(x)), square, x)


def looped(x):
    return jax.lax.while_loop(lambda c: c[0, 0] > 0, square, x)


@pytest.mark.parametrize(
    ("program", "times"),
    [
        (square, 1),
        (jax.jit(square), 1),
        (scanned, 5),
        (branched, 2),
        (jax.checkpoint(square), 1),
        (jax.vmap(square), 3),
        (jax.jit(lambda x: scanned(jax.nn.silu(x))), 5),
    ],
    ids=["plain", "jit", "scan", "cond", "checkpoint", "vmap", "nested"],
)
def test_programs_are_walked_into(program, times):
    x = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32) if times == 3 else X
    assert costs.count_flops(program, x) == costs.Flops(other=times * ONCE)


def test_a_while_loop_runs_as_often_as_one_says():
    assert costs.count_flops(looped, X, trips=7) == costs.Flops(other=7 * ONCE)
    with pytest.raises(InputError, match="while loop"):
        costs.count_flops(looped, X)


def test_what_cannot_be_looked_into_is_refused():
    def outside(x):
        return jax.pure_callback(lambda x: x, x, x)

    with pytest.raises(InputError, match="pure_callback"):
        costs.count_flops(outside, X)


def test_the_innermost_scope_counts_also_through_jit_and_vmap():
    @jax.jit
    def inner(x):
        with jax.named_scope("scores"):
            return square(x)

    def outer(x):
        with jax.named_scope("layer_0"), jax.named_scope("ffn"):
            return square(inner(x))

    assert costs.count_flops(outer, X) == costs.Flops(scores=ONCE, ffn=ONCE)
    many = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    assert costs.count_flops(jax.vmap(outer), many) == costs.Flops(scores=3 * ONCE, ffn=3 * ONCE)


def test_a_model_of_ones_own_has_its_scores_found():
    def apply(params, config, cache, tokens, valid):
        x = params[tokens]  # [B, S, 8]
        heads = x.reshape(*x.shape[:2], 2, 4)
        y, cache = kvjax.attend(cache, 0, q=heads, kv=(heads, heads))
        return y.reshape(x.shape) @ params.T, cache

    model = kvjax.Model(jnp.ones((10, 8)), None, apply)
    cache = kvjax.init_cache(model, caches.dense(), capacity=20)
    made = costs.count_flops(VALUE.step, model, cache, jnp.zeros((1,), jnp.int32))
    assert made == costs.Flops(scores=4 * 20 * 8, other=2 * 8 * 10)
