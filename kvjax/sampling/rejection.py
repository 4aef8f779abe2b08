"""Speculative sampling: drafts drawn from q are accepted or replaced so that what comes out follows p.

Leviathan et al. 2023, 2211.17192; Chen et al. 2023, 2302.01318.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.types import Array

ACCEPT, DRAFT = 1, 2
"""Folded into the key of a position: for the coin of a draft, and for drawing it. The key itself draws what is kept."""


def accepts(p: Array, q: Array, drafts: Array, coins: Array) -> Array:
    """`[B]` bool, which drafts are kept: with probability min(1, p / q).

    Args:
        p, q: `[B, V]`, probabilities of target and draft.
        drafts: `[B]` int32, drawn from q.
        coins: `[B]`, uniform in [0, 1).
    """
    wanted, had = (jnp.take_along_axis(x, jnp.maximum(drafts, 0)[:, None], axis=1)[:, 0] for x in (p, q))
    return coins * had < wanted


def residual(p: Array, q: Array) -> Array:
    """`[B, V]`, max(0, p - q): in proportion to it a draft that was not kept is replaced. p where p and q are equal."""
    rest = jnp.maximum(p - q, 0)
    return jnp.where(jnp.sum(rest, axis=1, keepdims=True) > 0, rest, p)


def probabilities(law: Array) -> Array:
    """`[B, V]`, softmax of logits, at least float32; NaN where all of a row's are -inf."""
    return jax.nn.softmax(law.astype(jnp.promote_types(jnp.float32, law.dtype)), axis=-1)


__all__ = ["ACCEPT", "DRAFT", "accepts", "residual", "probabilities"]
