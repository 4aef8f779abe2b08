"""Tiny models that the tests share, so that they share compiled programs as well: those of `kvjax.testing`."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.testing.cases import (
    BATCH,
    CAPACITY,
    FULL,
    MIXED,
    PROMPTS,
    SAMPLER,
    STEPS,
    VOCAB,
    WINDOW,
    WINDOWED,
    prompt_ids,
    tiny,
)

ONE_LAYER = dataclasses.replace(FULL, num_layers=1, windows=())
ONE_LAYER_WINDOWED = dataclasses.replace(FULL, num_layers=1, windows=(WINDOW,))


def filled(model, plan, *, seed: int = 0, valid=PROMPTS, capacity: int = CAPACITY):
    """Logits and a cache after a ragged prefill."""
    ids = prompt_ids(seed, len(valid))
    return kvjax.prefill(model, kvjax.init_cache(model, plan, batch=len(valid), capacity=capacity), ids, valid)


def fed(model, plan, lengths, capacity: int = CAPACITY):
    """Logits and a cache with rows of any lengths, fed in chunks of 16 so that no further program is compiled."""
    ids, at = prompt_ids(5, len(lengths), capacity), 0
    cache = kvjax.init_cache(model, plan, batch=len(lengths), capacity=capacity)
    logits = np.zeros((len(lengths), VOCAB), np.float32)
    while (valid := np.clip(lengths - at, 0, 16)).any():
        new, cache = kvjax.prefill(model, cache, ids[:, at : at + 16], valid)
        logits, at = np.where(valid[:, None] > 0, new, logits), at + 16
    return jnp.asarray(logits), cache


__all__ = [
    "BATCH",
    "CAPACITY",
    "FULL",
    "MIXED",
    "ONE_LAYER",
    "ONE_LAYER_WINDOWED",
    "PROMPTS",
    "SAMPLER",
    "STEPS",
    "VOCAB",
    "WINDOW",
    "WINDOWED",
    "fed",
    "filled",
    "prompt_ids",
    "tiny",
]
