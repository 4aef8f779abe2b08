"""Attention over any kind of cache, as a Linen module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kvjax.bridge.attention import attended, head_width
from kvjax.caches.base import OpenCache
from kvjax.ops.positions import Positions
from kvjax.types import Array, DType


class CachedAttention(nn.Module):
    """Causal self-attention over any kind of cache; its parameters are those of `nn.MultiHeadDotProductAttention`.

    Attributes:
        num_heads: H.
        num_kv_heads: K, a divisor of H; None is H, as Flax has it.
        qkv_features: H · D; None is the width of the input.
        out_features: None is the width of the input.
        rope: how queries and keys turn, such as `kvjax.ops.positions.Rope()`; None is not at all.
        window: positions that a query sees, its own included; None is all.
        use_bias: whether the four maps have one.
        normalize_qk: whether queries and keys pass a layer norm.
        dtype: that it computes in; None is that of input and parameters.
        param_dtype, kernel_init, bias_init: of the parameters.
    """

    num_heads: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    rope: Positions | None = None
    window: int | None = None
    use_bias: bool = True
    normalize_qk: bool = False
    dtype: DType | None = None
    param_dtype: DType = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, x: Array, cache: OpenCache | None = None, layer: int = 0, norm: nn.Module | None = None
    ) -> tuple[Array, OpenCache | None]:
        """Takes in the new tokens, any number of them, and attends to all that the cache has.

        Args:
            x: `[B, S, M]`, of the new tokens.
            cache: what `Model.apply` was given, or the last layer returned; None sees `x` alone: training, `init`.
            layer: counts from 0; each once a call.
            norm: applied to `x` before the projections; for kinds that keep the stream itself (`caches.output`), which
                a norm outside would hide.

        Returns:
            `[B, S, out_features]`, and the cache for the next layer.

        Raises:
            InputError: shapes disagree, heads do not divide, `rope` turns nothing, or `window` is less than 1.
        """
        made: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        inits: dict[str, Any] = {
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
            "use_bias": self.use_bias,
        }
        dense: Any = functools.partial(nn.DenseGeneral, **made, **inits)
        d, kv_heads = head_width(self.qkv_features or x.shape[-1], self.num_heads), self.num_kv_heads or self.num_heads
        query = dense((self.num_heads, d), name="query")
        key, value = dense((kv_heads, d), name="key"), dense((kv_heads, d), name="value")
        read = x if norm is None else norm(x)
        q, k, v = query(read), key(read), value(read)
        parts: tuple[nn.Module | None, ...] = (norm, key, value, None)
        if self.normalize_qk:
            key_ln = nn.LayerNorm(use_bias=False, **made, name="key_ln")
            q, k = nn.LayerNorm(use_bias=False, **made, name="query_ln")(q), key_ln(k)
            parts = (norm, key, value, key_ln)
        # A bound module must not be called while JAX traces what `attend` asks for: these are functions.
        normed, keys, values, keys_normed = (_function(part) for part in parts)

        def again(stream: Array) -> tuple[Array, Array]:
            read = normed(stream)
            return keys_normed(keys(read)), values(read)

        maps = [nn.unbox(part.variables["params"]) for part in (key, value)]
        linear = norm is None and not self.normalize_qk
        out, cache = attended(
            x,
            cache,
            layer,
            q=q,
            own=(k, v),
            again=again,
            maps=(maps[0]["kernel"], maps[1]["kernel"]) if linear else None,
            biases=(maps[0]["bias"], maps[1]["bias"]) if self.use_bias else None,
            rope=self.rope,
            window=self.window,
        )
        return dense(self.out_features or x.shape[-1], axis=(-2, -1), name="out")(out), cache


def _function(module: nn.Module | None) -> Callable[[Array], Array]:
    if module is None:
        return lambda x: x
    loose, variables = module.unbind()
    return lambda x: loose.apply(variables, x)  # type: ignore[return-value]


__all__ = ["CachedAttention"]
