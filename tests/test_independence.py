"""Promise: a seed samples the same alone and in any row. `test_suite` has the independence of every kind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kinds
import numpy as np
from models import PROMPTS, SAMPLER, STEPS, VOCAB, filled, prompt_ids

import kvjax


def test_a_seed_samples_the_same_alone_and_in_any_row():
    case = kinds.cases()[0]
    model, ids = case.model, prompt_ids()
    logits, cache = filled(model, case.plan)
    want, _, _ = kvjax.decode(model, cache, logits, steps=STEPS, sampler=SAMPLER, seed=[4, 5, 6])
    order = jnp.array([2, 0, 1])
    got, _, _ = kvjax.decode(model, cache.take(order), logits[order], steps=STEPS, sampler=SAMPLER, seed=[6, 4, 5])
    np.testing.assert_array_equal(got, want[order])
    for row, seed in enumerate([4, 5, 6]):
        alone = kvjax.init_cache(model, case.plan, batch=1, capacity=96)
        first, alone = kvjax.prefill(model, alone, ids[row : row + 1], PROMPTS[row : row + 1])
        got, _, _ = kvjax.decode(model, alone, first, steps=STEPS, sampler=SAMPLER, seed=seed)
        np.testing.assert_array_equal(got[0], want[row])
    assert len({tuple(row) for row in want.tolist()}) == 3
    assert int(jnp.max(want)) < VOCAB and jax.device_get(want).min() >= 0
