"""Tiny models that the tests share, so that they share compiled programs as well: those of `kvjax.testing`."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.config import Config, NormOrder
from kvjax.ops import activations
from kvjax.ops.norms import LayerNorm, OffsetRMSNorm
from kvjax.ops.positions import Learned, LinearScaling, Rope
from kvjax.testing.cases import (
    BATCH,
    CAPACITY,
    FULL,
    MIXED,
    POSTNORM,
    PROMPTS,
    RELATIVE,
    SAMPLER,
    STEPS,
    VOCAB,
    WINDOW,
    WINDOWED,
    prompt_ids,
    tiny,
)

LEARNED = dataclasses.replace(MIXED, positions=Learned(CAPACITY), max_positions=CAPACITY)
"""No rotation: layer inputs can be absorbed."""
ONE_LAYER = dataclasses.replace(FULL, num_layers=1, windows=())
ONE_LAYER_WINDOWED = dataclasses.replace(FULL, num_layers=1, windows=(WINDOW,))
GEMMA = Config(
    VOCAB,
    3,
    32,
    query_heads=4,
    kv_heads=2,
    head_dim=16,
    ffn_width=48,
    norm=OffsetRMSNorm(1e-6),
    norm_order=NormOrder.SANDWICH,
    qk_norm=OffsetRMSNorm(1e-6),
    activation=activations.gelu_tanh,
    positions=Rope(10_000.0, LinearScaling(4.0)),
    layer_positions=(Rope(100.0), Rope(10_000.0, LinearScaling(4.0)), Rope(100.0)),
    windows=(WINDOW, None, WINDOW),
    scale=8**-0.5,
    embed_scale=32**0.5,
    attention_softcap=20.0,
    logit_softcap=30.0,
    tied=False,
)
"""All that Gemma 2 and 3 have, in one model."""
POST = Config(
    VOCAB,
    2,
    32,
    query_heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_width=48,
    norm=LayerNorm(),
    norm_order=NormOrder.POST,
    positions=Learned(96),
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    tied=False,
)
"""Norms after every sub-layer, as in the original Transformer, and biases everywhere."""


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
    "GEMMA",
    "LEARNED",
    "MIXED",
    "ONE_LAYER",
    "ONE_LAYER_WINDOWED",
    "POST",
    "POSTNORM",
    "PROMPTS",
    "RELATIVE",
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
