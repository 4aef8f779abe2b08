"""Broken twins of the library's kinds: negative controls of the hard cases.

None of them is shipped. They run under the library's own attention, forward and loops; `contract.py` compares them
with their references.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from kvjax import struct
from kvjax.caches.base import Kind, LayerShape, Project, Span
from kvjax.caches.dense import Dense
from kvjax.caches.layer_input import AbsorbedInput
from kvjax.caches.sinks import SinksInCache
from kvjax.ops.attention import View

# ---------------------------------------------------------------- broken twins of kinds


@dataclasses.dataclass(frozen=True)
class Twin(Kind):
    """Makes the nodes of another kind, but of a class with the same fields."""

    plan: Kind
    node: type

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        made = self.plan.init(shape, batch, capacity)
        return self.node(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})


@struct.node
class NoFactor(AbsorbedInput):
    """Broken: the norm's factor of each position is left out."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> Any:
        views, node = super().extend(h, project, span, shared)
        return tuple(view.replace(k_scale=None, v_scale=None) for view in views), node


@struct.node
class TextPositions(SinksInCache):
    """Broken: sinks are read at their positions in the text."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> Any:
        (first, *near), node = super().extend(h, project, span, shared)
        return (first.replace(query_positions=None), *near), node


@struct.node
class NotTurned(Dense):
    """Broken: keys are kept as they are projected, and read as if they were turned."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        views, node = super().extend(h, project, span, shared)
        return tuple(view.replace(rotated=True) for view in views), node
