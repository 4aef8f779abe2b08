"""How a mutant breaks a plan: its nodes, and what layers share, wrapped; what passes through is spoilt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import caches, struct
from kvjax.caches.base import SOURCE, Kind, LayerShape, Node, Project, Shared, Span
from kvjax.caches.cross import CrossKind
from kvjax.loops.decode import VALUE
from kvjax.ops.attention import View
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
        shares: whether layers have something in common that a rewind gives back.
        floats: whether all buffers that keys and values are read from are floating.
        sources: rows of the source; 0 where there is none.
        shared: whether several rows read one source.
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
    sources: int
    shared: bool


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
        grown: what becomes of a node that was resized.
        read: `(views) -> views`, what cross-attention reads of the source.
        entry: by the name of an operation, `(entry, *arguments) -> entry` in its place, for what is kept of the source;
            flags are lost.
        seen_by: the check that most likely sees it, by name; tried first.
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
    grown: Callable[[Any], Any] | None = None
    read: Callable[[tuple[View, ...]], tuple[View, ...]] | None = None
    entry: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    seen_by: str = "same_logits"

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
        cross = MutatedCross(case.cross or caches.cross(), self) if case.config.encoder else None
        name = f"{case.name}, {self.name}"
        return dataclasses.replace(case, name=name, plan=self(case.plan), scarce=scarce, cross=cross)


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
        inner = self.inner.resize(capacity, shared)
        return self.replace(inner=inner if self.mutant.grown is None else self.mutant.grown(inner), capacity=capacity)

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
class Wrapping(Shared):
    """An entry around another, of which it has everything that it does not say itself."""

    inner: Any
    mutant: Mutant = struct.static()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


@struct.node
class MutatedShared(Wrapping):
    """What layers have in common, broken by a mutant."""

    def _ask(self, asked: tuple[Any, Array]) -> tuple[Any, Array]:
        entry, flags = asked
        return self.replace(inner=entry), jnp.zeros_like(flags) if self.mutant.unlimited else flags

    def reserve(self, span: Span) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask(self.inner.reserve(span))

    def claim(self, places: Array) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask(self.inner.claim(places))

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


@dataclasses.dataclass(frozen=True)
class MutatedCross(CrossKind):
    """Keeps of a source what another word keeps, broken."""

    inner: Any
    mutant: Mutant

    def of(self, source: Any, share: int, ask: Any) -> Any:
        """See `CrossKind`."""
        return MutatedSource(self.inner.of(source, share, ask), self.mutant)


@struct.node
class MutatedSource(Wrapping):
    """What is kept of a source, broken."""

    def _ask(self, name: str, *arguments: Any) -> tuple[Any, Array]:
        entry, flags = getattr(self.inner, name)(*arguments)
        if name in self.mutant.entry:
            entry, flags = self.mutant.entry[name](self.inner, *arguments), jnp.zeros_like(flags)
        return self.replace(inner=entry), flags

    def views(self, layer: int, project: Project) -> tuple[View, ...]:
        """What cross-attention reads."""
        views = self.inner.views(layer, project)
        return views if self.mutant.read is None else self.mutant.read(views)

    def reserve(self, span: Span) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask("reserve", span)

    def take(self, rows: Array) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask("take", rows)

    def reorder(self, beams: Array) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask("reorder", beams)

    def fork(self, rows: Array, copies: int) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask("fork", rows, copies)

    def alike(self, other: Any) -> tuple[Any, Any]:
        """See `Shared`."""
        mine, its = self.inner.alike(other.inner)
        return self.replace(inner=mine), other.replace(inner=its)

    def join(self, other: Any) -> tuple[Any, Array]:
        """See `Shared`."""
        return self._ask("join", other.inner)


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
    lengths = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    given = jax.make_jaxpr(lambda shared, n: [entry.rewind(n)[0] for entry in shared.values()])(cache.shared, lengths)
    source = cache.shared.get(SOURCE)
    windows = [min((w for w in (view.window, own) if w is not None), default=None) for view, own in seen]
    return Facts(
        keeps=case.keeps,
        exact=case.exact,
        slack=case.slack is not None or case.scarce is not None,
        scales=any(view.k_scale is not None and view.k_scale.size for view, _ in seen),
        window=any(window is not None for window in windows),
        narrows=any(view.window is not None and (own is None or view.window < own) for view, own in seen),
        turned=any(turned) and isinstance(case.config.positions, Rope),
        moves=bool(cache.shared.keys() - {SOURCE})
        or bool(moved(cache.layers, jax.ShapeDtypeStruct((BATCH,), jnp.int32)).jaxpr.eqns),
        shares=any(out not in given.jaxpr.invars for out in given.jaxpr.outvars),
        floats=all(jnp.issubdtype(view.k.dtype, jnp.floating) for view, _ in seen),
        sources=0 if source is None else source.lengths.shape[0],
        shared=case.share > 1,
    )


__all__ = ["Mutant", "Facts", "facts_of", "Mutated", "MutatedShared", "MutatedKind", "MutatedCross"]
