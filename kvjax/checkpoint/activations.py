"""The names that config.json files use for activation functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvjax.ops import activations
from kvjax.types import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": activations.silu,
    "swish": activations.silu,
    "gelu": activations.gelu,
    "gelu_python": activations.gelu,
    "gelu_new": activations.gelu_tanh,
    "gelu_fast": activations.gelu_tanh,
    "gelu_pytorch_tanh": activations.gelu_tanh,
    "relu": activations.relu,
}

__all__ = ["ACTIVATIONS"]
