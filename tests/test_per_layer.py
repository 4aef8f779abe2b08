"""Local and global layers, as in Gemma: each gets the cache that it needs, and nothing of it shows in the result."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from models import CAPACITY, GEMMA, POST, WINDOW, prompt_ids, tiny

import kvjax
from kvjax import caches
from kvjax.caches import plans
from kvjax.config import Config
from kvjax.errors import InputError
from kvjax.ops.positions import Learned, Rope

BATCH, LENGTH, CHUNK = 2, 64, 32
"""A chunk longer than the rings of the default plan, which hold a window of 6 and a slack of 16; then single tokens."""
TOLERANCE = 2e-5
"""Of the largest logit: one float32 program against another."""


def layer_bytes(config, plan, capacity):
    """Bytes of each layer's arrays, nothing allocated."""
    model = jax.eval_shape(lambda: kvjax.decoder(config, kvjax.init_params(config, jax.random.key(0))))
    cache = jax.eval_shape(lambda: kvjax.init_cache(model, plan, batch=BATCH, capacity=capacity))
    return [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layer)) for layer in cache.layers]


def test_memory_of_local_layers_is_bounded_by_the_window():
    slots = WINDOW + plans.SLACK
    per_slot = 2 * GEMMA.kv_heads * GEMMA.head_dim * 4 * BATCH
    for capacity in (64, 640, 6400):
        local, full, last = layer_bytes(GEMMA, caches.default(GEMMA), capacity)
        assert local == last == slots * per_slot
        assert full == capacity * per_slot
    assert layer_bytes(GEMMA, caches.dense(), 640)[0] == 640 * per_slot  # what the plan saves


def cached(model, plan=None):
    """Logits `[B, LENGTH - CHUNK + 1, V]` of fed texts, from the chunk's last token on."""
    ids = prompt_ids(3, BATCH, LENGTH)
    cache = kvjax.init_cache(model, plan, batch=BATCH, capacity=CAPACITY)
    logits, cache = kvjax.prefill(model, cache, ids[:, :CHUNK])
    found = [logits]
    for at in range(CHUNK, LENGTH):
        logits, cache = kvjax.step(model, cache, ids[:, at])
        found.append(logits)
    cache.check()
    return np.stack(found, axis=1)


def worst(found, model):
    """The largest difference from recomputing, of the largest logit at that position."""
    want = np.asarray(kvjax.forward(model, prompt_ids(3, BATCH, LENGTH)))[:, CHUNK - 1 :]
    return (np.abs(found - want).max(-1) / np.abs(want).max(-1)).max()


def test_cached_logits_equal_recomputed_ones_beyond_the_window():
    found = cached(tiny(GEMMA))
    assert worst(found, tiny(GEMMA)) < TOLERANCE
    narrower = dataclasses.replace(GEMMA, windows=(WINDOW - 1, None, WINDOW))
    assert worst(found, kvjax.decoder(narrower, tiny(GEMMA).params)) > 1000 * TOLERANCE


def test_cached_logits_of_a_post_norm_model_equal_recomputed_ones():
    found = cached(tiny(POST), (caches.layer_input(absorb=True), caches.dense()))
    assert worst(found, tiny(POST)) < TOLERANCE
    assert worst(np.roll(found, 1, axis=1), tiny(POST)) > 1000 * TOLERANCE


def test_the_tables_of_each_rotation_are_made_once_a_call(monkeypatch):
    made, tables = [], Rope.tables
    monkeypatch.setattr(Rope, "tables", lambda self, *rest: made.append(self) or tables(self, *rest))
    model = jax.eval_shape(lambda: tiny(GEMMA))
    jax.eval_shape(kvjax.forward, model, jax.ShapeDtypeStruct((1, 7), np.int32))
    assert sorted(made, key=str) == sorted(set(GEMMA.layer_positions), key=str)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_positions": (Rope(),)}, "1 entries for 3 layers"),
        ({"positions": Learned(8)}, "positions is Learned"),
        ({"attention_softcap": 0.0}, "attention_softcap"),
        ({"logit_softcap": -1.0}, "logit_softcap"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(GEMMA, **changes)


def test_layers_turn_alike_unless_they_are_told_otherwise():
    config = Config(8, 2, 8, query_heads=1, kv_heads=1, head_dim=8, ffn_width=8, positions=Rope(500.0))
    assert config.turns == (Rope(500.0),) * 2
    assert dataclasses.replace(config, positions=Rope(7.0)).turns == (Rope(7.0),) * 2
