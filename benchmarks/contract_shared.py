"""Prototype kinds for the hard case whose layers share something that is no kind yet: one encoder output."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches.base import (
    Node,
    Project,
    Shared,
    Span,
)
from kvjax.ops.attention import EMPTY, View
from kvjax.types import Array

# ---------------------------------------------------------------- cross-attention, absorbed, one source for all layers


@struct.node
class Source(Shared):
    """Encoder output of R sources, consecutive rows sharing one: `[R, T, 1 head, E]` stored, `lengths[R]`."""

    x: Any
    lengths: Array
    share: int = struct.static()

    def positions(self) -> Array:
        """`[R, T]`: 0, before every query, where the source has a token."""
        t = self.x.data.shape[-2]
        return jnp.where(jnp.arange(t)[None, :] < self.lengths[:, None], 0, EMPTY).astype(jnp.int32)

    def take(self, rows: Array) -> tuple[Source, Array]:
        source = rows // self.share
        return Source(self.x.take(source), self.lengths[source], 1), jnp.zeros_like(rows)

    def reorder(self, beams: Array) -> tuple[Source, Array]:
        return self, jnp.zeros_like(beams)  # beams stay within their source


@struct.node
class AbsorbedCross(Node):
    """Keeps nothing: attends over the one encoder output through the layer's maps."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        source = shared["source"]
        assert project.absorb is not None
        maps, _ = project.absorb(h)
        return (View(source.x.data, source.x.data, source.positions(), absorb=maps),), self

    def take(self, rows: Array, before: Any, shared: Any) -> AbsorbedCross:
        return self

    def resize(self, capacity: int, shared: Any) -> AbsorbedCross:
        return self
