"""What is new in one call: which tokens, where they stand, what they may see of each other, which of them are kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax import struct
from kvjax.ops.attention import EMPTY, View
from kvjax.types import Array


@struct.node
class Span(struct.Value):
    """The new tokens of one call.

    Args:
        start: `[B]` int32, tokens a row already has.
        valid: `[B]` int32, how many of the S new ones are real; the others are padding and are not kept.
        positions: `[B, S]` int32, where each new token stands in the text: rotation, learned tables and masks read it.
        ancestors: `[B, S, S]` bool or None: which new tokens each new token may see, itself included (tree drafts,
            where siblings share a position); None is causal order.
        base: `[B]` or `[1]` int32 or None, tokens before the places that a node counts (a shared prefix).
        changes: `[B, S]` bool or None, which of the new tokens are kept in the place of what is there; the others stand
            there already and are fed for what they see, so that it stays bitwise as it is. None is all that are real.
    """

    start: Array
    valid: Array
    positions: Array
    ancestors: Array | None = None
    base: Array | None = None
    changes: Array | None = None

    @property
    def end(self) -> Array:
        """`[B]` int32, tokens a row has afterwards."""
        return self.start + self.valid

    @property
    def order(self) -> Array:
        """`[B, S]` int32, the place of each new token in the order of feeding; equal to positions but in a tree."""
        steps = jnp.arange(self.positions.shape[1], dtype=jnp.int32)
        return self.start[:, None] + steps[None, :]

    def real(self) -> Array:
        """`[B, S]` bool, which new tokens are not padding."""
        steps = jnp.arange(self.positions.shape[1], dtype=jnp.int32)
        return steps[None, :] < self.valid[:, None]

    def kept(self) -> Array:
        """`[B, S]` bool, which new tokens are to be written."""
        return self.real() if self.changes is None else self.real() & self.changes

    def text(self, order: Array) -> Array:
        """`[B, T]`, where tokens stand in the text, by their place in the order of feeding; the same but in a tree and
        after a base."""
        old = order if self.base is None else jnp.where(order == EMPTY, EMPTY, order + self.base[:, None])
        if self.ancestors is None:
            return old
        new, inside = self._new(order)
        return jnp.where(inside, jnp.take_along_axis(self.positions, new, axis=1), old)

    def tree_view(self, view: View) -> View:
        """A view whose positions are places in the order of feeding, with positions of the text and a tree's mask."""
        if self.ancestors is None:
            return view
        span = self if view.pages is None else self._rows(view.pages[0].reshape(-1))
        order = _for_rows(view.positions, span.start.shape[0])
        seen = span.seen(order)
        return view.replace(positions=span.text(order), visible=seen if view.visible is None else seen & view.visible)

    def seen(self, order: Array) -> Array:
        """`[B, S, T]` bool, what a tree lets each new token see of places in the order of feeding: what was there
        before, and of the new ones its ancestors."""
        assert self.ancestors is not None
        new, inside = self._new(order)
        at = jnp.broadcast_to(new[:, None, :], (*self.ancestors.shape[:2], new.shape[1]))
        return jnp.take_along_axis(self.ancestors, at, axis=2) | ~inside[:, None, :]

    def _new(self, order: Array) -> tuple[Array, Array]:
        """For places `[B, T]`: which of the new tokens each is, clipped, and whether it is one."""
        new = order - self.start[:, None]
        size = self.positions.shape[1]
        return jnp.clip(new, 0, size - 1), (new >= 0) & (new < size)

    def _rows(self, rows: Array) -> Span:
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), self)


@struct.node
class Tree(struct.Value):
    """How the new tokens of one call hang together when they are drafts of several continuations.

    Args:
        depths: `[B or 1, S]` int32, how far below the text each token stands; its parent's and one.
        ancestors: `[B or 1, S, S]` bool, which tokens each may see, itself included.
    """

    depths: Array
    ancestors: Array


def _for_rows(positions: Array, batch: int) -> Array:
    """`[R, T]` for a view's rows, as `[B, T]`."""
    return positions if positions.shape[0] == batch else jnp.repeat(positions, batch // positions.shape[0], axis=0)


__all__ = ["Span", "Tree"]
