"""A model is a pytree: parameters, a static configuration, and the functions that run it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax import struct
from kvjax.caches import plans, storage
from kvjax.caches.base import Cache, LayerShape, Node, OpenCache, Project, Span
from kvjax.caches.recompute import Recompute
from kvjax.caches.shared_prefix import after, room_after
from kvjax.checks import is_concrete, whole
from kvjax.config import Config
from kvjax.errors import InputError
from kvjax.layers import Rotation, absorbs, decoder_layer, layer_sites
from kvjax.ops.activations import softcapped
from kvjax.ops.attention import EMPTY, Absorb, View
from kvjax.types import Array, Params


def apply_decoder(
    params: Params, config: Config, cache: OpenCache, tokens: Array, valid: Array
) -> tuple[Array, OpenCache]:
    """Runs the decoder over new tokens.

    Args:
        params: as `kvjax.params.declare` says.
        config: the model.
        cache: open, at the tokens that came before.
        tokens: `[B, S]` int32.
        valid: `[B]` int32, how many of a row's tokens are real.

    Returns:
        Features `[B, S, M]` for `decoder_head`, after the final norm where there is one, and the cache.
    """
    positions = cache.positions
    with jax.named_scope("embedding"):
        x = embed(params, config, tokens, positions)
    cache = cache.record(0, "embedding", x)
    rotations = Rotation.of_layers(config, positions, x.dtype)
    for layer in range(config.num_layers):
        x, cache = decoder_layer(params["layers"][str(layer)], config, x, cache, layer, rotations[layer])
    return final_norm(params, config, x), cache


def embed(params: Params, config: Config, tokens: Array, positions: Array) -> Array:
    """Tokens `[B, S]` at `positions[B, S]` to the stream `[B, S, M]`; bad ids read some row, and are flagged."""
    x = jnp.take(params["embed"]["table"], tokens, axis=0, mode="clip")
    x = x * jnp.asarray(config.embed_scale, x.dtype)
    return config.positions.embed(params.get("positions", {}), x, positions)


def final_norm(params: Params, config: Config, x: Array) -> Array:
    """The stream `[B, S, M]` as the head reads it: normed where the parameters have a final norm."""
    return config.norm(params["final_norm"], x) if "final_norm" in params else x


@jax.named_scope("head")
def decoder_head(params: Params, config: Config, x: Array) -> Array:
    """Features `[B, S, M]` to logits `[B, S, V]`, at least float32."""
    precise = jnp.promote_types(jnp.float32, x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    kernel, axis = (params["embed"]["table"], 1) if config.tied else (params["head"]["kernel"], 0)
    y = lax.dot_general(flat, kernel.astype(x.dtype), (((1,), (axis,)), ((), ())), preferred_element_type=precise)
    if config.logit_softcap is not None:
        y = softcapped(y, config.logit_softcap)
    return y.reshape(*x.shape[:-1], y.shape[-1])


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
    """

    params: Any
    config: Any = struct.static()
    apply: Callable[..., Any] = struct.static()
    head: Callable[..., Array] = struct.static(default=identity_head)

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for, or None."""
        return getattr(self.config, "max_positions", None)

    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """What kinds must know of each layer; found by tracing `apply` once, without computing."""
        if isinstance(self.config, Config):
            c, dtype, sites = self.config, self.params["embed"]["table"].dtype, layer_sites
            shape = LayerShape(c.kv_heads, c.head_dim, c.head_dim, dtype, width=c.width, stream=c.width, chained=True)
            return _numbered(
                dataclasses.replace(shape, window=window, sites=sites(i), absorbs=absorbs(c, i))
                for i, window in enumerate(c.windows)
            )
        found = _Found()
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        row = jax.ShapeDtypeStruct((1,), jnp.int32)

        def run(params: Any, start: Array, tokens: Array) -> Array:
            span = Span(start, jnp.ones_like(start), start[:, None])
            return self.apply(params, self.config, OpenCache(found, {}, span), tokens, span.valid)[0]

        jax.eval_shape(run, self.params, row, tokens)
        if sorted(found.shapes) != list(range(len(found.shapes))) or not found.shapes:
            raise InputError(f"Model.apply attends at layers {sorted(found.shapes)}; they must count from 0 upwards")
        return _numbered(found.nodes[i].shape() for i in range(len(found.shapes)))


def _numbered(shapes: Iterable[LayerShape]) -> tuple[LayerShape, ...]:
    """Layers that know which they are, and what the others show."""
    shapes = tuple(shapes)
    known = tuple(dict.fromkeys(site for shape in shapes for site in shape.sites))
    return tuple(dataclasses.replace(x, index=i, count=len(shapes), all_sites=known) for i, x in enumerate(shapes))


def decoder(config: Config, params: Params) -> Model:
    """A `Model` of this library's own decoder."""
    return Model(params, config, apply_decoder, decoder_head)


def forward(model: Model, tokens: Any, valid: Any = None) -> Array:
    """Logits at every position, without a cache: training and scoring.

    Args:
        model: any model.
        tokens: `[B, S]` int32.
        valid: `[B]` int32 or None, tokens of each row that are real; logits past them mean nothing.

    Returns:
        `[B, S, V]`; NaN in a row that has a real id outside the vocabulary.

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
    check_ids("forward", model, tokens, count)
    return _forward(model, tokens.astype(jnp.int32), count)


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


def check_ids(name: str, model: Model, tokens: Any, valid: Any) -> None:
    """Refuses real ids outside the vocabulary, where they and the vocabulary can be looked at.

    Raises:
        InputError: names row, id and vocabulary.
    """
    vocab = getattr(model.config, "vocab_size", None)
    if vocab is None or not (is_concrete(tokens) and is_concrete(valid)):
        return
    tokens, valid = np.asarray(tokens), np.asarray(valid)
    real = np.arange(tokens.shape[1])[None, :] < valid[:, None]
    for row, column in np.argwhere(real & ((tokens < 0) | (tokens >= vocab)))[:1]:
        raise InputError(f"{name}: row {row} has id {tokens[row, column]}, the vocabulary has {vocab} ids")


@jax.jit
def _forward(model: Model, tokens: Array, valid: Array) -> Array:
    b, s = tokens.shape
    steps = jnp.arange(s, dtype=jnp.int32)
    span = Span(jnp.zeros((b,), jnp.int32), valid, jnp.broadcast_to(steps[None, :], (b, s)))
    layers = tuple(Recompute() for _ in model.layer_shapes())
    fed = jnp.where(span.real(), tokens, 0)  # padding may hold anything
    x, _ = model.apply(model.params, model.config, OpenCache(layers, {}, span), fed, valid)
    logits = model.head(model.params, model.config, x)
    bad = jnp.any(span.real() & ((tokens < 0) | (tokens >= logits.shape[-1])), axis=1)
    return jnp.where(bad[:, None, None], jnp.nan, logits)


def init_cache(model: Model, plan: Any = None, *, batch: int = 1, capacity: int, prefix: Cache | None = None) -> Cache:
    """An empty cache, or one whose rows all go on from a prefix.

    Args:
        model: any model.
        plan: a kind (`caches.dense()`), a tuple with one a layer, or None for `caches.default`.
        batch: B, rows.
        capacity: T, tokens that a row can hold, a prefix included.
        prefix: a cache of one row that holds what all rows share; None for nothing. It is kept once for all rows, is
            copied and stays usable. The plan is that of the suffixes, and may be another one.

    Raises:
        InputError: `batch` or `capacity` is less than 1, the plan does not fit the layers, or the prefix has more rows,
            is empty, or leaves no room.
    """
    if batch < 1 or capacity < 1:
        raise InputError(f"init_cache: batch and capacity must be at least 1, not {batch} and {capacity}")
    shapes = model.layer_shapes()
    if plan is None:
        plan = tuple(plans.for_window(shape.window) for shape in shapes)
    kinds = plans.kinds_of(plan, shapes)
    if prefix is not None:
        prefix, capacity = room_after(prefix, len(shapes), capacity)
    layers = plans.init_layers(kinds, shapes, batch, capacity)
    # Three arrays, not one three times: a buffer cannot be donated twice.
    lengths, written, flags = (jnp.zeros((batch,), jnp.int32) for _ in range(3))
    shared = plans.init_shared(kinds, shapes, batch, capacity)
    cache = Cache(layers, shared, jnp.full((batch, capacity), -1, jnp.int32), lengths, written, flags, kinds)
    return cache if prefix is None else after(prefix, cache)


def cache_nbytes(model: Model, plan: Any = None, *, batch: int = 1, capacity: int) -> int:
    """Bytes of the cache that `init_cache` would make, nothing allocated."""
    made = jax.eval_shape(lambda: init_cache(model, plan, batch=batch, capacity=capacity))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made))


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

    Returns:
        `[B, S, H, D]`, D the width of the values, and the cache for the next layer.

    Raises:
        InputError: shapes disagree.
    """
    if not callable(kv) and len(kv) != 2:
        raise InputError(f"attend: kv must be (k, v) or a function that gives them, not {len(kv)} things")
    turn = rotate or _unturned

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
    )


def _unturned(x: Array, positions: Array) -> Array:
    return x


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


__all__ = ["Model", "decoder", "forward", "init_cache", "cache_nbytes", "attend", "apply_decoder", "decoder_head"]
