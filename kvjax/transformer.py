"""This library's own decoder and encoder: from tokens to features, and from features to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.caches.base import OpenCache, Span
from kvjax.caches.recompute import Recompute
from kvjax.config import Config
from kvjax.layers import Rotation, decoder_layer
from kvjax.ops.activations import softcapped
from kvjax.types import Array, Params
from kvjax.weights import product, rows


def apply_decoder(
    params: Params, config: Config, cache: OpenCache, tokens: Array, valid: Array
) -> tuple[Array, OpenCache]:
    """Runs the decoder over new tokens.

    Args:
        params: as `kvjax.params.declare` says.
        config: the model.
        cache: open, at the tokens that came before.
        tokens: `[B, S]` int32.
        valid: `[B]` int32, how many of a row's tokens are real.

    Returns:
        Features `[B, S, M]` for `decoder_head`, after the final norm where there is one, and the cache.
    """
    positions = cache.positions
    with jax.named_scope("embedding"):
        x = embed(params, config, tokens, positions)
    cache = cache.record(0, "embedding", x)
    x, cache = through(params, config, x, cache, 0, config.num_layers)
    return final_norm(params, config, x), cache


def through(
    params: Params, config: Config, x: Array, cache: OpenCache, first: int, last: int
) -> tuple[Array, OpenCache]:
    """The stream `[B, S, M]` through layers `first` to `last`, that one not among them."""
    rotations = Rotation.of_layers(params, config, cache.positions, x.dtype)
    for layer in range(first, last):
        x, cache = decoder_layer(params["layers"][str(layer)], config, x, cache, layer, rotations[layer])
    return x, cache


def apply_encoder(
    params: Params, config: Config, tokens: Array, valid: Array, apply: Callable[..., Any] = apply_decoder
) -> Array:
    """Runs the encoder over source texts: the decoder's own layers, whose tokens see each other both ways.

    Args:
        params: of encoder and decoder, as `kvjax.params.declare` says.
        config: the decoder, with its encoder.
        tokens: `[R, S]` int32.
        valid: `[R]` int32, how many of a row's tokens are real.
        apply: runs the layers.

    Returns:
        States `[R, S, E]`; those of padding mean nothing.
    """
    assert config.encoder is not None
    own, start = params["encoder"], jnp.zeros_like(valid)
    if config.encoder.tied:
        own = own | {"embed": params["embed"]}
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    span = Span(start, valid, jnp.broadcast_to(steps[None, :], tokens.shape))
    layers = (Recompute(causal=False),) * config.encoder.num_layers
    with jax.named_scope("encoder"):
        return apply(own, config.encoder, OpenCache(layers, {}, span), tokens, valid)[0]


def embed(params: Params, config: Config, tokens: Array, positions: Array) -> Array:
    """Tokens `[B, S]` at `positions[B, S]` to the stream `[B, S, M]`; bad ids read some row, and are flagged."""
    x = rows(params["embed"]["table"], tokens)
    x = x * jnp.asarray(config.embed_scale, x.dtype)
    x = config.positions.embed(params.get("positions", {}), x, positions)
    return config.norm(params["embed_norm"], x) if config.embed_norm else x


def final_norm(params: Params, config: Config, x: Array) -> Array:
    """The stream `[B, S, M]` as the head reads it: normed where the parameters have a final norm."""
    return config.norm(params["final_norm"], x) if "final_norm" in params else x


@jax.named_scope("head")
def decoder_head(params: Params, config: Config, x: Array) -> Array:
    """Features `[B, S, M]` to logits `[B, S, V]`, at least float32."""
    precise = jnp.promote_types(jnp.float32, x.dtype)
    flat = x.reshape(-1, x.shape[-1]) * jnp.asarray(config.logit_scale, x.dtype)
    kernel, axis = (params["embed"]["table"], 1) if config.tied else (params["head"]["kernel"], 0)
    y = product(flat, kernel, axis, precise)
    if config.head_bias:
        y = y + params["head"]["bias"][None, :].astype(precise)
    if config.logit_softcap is not None:
        y = softcapped(y, config.logit_softcap)
    return y.reshape(*x.shape[:-1], y.shape[-1])


__all__ = ["apply_decoder", "apply_encoder", "through", "embed", "final_norm", "decoder_head"]
