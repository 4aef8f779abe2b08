"""What a cache costs, predicted from the configuration alone: this module imports no kind of cache.

The arrays of a cache are measured by `Cache.nbytes`; a test holds the two equal. Symbols are those of `kvjax.types`.
"""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.config import Config
from kvjax.types import DType


def container_nbytes(batch: int, capacity: int) -> int:
    """Bytes that every cache has: tokens `[B, T]`, and lengths, furthest positions and flags `[B]`, all int32."""
    return 4 * batch * capacity + 3 * 4 * batch


def slot_nbytes(config: Config, dtype: DType = jnp.float32) -> int:
    """Bytes of one position's key and value in one layer of one row: 2 · K · D · bytes per element."""
    return 2 * config.kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def dense_nbytes(config: Config, *, batch: int, capacity: int, dtype: DType = jnp.float32) -> int:
    """Bytes of a dense cache: 2 · L · K · D · T · B · bytes per element, and the container.

    Args:
        config: the model.
        batch: B.
        capacity: T.
        dtype: of a stored element.
    """
    return config.num_layers * capacity * batch * slot_nbytes(config, dtype) + container_nbytes(batch, capacity)


def ring_nbytes(
    config: Config,
    *,
    batch: int,
    capacity: int,
    window: int,
    sinks: int = 0,
    slack: int = 0,
    dtype: DType = jnp.float32,
) -> int:
    """Bytes of a ring in every layer: 2 · L · K · D · (sinks + window + slack) · B · bytes per element, and the
    container, whose tokens alone grow with the text.

    Args:
        config: the model.
        batch: B.
        capacity: T, tokens of the text.
        window, sinks, slack: of the ring.
        dtype: of a stored element.
    """
    slots = sinks + window + slack
    return config.num_layers * slots * batch * slot_nbytes(config, dtype) + container_nbytes(batch, capacity)


def recompute_nbytes(config: Config, *, batch: int, capacity: int) -> int:
    """Bytes without a cache: the container."""
    return container_nbytes(batch, capacity)


__all__ = ["container_nbytes", "slot_nbytes", "dense_nbytes", "ring_nbytes", "recompute_nbytes"]
