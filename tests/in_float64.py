"""Run with JAX_ENABLE_X64=1 by test_float64.py: every kind against its reference, position by position, in float64."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import kinds
import numpy as np
from models import BATCH, CAPACITY, PROMPTS, prompt_ids, tiny

import kvjax

STEPS = 24
SPLITS = [(16,), (5, 11), (1,) * 16]


@jax.jit
def teach(model, cache, tokens):
    """Steps over given tokens `[steps, B]`; logits `[steps, B, V]`."""

    def one(cache, row):
        logits, cache = kvjax.step(model, cache, row)
        return cache, logits

    return jax.lax.scan(one, cache, tokens)[::-1]


def logits_of(model, plan, split):
    ids, lengths, at = prompt_ids(), PROMPTS, 0
    cache = kvjax.init_cache(model, plan, batch=BATCH, capacity=CAPACITY)
    last = None
    for size in split:
        valid = np.clip(lengths - at, 0, size)
        logits, cache = kvjax.prefill(model, cache, ids[:, at : at + size], valid)
        last, at = logits if last is None else jnp.where(valid[:, None] > 0, logits, last), at + size
    rest, cache = teach(model, cache, jnp.asarray(prompt_ids(9, STEPS, BATCH)))
    cache.check()
    return np.concatenate([np.asarray(last)[None], np.asarray(rest)])


def main(full: bool) -> None:
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert jax.config.jax_enable_x64
    for case in kinds.cases():
        if (case.full and not full) or not case.exact:
            continue
        model = tiny(case.config, dtype=jnp.float64)
        want = logits_of(model, case.reference, (16,))
        assert want.dtype == np.float64
        for split in SPLITS:
            error = np.abs(logits_of(model, case.plan, split) - want).max() / np.abs(want).max()
            print(f"{case.name}, prompt as {split[:3]}: {error:.1e}")
            assert error <= 1e-12, case.name


main("full" in sys.argv[1:])
