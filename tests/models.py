"""Tiny models that the tests share, so that they share compiled programs as well."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax import sampling
from kvjax.config import Config, NormOrder
from kvjax.ops import activations
from kvjax.ops.norms import LayerNorm, OffsetRMSNorm
from kvjax.ops.positions import Learned, LinearScaling, Rope

VOCAB = 96
WINDOW = 6
BATCH = 3
CAPACITY = 96
PROMPTS = np.array([16, 7, 1], np.int32)
"""Lengths of a ragged batch of prompts: a whole bucket, a part of one, a single token."""

FULL = Config(VOCAB, 2, 32, query_heads=4, kv_heads=2, head_dim=8, ffn_width=48, tied=False)
WINDOWED = Config(VOCAB, 2, 32, query_heads=4, kv_heads=2, head_dim=8, ffn_width=48, tied=False, windows=(WINDOW,) * 2)
MIXED = Config(VOCAB, 2, 32, query_heads=4, kv_heads=2, head_dim=8, ffn_width=48, tied=False, windows=(WINDOW, None))
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
    attention_softcap=5.0,
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
    activation=activations.relu,
    gated=False,
    positions=Learned(96),
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    tied=False,
)
"""The decoder of the original Transformer, but for learned positions."""


@functools.cache
def tiny(config: Config = FULL, seed: int = 0, dtype=jnp.float32) -> kvjax.Model:
    """A random decoder. Its weights are 20 times larger than at initialisation: otherwise it repeats a few tokens."""
    params = kvjax.init_params(config, jax.random.key(seed), dtype)
    return kvjax.decoder(config, jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, params))


def prompt_ids(seed: int = 0, batch: int = BATCH, length: int = 16, vocab: int = VOCAB) -> np.ndarray:
    """`[batch, length]` int32."""
    return np.random.default_rng(seed).integers(0, vocab, (batch, length)).astype(np.int32)


SAMPLER = sampling.chain(sampling.temperature(0.9))
STEPS = 12
"""What `decode` runs with where a test has no reason for another."""


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
