"""The textbook example of what caches cost an encoder-decoder, and the figures that circulate for it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.config import Config
from kvjax.costs.memory import container_nbytes, dense_nbytes, sites_of, trace_nbytes
from kvjax.costs.source import cross_nbytes, encoder_output_nbytes, source_nbytes
from kvjax.ops import activations
from kvjax.ops.norms import LayerNorm
from kvjax.ops.positions import Sinusoidal
from kvjax.types import DType

_STACK = Config(
    37_000,
    6,
    512,
    query_heads=8,
    kv_heads=8,
    head_dim=64,
    ffn_width=2048,
    norm=LayerNorm(),
    activation=activations.relu,
    gated=False,
    positions=Sinusoidal(),
)
TEXTBOOK = dataclasses.replace(_STACK, encoder=_STACK)
"""The base Transformer of Vaswani et al. (1706.03762) in its sizes; where the norms stand costs nothing here."""

BATCH, POSITIONS, PADDED = 4, 100, 128
"""Rows; positions of source and of target; the same padded to a power of two."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One thing that is kept.

    Args:
        kept: what.
        float32, bfloat16: bytes, of all rows; what every cache has besides (tokens, lengths, flags) is not in it.
        said: millions of bytes that circulate for it, or None.
        share: 1; or the number of rows, where that is said of one.
    """

    kept: str
    float32: int
    bfloat16: int
    said: int | None = None
    share: int = 1

    @property
    def element(self) -> float | None:
        """Bytes that each number would have for `said` to be right; float32 has 4, bfloat16 2."""
        return None if self.said is None else self.said * 1e6 * self.share / (self.float32 / 4)


def textbook() -> tuple[Line, ...]:
    """Bytes for d 512, 6 layers, a batch of 4 and 100 + 100 positions, computed with the functions of this room."""

    def own(store: DType, positions: int) -> int:
        shape = {"batch": BATCH, "capacity": positions}
        return dense_nbytes(TEXTBOOK, **shape, store=store) - container_nbytes(**shape)

    def cross(store: DType, positions: int) -> int:
        return cross_nbytes(TEXTBOOK, source=positions, rows=BATCH, store=store) - source_nbytes(BATCH)

    def both(store: DType, positions: int = POSITIONS) -> int:
        return own(store, positions) + cross(store, positions)

    def streams(store: DType, sites: int) -> int:
        shape = {"batch": BATCH, "capacity": POSITIONS, "embedding": 0}
        return trace_nbytes(TEXTBOOK, **shape, sites=sites, store=store)

    def states(store: DType) -> int:
        kept = encoder_output_nbytes(TEXTBOOK, source=POSITIONS, rows=BATCH, store=store)
        return own(store, POSITIONS) + kept - source_nbytes(BATCH)

    sites = sites_of(TEXTBOOK)
    lines = (
        ("K/V of text and source", both, 24, 1),
        ("outputs of the layers", lambda store: streams(store, 1), 12, 1),
        ("both of these", lambda store: both(store) + streams(store, 1), 36, BATCH),
        ("outputs of all sub-layers", lambda store: streams(store, sites), None, 1),
        ("K/V and all sub-layers", lambda store: both(store) + streams(store, sites), None, 1),
        ("text K/V, encoder output", states, None, 1),
        (f"K/V, padded to {PADDED}", lambda store: both(store, PADDED), None, 1),
    )
    return tuple(Line(kept, f(jnp.float32), f(jnp.bfloat16), *rest) for kept, f, *rest in lines)


__all__ = ["TEXTBOOK", "BATCH", "POSITIONS", "PADDED", "Line", "textbook"]
