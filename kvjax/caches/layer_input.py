"""Layer input: the residual stream before the norm, one vector a position in place of keys and values.

They are made again from what is kept at every call (HCache, 2410.05004; XQuant, 2508.10395), or, where nothing that is
not linear stands between, never: the query goes through their maps instead ("absorbed", as in DeepSeek-V2, 2405.04434).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import codecs, storage
from kvjax.caches.base import Kind, LayerShape, Node, Project, Span, filled_positions
from kvjax.caches.codecs import Segment
from kvjax.caches.dense import dense
from kvjax.checks import either
from kvjax.errors import InputError
from kvjax.ops.attention import EMPTY, View
from kvjax.types import Array


@struct.node
class LayerInput(Node):
    """The layer's input at T positions; slot t keeps position t.

    Args:
        x: a store of one head of width M.
        capacity: T.
        chained: whether the input is what the layer below, or the embedding, gave (`LayerShape.chained`).
    """

    x: Any
    capacity: int = struct.static()
    chained: bool = struct.static()

    @property
    def patches(self) -> bool:
        """See `Node`."""
        return self.max_rewind is None

    @property
    def shifts(self) -> bool:
        """See `Node`."""
        return True

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        """See `Node`. All that is kept is projected, the new tokens too: what attention reads does not depend on how
        the text was split into calls."""
        node = self.replace(x=self.x.write(h[:, :, None], self._slots(span), span.positions))
        kept = node.x.read(filled_positions(self.capacity, span.end), span.end)
        return tuple(_projected(part, h, project, span) for part in kept), node

    def _slots(self, span: Span) -> Array:
        return jnp.where(span.kept(), span.order, self.capacity)

    def recorded(self, site: str) -> Any:
        """See `Node`."""
        return self.x if site == "input" or (site == "below" and self.chained) else None

    def resize(self, capacity: int, shared: Any) -> Any:
        """See `Node`."""
        return self._each(lambda store: store.resize(capacity)).replace(capacity=capacity)

    def move(self, source: Array, target: Array, shared: Any) -> Any:
        """See `Node`."""
        return self._each(lambda store: store.move(source, target))

    def _each(self, f: Callable[[Any], Any]) -> Any:
        return self._parts(f, f)

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """See `Node`; what is kept, one head of width M, in the place of keys and of values."""
        x = self.x.unpacked(lengths)
        return x, x, filled_positions(self.capacity, lengths)


def _projected(part: Segment, h: Array, project: Project, span: Span) -> View:
    """Keys and values of one segment of kept inputs; only the segment is read, so that no slot is projected twice."""
    b, t = h.shape[0], part.positions.shape[-1]
    # [B, T, M]: the same bytes as stored
    x = part.decoded(h.dtype).reshape(b, t, -1)
    order = jnp.broadcast_to(jnp.where(part.positions == EMPTY, 0, part.positions), (b, t))
    k, v = project.kv(x, span.text(order))
    return View(storage.pack(k), storage.pack(v), part.positions)


@struct.node
class AbsorbedInput(LayerInput):
    """The same with the norm's factor of each position: keys and values are never made.

    Args:
        factor: a store of one number a slot; 1 where no norm stands before the projections, NaN where the input was
            not finite.
    """

    factor: Any = None

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        """See `Node`."""
        if project.absorb is None:
            raise InputError(f"caches.layer_input(absorb=True): {REASON}")
        maps, factor = project.absorb(h)
        # What is not finite shows in the scores of those who see it: in the values 0 · NaN would leak to all.
        good = jnp.all(jnp.isfinite(h) if self.reach is None else jnp.abs(h) <= self.reach, axis=-1)
        factor = jnp.where(good, 1.0 if factor is None else factor, jnp.nan)
        slots, h = self._slots(span), jnp.where(good[..., None], h, 0)
        node = self.replace(
            x=self.x.write(h[:, :, None], slots, span.positions),
            factor=self.factor.write(factor[:, :, None], slots, span.positions),
        )
        held = filled_positions(self.capacity, span.end)
        (x,), (kept,) = node.x.read(held, span.end), node.factor.read(held, span.end)
        factor, values = kept.data, jnp.where(jnp.isnan(kept.data), 0, kept.data)
        if x.scale is not None:
            factor, values = factor * x.scale, values * x.scale
        view = View(x.data, x.data, x.positions, factor, values, absorb=maps, k_decode=x.decode, v_decode=x.decode)
        return (view,), node


REASON = "a rotation, or a norm of each key, stands between the layer's input and its keys; leave absorb out"


@dataclasses.dataclass(frozen=True)
class LayerInputKind(Kind):
    """See `layer_input`."""

    absorb: bool
    store: Any

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        """See `Kind`.

        Raises:
            InputError: the layer does not show its input, or does not allow absorption.
        """
        if shape.width is None:
            raise InputError(
                f"caches.layer_input: layer {shape.index} does not show its input; "
                "give kvjax.attend h, and kv as a function of it"
            )
        x = self.store.empty(batch, 1, capacity, shape.width, shape.dtype)
        if not self.absorb:
            return LayerInput(x, capacity, shape.chained)
        if not shape.absorbs:
            raise InputError(f"caches.layer_input(absorb=True): layer {shape.index}: {REASON}")
        if not one_factor(x):
            raise InputError(f"caches.layer_input(absorb=True): a store of {self.store} has no one factor a position")
        precise = jnp.promote_types(jnp.float32, shape.dtype)
        factor = codecs.plain().empty(batch, 1, capacity, None, precise)
        return AbsorbedInput(x, capacity, shape.chained, factor)

    def remark(self, shapes: tuple[LayerShape, ...]) -> str:
        """See `Kind`."""
        own, kv = (_slot_nbytes(kind, shapes) for kind in (self, dense(store=self.store)))
        verdict = "as large as" if own == kv else ("LARGER than" if own > kv else "smaller than")
        return f"layer inputs {own:,} bytes a token, {verdict} keys and values ({kv:,}; {own / kv:.3g} times)"


def one_factor(store: Any) -> bool:
    """Whether what a store keeps is one buffer with at most one factor a slot: what absorbed attention can read."""

    def arrays() -> list[tuple[Array, Array | None]]:  # not how they are decoded, which is no array
        return [(x.data, x.scale) for x in store.read(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32))]

    kept = jax.eval_shape(arrays)
    return len(kept) == 1 and (kept[0][1] is None or kept[0][1].ndim < kept[0][0].ndim)


def _slot_nbytes(kind: Kind, shapes: tuple[LayerShape, ...]) -> int:
    made = jax.eval_shape(lambda: [kind.init(shape, 1, 1024) for shape in shapes])
    bits = sum(math.prod(x.shape) * jnp.iinfo(x.dtype).bits for x in jax.tree.leaves(made) if x.dtype.name == "int4")
    return (bits // 8 + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made) if x.dtype.name != "int4")) // 1024


def layer_input(*, absorb: bool = False, store: Any = None) -> LayerInputKind:
    """The residual stream before the norm, M numbers a position, where K/V keeps 2 · K · D.

    That is half of K/V where every query head has keys of its own, and more than K/V where many share them:
    M / (2 · K · D) is 2 for Llama-3-8B. `kvjax info` says which, and so does the kind's `remark(model.layer_shapes())`.
    Every step projects all positions again, 4 · M · K · D FLOPs each. A text can be taken up again at any layer
    (`kvjax.resume`).

    Args:
        absorb: put the query through the key and value maps instead, so that nothing is projected again: H times the
            FLOPs of attention at M in place of D. The norm's gain goes into the maps and its factor is kept beside each
            position. Exact; only where neither a rotation nor a norm of each key stands between.
        store: a codec, or a floating dtype; None stores what the model computes in.
    """
    return LayerInputKind(either("caches.layer_input: absorb", absorb), codecs.as_codec(store))


__all__ = ["layer_input", "LayerInput", "AbsorbedInput", "LayerInputKind", "one_factor"]
