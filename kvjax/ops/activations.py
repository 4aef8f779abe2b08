"""Activation functions under the field's names. Module-level, so that a configuration that holds one is hashable."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.types import Array


def silu(x: Array) -> Array:
    """x · sigmoid(x)."""
    return x * jax.nn.sigmoid(x)


def gelu(x: Array) -> Array:
    """Gaussian error linear unit by the error function."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """Gaussian error linear unit, tanh approximation (`gelu_new` of GPT-2)."""
    return jax.nn.gelu(x, approximate=True)


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return jnp.maximum(x, 0)


def softcapped(x: Array, cap: float) -> Array:
    """tanh(x / cap) · cap: near x where x is small, within ±cap everywhere (Gemma 2, 2408.00118)."""
    return jnp.tanh(x / cap) * cap


__all__ = ["silu", "gelu", "gelu_tanh", "relu", "softcapped"]
