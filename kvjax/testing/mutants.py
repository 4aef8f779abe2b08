"""Negative controls: each mutant breaks any plan in one small way, and the contract suite must see it.

A mutant is a function from a plan to a broken plan. It wraps the nodes, and what layers share, of whatever kinds the
plan has, and spoils what passes through: where tokens go, what is read, which rows move. `mutant.applies(case)` says
where it changes anything at all:

- there is no scale in a plain store, and no window on a layer that sees everything; the layer's own window hides what a
  wider view would show;
- a plan that keeps nothing writes nowhere, and a token too many lies behind the query that its logits are of;
- keys that are not turned have no position, and codes of whole numbers and approximations no gradient to compare;
- the flag of a full cache is the container's: a kind has flags of its own where rewinding or a pool has a limit;
- what is kept of a source is broken where there is one; rows are mixed up only where there are several;
- pages are released too early only where a rewind gives some back, and rows move only where something is kept in rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.caches.base import Project, Span
from kvjax.errors import KvjaxError
from kvjax.ops.attention import EMPTY, View
from kvjax.testing.cases import Case
from kvjax.testing.mutation import Facts, Mutant, facts_of
from kvjax.types import Array


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


def _neighbours_keys(view: View, span: Span, window: int | None) -> View:
    return view.replace(k=jnp.roll(view.k, 1, axis=0))


_TRACES = itertools.count()


def _python_state(view: View, span: Span, window: int | None) -> View:
    # Read while tracing: every compiled program sees another mask.
    return _where_held(view, view.positions + next(_TRACES) % 5)


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


def _has_source(facts: Facts) -> bool:
    return facts.sources > 0


def _has_sources(facts: Facts) -> bool:
    return facts.sources > 1


def _each_read(change: Callable[[View], View]) -> Callable[..., tuple[View, ...]]:
    return lambda views: tuple(change(view) for view in views)


def _of_row(which: Callable[[Array], Array]) -> Callable[[View], View]:
    def change(view: View) -> View:
        rows = which(jnp.arange(view.positions.shape[0]))

        def taken(buffer: Array | None) -> Array | None:
            if buffer is None:
                return None
            x = buffer.reshape(rows.shape[0], -1, *buffer.shape[1:])  # [R, K, S, ...]
            return jnp.take(x, rows, axis=0).reshape(buffer.shape)

        parts = {name: taken(getattr(view, name)) for name in ("k", "v", "k_scale", "v_scale", "k_zero", "v_zero")}
        return view.replace(positions=view.positions[rows], **parts)

    return change


def _left(entry: Any, *arguments: Any) -> Any:
    return entry


def _without_lengths(entry: Any, rows: Array) -> Any:
    return entry.take(rows)[0].replace(lengths=jnp.resize(entry.lengths, rows.shape))


def _by_turns(entry: Any, rows: Array, copies: int) -> Any:
    return entry.take(jnp.arange(rows.shape[0], dtype=jnp.int32) % (rows.shape[0] // copies))[0]


MUTANTS = (
    Mutant("start + 1", span=_shift(start=1)),
    Mutant("start - 1", span=_shift(start=-1)),
    Mutant("valid + 1", lambda facts: facts.keeps, span=_shift(valid=1), seen_by="idle_rows"),
    Mutant("valid - 1", span=_shift(valid=-1)),
    Mutant("write clamped", lambda facts: facts.keeps, span=_clamped, seen_by="idle_rows"),
    Mutant("stale positions", views=_each_view(_stale)),
    Mutant("mask < for <=", views=_each_view(lambda view, span, _: _where_held(view, view.positions + 1))),
    Mutant("a state that Python keeps", views=_each_view(_python_state)),
    Mutant("unused slots seen", views=_each_view(_unused_seen)),
    Mutant("window + 1", lambda facts: facts.narrows, views=_each_view(_window(1))),
    Mutant("window - 1", lambda facts: facts.window, views=_each_view(_window(-1))),
    Mutant("key position + 1", lambda facts: facts.turned, project=_turned(1)),
    Mutant("key position - 1", lambda facts: facts.turned, project=_turned(-1)),
    Mutant("a neighbour's keys", views=_each_view(_neighbours_keys)),
    Mutant("a neighbour's scale", lambda facts: facts.scales, views=_each_view(_neighbours_scale)),
    Mutant(
        "gradient stopped",
        lambda facts: facts.exact and facts.floats,
        views=_each_view(_without_gradient),
        seen_by="gradients",
    ),
    Mutant("rewind a no-op", drift=lambda end, lengths: end - lengths, seen_by="rewind"),
    Mutant("rewind off by one", drift=lambda end, lengths: (end > lengths).astype(jnp.int32), seen_by="rewind"),
    Mutant("another dtype after a call", extended=lambda end: end.astype(jnp.float32), seen_by="types"),
    Mutant("another dtype after a rewind", after=lambda end: end.astype(jnp.float32), seen_by="types"),
    Mutant(
        "empty once it grew",
        lambda facts: facts.moves,
        grown=lambda node: jax.tree.map(jnp.zeros_like, node),
        seen_by="resize",
    ),
    Mutant("take = identity", lambda facts: facts.moves, rows=_left_where_they_are, seen_by="rows"),
    Mutant("rows swapped", lambda facts: facts.moves, rows=lambda end, rows: jnp.roll(rows, 1), seen_by="rows"),
    Mutant("rows swapped under jit", lambda facts: facts.moves, rows=_under_jit, seen_by="jit_is_eager"),
    Mutant("take uses its cache up", lambda facts: facts.moves, uses_up=True, seen_by="value"),
    Mutant("flag never set", lambda facts: facts.slack, unlimited=True, seen_by="rewind_beyond_the_slack"),
    Mutant(
        "a page released too early", lambda facts: facts.shares, lengths=lambda lengths: lengths // 2, seen_by="rewind"
    ),
    Mutant("source: seen in order", _has_source, read=_each_read(lambda view: view.replace(causal=True))),
    Mutant(
        "source: padding seen",
        _has_source,
        read=_each_read(lambda view: view.replace(positions=jnp.where(view.positions == EMPTY, 0, view.positions))),
    ),
    Mutant("source: the next row's", _has_sources, read=_each_read(_of_row(lambda rows: (rows + 1) % rows.shape[0]))),
    Mutant("source: that of row 0", _has_sources, read=_each_read(_of_row(jnp.zeros_like))),
    Mutant(
        "source: gradient stopped",
        lambda facts: facts.exact and facts.sources > 0,
        read=_each_read(lambda view: jax.tree.map(lax.stop_gradient, view)),
        seen_by="gradients",
    ),
    Mutant("source: refused without a flag", _has_source, entry={"reserve": _left}, seen_by="refused_source"),
    Mutant("source: lengths left by a take", _has_sources, entry={"take": _without_lengths}, seen_by="rows"),
    Mutant("source: fork by turns", _has_sources, entry={"fork": _by_turns}, seen_by="rows"),
    Mutant(
        "source: fork copies",
        _has_source,
        entry={"fork": lambda entry, rows, copies: entry.take(rows)[0]},
        seen_by="source_stays",
    ),
    Mutant(
        "source: reorder copies",
        lambda facts: facts.shared,
        entry={"reorder": lambda entry, beams: entry.take(beams)[0]},
        seen_by="source_stays",
    ),
    Mutant(
        "source: reorder leaves a row's own",
        lambda facts: facts.sources > 1 and not facts.shared,
        entry={"reorder": _left},
        seen_by="rows",
    ),
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
    found: dict[str, str | None] = {}
    for mutant in mutants:
        if mutant.applies(case):
            broken, order = mutant.of(case), sorted(checks, key=lambda check: check.__name__ != mutant.seen_by)
            found[mutant.name] = next((check.__name__ for check in order if kills(check, broken)), None)
    return found


def kills(check: Callable[[Case], object], broken: Case) -> bool:
    """Whether a check sees that a case is broken. Errors that are no answer, such as JAX's own, are raised."""
    try:
        check(broken)
    except (AssertionError, KvjaxError):
        return True
    return False


__all__ = ["MUTANTS", "Mutant", "Facts", "facts_of", "NOTHING", "killers", "kills"]
