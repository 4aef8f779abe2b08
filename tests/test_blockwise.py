"""Promise: a long prefill goes blockwise, so that temporary memory grows with the prompt, not with its square."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import ONE_LAYER, ONE_LAYER_WINDOWED, tiny

import kvjax
from kvjax import caches
from kvjax.config import Config
from kvjax.loops import decode as loop
from kvjax.ops import attention, decoding

LONG = Config(32, 1, 16, query_heads=2, kv_heads=1, head_dim=8, ffn_width=16)


def temporaries(length, plan):
    """Bytes that a prefill of `length` tokens needs besides its arguments and results."""
    model = jax.eval_shape(lambda: kvjax.decoder(LONG, kvjax.init_params(LONG, jax.random.key(0))))
    cache = jax.eval_shape(lambda m: kvjax.init_cache(m, plan, batch=1, capacity=length), model)
    tokens, valid = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    # a new function each time: jit would remember what it traced before a constant was patched
    run = jax.jit(lambda *x: loop._prefill(*x), donate_argnums=1)
    return run.lower(model, cache, tokens, valid).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(caches.dense(), id="dense"),
        pytest.param(caches.ring(512, slack=16), id="ring"),
        pytest.param(caches.recompute(), id="recompute", marks=pytest.mark.full),
    ],
)
def test_temporary_memory_of_a_prefill_grows_with_its_length(plan):
    two, eight = (temporaries(n, plan) for n in (2048, 8192))
    print(f"{two:,} {eight:,} bytes")
    assert eight / two < 5  # 16 if it grew with the square


def test_unblocked_it_would_grow_with_the_square(monkeypatch):
    monkeypatch.setattr(attention, "BLOCKWISE_ABOVE", 1 << 30)
    monkeypatch.setattr(decoding, "MANY_SLOTS", 1 << 30)
    two, eight = (temporaries(n, caches.dense()) for n in (2048, 8192))
    assert eight / two > 10


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        pytest.param(ONE_LAYER, caches.dense(), id="dense"),
        pytest.param(ONE_LAYER_WINDOWED, caches.ring(6, slack=2), id="ring"),
        pytest.param(ONE_LAYER_WINDOWED, caches.dense(), id="dense-windowed", marks=pytest.mark.full),
        pytest.param(ONE_LAYER, caches.ring(9, sinks=3), id="sinks", marks=pytest.mark.full),
        pytest.param(ONE_LAYER, caches.recompute(), id="recompute", marks=pytest.mark.full),
    ],
)
def test_blockwise_values_equal_unblocked_ones(monkeypatch, config, plan):
    monkeypatch.setattr(attention, "BLOCK", 32)
    model, s = tiny(config), 75  # two blocks and a part of one
    tokens = np.random.default_rng(0).integers(0, 96, (3, s)).astype(np.int32)
    valid = np.array([75, 40, 33], np.int32)  # ragged: a full row, one in the second block, one just past the first
    found = {}
    monkeypatch.setattr(decoding, "MANY", 16)
    for above, slots in ((1, 50), (1 << 30, 1 << 30)):
        monkeypatch.setattr(attention, "BLOCKWISE_ABOVE", above)
        monkeypatch.setattr(decoding, "MANY_SLOTS", slots)  # 160 slots are four blocks
        run = jax.jit(lambda *x: loop._prefill(*x))
        blocks = str(jax.make_jaxpr(run)(model, empty(model, plan), tokens, valid)).count("scan[")
        assert (blocks > 0) == (above == 1)
        logits, cache = run(model, empty(model, plan), tokens, valid)
        more, cache = run(model, cache, tokens[:, ::-1], np.array([40, 75, 1], np.int32))
        found[above] = np.stack([logits, more])
        assert not np.asarray(cache.flags).any()
    np.testing.assert_allclose(found[1], found[1 << 30], rtol=1e-4, atol=1e-4 * np.abs(found[1]).max())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="slots go in blocks on a CPU")
def test_a_block_of_slots_that_nobody_sees_is_left_out(monkeypatch):
    """And a row does not depend, to the bit, on whether its neighbour sees it."""
    for name, value in (("MANY", 16), ("MANY_SLOTS", 50)):
        monkeypatch.setattr(decoding, name, value)
    monkeypatch.setattr(attention, "BLOCK", 32)
    monkeypatch.setattr(attention, "BLOCKWISE_ABOVE", 1)
    model, reached, told = tiny(ONE_LAYER), attention._reached, []
    tokens = np.random.default_rng(0).integers(0, 96, (3, 75)).astype(np.int32)

    def first_row(rule, behind):
        monkeypatch.setattr(attention, "_reached", rule)
        run = jax.jit(lambda *x: loop._prefill(*x))
        _, cache = run(model, empty(model, caches.dense()), tokens, np.array([0, behind, 0], np.int32))
        return np.asarray(run(model, cache, tokens, np.array([75, 75, 75], np.int32))[0][0])

    def telling(*given):
        jax.debug.callback(told.append, reached(*given))
        return reached(*given)

    alone = first_row(telling, behind=0)
    jax.effects_barrier()
    assert 0 < sum(map(bool, told)) < len(told)
    np.testing.assert_array_equal(alone, first_row(reached, behind=75))
    np.testing.assert_array_equal(alone, first_row(lambda *_: jnp.array(True), behind=0))
    assert (alone != first_row(lambda *_: jnp.array(False), behind=0)).any(), "what is seen may not be left out"


def empty(model, plan):
    return kvjax.init_cache(model, plan, batch=3, capacity=160)
