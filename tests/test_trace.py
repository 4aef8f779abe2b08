"""Promise: a trace holds what a plain forward pass computes there, for the prompt and for what is generated alike."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CAPACITY, MIXED, WINDOW, WINDOWED, filled, prompt_ids, tiny
from naive import gap, run

import kvjax
from kvjax import CacheError, InputError, caches, codecs, struct
from kvjax.caches.base import Kind
from kvjax.caches.trace import Traced
from kvjax.transformer import decoder_head, final_norm

VALID = np.array([16, 9, 3])
EXACT = 1e-5
"""Of the largest, in float32; sums are taken in another order."""

PLANS = {
    "hybrid": (MIXED, caches.hybrid()),
    "ring": (MIXED, (caches.traced(caches.ring(WINDOW, slack=3)), caches.traced(caches.dense()))),
    "recompute": (MIXED, caches.traced(caches.recompute())),
    "layer input": (MIXED, caches.traced(caches.layer_input())),
    "output": (MIXED, caches.output()),
    "per layer": (MIXED, caches.traced(caches.per_layer(local=caches.ring(WINDOW), full=caches.dense()))),
}


def generated(model, plan, steps=8):
    """A cache with ragged prompts and what was decoded after them."""
    logits, cache = filled(model, plan, valid=VALID)
    tokens, logits, cache = kvjax.decode(model, cache, logits, steps=steps)
    return cache.check()


def worst(cache, model):
    """The largest difference between the traces and the streams of plain forward passes, of all sites and rows."""
    found = []
    for row, length in enumerate(np.asarray(cache.lengths)):
        _, sites = run(model, np.asarray(cache.tokens)[row, :length])
        for (layer, site), want in sites.items():
            if cache.recorded(layer, site) is not None:
                got = np.asarray(cache.trace(layer, site)[row])
                assert not got[length:].any(), "past the length"
                found.append(gap(got[:length], want))
    return len(found), max(found)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in ("hybrid", "ring") else pytest.mark.full) for x in PLANS]
)
def test_a_trace_equals_what_a_plain_forward_pass_computes_there(name):
    config, plan = PLANS[name]
    model = tiny(config)
    count, error = worst(generated(model, plan), model)
    assert count == 3 * (3 if name == "output" else 5)
    assert error <= EXACT


@pytest.mark.full
def test_a_trace_beside_codes_is_of_the_pass_that_gave_the_logits():
    model = tiny(MIXED)
    logits, cache = filled(model, caches.traced(caches.dense(store=codecs.int8())), valid=VALID)
    tokens, last, cache = kvjax.decode(model, cache, logits, steps=8)
    out = final_norm(model.params, MIXED, cache.trace(1, "after_ffn"))
    every = np.asarray(decoder_head(model.params, MIXED, out))
    for row, n in enumerate(VALID):
        assert gap(every[row, n - 1], logits[row]) <= EXACT and gap(every[row, n + 7], last[row]) <= EXACT
        np.testing.assert_array_equal(every[row, n - 1 : n + 7].argmax(axis=1), tokens[row])


@pytest.mark.full
def test_in_float64_traces_layer_inputs_sinks_and_resumed_runs_are_right_to_twelve_digits():
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "error", str(here / "streams_in_float64.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("e-1") >= 6


@struct.node
class Late(Traced):
    """Broken: notes each token one slot late."""

    def record(self, site, x, span):
        return super().record(site, x, span.replace(start=span.start + 1))


@dataclasses.dataclass(frozen=True)
class LateKind(Kind):
    def init(self, shape, batch, capacity):
        made = caches.hybrid().init(shape, batch, capacity)
        return Late(made.inner, made.sites, capacity)


def test_a_trace_that_is_a_slot_late_is_found():
    model = tiny(MIXED)
    assert worst(generated(model, LateKind()), model)[1] > 0.1


def sites_of(cache):
    return {(i, s): np.asarray(cache.trace(i, s)) for i in range(2) for s in cache.layers[i].sites}


def test_what_the_trace_holds_moves_with_every_operation():
    model = tiny(MIXED)
    cache = generated(model, caches.hybrid())
    before = sites_of(cache)
    assert set(before) == {(0, "embedding"), *((i, s) for i in (0, 1) for s in ("after_self_attention", "after_ffn"))}
    moved = {
        "take": (cache.take([2, 0, 2, 1]), [2, 0, 2, 1]),
        "reorder": (cache.reorder([1, 2, 0]), [1, 2, 0]),
        "grown": (cache.resize(CAPACITY + 16), [0, 1, 2]),
        "join": (cache.take([1]).join(cache.take([2, 0])), [1, 2, 0]),
        "insert": (cache.insert([1], cache.take([2])), [0, 2, 2]),
    }
    for how, (after, rows) in moved.items():
        for key, x in sites_of(after).items():
            assert x[:, :CAPACITY].tobytes() == before[key][rows].tobytes(), how
            assert not x[:, CAPACITY:].any()
    back = cache.rewind(cache.lengths - 5)
    for (layer, site), x in sites_of(back).items():
        for row, length in enumerate(np.asarray(back.lengths)):
            assert x[row, :length].tobytes() == before[layer, site][row, :length].tobytes()
            assert not x[row, length:].any()
    # fed on, the rest is the new text's
    _, on = kvjax.prefill(model, back, prompt_ids(9, 3, 4))
    assert worst(on, model)[1] <= EXACT


def test_an_accepted_path_of_a_tree_moves_in_the_trace_too():
    model = tiny(MIXED)
    _, cache = filled(model, caches.hybrid(), valid=VALID)
    _, fed = kvjax.prefill(model, cache, prompt_ids(2, 3, 4))
    kept = fed.keep(cache.lengths, np.array([[1, 3]] * 3), np.array([2, 1, 0]))
    for key, x in sites_of(kept).items():
        old = np.asarray(fed.trace(*key))
        for row, (n, count) in enumerate(zip(VALID, (2, 1, 0), strict=True)):
            assert x[row, : n + count].tobytes() == old[row][[*range(n), n + 1, n + 3][: n + count]].tobytes()


def test_the_trace_does_not_shorten_what_the_kind_inside_can_do():
    model = tiny(WINDOWED)
    ring = kvjax.init_cache(model, caches.traced(caches.ring(WINDOW, slack=3)), capacity=8)
    assert ring.max_rewind == 3 and not ring.replays
    assert kvjax.init_cache(model, caches.traced(caches.recompute()), capacity=8).replays


def test_bytes_are_those_of_the_streams():
    model, shape = tiny(MIXED), {"batch": 2, "capacity": 40}
    nbytes = lambda plan: kvjax.cache_nbytes(model, plan, **shape)  # noqa: E731
    stream, bare = 32 * 40 * 2 * 4, nbytes(caches.recompute())
    assert nbytes(caches.output()) == 3 * stream + bare, "(L + 1) · M · T · B · bytes"
    assert nbytes(caches.hybrid()) == nbytes(caches.dense()) + 5 * stream
    assert nbytes(caches.traced(caches.dense(), ("after_ffn",), store=jnp.bfloat16)) == nbytes(caches.dense()) + stream


def test_a_trace_in_half_precision_is_rounded_once():
    model = tiny(MIXED)
    fine, coarse = (generated(model, caches.hybrid(store=store)) for store in (None, jnp.bfloat16))
    for layer, site in sites_of(fine):
        want = jnp.asarray(fine.trace(layer, site)).astype(jnp.bfloat16)
        assert (np.asarray(coarse.trace(layer, site)) == np.asarray(want)).all()


def test_sites_that_are_not_there_are_clear_errors():
    model = tiny(MIXED)
    with pytest.raises(InputError, match="no layer has a site 'after_cross_attention'.*'after_ffn'"):
        kvjax.init_cache(model, caches.traced(sites=("after_cross_attention",)), capacity=8)
    for wrong in ((), "after_ffn", (1,)):
        with pytest.raises(InputError, match="sites must be a tuple of names"):
            caches.traced(sites=wrong)
    cache = kvjax.init_cache(model, caches.traced(sites=("embedding",)), capacity=8)
    assert cache.trace(0, "embedding").shape == (1, 8, 32)
    for layer, site in ((1, "embedding"), (0, "after_ffn"), (5, "after_ffn"), (-1, "after_ffn")):
        with pytest.raises(CacheError, match=rf"layer {layer} of 2 keeps no '{site}'.*caches.traced"):
            cache.trace(layer, site)
    with pytest.raises(CacheError, match=r"keeps no 'input'.*caches.layer_input\(\)"):
        cache.trace(0, "input")


# --- a model of one's own may show any sites


def mine(params, config, cache, tokens, valid):
    x = jnp.take(params["embed"], tokens, axis=0, mode="clip")
    cache = cache.record(0, "embedding", x)
    for layer in range(2):
        h, w = x, params["w"][layer]
        kv = lambda h, w=w: tuple((h @ w[n])[:, :, None] for n in (1, 2))  # noqa: E731
        out, cache = kvjax.attend(cache, layer, q=(h @ w[0])[:, :, None], kv=kv, h=h)
        x = x + out[:, :, 0]
        cache = cache.record(layer, "after_self_attention", x)
        if layer == 1:
            x = x + jnp.tanh(x)
            cache = cache.record(layer, "after_cross_attention", x)
        x = jnp.tanh(x)
        cache = cache.record(layer, "after_ffn", x)
    return x @ params["embed"].T, cache


def other(params, config, cache, tokens, valid):
    """Attends to something that it never showed."""
    x = jnp.take(params["embed"], tokens, axis=0, mode="clip")
    cache = cache.record(0, "embedding", x)
    h = 2 * x
    out, cache = kvjax.attend(cache, 0, q=h[:, :, None], kv=lambda h: (h[:, :, None], h[:, :, None]), h=h)
    return out[:, :, 0] @ params["embed"].T, cache.record(0, "after_ffn", out[:, :, 0])


def own(apply):
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    return kvjax.Model({"embed": draw(0, 20, 8), "w": draw(1, 2, 3, 8, 8)}, None, apply)


def test_a_model_of_ones_own_shows_the_sites_that_it_names():
    model = own(mine)
    first, second = model.layer_shapes()
    assert first.sites == ("embedding", "after_self_attention", "after_ffn") and first.stream == 8
    assert second.sites == ("after_self_attention", "after_cross_attention", "after_ffn") and second.chained
    plan = caches.traced(sites=("after_cross_attention", "after_ffn"))
    cache = kvjax.init_cache(model, plan, capacity=16)
    _, cache = kvjax.prefill(model, cache, [[3, 1, 4, 1, 5]])
    after = jnp.tanh(cache.trace(1, "after_cross_attention"))
    np.testing.assert_allclose(cache.trace(1, "after_ffn"), after, rtol=1e-6)
    with pytest.raises(CacheError, match="layer 0 of 2 keeps no 'after_cross_attention'"):
        cache.trace(0, "after_cross_attention")
    want, _ = kvjax.prefill(model, kvjax.init_cache(model, caches.dense(), capacity=16), [[3, 1, 4, 1, 5]])
    got, outputs = kvjax.prefill(model, kvjax.init_cache(model, caches.output(), capacity=16), [[3, 1, 4, 1, 5]])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs.trace(0, "after_ffn"), cache.trace(0, "after_ffn"), rtol=1e-5, atol=1e-5)


def test_an_output_cache_needs_layers_that_are_given_what_was_shown():
    model = own(other)
    with pytest.raises(InputError, match="layer 0 must be given, as h, what was last recorded"):
        kvjax.init_cache(model, caches.output(), capacity=8)
    inputs = kvjax.init_cache(model, caches.layer_input(), capacity=8)  # keeps what it is given
    _, inputs = kvjax.prefill(model, inputs, [[1, 2]])
    assert inputs.recorded(0, "embedding") is None and inputs.trace(0, "input").any()
