"""Normalisation over the last axis, computed in at least float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """x / sqrt(mean(x²) + eps) · scale (Zhang and Sennrich 2019, 1910.07467).

    Args:
        eps: added to the mean square.
    """

    eps: float = 1e-5

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Parameter shapes for an axis of `width`."""
        return {"scale": (width,)}

    @jax.named_scope("norms")
    def __call__(self, params: Params, x: Array) -> Array:
        """`x[..., M]` to the same shape and dtype."""
        y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return _affine(y.astype(x.dtype), params["scale"])

    @jax.named_scope("norms")
    def factor(self, x: Array) -> Array:
        """`[...]`, what each vector of `x[..., M]` is multiplied by."""
        y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        return lax.rsqrt(jnp.mean(y * y, axis=-1) + self.eps)

    def fold(self, params: Params, kernel: Array) -> tuple[Array, Array | None]:
        """`(kernel' [M, out], bias' [out] or None)` with `norm(x) @ kernel = (x @ kernel') * factor(x) + bias'`."""
        return kernel * params["scale"][:, None].astype(kernel.dtype), None


@dataclasses.dataclass(frozen=True)
class OffsetRMSNorm(RMSNorm):
    """x / sqrt(mean(x²) + eps) · (1 + offset), the product in at least float32 (Gemma, 2408.00118).

    The offset is a parameter of its own: 1 + offset has no room in bfloat16.
    """

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Parameter shapes for an axis of `width`."""
        return {"offset": (width,)}

    @jax.named_scope("norms")
    def __call__(self, params: Params, x: Array) -> Array:
        """`x[..., M]` to the same shape and dtype."""
        y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        y = y * self.factor(x)[..., None]
        return _affine(y, 1 + params["offset"].astype(y.dtype)).astype(x.dtype)

    def fold(self, params: Params, kernel: Array) -> tuple[Array, Array | None]:
        """As `RMSNorm.fold`."""
        precise = jnp.promote_types(jnp.float32, kernel.dtype)
        scaled = kernel.astype(precise) * (1 + params["offset"].astype(precise))[:, None]
        return scaled.astype(kernel.dtype), None


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / sqrt(var + eps) · scale + bias (Ba et al. 2016, 1607.06450).

    Args:
        eps: added to the variance.
    """

    eps: float = 1e-5

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Parameter shapes for an axis of `width`."""
        return {"scale": (width,), "bias": (width,)}

    @jax.named_scope("norms")
    def __call__(self, params: Params, x: Array) -> Array:
        """`x[..., M]` to the same shape and dtype."""
        y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = _affine(y.astype(x.dtype), params["scale"])
        return y + jnp.expand_dims(params["bias"], range(x.ndim - 1)).astype(x.dtype)

    @jax.named_scope("norms")
    def factor(self, x: Array) -> Array:
        """`[...]`, what each centred vector of `x[..., M]` is multiplied by."""
        y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        return lax.rsqrt(jnp.mean(y * y, axis=-1) + self.eps)

    def fold(self, params: Params, kernel: Array) -> tuple[Array, Array | None]:
        """As `RMSNorm.fold`; centring is linear, so it goes into the kernel."""
        scaled = kernel * params["scale"][:, None].astype(kernel.dtype)
        return scaled - jnp.mean(scaled, axis=0, keepdims=True), params["bias"].astype(kernel.dtype) @ kernel


Norm = RMSNorm | LayerNorm  # OffsetRMSNorm is an RMSNorm


def _affine(x: Array, scale: Array) -> Array:
    return x * jnp.expand_dims(scale, range(x.ndim - 1)).astype(x.dtype)


__all__ = ["RMSNorm", "OffsetRMSNorm", "LayerNorm", "Norm"]
