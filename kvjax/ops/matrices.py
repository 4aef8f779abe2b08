"""Products of a few rows with a large matrix, in the form that the device does fastest (docs/decisions.md, "Speed")."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.types import Array

PARTS = 4
"""Parts of a matrix that XLA:CPU multiplies with one row, on one core each; measured on two cores."""

LEAST = 1 << 18
"""Bytes of a matrix from which that is worth it."""


def times(x: Array, matrix: Array, dtype: Any = None) -> Array:
    """`x[n, in]` times a matrix `[in, out]`, in the dtype of `x`: `[n, out]` in `dtype`, that of `x` if None.

    XLA:CPU multiplies a single row with a matrix on one core; the parts of a batched product it spreads over the cores.
    So the rows of the matrix are taken in parts, whose results are added. Nothing is copied: that is a reshape.
    """
    matrix = matrix.astype(x.dtype)
    rows, width = matrix.shape
    if x.shape[0] != 1 or rows % PARTS or matrix.size * x.dtype.itemsize < LEAST or not _wide_on_cpu(x.dtype):
        return lax.dot_general(x, matrix, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
    parts = x.reshape(PARTS, 1, rows // PARTS), matrix.reshape(PARTS, rows // PARTS, width)
    return jnp.sum(lax.dot_general(*parts, (((2,), (1,)), ((0,), (0,))), preferred_element_type=dtype), axis=0)


def times_rows(x: Array, table: Array, dtype: Any = None) -> Array:
    """`x[n, in]` times each row of a table `[out, in]`, in the dtype of `x`: `[n, out]` in `dtype`, as `times`.

    XLA:CPU is slow where the larger factor stands on the right with its rows contracted, and puts it there; behind a
    barrier it stays on the left.
    """
    table = table.astype(x.dtype)
    if x.shape[0] == 1 or jax.default_backend() != "cpu":
        return lax.dot_general(x, table, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    y = lax.dot_general(table, x, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return lax.optimization_barrier(y).T


def _wide_on_cpu(dtype: Any) -> bool:
    """Whether sums of parts lose nothing to rounding, on a device where parts are faster."""
    return jax.default_backend() == "cpu" and jnp.finfo(dtype).bits >= 32


__all__ = ["times", "times_rows"]
