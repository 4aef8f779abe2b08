"""Weights that are kept in eight bits: matrices as int8 codes with one scale for each output.

Symmetric, nearest code, nothing calibrated: the weight half of W8A16, as in LLM.int8 (Dettmers et al. 2022, 2208.07339,
section 2.1) and gpt-fast. What is multiplied with is the code in the dtype that the model computes in, which holds
every code exactly; the scale multiplies the product. Layers ask for products, rows and whole matrices with the
functions here, and take an array for what it is.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.config import Config
from kvjax.errors import InputError
from kvjax.ops.matrices import times, times_rows
from kvjax.types import Array, DType

LARGEST = 127
"""Codes go from -127 to 127: of -128 there is no opposite."""

PRODUCTS = times, times_rows
"""By the axis of the matrix that is contracted."""

_M = TypeVar("_M", bound=Any)


@struct.node
class Int8(struct.Value):
    """A matrix as codes; each is at most half a scale from what it stands for.

    Args:
        codes: int8, in the matrix's own shape.
        scale: float32, `[1, out]` of a kernel `[in, out]`, `[out, 1]` of a table `[out, in]`.
        dtype: that the matrix had.
    """

    codes: Array
    scale: Array
    dtype: np.dtype[Any] = struct.static()

    def times(self, x: Array, axis: int, precise: DType) -> Array:
        """`[N, out]`: `x[N, in]` times the matrix, whose `axis` is contracted, accumulated in `precise`."""
        return PRODUCTS[axis](x, self.codes, precise) * self.scale.reshape(1, -1).astype(precise)

    def rows(self, ids: Array) -> Array:
        """`[..., in]`, rows of a table, in its dtype."""
        return jax.tree.map(lambda part: jnp.take(part, ids, axis=0, mode="clip"), self).dense()

    def dense(self) -> Array:
        """The matrix, in its dtype."""
        precise = jnp.promote_types(jnp.float32, self.dtype)
        return (self.codes.astype(precise) * self.scale.astype(precise)).astype(self.dtype)


def product(x: Array, w: Any, axis: int = 0, precise: DType | None = None) -> Array:
    """`[N, out]`: `x[N, in]` times a matrix, whose `axis` is contracted; in `precise`, None being the dtype of `x`."""
    if isinstance(w, Int8):
        return w.times(x, axis, jnp.promote_types(jnp.float32, x.dtype)).astype(precise or x.dtype)
    return PRODUCTS[axis](x, w, precise)


def rows(table: Any, ids: Array) -> Array:
    """Rows of a table, `[..., in]`; an id outside it reads some row."""
    return table.rows(ids) if isinstance(table, Int8) else jnp.take(table, ids, axis=0, mode="clip")


def dense(w: Any) -> Array:
    """A matrix as an array."""
    return w.dense() if isinstance(w, Int8) else w


def int8_weights(model: _M) -> _M:
    """The same model with every matrix of its layers, its head and its embeddings in int8, one scale for each output,
    and for each token of an embedding; norms, biases and positions stay as they are. The original is untouched.

    An approximation: another model, whose caches are not those of the original. It works on every device, and is for
    those that decode codes on the way into the product: a GPU or a TPU. XLA for CPU keeps a float32 copy of what a loop
    multiplies with (`benchmarks/weights.py`).

    Args:
        model: of this library's own decoder.

    Raises:
        InputError: a model of one's own, whose layers do not know codes; or its matrices are codes already.
    """
    if not isinstance(model.config, Config):
        raise InputError("int8_weights: the model is one's own; its apply must multiply by kvjax.weights.product")

    def of(path: Any, w: Any) -> Any:
        last, above = path[-1].key, path[-2].key
        if isinstance(w, Int8):
            raise InputError(f"int8_weights: {jax.tree_util.keystr(path, simple=True, separator='/')} is int8 already")
        if last == "kernel":
            return quantised(w, inputs=0)
        return quantised(w, inputs=1) if (above, last) == ("embed", "table") else w

    is_codes = lambda x: isinstance(x, Int8)  # noqa: E731
    return model.replace(params=jax.tree_util.tree_map_with_path(of, model.params, is_leaf=is_codes))


def quantised(w: Array, inputs: int) -> Int8:
    """A matrix as codes, with one scale for each index that is not of axis `inputs`."""
    return _coded(w, inputs=inputs)


@functools.partial(jax.jit, static_argnames="inputs")
def _coded(w: Array, *, inputs: int) -> Int8:
    precise = w.astype(jnp.promote_types(jnp.float32, w.dtype))
    scale = (jnp.max(jnp.abs(precise), axis=inputs, keepdims=True) / LARGEST).astype(jnp.float32)
    codes = jnp.round(precise / jnp.where(scale == 0, 1, scale).astype(precise.dtype))  # by the scale as it is kept
    return Int8(jnp.clip(codes, -LARGEST, LARGEST).astype(jnp.int8), scale, w.dtype)


__all__ = ["Int8", "int8_weights", "quantised", "product", "rows", "dense"]
