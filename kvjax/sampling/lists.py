"""Filters that name tokens: some are banned."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.sampling.contract import Text, among, id_list
from kvjax.types import Array


@struct.node
class Banned(struct.Value):
    """Some tokens are never chosen.

    Args:
        ids: `[n]` int32, -1 for none.
    """

    ids: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        return jnp.where(among(self.ids, logits.shape[1])[None], -jnp.inf, logits)


def banned(ids: Any) -> Banned:
    """Never chooses any of `ids`.

    Raises:
        InputError: no list of ids.
    """
    return Banned(jnp.asarray(id_list("sampling.banned: ids", ids)))


__all__ = ["Banned", "banned"]
