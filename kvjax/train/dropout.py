"""The library's decoder with residual dropout, for training only; at rate 0 it is `kvjax.model.apply_decoder`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.caches.base import OpenCache
from kvjax.config import Config
from kvjax.layers import Rotation, feed_forward, joined, normed, self_attention
from kvjax.model import Model
from kvjax.transformer import decoder_head, embed, final_norm
from kvjax.types import Array, Params


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
    return Model(
        dict(params, dropout={"key": key, "rate": jnp.asarray(rate, jnp.float32)}), config, _apply, decoder_head
    )


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
        y = feed_forward(p["ffn"], config, normed(p, config, "ffn", x))
        x = joined(p, config, "ffn", x, drop(y, 2 * layer + 2))
    return final_norm(params, config, x), cache


__all__ = ["dropping"]
