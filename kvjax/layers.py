"""Layer functions: parameters and activations in, activations and cache out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.caches.base import OpenCache, Project
from kvjax.config import Config, NormOrder
from kvjax.ops.attention import Absorb
from kvjax.ops.positions import Bias, Positions
from kvjax.types import Array, Params
from kvjax.weights import dense, product


def linear(params: Params, x: Array) -> Array:
    """`x[..., in] @ kernel[in, out] + bias[out]`."""
    flat = x.reshape(-1, x.shape[-1])  # one matrix product: leading axes only confuse the layout
    y = product(flat, params["kernel"])
    if "bias" in params:
        y = y + params["bias"][None, :].astype(y.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def feed_forward(params: Params, config: Config, x: Array) -> Array:
    """`[B, S, M]` to `[B, S, M]`: down(activation(gate) · up), or down(activation(up))."""
    if config.gated:
        gate, up = jnp.split(linear(params["gate_up"], x), 2, axis=-1)
        return linear(params["down"], config.activation(gate) * up)
    return linear(params["down"], config.activation(linear(params["up"], x)))


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Rotates to positions; the tables of the new tokens' own positions are made once.

    Args:
        kind: how a layer turns queries and keys.
        positions: `[B, S]` int32 of the new tokens.
        tables: made for `positions`.
        head_dim: D.
        dtype: what the model computes in.
        bias: what the layer adds to its scores, or None.
    """

    kind: Positions
    positions: Array
    tables: Any
    head_dim: int
    dtype: Any
    bias: Bias | None = None

    @classmethod
    def of_layers(cls, params: Params, config: Config, positions: Array, dtype: Any) -> tuple[Rotation, ...]:
        """One a layer; layers that turn alike share one, with its tables. `params` are those of the whole stack."""
        d, own = config.head_dim, params.get("positions", {})
        kinds = dict.fromkeys(config.turns)
        made = {x: cls(x, positions, x.tables(positions, d, dtype), d, dtype, x.bias(own)) for x in kinds}
        return tuple(made[x] for x in config.turns)

    def __call__(self, x: Array, positions: Array) -> Array:
        """`x[B, S, heads, D]` turned to `positions[B, S]`."""
        tables = self.tables
        if positions is not self.positions:
            tables = self.kind.tables(positions, self.head_dim, self.dtype)
        return self.kind.rotate(x, tables)


def normed(params: Params, config: Config, part: str, x: Array) -> Array:
    """What the sub-layer `part`, "attn", "cross" or "ffn", reads of the stream `x[B, S, M]`."""
    return x if config.norm_order is NormOrder.POST else config.norm(params[f"{part}_norm"], x)


def joined(params: Params, config: Config, part: str, x: Array, y: Array) -> Array:
    """The stream `x[B, S, M]` after the sub-layer `part` gave `y[B, S, M]`."""
    if config.norm_order is NormOrder.POST:
        return config.norm(params[f"{part}_norm"], x + y)
    if config.norm_order is NormOrder.SANDWICH:
        y = config.norm(params[f"{part}_post_norm"], y)
    return x + y


def self_attention(
    params: Params, config: Config, x: Array, cache: OpenCache, layer: int, rotation: Rotation
) -> tuple[Array, OpenCache]:
    """Norm, projections, attention over the cache, output projection.

    Args:
        params: the layer's parameters.
        config: the model.
        x: `[B, S, M]`, the residual stream before any norm.
        cache: open.
        layer: which.
        rotation: the layer's, for the call's positions.

    Returns:
        `[B, S, M]` to be joined with the stream, and the cache with the layer extended.
    """
    h, k, d = config.query_heads, config.kv_heads, config.head_dim
    attn = params["attn"]

    @jax.named_scope("projections")
    def project(x: Array, weights: Params, sizes: tuple[int, ...]) -> list[Array]:
        y = linear(weights, normed(params, config, "attn", x))  # [B, S, heads * D]
        return [part.reshape(*x.shape[:2], -1, d) for part in jnp.split(y, [size * d for size in sizes], axis=-1)]

    q, own_keys, own_values = project(x, attn["qkv"], (h, h + k))
    if config.qk_norm is not None:
        q, own_keys = config.qk_norm(attn["q_norm"], q), config.qk_norm(attn["k_norm"], own_keys)

    def kv(stream: Array, positions: Array | None) -> tuple[Array, Array]:
        keys, values = own_keys, own_values
        if stream is not x:  # what was kept: its queries are not wanted again
            weights = jax.tree.map(lambda w: w[..., h * d :], attn["qkv"])
            keys, values = project(stream, weights, (k,))
            if config.qk_norm is not None:
                keys = config.qk_norm(attn["k_norm"], keys)
        return (keys if positions is None else rotation(keys, positions)), values

    @jax.named_scope("projections")
    def absorb(stream: Array) -> tuple[Absorb, Array | None]:
        kernel, bias, factor = dense(attn["qkv"]["kernel"])[:, h * d :].astype(stream.dtype), None, None
        if config.norm_order is not NormOrder.POST:  # else no norm stands before the projections
            kernel, bias = config.norm.fold(params["attn_norm"], kernel)
            factor = config.norm.factor(stream)
        if "bias" in attn["qkv"]:
            own = attn["qkv"]["bias"][h * d :].astype(stream.dtype)
            bias = own if bias is None else bias + own
        return Absorb.of(kernel, bias, k, stream.dtype), factor

    out, cache = cache.attend(
        layer,
        q,
        Project(kv, rotation, absorb if absorbs(config, layer) else None),
        x,
        kv_heads=k,
        scale=config.scale,
        window=config.windows[layer],
        softcap=config.attention_softcap,
        bias=rotation.bias,
    )
    with jax.named_scope("projections"):
        return linear(attn["out"], out.reshape(*x.shape[:2], h * d)), cache


def cross_attention(params: Params, config: Config, x: Array, cache: OpenCache, layer: int) -> Array:
    """Norm, query projection, attention over the source, output projection. No order stands between source and text.

    Args:
        params: the layer's parameters.
        config: the model.
        x: `[B, S, M]`, the residual stream before any norm.
        cache: open; read only.
        layer: which.

    Returns:
        `[B, S, M]` to be joined with the stream.
    """
    h, k, d = config.query_heads, config.kv_heads, config.head_dim
    cross = params["cross"]

    def kv(states: Array, positions: Array | None) -> tuple[Array, Array]:
        with jax.named_scope("projections"):
            keys, values = jnp.split(linear(cross["kv"], states), 2, axis=-1)  # [R, S, K * D] each
        keys, values = (part.reshape(*states.shape[:2], k, d) for part in (keys, values))
        return (keys if config.qk_norm is None else config.qk_norm(cross["k_norm"], keys)), values

    def absorb(states: Array) -> tuple[Absorb, Array | None]:
        bias = cross["kv"].get("bias")
        return Absorb.of(dense(cross["kv"]["kernel"]), bias, k, states.dtype), None

    with jax.named_scope("projections"):
        q = linear(cross["q"], normed(params, config, "cross", x)).reshape(*x.shape[:2], h, d)
        if config.qk_norm is not None:
            q = config.qk_norm(cross["q_norm"], q)
    out = cache.cross_attend(
        layer,
        q,
        Project(kv, unturned, absorb if config.qk_norm is None else None),
        kv_heads=k,
        scale=config.scale,
        softcap=config.attention_softcap,
    )
    with jax.named_scope("projections"):
        return linear(cross["out"], out.reshape(*x.shape[:2], h * d))


def unturned(x: Array, positions: Array) -> Array:
    """`x[B, S, heads, D]` as it is: nothing rotates."""
    return x


def absorbs(config: Config, layer: int) -> bool:
    """Whether keys are linear in the layer's input: no rotation between the map and the score, no norm of each key."""
    return not config.turns[layer].rotates and config.qk_norm is None


def layer_sites(config: Config, layer: int) -> tuple[str, ...]:
    """Names under which a decoder layer shows its stream, in the order in which it does."""
    first = ("embedding",) if layer == 0 else ()
    cross = () if config.encoder is None else ("after_cross_attention",)
    return (*first, "after_self_attention", *cross, "after_ffn")


def decoder_layer(
    params: Params, config: Config, x: Array, cache: OpenCache, layer: int, rotation: Rotation
) -> tuple[Array, OpenCache]:
    """Attention to the text, to the source where there is one, then feed-forward, each joined with the stream as
    `norm_order` says; `x[B, S, M]` to `[B, S, M]`."""
    with jax.named_scope(f"layer_{layer}"):
        with jax.named_scope("attention"):
            y, cache = self_attention(params, config, x, cache, layer, rotation)
            x = joined(params, config, "attn", x, y)
        cache = cache.record(layer, "after_self_attention", x)
        if config.encoder is not None:
            with jax.named_scope("cross_attention"):
                x = joined(params, config, "cross", x, cross_attention(params, config, x, cache, layer))
            cache = cache.record(layer, "after_cross_attention", x)
        with jax.named_scope("ffn"):
            y = feed_forward(params["ffn"], config, normed(params, config, "ffn", x))
            x = joined(params, config, "ffn", x, y)
        return x, cache.record(layer, "after_ffn", x)


__all__ = [
    "linear",
    "feed_forward",
    "Rotation",
    "normed",
    "joined",
    "self_attention",
    "cross_attention",
    "unturned",
    "decoder_layer",
    "absorbs",
    "layer_sites",
]
