"""Negative controls: each mutant breaks any plan in one small way, and the contract suite must see it.

A mutant is a function from a plan to a broken plan. It wraps the nodes, and what layers share, of whatever kinds the
plan has, and spoils what passes through: where tokens go, what is read, which rows move. `mutant.applies(case)` says
where it changes anything at all: there is no scale in a plain store, no window on a layer that sees everything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax import struct
from kvjax.caches.base import Kind, LayerShape, Node, Project, Shared, Span
from kvjax.errors import KvjaxError
from kvjax.loops.decode import VALUE
from kvjax.ops.attention import EMPTY, View
from kvjax.ops.positions import Rope
from kvjax.testing.cases import BATCH, PROMPTS, Case, prompt_ids
from kvjax.types import Array


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a case has that a mutant may break.

    Args:
        keeps, exact: as the case says.
        slack: whether there is a limit on rewinding, or a plan that has too little for all rows.
        scales: whether a view decodes with a scale.
        window: whether some layer has one; `narrows`: whether a view's window is narrower than the layer's own.
        turned: whether keys are turned to positions when they are projected.
        moves: whether taking rows changes a node.
        shares: whether layers have something in common.
        floats: whether all buffers that keys and values are read from are floating.
    """

    keeps: bool
    exact: bool
    slack: bool
    scales: bool
    window: bool
    narrows: bool
    turned: bool
    moves: bool
    shares: bool
    floats: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Mutant:
    """What is broken; None leaves it as it is. Calling it with a plan gives the broken plan.

    Args:
        name: for people.
        needs: `Facts -> bool`, where it applies.
        span: `(span, capacity) -> span`, the new tokens as the node sees them.
        project: what the layer can do, as the node sees it.
        views: `(views, span, window) -> views`, what attention reads; `window` is the layer's own.
        rows: `(node, rows) -> rows or None`, the rows that a `take` takes; None leaves the node as it is.
        drift: `(end, lengths) -> [B]`, by how much the node's own count is off after a rewind from `end`.
        after: what becomes of a node's count that was rewound.
        extended: what becomes of it after a call.
        uses_up: whether rows that are taken use the node's buffers up.
        unlimited: whether the node claims that it can be rewound any number of tokens, and flags of what is shared are
            lost.
        lengths: what the entries that layers share are told to rewind to.
    """

    name: str
    needs: Callable[[Facts], bool] = lambda facts: True
    span: Callable[[Span, int], Span] | None = None
    project: Callable[[Project], Project] | None = None
    views: Callable[[tuple[View, ...], Span, int | None], tuple[View, ...]] | None = None
    rows: Callable[[Any, Any], Any] | None = None
    drift: Callable[[Array, Array], Array] | None = None
    after: Callable[[Array], Array] | None = None
    extended: Callable[[Array], Array] | None = None
    uses_up: bool = False
    unlimited: bool = False
    lengths: Callable[[Array], Array] | None = None

    def __call__(self, plan: Any) -> Any:
        """A plan of the same layers, broken."""
        if isinstance(plan, tuple | list):
            return tuple(MutatedKind(kind, self) for kind in plan)
        return MutatedKind(plan, self)

    def applies(self, case: Case) -> bool:
        """Whether it changes anything that a plan of the case does."""
        return self.needs(facts_of(case))

    def of(self, case: Case) -> Case:
        """The case with its plans broken."""
        scarce = None if case.scarce is None else self(case.scarce)
        return dataclasses.replace(case, name=f"{case.name}, {self.name}", plan=self(case.plan), scarce=scarce)


@dataclasses.dataclass(frozen=True)
class MutatedKind(Kind):
    """Makes the nodes and shared entries of another kind, broken."""

    inner: Any
    mutant: Mutant

    def of(self, shape: LayerShape) -> Kind:
        """See `Kind`."""
        return MutatedKind(self.inner.of(shape), self.mutant)

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        """See `Kind`."""
        count = jnp.zeros((batch,), jnp.int32)
        inner = self.inner.init(shape, batch, capacity)
        return Mutated(inner, count, jnp.zeros((batch,), jnp.int32), capacity, shape.window, self.mutant)

    def shared(self, batch: int, capacity: int) -> dict[str, Any]:
        """See `Kind`."""
        made = self.inner.shared(batch, capacity).items()
        return {name: MutatedShared(entry, self.mutant) for name, entry in made}


@struct.node
class Mutated(Node):
    """A node of any kind, broken by a mutant.

    Args:
        inner: the node.
        end: `[B]` int32, tokens of each row after the last call.
        off: `[B]` int32, by how much the node believes to have more; 0 but for mutants that rewind wrongly.
        capacity: T.
        window: the layer's own.
        mutant: what is broken.
    """

    inner: Any
    end: Array
    off: Array
    capacity: int = struct.static()
    window_of_layer: int | None = struct.static()
    mutant: Mutant = struct.static()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def replays(self) -> bool:  # type: ignore[override]
        """That of the node inside."""
        return self.inner.replays

    @property
    def max_rewind(self) -> int | None:  # type: ignore[override]
        """That of the node inside."""
        return None if self.mutant.unlimited else self.inner.max_rewind

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        """See `Node`."""
        broken, end = self.mutant, span.end
        span = span.replace(start=span.start + self.off)
        seen = span if broken.span is None else broken.span(span, self.capacity)
        project = project if broken.project is None else broken.project(project)
        views, inner = self.inner.extend(h, project, seen, shared)
        views = views if broken.views is None else broken.views(views, span, self.window_of_layer)
        return views, self.replace(inner=inner, end=end if broken.extended is None else broken.extended(end))

    def record(self, site: str, x: Array, span: Span) -> Any:
        """See `Node`."""
        seen = span if self.mutant.span is None else self.mutant.span(span, self.capacity)
        return self.replace(inner=self.inner.record(site, x, seen))

    def recorded(self, site: str) -> Any:
        """See `Node`."""
        return self.inner.recorded(site)

    def resize(self, capacity: int, shared: Any) -> Any:
        """See `Node`."""
        return self.replace(inner=self.inner.resize(capacity, shared), capacity=capacity)

    def rewind(self, lengths: Array, before: Any, shared: Any) -> Any:
        """See `Node`."""
        off, end = self.off, self.end
        if self.mutant.drift is not None:
            off = self.mutant.drift(end + off, lengths)
        if self.mutant.after is not None:
            end = self.mutant.after(end)
        return self.replace(inner=self.inner.rewind(lengths, before, shared), off=off, end=jnp.minimum(end, lengths))

    def take(self, rows: Array, before: Any, shared: Any) -> Any:
        """See `Node`."""
        return self._rows(rows, self.inner.take, before, shared)

    def reorder(self, beams: Array, before: Any, shared: Any) -> Any:
        """See `Node`."""
        return self._rows(beams, self.inner.reorder, before, shared)

    def _rows(self, rows: Array, how: Any, before: Any, shared: Any) -> Any:
        taken = rows if self.mutant.rows is None else self.mutant.rows(self.end, rows)
        pick = lambda x: jnp.take(x, rows, axis=0, mode="clip")  # noqa: E731
        made = self.replace(inner=how(taken, before, shared), end=pick(self.end), off=pick(self.off))
        if self.mutant.uses_up and not isinstance(rows, jax.core.Tracer):
            jax.block_until_ready(made)
            shared_with = {id(x) for x in jax.tree.leaves(made)}
            for leaf in jax.tree.leaves(self.inner):
                if id(leaf) not in shared_with:
                    leaf.delete()
        return made

    def join(self, other: Any) -> Any:
        """See `Node`."""
        both = lambda a, b: jnp.concatenate([a, b])  # noqa: E731
        return self.replace(
            inner=self.inner.join(other.inner), end=both(self.end, other.end), off=both(self.off, other.off)
        )

    def move(self, source: Array, target: Array, shared: Any) -> Any:
        """See `Node`."""
        return self.replace(inner=self.inner.move(source, target, shared))

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """See `Node`."""
        return self.inner.contents(lengths + self.off, shared)


@struct.node
class MutatedShared(Shared):
    """What layers have in common, broken by a mutant."""

    inner: Any
    mutant: Mutant = struct.static()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _ask(self, asked: tuple[Any, Array]) -> tuple[Any, Array]:
        entry, flags = asked
        return self.replace(inner=entry), jnp.zeros_like(flags) if self.mutant.unlimited else flags

    def reserve(self, span: Span) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask(self.inner.reserve(span))

    def own(self, places: Array) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask(self.inner.own(places))

    def resize(self, capacity: int) -> Any:
        """See `Shared`."""
        return self.replace(inner=self.inner.resize(capacity))

    def rewind(self, lengths: Array) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask(self.inner.rewind(lengths if self.mutant.lengths is None else self.mutant.lengths(lengths)))

    def release(self, rows: Array) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask(self.inner.release(rows))

    def take(self, rows: Array) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask(self.inner.take(rows))

    def reorder(self, beams: Array) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask(self.inner.reorder(beams))

    def join(self, other: Any) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask(self.inner.join(other.inner))


# ---------------------------------------------------------------- what a case has


@functools.cache
def facts_of(case: Case) -> Facts:
    """Looks at a case's views and projections while a prefill is traced; computes nothing."""
    seen: list[tuple[View, int | None]] = []
    turned: list[bool] = []

    def look(views: tuple[View, ...], span: Span, window: int | None) -> tuple[View, ...]:
        seen.extend((view, window) for view in views)
        return views

    def listen(project: Project) -> Project:
        def kv(h: Any, positions: Any) -> tuple[Array, Array]:
            turned.append(positions is not None)
            return project.kv(h, positions)

        return dataclasses.replace(project, kv=kv)

    probe, model = case.but(Mutant("probe", views=look, project=listen)(case.plan)), case.model
    cache = jax.eval_shape(lambda: probe.empty_for(model))
    jax.eval_shape(VALUE.prefill, model, cache, prompt_ids(), PROMPTS)
    moved = jax.make_jaxpr(lambda nodes, rows: [node.inner.take(rows, cache.shared, cache.shared) for node in nodes])
    windows = [min((w for w in (view.window, own) if w is not None), default=None) for view, own in seen]
    return Facts(
        keeps=case.keeps,
        exact=case.exact,
        slack=case.slack is not None or case.scarce is not None,
        scales=any(view.k_scale is not None and view.k_scale.size for view, _ in seen),
        window=any(window is not None for window in windows),
        narrows=any(view.window is not None and (own is None or view.window < own) for view, own in seen),
        turned=any(turned) and isinstance(case.config.positions, Rope),
        moves=bool(cache.shared) or bool(moved(cache.layers, jax.ShapeDtypeStruct((BATCH,), jnp.int32)).jaxpr.eqns),
        shares=bool(cache.shared),
        floats=all(jnp.issubdtype(view.k.dtype, jnp.floating) for view, _ in seen),
    )


# ---------------------------------------------------------------- the mutants


def _shift(start: int = 0, valid: int = 0) -> Callable[[Span, int], Span]:
    return lambda span, capacity: span.replace(start=span.start + start, valid=span.valid + valid)


def _clamped(span: Span, capacity: int) -> Span:
    # What `dynamic_update_slice` does with a start past the end.
    s = span.positions.shape[1]
    lost = (span.valid == 0) & (span.start + s > capacity)
    start = jnp.where(lost, jnp.maximum(capacity - s, 0), span.start)
    return span.replace(start=start, valid=jnp.where(lost, s, span.valid))


def _each_view(change: Callable[[View, Span, int | None], View]) -> Callable[..., tuple[View, ...]]:
    return lambda views, span, window: tuple(change(view, span, window) for view in views)


def _where_held(view: View, positions: Array) -> View:
    return view.replace(positions=jnp.where(view.positions == EMPTY, EMPTY, positions))


def _stale(view: View, span: Span, window: int | None) -> View:
    start = span.start[:, None]
    if view.pages is not None:
        reader = view.pages[0].reshape(view.positions.shape[0], -1)[:, 0]
        start = jnp.take(span.start, jnp.maximum(reader, 0))[:, None]
    elif view.positions.shape[0] != start.shape[0]:
        return view
    return view.replace(positions=jnp.where(view.positions >= start, EMPTY, view.positions))


def _window(by: int) -> Callable[[View, Span, int | None], View]:
    def change(view: View, span: Span, window: int | None) -> View:
        own = [w for w in (view.window, window) if w is not None]
        return view.replace(window=min(own) + by) if own else view

    return change


def _neighbours_scale(view: View, span: Span, window: int | None) -> View:
    if view.k_scale is None:
        return view
    axis = -2 if view.k_scale.ndim == view.k.ndim else -1
    return view.replace(k_scale=jnp.roll(view.k_scale, 1, axis=axis))


def _unused_seen(view: View, span: Span, window: int | None) -> View:
    return view.replace(positions=jnp.where(view.positions == EMPTY, 0, view.positions))


def _without_gradient(view: View, span: Span, window: int | None) -> View:
    return view.replace(k=lax.stop_gradient(view.k), v=lax.stop_gradient(view.v))


def _turned(by: int) -> Callable[[Project], Project]:
    def change(project: Project) -> Project:
        kv = project.kv
        return dataclasses.replace(project, kv=lambda h, at: kv(h, None if at is None else at + by))

    return change


def _left_where_they_are(end: Array, rows: Array) -> Array:
    return jnp.arange(rows.shape[0], dtype=jnp.int32) % end.shape[0]


def _under_jit(end: Array, rows: Array) -> Array:
    return jnp.roll(rows, 1) if isinstance(rows, jax.core.Tracer) else rows


MUTANTS = (
    Mutant("start + 1", span=_shift(start=1)),
    Mutant("start - 1", span=_shift(start=-1)),
    Mutant("valid + 1", lambda facts: facts.keeps, span=_shift(valid=1)),
    Mutant("valid - 1", span=_shift(valid=-1)),
    Mutant("write clamped", lambda facts: facts.keeps, span=_clamped),
    Mutant("stale positions", views=_each_view(_stale)),
    Mutant("mask < for <=", views=_each_view(lambda view, span, _: _where_held(view, view.positions + 1))),
    Mutant("unused slots seen", views=_each_view(_unused_seen)),
    Mutant("window + 1", lambda facts: facts.narrows, views=_each_view(_window(1))),
    Mutant("window - 1", lambda facts: facts.window, views=_each_view(_window(-1))),
    Mutant("key position + 1", lambda facts: facts.turned, project=_turned(1)),
    Mutant("key position - 1", lambda facts: facts.turned, project=_turned(-1)),
    Mutant("a neighbour's scale", lambda facts: facts.scales, views=_each_view(_neighbours_scale)),
    Mutant("gradient stopped", lambda facts: facts.exact and facts.floats, views=_each_view(_without_gradient)),
    Mutant("rewind a no-op", drift=lambda end, lengths: end - lengths),
    Mutant("rewind off by one", drift=lambda end, lengths: (end > lengths).astype(jnp.int32)),
    Mutant("another dtype after a call", extended=lambda end: end.astype(jnp.float32)),
    Mutant("another dtype after a rewind", after=lambda end: end.astype(jnp.float32)),
    Mutant("take = identity", lambda facts: facts.moves, rows=_left_where_they_are),
    Mutant("rows swapped", lambda facts: facts.moves, rows=lambda end, rows: jnp.roll(rows, 1)),
    Mutant("rows swapped under jit", lambda facts: facts.moves, rows=_under_jit),
    Mutant("take uses its cache up", lambda facts: facts.moves, uses_up=True),
    Mutant("flag never set", lambda facts: facts.slack, unlimited=True),
    Mutant("a page released too early", lambda facts: facts.shares, lengths=lambda lengths: lengths // 2),
)
"""Every mutant, each wrong in one way."""


NOTHING = Mutant("nothing")
"""Breaks nothing: every check must pass it, or what kills the mutants is that they are wrapped."""


def killers(case: Case, checks: Any, mutants: tuple[Mutant, ...] = MUTANTS) -> dict[str, str | None]:
    """Which check kills each mutant that applies to a case: the first one's name, or None if the mutant survives all.

    Args:
        case: right, or every mutant dies of what is wrong already.
        checks: in the order in which they are tried.
        mutants: to be tried.
    """
    applied = [mutant for mutant in mutants if mutant.applies(case)]
    return {
        mutant.name: next((check.__name__ for check in checks if kills(check, mutant.of(case))), None)
        for mutant in applied
    }


def kills(check: Callable[[Case], object], broken: Case) -> bool:
    """Whether a check sees that a case is broken. Errors that are no answer, such as JAX's own, are not caught."""
    try:
        check(broken)
    except (AssertionError, KvjaxError):
        return True
    except RuntimeError as error:
        if "deleted" not in str(error):
            raise
        return True
    return False


__all__ = ["MUTANTS", "Mutant", "Facts", "facts_of", "NOTHING", "killers", "kills"]
