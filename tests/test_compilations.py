"""Promise: what changes from call to call compiles nothing, counted from JAX's own log; no weights in the program."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import ONE_LAYER, filled, prompt_ids, tiny

import kvjax
from kvjax import sampling
from kvjax.loops.decode import VALUE
from kvjax.stopping import stops_of
from kvjax.timing import Compilations


def chain(temperature, k, p):
    return sampling.chain(sampling.temperature(temperature), sampling.top_k(k), sampling.top_p(p))


@pytest.fixture
def log(caplog):
    """Programs that JAX's own log says it compiled."""
    jax.config.update("jax_log_compiles", True)
    with caplog.at_level(logging.WARNING, logger="jax"):
        yield lambda: sum(r.getMessage().startswith(("Finished XLA compilation", "Persistent")) for r in caplog.records)
    jax.config.update("jax_log_compiles", False)


@pytest.mark.corner
def test_the_counter_agrees_with_jax_s_log(log):
    x = jnp.arange(7.0)
    before = log()
    with Compilations() as none:
        jax.block_until_ready(x)
    with Compilations() as made:
        f = jax.jit(lambda x: jax.jit(lambda y: y * 2)(x) + 1)
        f(x), f(x + 1), f(jnp.arange(8.0))
    assert none.count == 0 and none.seconds == 0
    assert made.count == log() - before >= 2
    assert made.seconds > 0


def test_one_counter_inside_another_counts_for_both():
    with Compilations() as outer, Compilations() as inner:
        jax.jit(lambda x: x + 11)(jnp.zeros(3))
    with Compilations() as other:
        jax.jit(lambda x: x + 12)(jnp.zeros(3))
    assert outer.count == inner.count and other.count >= 1


@pytest.mark.corner
def test_eight_prompt_lengths_compile_the_buckets_they_cross():
    model = tiny(ONE_LAYER)
    cache = kvjax.init_cache(model, batch=2, capacity=144)
    with Compilations() as made:
        for n in (3, 9, 16, 17, 25, 32, 33, 64):  # buckets 16, 32, 64
            kvjax.prefill(model, cache, prompt_ids(1, 2, n), np.array([n, 1]))
    assert made.count <= 3


@pytest.mark.corner
def test_generate_compiles_nothing_for_other_prompts_numbers_seeds_stops_and_budgets():
    own = dataclasses.replace(ONE_LAYER, max_positions=510)  # whose programs no other file has made
    model, other, prompts = tiny(own), tiny(own, 1), prompt_ids(2, 3).tolist()

    def run(a, b, c, **options):
        ids = [prompts[0][:a], prompts[1][:b], prompts[2][:c]]
        return kvjax.generate(
            model, ids, **({"max_new_tokens": 5, "sampler": chain(0.8, 10, 0.9), "seed": 0} | options)
        )

    numbers = chain(0.8, 10, 0.9)
    with Compilations() as first:
        out = run(16, 3, 9, sampler=numbers)
    assert first.count == 2 == out.timings.programs, "a prefill and a loop"
    with Compilations() as made:
        run(1, 2, 15)
        run(16, 3, 9, sampler=chain(1.3, 4, 0.5))
        run(16, 3, 9, sampler=chain(0.0, 0, 1.0), seed=[7, 8, 2**32 - 1])
        run(16, 3, 9, stop_ids=(1, 2, 3), max_new_tokens=[0, 1, 40])
        run(16, 3, 9, stop_ids=tuple(range(8)), max_new_tokens=np.int64(17))
        list(kvjax.generate(other, prompts, sampler=chain(0.8, 10, 0.9), max_new_tokens=2).lengths)
    assert made.count == 0


@pytest.mark.corner
@kinds.mixed()
def test_a_second_step_and_a_second_decode_compile_nothing(case):
    model = case.model
    logits, cache = filled(model, case.plan)
    one, two = chain(0.8, 10, 0.9), chain(1.1, 3, 0.2)

    def loop(cache, logits, sampler, seed):
        logits, cache = kvjax.step(model, cache, sampling.largest(logits))
        logits, cache = kvjax.step(model, cache, np.array([1, 2, 3]))
        tokens, logits, cache = kvjax.decode(model, cache, logits, steps=3, sampler=sampler, seed=seed)
        state = kvjax.decode_until(model, cache, logits, max_new_tokens=seed, stop_ids=(seed,), chunk=4)
        return kvjax.step(model, state.cache, np.array([1, 2, 3]))

    logits, cache = loop(cache, logits, one, 0)
    with Compilations() as made:
        logits, cache = loop(cache, logits, two, 5)
    assert made.count == 0
    cache.check()


def arrays_inside(jaxpr):
    """Bytes of every constant of a closed jaxpr and of those nested in it."""
    for constant in jaxpr.consts:
        yield getattr(constant, "nbytes", 0)
    yield from _nested(jaxpr.jaxpr)


def asking(jaxpr):
    """Names of the primitives that call the host, of a jaxpr and of those nested in it."""
    for equation in jaxpr.eqns:
        if any(word in equation.primitive.name for word in ("callback", "infeed", "outfeed", "debug_print")):
            yield equation.primitive.name
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from asking(inner)


def _nested(jaxpr):
    for equation in jaxpr.eqns:
        for atom in equation.invars:
            if hasattr(atom, "val"):
                yield getattr(atom.val, "nbytes", 0)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            if hasattr(value, "jaxpr"):
                yield from arrays_inside(value)
            elif hasattr(value, "eqns"):
                yield from _nested(value)


def traced(model, cache):
    """The jaxprs of the four programs."""
    rows, logits = jnp.zeros((3,), jnp.int32), jnp.zeros((3, 96))
    seeds, sampler = jnp.zeros((3,), jnp.uint32), chain(0.8, 10, 0.9)
    from kvjax.loops.decode import Progress

    state = Progress(cache, logits, jnp.zeros((3,), bool), jnp.zeros((), jnp.int32))
    yield jax.make_jaxpr(VALUE.prefill)(model, cache, jnp.zeros((3, 16), jnp.int32), rows)
    yield jax.make_jaxpr(VALUE.step)(model, cache, rows)
    yield jax.make_jaxpr(lambda *x: VALUE.decode(*x, steps=3))(model, cache, logits, sampler, seeds)
    yield jax.make_jaxpr(lambda *x: VALUE.until(*x, chunk=3))(
        model, state, sampler, seeds, stops_of("test"), rows, rows, np.int32(1)
    )


@pytest.mark.corner
@kinds.first_of_each()
def test_no_program_has_a_constant_above_a_kibibyte(case):
    cache = kvjax.init_cache(case.model, case.plan, batch=3, capacity=96)
    for jaxpr in traced(case.model, cache):
        assert max(arrays_inside(jaxpr), default=0) <= 1024


@pytest.mark.corner
@kinds.first_of_each()
def test_no_program_of_any_kind_calls_the_host(case):
    cache = kvjax.init_cache(case.model, case.plan, batch=3, capacity=96)
    for jaxpr in traced(case.model, cache):
        assert list(asking(jaxpr.jaxpr)) == []


def test_a_program_that_calls_the_host_would_be_found():
    def closed(params, config, x):
        jax.debug.callback(lambda x: None, x[0, 0, 0])
        return jnp.zeros((*x.shape[:2], 96))

    broken = tiny(ONE_LAYER).replace(head=closed)
    for jaxpr in traced(broken, kvjax.init_cache(broken, batch=3, capacity=96)):
        assert "debug_callback" in set(asking(jaxpr.jaxpr))


def test_a_closure_over_weights_would_be_found():
    model = tiny(ONE_LAYER)
    table = model.params["embed"]["table"]

    def closed(params, config, x):
        return x @ table.T

    broken = model.replace(head=closed)
    cache = kvjax.init_cache(broken, batch=3, capacity=96)
    for jaxpr in traced(broken, cache):
        assert max(arrays_inside(jaxpr), default=0) >= table.nbytes
