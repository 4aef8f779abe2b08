"""Plans: which kind each layer gets. A plan is one kind for all layers, or a tuple with one kind a layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kvjax.caches.base import Kind, LayerShape
from kvjax.caches.dense import dense
from kvjax.caches.ring import ring
from kvjax.config import Config
from kvjax.errors import InputError

SLACK = 16
"""Tokens that a local layer's ring can be rewound under the default plan."""


def default(config: Config) -> tuple[Any, ...]:
    """The sensible plan: a ring with a slack of 16 for layers with a window, dense for those that see everything."""
    return tuple(for_window(window) for window in config.windows)


def for_window(window: int | None) -> Any:
    """The default kind for a layer whose queries see `window` positions, or everything."""
    return dense() if window is None else ring(window, slack=SLACK)


@dataclasses.dataclass(frozen=True)
class PerLayer(Kind):
    """See `per_layer`."""

    local: Kind
    full: Kind

    def of(self, shape: LayerShape) -> Kind:
        """See `Kind`."""
        return (self.full if shape.window is None else self.local).of(shape)


def per_layer(*, local: Any, full: Any) -> PerLayer:
    """One kind for the layers that have a window, another for those that see everything.

    Args:
        local: a kind, such as `caches.ring(1024)`.
        full: a kind, such as `caches.dense(store=codecs.int8())`.

    Raises:
        InputError: one of them is no kind.
    """
    return PerLayer(_checked(local), _checked(full))


def init_layers(plan: Any, shapes: tuple[LayerShape, ...], batch: int, capacity: int) -> tuple[Any, ...]:
    """Empty nodes for layers of these shapes.

    Raises:
        InputError: `plan` is no kind, or a tuple of another length than the layers.
    """
    kinds = kinds_of(plan, shapes)
    return tuple(kind.init(shape, batch, capacity) for kind, shape in zip(kinds, shapes, strict=True))


def init_shared(plan: Any, shapes: tuple[LayerShape, ...], batch: int, capacity: int) -> dict[str, Any]:
    """What the plan's kinds have in common: one entry a name, whoever asks for it.

    Raises:
        InputError: two kinds ask for different entries under one name.
    """
    made: dict[str, Any] = {}
    for kind in dict.fromkeys(kinds_of(plan, shapes)):
        for name, entry in kind.shared(batch, capacity).items():
            have = made.get(name, entry)
            made[name] = have.beside(entry)
            if _outline(made[name]) != _outline(entry.beside(have)):
                raise InputError(f"plan: two kinds ask for different shared {name!r}; give them the same sizes")
    return made


def _outline(entry: Any) -> Any:
    leaves, structure = jax.tree.flatten(entry)
    return structure, [(x.shape, x.dtype) for x in leaves]


def kinds_of(plan: Any, shapes: tuple[LayerShape, ...]) -> tuple[Kind, ...]:
    """The kind that a plan gives to each layer.

    Raises:
        InputError: `plan` is no kind, or a tuple of another length than the layers.
    """
    kinds = tuple(plan) if isinstance(plan, tuple | list) else (plan,) * len(shapes)
    if len(kinds) != len(shapes):
        raise InputError(f"plan: {len(kinds)} kinds for {len(shapes)} layers")
    return tuple(_checked(kind).of(shape) for kind, shape in zip(kinds, shapes, strict=True))


def _checked(kind: Any) -> Kind:
    if not isinstance(kind, Kind):
        raise InputError(f"plan: {kind!r} is no kind of cache; call it, as in caches.dense()")
    return kind


__all__ = ["default", "for_window", "per_layer", "init_layers", "init_shared", "kinds_of", "SLACK"]
