"""The library's decoder and encoder with residual dropout, for training only; at rate 0 `kvjax.transformer`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.caches.base import OpenCache
from kvjax.config import Config
from kvjax.layers import Rotation, cross_attention, feed_forward, joined, normed, self_attention
from kvjax.model import Model
from kvjax.transformer import apply_encoder, decoder_head, embed, final_norm
from kvjax.types import Array, Params

ENCODER = 1 << 16
"""Folded into the key of the encoder's pattern; a decoder's sites have smaller numbers."""


def dropping(config: Config, params: Params, key: Array, rate: Any) -> Model:
    """A model that drops a share of the embedding and of what each sub-layer gives.

    Dropout as in nanoGPT, without the one on attention weights (Srivastava et al. 2014,
    https://jmlr.org/papers/v15/srivastava14a.html).

    Args:
        config: the model.
        params: its parameters.
        key: a JAX random key; one key, one pattern.
        rate: share of the elements that are dropped, in [0, 1), to a 256th.

    Returns:
        A `kvjax.model.Model` for `kvjax.model.forward`.
    """
    rate = jnp.asarray(rate, jnp.float32)
    params = dict(params, dropout={"key": key, "rate": rate})
    if config.encoder is None:
        return Model(params, config, _apply, decoder_head)
    params["encoder"] = dict(params["encoder"], dropout={"key": jax.random.fold_in(key, ENCODER), "rate": rate})
    return Model(params, config, _apply, decoder_head, _encode)


def _encode(params: Params, config: Config, tokens: Array, valid: Array) -> Array:
    return apply_encoder(params, config, tokens, valid, _apply)


def _apply(params: Params, config: Config, cache: OpenCache, tokens: Array, valid: Array) -> tuple[Array, OpenCache]:
    key, rate = params["dropout"]["key"], params["dropout"]["rate"]
    threshold = jnp.round(rate * 256.0)
    scale = 256.0 / (256.0 - threshold)

    def drop(x: Array, site: int) -> Array:
        # Bytes, not float uniforms: a quarter of the random bits, which were 15 % of a step on one core.
        bits = jax.random.bits(jax.random.fold_in(key, site), x.shape, jnp.uint8)
        return jnp.where(bits >= threshold, x * scale, 0.0)

    x = drop(embed(params, config, tokens, cache.positions), 0)  # [B, S, M]
    rotations = Rotation.of_layers(params, config, cache.positions, x.dtype)
    for layer in range(config.num_layers):
        p = params["layers"][str(layer)]
        y, cache = self_attention(p, config, x, cache, layer, rotations[layer])
        x = joined(p, config, "attn", x, drop(y, 2 * layer + 1))
        if config.encoder is not None:
            y = cross_attention(p, config, x, cache, layer)
            x = joined(p, config, "cross", x, drop(y, 2 * config.num_layers + 1 + layer))
        y = feed_forward(p["ffn"], config, normed(p, config, "ffn", x))
        x = joined(p, config, "ffn", x, drop(y, 2 * layer + 2))
    return final_norm(params, config, x), cache


__all__ = ["dropping"]
