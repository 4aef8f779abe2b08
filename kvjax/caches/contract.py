"""The contract of a cache: the node of a layer, what layers share, and what passes between a layer and its node.

A layer asks its node to take in S new tokens and to hand back what to attend over:

    extend(h, project, span, shared) -> (views, node)
    record(site, x, span) -> node             default: itself; a trace needs it
    resize(capacity), rewind(lengths), take(rows), reorder(beams), join(other), move(source, target)

What layers have in common lies once in `Cache.shared`: named `Shared` entries, asked once a call (`reserve`) before the
layers run, and moved with the same operations. Nodes and entries are frozen pytrees; nothing here is changed in place.
`docs/decisions.md` says what forced each part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import words
from kvjax.caches.codecs import Segment, Store
from kvjax.caches.entry import Shared
from kvjax.caches.span import Span, Tree
from kvjax.errors import InputError
from kvjax.ops.attention import EMPTY, Absorb, View
from kvjax.types import Array


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What a kind must know of a layer to make its node.

    Args:
        kv_heads: K.
        key_dim, value_dim: widths of one key and one value.
        dtype: what the layer computes in.
        window: the layer's own window, or None.
        width: M, of the layer's input; None where the model does not show it.
        index, count: which layer it is, and of how many.
        sites: names under which the layer shows its stream (`OpenCache.record`).
        all_sites: those of all layers.
        stream: M, of what it shows there.
        chained: whether the layer's input is what was shown last: `after_ffn` of the layer below, or `embedding`.
        absorbs: whether keys and values are linear in the layer's input (`Project.absorb`).
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: Any
    window: int | None = None
    width: int | None = None
    index: int = 0
    count: int = 1
    sites: tuple[str, ...] = ()
    all_sites: tuple[str, ...] = ()
    stream: int | None = None
    chained: bool = False
    absorbs: bool = False


@dataclasses.dataclass(frozen=True)
class Project:
    """What a layer can do for its node: functions, not results.

    Args:
        kv: `(h [B, S, ...], positions [B, S] or None) -> (k [B, S, K, D], v [B, S, K, D])`, keys rotated to
            `positions`, or not rotated when None.
        rotate: `(x [B, S, heads, D], positions [B, S]) -> x`, the layer's rotation.
        absorb: `h [B, S, E] -> (maps, factor [B, S] or None)`: keys and values are linear in `h` times a factor per
            position (the norm's); or None where something stands between, a rotation or a norm of the keys.
    """

    kv: Callable[[Any, Array | None], tuple[Array, Array]]
    rotate: Callable[[Array, Array], Array]
    absorb: Callable[[Any], tuple[Absorb, Array | None]] | None = None


class Node(struct.Value):
    """A layer's part of the cache; a layout derives from it and is a `struct.node`.

    What stands here as a default holds for layouts whose stores have a row for each row of the batch.
    """

    replays = False
    """Whether the layer keeps nothing, so that every call must feed the whole text again."""

    @property
    def patches(self) -> bool:
        """Whether a piece in the middle can be computed anew, or moved, and the rest stays: every position has a
        place of its own, and of the new ones it keeps what `Span.kept` says."""
        return False

    @property
    def shifts(self) -> bool:
        """Whether what it keeps of a token is the same wherever in the text that stands, if only distances matter to
        the model: then `move` can make room in the middle, or close it."""
        return False

    @property
    def max_rewind(self) -> int | None:
        """How many tokens behind the furthest one written a row can be rewound exactly; None is any number."""
        parts = jax.tree.leaves(self, is_leaf=self._is_part)
        limits = [part.max_rewind for part in parts if self._is_part(part) and part.max_rewind is not None]
        return min(limits, default=None)

    @property
    def sees(self) -> int | None:
        """How many positions a query sees of it at most, its own included; None is all that there are."""
        return None

    def again(self, wanted: Any, start: Any, lengths: Any, written: Any, shared: Any) -> Any:
        """From where on a row must be fed again, so that what the layer gives from `wanted` on is right and so is all
        that is kept in the end; 0 if it must be from its beginning.

        Args:
            wanted: `[B]` int32, of a row that has at least a token more.
            start: `[B]` int32, where the text begins to differ from what was fed.
            lengths: `[B]` int32, tokens that a row has in the end.
            written: `[B]` int32, one past the furthest position ever written.
            shared: what layers have in common, by name.
        """
        first, limit = wanted.clip(None, start), self.max_rewind
        return first if limit is None else first * (first >= written - limit)

    @property
    def reach(self) -> float | None:
        """The largest number that every store can keep; None is any that the model computes with."""
        parts = jax.tree.leaves(self, is_leaf=self._is_part)
        limits = [part.reach for part in parts if self._is_part(part) and part.reach is not None]
        return min(limits, default=None)

    @property
    def branches(self) -> bool:
        """Whether it can keep what comes after a text that rows share: it sees nothing but its own tokens."""
        return not self.replays and type(self).record is Node.record

    def onward(self, kind: Any, shared: Any) -> tuple[Any, Any, dict[str, Any]]:
        """The node, its kind and entries, of the rows' own text: itself, where no prefix is shared already."""
        return self, kind, shared

    def word(self, kind: Any, shared: Any) -> Any:
        """The word that makes an empty node like it; `kind` made it, before rows were moved."""
        return kind

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        """Takes in the new tokens; hands back the views to attend over and the node that has them.

        The views' positions are places in the order of feeding (`span.order`, or 0 for what every query sees, such as
        a source text); where a tree makes the text's positions differ, the container turns one into the other.

        Args:
            h: `[B, S, M]`, the layer's input before its norm; only passed on to `project.kv` or stored. None: nothing
                is new to this node (cross-attention while the target grows).
            project: what the layer can do.
            span: the new tokens.
            shared: what layers have in common, by name; read, not changed.
        """
        raise NotImplementedError

    def record(self, site: str, x: Array, span: Span) -> Any:
        """Sees `x[B, S, M]` at a named site of the layer. Most kinds keep nothing of it."""
        return self

    def recorded(self, site: str) -> Any:
        """The store `[B, 1 head, T, M]` of what was recorded at a site, or None. `"input"` is the layer's input, and
        `"below"` too where it is what was shown last (`LayerShape.chained`)."""
        return None

    # In what follows `shared` is as it will be in the same container as the result, `before` as it was.

    def resize(self, capacity: int, shared: Any) -> Any:
        """The same with room for `capacity` tokens."""
        raise NotImplementedError

    def rewind(self, lengths: Array, before: Any, shared: Any) -> Any:
        """Forgets what lies at or past `lengths[B]`, and moves what `shared` has elsewhere than `before`. Kinds whose
        positions follow from lengths have nothing to do."""
        return self

    def loosen(self, tokens: int, lengths: Array, shared: Any) -> Any:
        """The same, so that rows can be rewound by `tokens` once so many more were fed; itself where they can now."""
        return self._parts(lambda store: store, lambda node: node.loosen(tokens, lengths, shared))

    def take(self, rows: Array, before: Any, shared: Any) -> Any:
        """Other rows, `rows[n]` int32; everything moves."""
        return self._parts(lambda store: store.take(rows), lambda node: node.take(rows, before, shared))

    def reorder(self, beams: Array, before: Any, shared: Any) -> Any:
        """Rows exchanged inside a source; what the rows of a source share stays."""
        return self.take(beams, before, shared)

    def join(self, other: Any) -> Any:
        """These rows, then those of a node of another cache with the same plan and capacity."""
        join = lambda a, b: a.join(b)  # noqa: E731
        return self._parts(join, join, other)

    def move(self, source: Array, target: Array, shared: Any) -> Any:
        """What stands at places `source[B, n]` in the order of feeding stands at `target[B, n]` too, as stored; EMPTY
        targets are dropped. The accepted path of a tree of drafts moves up so."""
        raise NotImplementedError

    def turn(self, places: Array, by: Callable[[Array], Array], shared: Any) -> Any:
        """Keys at `places[B, n]` in the order of feeding, if they are kept turned, are turned on: decoded, put through
        `by([B, n, K, D])` and kept again; EMPTY places are dropped."""
        return self

    def _parts(self, on_store: Callable[..., Any], on_node: Callable[..., Any], *others: Any) -> Any:
        """The same with every store and every inner node replaced by what a function makes of it."""

        def one(part: Any, *rest: Any) -> Any:
            return on_node(part, *rest) if isinstance(part, Node) else on_store(part, *rest)

        return jax.tree.map(one, self, *others, is_leaf=self._is_part)

    def _is_part(self, x: Any) -> bool:
        return x is not self and isinstance(x, Store | Node)

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """Keys and values `[B, K, T, D]`, decoded, and the position `[B, T]` of every slot; a copy, for looking."""
        raise NotImplementedError


class Kind:
    """A word of a plan: hashable, makes a layer's node.

    `str` of a kind is the call that makes it, which `caches.parse` reads; a kind of one's own has its `repr`.
    """

    def __str__(self) -> str:
        try:
            return words.text_of(self, words.known())
        except InputError:
            return repr(self)

    def of(self, shape: LayerShape) -> Kind:
        """The kind that this word means for a layer: itself, but for a word that chooses among others."""
        return self

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        """An empty node for `batch` rows and `capacity` tokens."""
        raise NotImplementedError

    def remark(self, shapes: tuple[LayerShape, ...]) -> str:
        """What one should know before choosing it for layers of these shapes; `kvjax info` prints it."""
        return ""

    def shared(self, batch: int, capacity: int) -> dict[str, Any]:
        """Entries of `Cache.shared` that its nodes look for; kinds that name the same one share it."""
        return {}


def filled_positions(capacity: int, end: Array) -> Array:
    """`[B, T]` int32: slot t holds position t where `t < end[b]`, nothing elsewhere."""
    slots = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    return jnp.where(slots < end[:, None], slots, EMPTY)


def views_of(keys: tuple[Segment, ...], values: tuple[Segment, ...], **static: Any) -> tuple[View, ...]:
    """One view for each pair of segments that two stores of one codec gave; `static` are further fields of `View`."""

    def one(k: Segment, v: Segment) -> View:
        more: dict[str, Any] = {"k_zero": k.zero, "v_zero": v.zero, "k_decode": k.decode, "v_decode": v.decode}
        return View(k.data, v.data, k.positions, k.scale, v.scale, visible=k.visible, **more, **static)

    return tuple(one(k, v) for k, v in zip(keys, values, strict=True))


__all__ = ["LayerShape", "Span", "Tree", "Project", "Shared", "Node", "Kind", "filled_positions", "views_of"]
