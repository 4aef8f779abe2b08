"""What the decoders of both kinds of modules do when they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.traverse_util import flatten_dict

from kvjax import caches
from kvjax.caches.base import SOURCE, Cache
from kvjax.caches.cross import Source
from kvjax.caching import init_cache
from kvjax.checks import whole
from kvjax.config import Config
from kvjax.errors import InputError
from kvjax.loops.decode import check_tokens, prefill, step
from kvjax.loops.feed import feed, finish
from kvjax.model import Model, decoder, forward
from kvjax.params import declare
from kvjax.types import Array

Sites = dict[str, dict[str, Array]]


def model_of(config: Config, variables: Mapping[str, Any]) -> Model:
    """The model with the parameters among Linen's variables, which must be those that `kvjax.params` declares.

    Raises:
        InputError: one is missing, not known, or of another shape.
    """
    params = unfreeze(dict(variables.get("params", {})))
    want = flatten_dict(declare(config), sep="/")
    have = {name: jnp.shape(getattr(x, "codes", x)) for name, x in flatten_dict(params, sep="/").items()}
    if wrong := [name for name in want | have if want.get(name) != have.get(name)]:
        at, shapes = wrong[0], (have.get(wrong[0], "missing"), want.get(wrong[0], "nothing"))
        raise InputError(f"decoder: params/{at} is {shapes[0]}, config declares {shapes[1]}; {len(wrong)} do not agree")
    return decoder(config, params)


def called(model: Model, tokens: Any, cache: Cache | None, valid: Any, source: Source | None) -> Any:
    """Feeds tokens; one column without `valid` is a step, other ones are a prefill.

    Args:
        model: any model.
        tokens: `[B, S]` int32.
        cache: stays usable; None runs the whole text without one.
        valid: `[B]` int32 or None, tokens of each row that are real.
        source: what the rows attend to, where there is no cache that has it.

    Returns:
        Logits `[B, V]` after the last token and the cache; without a cache logits `[B, S, V]` alone.

    Raises:
        InputError: shapes or ids are wrong, or a source is given beside a cache.
        CacheError: tokens do not fit (of a prefill; a step flags the row).
    """
    if cache is None:
        return forward(model, tokens, valid, source=source)
    tokens = _checked(tokens, cache, source)
    if valid is None and tokens.shape[1] == 1:
        return step(model, cache, tokens[:, 0])
    return prefill(model, cache, tokens, valid)


def watched(
    model: Model, tokens: Any, cache: Cache | None, valid: Any, source: Source | None, sites: tuple[str, ...] | None
) -> tuple[Any, Sites]:
    """As `called`, and the residual stream `[B, S, M]` of these tokens at named sites, zeros where they are not real.

    For the length of the call every layer's node lies in one that records (`caches.traced`).

    Args:
        model, tokens, cache, valid, source: as for `called`.
        sites: names, as for `caches.traced`; None is all.

    Returns:
        What `called` gives, and the streams by layer, written as in the parameters, and site.

    Raises:
        InputError: no layer has such a site; what `called` says.
        CacheError: see `called`.
    """
    tokens = _checked(tokens, cache, source)
    kind = caches.traced(caches.recompute(), sites)
    if cache is None:
        b, s = tokens.shape
        seen = init_cache(model, kind, batch=b, capacity=s, source=source)
        given = check_tokens("decoder", model, seen, tokens, valid)
        start, (logits, seen) = seen.lengths, _whole(model, seen, *given)
        out: Any = logits
    else:
        shapes = model.layer_shapes(cache.shared.get(SOURCE))
        made = [kind.init(shape, cache.batch, cache.capacity) for shape in shapes]
        nodes = tuple(outer.replace(inner=node) for outer, node in zip(made, cache.layers, strict=True))
        start = cache.lengths
        logits, seen = called(model, tokens, cache.replace(layers=nodes), valid, None)
        out = logits, seen.replace(layers=tuple(node.inner for node in seen.layers))
    slots = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]  # [B, S]
    streams: Sites = {}
    for layer, node in enumerate(seen.layers):
        for site in node.sites:
            stream = seen.trace(layer, site)  # [B, T, M]
            new = jnp.take_along_axis(stream, slots[:, :, None], axis=1, mode="fill", fill_value=0)
            streams.setdefault(str(layer), {})[site] = new
    return out, streams


def _checked(tokens: Any, cache: Cache | None, source: Source | None) -> Any:
    if cache is not None and source is not None:
        raise InputError(f"decoder: source is given beside a cache of {cache.batch} rows; give it to init_cache")
    tokens = whole("decoder: tokens", tokens)
    if tokens.ndim != 2:
        raise InputError(f"decoder: tokens must be [B, S], not {list(tokens.shape)}")
    return tokens


@jax.jit
def _whole(model: Model, cache: Cache, tokens: Array, valid: Array) -> tuple[Array, Cache]:
    x, cache = feed(model, cache, tokens.astype(jnp.int32), valid)
    return finish(model, cache, x, valid)


__all__ = ["model_of", "called", "watched", "Sites"]
