"""The container while a model takes in new tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches.contract import Project, Span
from kvjax.errors import InputError
from kvjax.ops.attention import attention
from kvjax.ops.positions import Bias
from kvjax.types import Array

SOURCE = "source"
"""The name in `Cache.shared` of what cross-attention reads."""


@struct.node
class OpenCache(struct.Value):
    """A cache while a model takes in new tokens: what `Model.apply` is given and returns.

    Args:
        layers: the nodes, one a layer.
        shared: what the layers have in common.
        span: the new tokens.
        shown: the same for what layers show (`record`), where other ones change; None is `span`.
    """

    layers: Any
    shared: Any
    span: Span
    shown: Span | None = None

    @property
    def positions(self) -> Array:
        """`[B, S]` int32, where the new tokens stand in the text."""
        return self.span.positions

    def record(self, layer: int, site: str, x: Array) -> OpenCache:
        """Shows `x[B, S, M]` to the layer's node under a name."""
        return self._with(layer, self.layers[layer].record(site, x, self.shown or self.span))

    def attend(
        self,
        layer: int,
        q: Array,
        project: Project,
        h: Any = None,
        *,
        kv_heads: int,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        bias: Bias | None = None,
    ) -> tuple[Array, OpenCache]:
        """Extends one layer's node and attends. `kvjax.attend` is the door for models of one's own."""
        if window is not None and window < 1:
            raise InputError(f"attend: window {window} at layer {layer} must be at least 1, the query's own position")
        node = self.layers[layer]
        project = dataclasses.replace(project, kv=functools.partial(_finite_values, project.kv, node.reach))
        views, node = node.extend(h, project, self.span, self.shared)
        views = tuple(self.span.tree_view(view) for view in views)
        out = attention(
            q,
            self.span.positions,
            views,
            kv_heads=kv_heads,
            scale=scale,
            window=window,
            softcap=softcap,
            rotate=project.rotate,
            bias=bias,
        )
        return out, self._with(layer, node)

    def cross_attend(
        self,
        layer: int,
        q: Array,
        project: Project,
        *,
        kv_heads: int,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Array:
        """Attends to the source, which does not change. `kvjax.cross_attend` is the door for models of one's own."""
        if SOURCE not in self.shared:
            raise InputError("the model attends to a source, but has none: give source=kvjax.encode(model, tokens)")
        views = self.shared[SOURCE].views(layer, project)
        return attention(q, self.span.positions, views, kv_heads=kv_heads, scale=scale, softcap=softcap)

    def _with(self, layer: int, node: Any) -> OpenCache:
        if node is self.layers[layer]:
            return self
        layers = (*self.layers[:layer], node, *self.layers[layer + 1 :])
        return self.replace(layers=layers)


def _finite_values(kv: Callable[..., Any], reach: float | None, h: Any, positions: Array | None) -> tuple[Array, Array]:
    k, v = kv(h, positions)
    return finite(k, v, reach)


def finite(k: Array, v: Array, reach: float | None) -> tuple[Array, Array]:
    """Keys and values, a value that is not finite moved into its key: there it shows as long as it is seen, and masks
    hide it afterwards; among the values it would leak as 0 · NaN. So is what the stores cannot keep."""
    good = jnp.isfinite(v) if reach is None else jnp.abs(v) <= reach
    fits = jnp.all(good, axis=-1, keepdims=True)
    if reach is not None:
        fits &= jnp.all(jnp.abs(k) <= reach, axis=-1, keepdims=True)
    return jnp.where(fits, k, jnp.nan), jnp.where(good, v, 0)


__all__ = ["OpenCache", "SOURCE", "finite"]
