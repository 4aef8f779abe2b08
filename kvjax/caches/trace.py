"""Trace: any kind of cache, and beside it the residual stream at named sites, prompt and generated tokens alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from kvjax import struct
from kvjax.caches import codecs
from kvjax.caches.base import Kind, LayerShape, Node, Project, Span
from kvjax.caches.dense import dense
from kvjax.caches.layer_input import layer_input
from kvjax.errors import InputError
from kvjax.ops.attention import View
from kvjax.types import Array


@struct.node
class Traced(Node):
    """A node of any kind, and what the layer showed at some sites; slot t keeps position t.

    Args:
        inner: the node that attention reads.
        sites: a store of one head of width M for each site.
        capacity: T.
    """

    inner: Any
    sites: dict[str, Any]
    capacity: int = struct.static()

    @property
    def replays(self) -> bool:  # type: ignore[override]
        """That of the kind inside; the trace is then written anew as well."""
        return self.inner.replays

    @property
    def patches(self) -> bool:
        """See `Node`."""
        return self.inner.patches and self.max_rewind is None

    @property
    def sees(self) -> int | None:
        """See `Node`."""
        return self.inner.sees

    def again(self, wanted: Any, start: Any, lengths: Any, written: Any, shared: Any) -> Any:
        """See `Node`. What is shown from the change on is recorded, wanted or not."""
        return self.inner.again(wanted.clip(None, start), start, lengths, written, shared)

    @property
    def shifts(self) -> bool:
        """See `Node`."""
        return self.inner.shifts

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Traced]:
        """See `Node`."""
        views, inner = self.inner.extend(h, project, span, shared)
        return views, self.replace(inner=inner)

    def record(self, site: str, x: Array, span: Span) -> Traced:
        """See `Node`."""
        inner, sites = self.inner.record(site, x, span), self.sites
        if site in sites:
            slots = jnp.where(span.kept(), span.order, self.capacity)
            sites = sites | {site: sites[site].write(x[:, :, None], slots, span.positions)}
        return self.replace(inner=inner, sites=sites)

    def recorded(self, site: str) -> Any:
        """See `Node`."""
        return self.sites[site] if site in self.sites else self.inner.recorded(site)

    def word(self, kind: Any, shared: Any) -> Any:
        """See `Node`."""
        inner = getattr(kind, "inner", None)  # `output` has none to change
        return kind if inner is None else dataclasses.replace(kind, inner=self.inner.word(inner, shared))

    def resize(self, capacity: int, shared: Any) -> Traced:
        """See `Node`."""
        grown = self._parts(lambda store: store.resize(capacity), lambda node: node.resize(capacity, shared))
        return grown.replace(capacity=capacity)

    def rewind(self, lengths: Array, before: Any, shared: Any) -> Traced:
        """See `Node`."""
        return self.replace(inner=self.inner.rewind(lengths, before, shared))

    def reorder(self, beams: Array, before: Any, shared: Any) -> Traced:
        """See `Node`."""
        return self._parts(lambda store: store.take(beams), lambda node: node.reorder(beams, before, shared))

    def move(self, source: Array, target: Array, shared: Any) -> Traced:
        """See `Node`."""
        return self._parts(lambda store: store.move(source, target), lambda node: node.move(source, target, shared))

    def turn(self, places: Array, by: Callable[[Array], Array], shared: Any) -> Traced:
        """See `Node`."""
        return self.replace(inner=self.inner.turn(places, by, shared))

    def contents(self, lengths: Array, shared: Any) -> tuple[Array, Array, Array]:
        """See `Node`; of the kind inside."""
        return self.inner.contents(lengths, shared)


@dataclasses.dataclass(frozen=True)
class TracedKind(Kind):
    """See `traced` and `hybrid`."""

    inner: Any
    sites: tuple[str, ...] | None
    store: Any

    def of(self, shape: LayerShape) -> TracedKind:
        """See `Kind`."""
        return dataclasses.replace(self, inner=self.inner.of(shape))

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Traced:
        """See `Kind`.

        Raises:
            InputError: no layer has one of the sites, or none shows anything.
        """
        wanted = shape.all_sites if self.sites is None else self.sites
        if unknown := [site for site in wanted if site not in shape.all_sites]:
            raise InputError(f"caches.traced: no layer has a site {unknown[0]!r}; there are {list(shape.all_sites)}")
        if not wanted:
            raise InputError("caches.traced: the model shows no site; its apply must call cache.record(layer, site, x)")
        inner = self.inner.init(shape, batch, capacity)
        stores = {
            site: self.store.empty(batch, 1, capacity, shape.stream, shape.dtype)
            for site in wanted
            if site in shape.sites
        }
        return Traced(inner, stores, capacity)

    def shared(self, batch: int, capacity: int) -> dict[str, Any]:
        """See `Kind`."""
        return self.inner.shared(batch, capacity)


@dataclasses.dataclass(frozen=True)
class OutputKind(Kind):
    """See `output`."""

    store: Any

    def init(self, shape: LayerShape, batch: int, capacity: int) -> Any:
        """See `Kind`.

        Raises:
            InputError: the layers do not show their stream as `output` needs it.
        """
        last = shape.index == shape.count - 1
        if not shape.chained or (last and "after_ffn" not in shape.sites):
            raise InputError(
                f"caches.output: layer {shape.index} must be given, as h, what was last recorded: 'embedding' of "
                "layer 0, or 'after_ffn' of the layer below; and the last layer must record 'after_ffn'"
            )
        inner = layer_input(store=self.store)
        return (traced(inner, ("after_ffn",), store=self.store) if last else inner).init(shape, batch, capacity)


def traced(inner: Any = None, sites: Sequence[str] | None = None, *, store: Any = None) -> TracedKind:
    """Any kind, and the residual stream at named sites; `cache.trace(layer, site)` shows it.

    Filled in the same pass, for the prompt and for what is generated. A site that only some layers have is kept there.

    Args:
        inner: the kind that attention reads; None is `dense()`.
        sites: names such as "embedding", "after_self_attention", "after_cross_attention", "after_ffn": the stream
            after the addition, in post-norm models after the norm. None is all that the layers have.
        store: a codec, or a floating dtype, of what is recorded; None is what the model computes in.

    Raises:
        InputError: `sites` is empty, or not names.
    """
    if sites is not None:
        if not isinstance(sites, tuple | list) or not sites or not all(isinstance(site, str) for site in sites):
            raise InputError(f"caches.traced: sites must be a tuple of names, at least one, not {sites!r}")
    inner = dense() if inner is None else inner
    if not isinstance(inner, Kind):
        raise InputError(f"caches.traced: {inner!r} is no kind of cache; call it, as in caches.dense()")
    return TracedKind(inner, None if sites is None else tuple(sites), codecs.as_codec(store))


def output(*, store: Any = None) -> OutputKind:
    """The embedding and the output of every layer, (L + 1) · M numbers a position; keys and values are projected again
    from the layer below at every call, so it decodes.

    It saves no FLOP over K/V and with grouped queries no memory either: it is for taking a text up again at any layer
    (`kvjax.resume`).

    Args:
        store: a codec, or a floating dtype; None stores what the model computes in.
    """
    return OutputKind(codecs.as_codec(store))


def hybrid(inner: Any = None, *, store: Any = None) -> TracedKind:
    """Keys and values, and the stream at all sites: decodes as fast as `inner`, and every layer can be resumed.

    Args:
        inner: the kind that attention reads; None is `dense()`.
        store: a codec, or a floating dtype, of what is recorded; None is what the model computes in.
    """
    return traced(inner, store=store)


__all__ = ["traced", "output", "hybrid", "Traced", "TracedKind", "OutputKind"]
