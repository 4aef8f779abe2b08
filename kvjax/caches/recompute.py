"""Recompute: keeps nothing. Every call feeds the whole text again, under the same loops: the reference for the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import storage
from kvjax.caches.base import Kind, LayerShape, Node, Project, Span
from kvjax.caches.sinks import in_cache, past_sinks
from kvjax.checks import count
from kvjax.errors import CacheError, InputError
from kvjax.ops.attention import EMPTY, View
from kvjax.types import Array


@struct.node
class Recompute(Node):
    """A layer without a cache: hands back the keys and values of the call, which is the whole text.

    Args:
        window, sinks: attend as `ring(window, sinks=sinks)` does; None and 0 as the layer itself does.
        sinks_in_cache: as for `ring`.
        causal: False lets tokens see those after them too: an encoder's layer.
    """

    window: int | None = struct.static(default=None)
    sinks: int = struct.static(default=0)
    sinks_in_cache: bool = struct.static(default=False)
    causal: bool = struct.static(default=True)

    replays = True
    patches = True  # nothing is kept: only the container's tokens move

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Recompute]:
        """See `Node`."""
        k, v = project.kv(h, span.positions)
        at = jnp.where(span.real(), span.order, EMPTY)
        kept = storage.pack(k), storage.pack(v)
        whole = View(*kept, at, window=self.window, sinks=self.sinks, causal=self.causal)
        if self.window is None or not self.sinks_in_cache:
            return (whole,), self
        n, queries = self.sinks, in_cache(span.positions, self.window, self.sinks)
        first = whole.replace(k=storage.pack(k[:, :n]), v=storage.pack(v[:, :n]), positions=at[:, :n])
        return (first.replace(query_positions=queries), whole.replace(positions=past_sinks(at, n), sinks=0)), self

    def resize(self, capacity: int, shared: Any) -> Recompute:
        """Itself."""
        return self

    def take(self, rows: Array, before: Any, shared: Any) -> Recompute:
        """Itself."""
        return self

    def move(self, source: Array, target: Array, shared: Any) -> Recompute:
        """Itself: the container moves the tokens."""
        return self

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """Raises CacheError: there is nothing to look at."""
        raise CacheError("recompute keeps no keys and values")


@dataclasses.dataclass(frozen=True)
class RecomputeKind(Kind):
    """See `recompute`."""

    window: int | None
    sinks: int
    sinks_in_cache: bool

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Recompute:
        """See `Kind`."""
        return Recompute(self.window, self.sinks, self.sinks_in_cache)


def recompute(*, window: int | None = None, sinks: int = 0, sinks_in_cache: bool = False) -> RecomputeKind:
    """No cache: everything is computed anew from the tokens at every call. The reference.

    Args:
        window, sinks, sinks_in_cache: the reference for `ring(window, sinks=sinks, …)` on layers that would see
            everything.

    Raises:
        InputError: `window` is less than 1, or `sinks` is negative; `sinks_in_cache` without window or sinks.
    """
    if sinks_in_cache and window is None:
        raise InputError("caches.recompute: sinks_in_cache needs a window, which window=None leaves out")
    for name, value, least in (("window", 1 if window is None else window, 1), ("sinks", sinks, int(sinks_in_cache))):
        count(f"caches.recompute: {name}", value, least)
    return RecomputeKind(window, sinks, bool(sinks_in_cache))


__all__ = ["recompute", "Recompute", "RecomputeKind"]
