"""A model is a pytree: parameters, a static configuration, and the functions that run it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.caches import storage
from kvjax.caches.base import SOURCE, LayerShape, Node, OpenCache, Project, Span, filled_positions
from kvjax.caches.cross import Cross, Source, rows_of
from kvjax.caches.opened import finite
from kvjax.caches.recompute import Recompute
from kvjax.checks import is_concrete, whole
from kvjax.config import Config
from kvjax.errors import InputError
from kvjax.layers import absorbs, layer_sites, unturned
from kvjax.ops.attention import EMPTY, Absorb, View
from kvjax.ops.positions import Bias
from kvjax.transformer import apply_decoder, apply_encoder, decoder_head
from kvjax.types import Array, Params


def identity_head(params: Params, config: Any, x: Array) -> Array:
    """For models whose `apply` returns logits itself."""
    return x


@struct.node
class Model(struct.Value):
    """Parameters and what runs them. Loops, plans and tests need nothing else of a model.

    Args:
        params: a pytree of arrays.
        config: static and hashable; None for models that need none. If it has `max_positions`, that is the model's
            limit on positions.
        apply: a module-level function `(params, config, cache, tokens [B, S], valid [B]) -> (x [B, S, ...], cache)`;
            a closure over arrays would be compiled in as constants.
        head: a module-level function `(params, config, x) -> logits`, so that only wanted positions become logits;
            the default is for an `apply` that returns logits.
        encode: a module-level function `(params, config, tokens [R, S], valid [R]) -> states [R, S, E]`, for an `apply`
            that attends to a source (`kvjax.cross_attend`); None where there is none, or it is made elsewhere.
    """

    params: Any
    config: Any = struct.static()
    apply: Callable[..., Any] = struct.static()
    head: Callable[..., Array] = struct.static(default=identity_head)
    encode: Callable[..., Array] | None = struct.static(default=None)

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for, or None."""
        return getattr(self.config, "max_positions", None)

    @property
    def vocab_size(self) -> int | None:
        """Ids that the model knows, as far as its configuration says."""
        return getattr(self.config, "vocab_size", None)

    def layer_shapes(self, source: Source | Cross | None = None) -> tuple[LayerShape, ...]:
        """What kinds must know of each layer; found by tracing `apply` once, without computing.

        Args:
            source: for an `apply` of one's own that attends to one; or what a cache keeps of it (`shared`).
        """
        if isinstance(self.config, Config):
            c, dtype = self.config, self.params["embed"]["table"].dtype
            shape = LayerShape(c.kv_heads, c.head_dim, c.head_dim, dtype, width=c.width, stream=c.width, chained=True)
            return _numbered(
                dataclasses.replace(shape, window=window, sites=layer_sites(c, i), absorbs=absorbs(c, i))
                for i, window in enumerate(c.windows)
            )
        found = _Found()
        rows = 1 if source is None else source.lengths.shape[0] * getattr(source, "share", 1)
        row = jax.ShapeDtypeStruct((rows,), jnp.int32)

        def run(params: Any, start: Array, source: Any) -> Array:
            span = Span(start, jnp.ones_like(start), start[:, None])
            shared = {} if source is None else {SOURCE: Asked(source) if isinstance(source, Source) else source}
            return self.apply(params, self.config, OpenCache(found, shared, span), start[:, None], span.valid)[0]

        jax.eval_shape(run, self.params, row, source)
        if sorted(found.shapes) != list(range(len(found.shapes))) or not found.shapes:
            raise InputError(f"Model.apply attends at layers {sorted(found.shapes)}; they must count from 0 upwards")
        return _numbered(found.nodes[i].shape() for i in range(len(found.shapes)))


def _numbered(shapes: Iterable[LayerShape]) -> tuple[LayerShape, ...]:
    """Layers that know which they are, and what the others show."""
    shapes = tuple(shapes)
    known = tuple(dict.fromkeys(site for shape in shapes for site in shape.sites))
    return tuple(dataclasses.replace(x, index=i, count=len(shapes), all_sites=known) for i, x in enumerate(shapes))


def decoder(config: Config, params: Params) -> Model:
    """A `Model` of this library's own decoder, with its encoder where the configuration has one."""
    return Model(params, config, apply_decoder, decoder_head, None if config.encoder is None else apply_encoder)


def forward(model: Model, tokens: Any, valid: Any = None, *, source: Source | None = None) -> Array:
    """Logits at every position, without a cache: training and scoring.

    Args:
        model: any model.
        tokens: `[B, S]` int32.
        valid: `[B]` int32 or None, tokens of each row that are real; logits past them mean nothing.
        source: what the rows attend to, from `kvjax.encode`; B is a multiple of its rows.

    Returns:
        `[B, S, V]`; NaN in a row that has a real id outside the vocabulary, or a source that was refused.

    Raises:
        InputError: `tokens` is not `[B, S]` whole numbers, S is past the model's positions, or (outside `jit`) an id is
            outside the vocabulary.
    """
    tokens = jnp.asarray(whole("forward: tokens", tokens))
    if tokens.ndim != 2 or not tokens.size:
        raise InputError(f"forward: tokens must be [B, S] with at least one token, not {list(tokens.shape)}")
    b, s = tokens.shape
    if model.max_positions is not None and s > model.max_positions:
        raise InputError(f"forward: {s} tokens, but the model has {model.max_positions} positions")
    count = jnp.asarray(check_valid("forward", valid, b, s))
    check_ids("forward", model.vocab_size, tokens, count)
    check_source("forward", model, source, b)
    return _forward(model, tokens.astype(jnp.int32), count, source)


def check_valid(name: str, valid: Any, rows: int, columns: int) -> Any:
    """`valid` as `[B]` int32, all columns where it is None.

    Raises:
        InputError: no whole numbers, not one a row, or outside 0 to `columns`.
    """
    if valid is None:
        return np.full((rows,), columns, np.int32)
    valid = whole(f"{name}: valid", valid, ((rows,),))
    if not is_concrete(valid):
        return valid
    valid = np.asarray(valid)
    if ((valid < 0) | (valid > columns)).any():
        raise InputError(f"{name}: valid {valid.tolist()} must lie between 0 and {columns}, the columns of tokens")
    return valid


def check_ids(name: str, vocab: int | None, tokens: Any, valid: Any) -> None:
    """Refuses real ids outside a vocabulary, where they and the vocabulary can be looked at.

    Raises:
        InputError: names row, id and vocabulary.
    """
    if vocab is None or not (is_concrete(tokens) and is_concrete(valid)):
        return
    tokens, valid = np.asarray(tokens), np.asarray(valid)
    real = np.arange(tokens.shape[1])[None, :] < valid[:, None]
    for row, column in np.argwhere(real & ((tokens < 0) | (tokens >= vocab)))[:1]:
        raise InputError(f"{name}: row {row} has id {tokens[row, column]}, the vocabulary has {vocab} ids")


def check_source(name: str, model: Model, source: Source | None, batch: int) -> int:
    """How many rows read one row of a source.

    Raises:
        InputError: the model needs a source and has none, or the reverse; another width; the rows do not divide; what
            `rows_of` says.
    """
    own = isinstance(model.config, Config)
    encoder: Any = getattr(model.config, "encoder", None)
    if source is None:
        if own and encoder is not None:
            raise InputError(f"{name}: the model attends to a source; give source=kvjax.encode(model, tokens)")
        return 1
    if own and encoder is None:
        raise InputError(f"{name}: a source is given, but the model has no encoder and attends to none")
    rows, width = rows_of(name, source), source.states.shape[-1]
    if own and width != encoder.width:
        raise InputError(f"{name}: the source has states of width {width}, the model reads {encoder.width}")
    if batch % rows:
        raise InputError(f"{name}: batch {batch} is no multiple of the {rows} rows of the source")
    return batch // rows


@jax.jit
def _forward(model: Model, tokens: Array, valid: Array, source: Source | None) -> Array:
    b, s = tokens.shape
    steps = jnp.arange(s, dtype=jnp.int32)
    span = Span(jnp.zeros((b,), jnp.int32), valid, jnp.broadcast_to(steps[None, :], (b, s)))
    source = None if source is None else source.checked()
    layers = tuple(Recompute() for _ in model.layer_shapes(source))
    fed = jnp.where(span.real(), tokens, 0)  # padding may hold anything
    shared = {} if source is None else {SOURCE: Asked(source)}
    x, _ = model.apply(model.params, model.config, OpenCache(layers, shared, span), fed, valid)
    logits = model.head(model.params, model.config, x)
    bad = jnp.any(span.real() & ((tokens < 0) | (tokens >= logits.shape[-1])), axis=1)
    if source is not None:
        bad |= jnp.repeat(source.flags != 0, b // source.lengths.shape[0])
    return jnp.where(bad[:, None, None], jnp.nan, logits)


def attend(
    cache: OpenCache,
    layer: int,
    *,
    q: Array,
    kv: Any,
    h: Any = None,
    rotate: Callable[[Array, Array], Array] | None = None,
    absorb: Callable[[Any], tuple[Absorb, Array | None]] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bias: Bias | None = None,
) -> tuple[Array, OpenCache]:
    """The door for a model of one's own: takes in the new keys and values, masks, reads; for any kind of cache.

    Args:
        cache: what `apply` was given, or the last `attend` returned. `cache.positions` is `[B, S]`.
        layer: counts from 0; each layer once a call.
        q: `[B, S, H, D]`, new queries; not rotated if `rotate` is given.
        kv: `(k [B, S, K, D], v [B, S, K, D])`, K a divisor of H; rotated already, or with `rotate` not rotated. Or a
            function `h -> (k, v)` for kinds that keep what keys and values are made from, with `h`.
        h: `[B, S, M]`, what `kv` is a function of.
        rotate: `(x [B, S, heads, D], positions [B, S]) -> x`, the model's rotation of queries and keys.
        absorb: see `Project`.
        scale: factor on the scores, `D ** -0.5` if None.
        window: how many positions a query sees, its own included; None is all.
        softcap: bound c on scaled scores, as tanh(s / c) · c (Gemma 2); None is none.
        bias: added to scaled scores: `(query positions, key positions)`, int32 that broadcast to `[...]`, to
            `[H, ...]`.

    Returns:
        `[B, S, H, D]`, D the width of the values, and the cache for the next layer.

    Raises:
        InputError: shapes disagree.
    """
    if not callable(kv) and len(kv) != 2:
        raise InputError(f"attend: kv must be (k, v) or a function that gives them, not {len(kv)} things")
    turn = rotate or unturned

    def project(stream: Any, positions: Array | None) -> tuple[Array, Array]:
        if callable(kv):
            k, v = kv(stream)
        elif stream is h:
            k, v = kv
        else:
            raise InputError("attend: this kind of cache projects again; give kv as a function of h, and h")
        return (k if positions is None else turn(k, positions)), v

    keys, values = jax.eval_shape(lambda: project(h, None))
    if q.ndim != 4 or keys.ndim != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[:2] != q.shape[:2]:
        raise InputError(f"attend: q {q.shape}, k {keys.shape}, v {values.shape} must be [B, S, heads, width] alike")
    if q.shape[2] % keys.shape[2] or q.shape[3] != keys.shape[3]:
        raise InputError(f"attend: q has {q.shape[2:]}, k has {keys.shape[2:]}: heads must divide, widths be equal")
    if isinstance(cache.layers, _Found):
        cache.layers.window = window
    return cache.attend(
        layer,
        q,
        Project(project, turn, absorb),
        h,
        kv_heads=keys.shape[2],
        scale=scale,
        window=window,
        softcap=softcap,
        bias=bias,
    )


def cross_attend(
    cache: OpenCache,
    layer: int,
    *,
    q: Array,
    kv: Callable[[Array], tuple[Array, Array]],
    kv_heads: int | None = None,
    absorb: Callable[[Any], tuple[Absorb, Array | None]] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """The door to a source for a model of one's own: every query sees all of its row's source, which never changes.

    Args:
        cache: what `apply` was given, or the last `attend` returned.
        layer: of the decoder; each layer once a call.
        q: `[B, S, H, D]`, new queries.
        kv: `states [R, S, E] -> (k [R, S, K, D], v [R, S, K, D])`, K a divisor of H. Called once for a source, or at
            every call, as what is kept of the source wants it.
        kv_heads: K; None is H.
        absorb: see `Project`; None where keys and values are not linear in the states.
        scale: factor on the scores, `D ** -0.5` if None.
        softcap: bound c on scaled scores, as tanh(s / c) · c; None is none.

    Returns:
        `[B, S, H, D]`, D the width of the values.

    Raises:
        InputError: the cache has no source, or shapes disagree.
    """

    def project(states: Array, positions: Array | None) -> tuple[Array, Array]:
        k, v = kv(states)
        if q.ndim != 4 or k.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[:2] != states.shape[:2]:
            raise InputError(f"cross_attend: q {q.shape}, k {k.shape}, v {v.shape} must be [rows, S, heads, width]")
        if k.shape[2] != heads or q.shape[3] != k.shape[3]:
            raise InputError(f"cross_attend: k has {k.shape[2:]} heads of width, q makes it {heads, q.shape[3]}")
        return k, v

    heads = q.shape[2] if kv_heads is None else kv_heads
    if q.shape[2] % heads:
        raise InputError(f"cross_attend: q has {q.shape[2]} heads, no multiple of kv_heads {heads}")
    how = Project(project, unturned, absorb)
    return cache.cross_attend(layer, q, how, kv_heads=heads, scale=scale, softcap=softcap)


@jax.tree_util.register_static
class _Found:
    """Stands in for the nodes while `layer_shapes` traces; notes what each layer asks for."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.nodes: dict[int, _FoundNode] = {}
        self.window: int | None = None
        self.shown: tuple[int, str, Any] | None = None

    def __getitem__(self, layer: int) -> _FoundNode:
        return self.nodes.setdefault(layer, _FoundNode(self, layer))


class Asked:
    """Stands in for what is kept of a source where nothing is: layers project it themselves, and that is noted."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.made: dict[int, tuple[Array, Array]] = {}

    def views(self, layer: int, project: Project) -> tuple[View, ...]:
        """As `Cross.views`.

        Raises:
            InputError: the layer has asked already.
        """
        if layer in self.made:
            raise InputError(f"Model.apply attends to the source twice at layer {layer}; each layer once a call")
        k, v = finite(*project.kv(self.source.states, None), None)
        self.made[layer] = k, v
        at = filled_positions(k.shape[1], self.source.lengths)
        return (View(storage.pack(k), storage.pack(v), at, causal=False),)


class _FoundNode(Node):
    def __init__(self, found: _Found, layer: int) -> None:
        self.found, self.layer = found, layer
        self.sites: dict[str, int] = {}

    def shape(self) -> LayerShape:
        widths = set(self.sites.values())
        if len(widths) > 1:
            raise InputError(f"Model.apply shows layer {self.layer} at {self.sites}: all sites must have one width")
        found = self.found.shapes[self.layer]
        return dataclasses.replace(found, sites=tuple(self.sites), stream=max(widths, default=None))

    def record(self, site: str, x: Array, span: Span) -> Any:
        self.sites[site] = x.shape[-1]
        self.found.shown = self.layer, site, x
        return self

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Any]:
        k, v = project.kv(h, span.positions)
        layer, site, x = self.found.shown or (0, "", None)
        self.found.shapes[self.layer] = LayerShape(
            k.shape[2],
            k.shape[3],
            v.shape[3],
            k.dtype,
            self.found.window,
            width=None if h is None else h.shape[-1],
            chained=h is not None and h is x and (layer, site) in ((0, "embedding"), (self.layer - 1, "after_ffn")),
            absorbs=project.absorb is not None,
        )
        at = jnp.full((1, k.shape[1]), EMPTY, jnp.int32)
        return (View(storage.pack(k), storage.pack(v), at),), self


__all__ = [
    "Model",
    "Asked",
    "decoder",
    "forward",
    "attend",
    "cross_attend",
    "check_valid",
    "check_ids",
    "check_source",
]
