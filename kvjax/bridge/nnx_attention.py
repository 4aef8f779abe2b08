"""Attention over any kind of cache, as an NNX module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from kvjax.bridge.attention import attended, head_width
from kvjax.caches.base import OpenCache
from kvjax.ops.positions import Positions
from kvjax.types import Array, DType

KERNEL_INIT, BIAS_INIT = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()
"""Those of Flax's own."""


class CachedAttention(nnx.Module):
    """Causal self-attention over any kind of cache; its parameters are those of `nnx.MultiHeadAttention`.

    Args:
        num_heads: H.
        in_features: M, the width of the input.
        qkv_features: H · D; None is M.
        out_features: None is M.
        num_kv_heads: K, a divisor of H; None is H.
        rope: how queries and keys turn, such as `kvjax.ops.positions.Rope()`; None is not at all.
        window: positions that a query sees, its own included; None is all.
        use_bias: whether the four maps have one.
        normalize_qk: whether queries and keys pass a layer norm.
        dtype: that it computes in; None is that of input and parameters.
        param_dtype, kernel_init, bias_init: of the parameters.
        rngs: that make them.

    Raises:
        InputError: heads do not divide the features.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        *,
        rope: Positions | None = None,
        window: int | None = None,
        use_bias: bool = True,
        normalize_qk: bool = False,
        dtype: DType | None = None,
        param_dtype: DType = jnp.float32,
        kernel_init: Callable[..., Any] = KERNEL_INIT,
        bias_init: Callable[..., Any] = BIAS_INIT,
        rngs: nnx.Rngs,
    ):
        made: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inits: dict[str, Any] = {"kernel_init": kernel_init, "bias_init": bias_init, "use_bias": use_bias}
        dense: Any = functools.partial(nnx.LinearGeneral, **made, **inits)
        d, kv_heads = head_width(qkv_features or in_features, num_heads), num_kv_heads or num_heads
        self.query = dense(in_features, (num_heads, d))
        self.key = dense(in_features, (kv_heads, d))
        self.value = dense(in_features, (kv_heads, d))
        self.out = dense((num_heads, d), out_features or in_features, axis=(-2, -1))
        if normalize_qk:
            self.query_ln = nnx.LayerNorm(d, use_bias=False, **made)
            self.key_ln = nnx.LayerNorm(d, use_bias=False, **made)
        self.rope, self.window, self.use_bias, self.normalize_qk = rope, window, use_bias, normalize_qk

    def __call__(
        self, x: Array, cache: OpenCache | None = None, layer: int = 0, norm: Callable[[Array], Array] | None = None
    ) -> tuple[Array, OpenCache | None]:
        """Takes in the new tokens, any number of them, and attends to all that the cache has.

        Args:
            x: `[B, S, M]`, of the new tokens.
            cache: what `Model.apply` was given, or the last layer returned; None sees `x` alone: training.
            layer: counts from 0; each once a call.
            norm: applied to `x` before the projections; for kinds that keep the stream itself (`caches.output`), which
                a norm outside would hide.

        Returns:
            `[B, S, out_features]`, and the cache for the next layer.

        Raises:
            InputError: shapes disagree, `rope` turns nothing, or `window` is less than 1.
        """

        def project(stream: Array) -> tuple[Array, Array]:
            read = stream if norm is None else norm(stream)
            keys = self.key(read)
            return (self.key_ln(keys) if self.normalize_qk else keys), self.value(read)

        q = self.query(x if norm is None else norm(x))
        linear = norm is None and not self.normalize_qk
        out, cache = attended(
            x,
            cache,
            layer,
            q=self.query_ln(q) if self.normalize_qk else q,
            own=project(x),
            again=project,
            maps=(self.key.kernel[...], self.value.kernel[...]) if linear else None,
            biases=(self.key.bias[...], self.value.bias[...]) if self.use_bias else None,
            rope=self.rope,
            window=self.window,
        )
        return self.out(out), cache


__all__ = ["CachedAttention"]
