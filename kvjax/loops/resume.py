"""Resume: takes a text up again at one layer and one position, from a stream that the cache recorded.

What lies below the layer, and what lies before the position, is not computed again. Patching the stream there is how
one asks what a state inside the model does (activation patching, Meng et al. 2022, 2202.05262).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax.caches.base import Cache, OpenCache, Span
from kvjax.caches.flags import REWIND
from kvjax.checks import is_concrete, whole
from kvjax.config import Config
from kvjax.errors import CacheError, InputError
from kvjax.layers import Rotation, decoder_layer
from kvjax.loops.decode import bucket
from kvjax.loops.feed import finish
from kvjax.model import Model
from kvjax.transformer import apply_decoder, embed, final_norm
from kvjax.types import Array


def _resume(
    model: Model, cache: Cache, layer: Array, position: Array, patch: Array, count: Array
) -> tuple[Array, Cache]:
    # layer [], position [B], patch [B, S, M] of which the first `count` columns are meant
    c, params = model.config, model.params
    b, s, _ = patch.shape
    # A plan in which some layer keeps nothing needs the layer's whole input again.
    start = jnp.zeros_like(position) if cache.replays else position
    wrong = (position < 0) | (position >= cache.lengths) | (layer < 0) | (layer >= c.num_layers)
    wrong |= (count > 0) & (position + count > cache.lengths)  # nothing of a patch is cut off
    for i, limit in _limits(cache):
        wrong |= (layer <= i) & (position < cache.written - limit)
    base, shared, flags = cache, cache.shared, cache.flags
    moves = any(not entry.still for entry in shared.values())
    if moves:  # what layers share must be given back and reserved, for all layers: those below run again as well
        base = cache.replace(flags=jnp.zeros_like(flags)).rewind(start)
        wrong |= base.flags != 0
    steps = jnp.arange(s, dtype=jnp.int32)[None, :]
    places = start[:, None] + steps
    span = Span(start, jnp.where(wrong, 0, cache.lengths - start), places)
    if moves:
        shared, refused = base.reserve(span)
        span, flags = span.replace(valid=jnp.where(refused != 0, 0, span.valid)), flags | refused
    at = jnp.clip(places, 0, cache.capacity - 1)[:, :, None]

    def given(kept: Any) -> Array:
        """`[B, S, M]`, what the layer was given, or is given now."""
        x = jnp.take_along_axis(kept.unpacked(cache.lengths)[:, 0], at, axis=1).astype(patch.dtype)
        column = places - position[:, None]
        new = jnp.take_along_axis(patch, jnp.clip(column, 0, s - 1)[:, :, None], axis=1)
        return jnp.where(((column >= 0) & (column < count))[:, :, None], new, x)

    tokens = jnp.take_along_axis(cache.tokens, at[:, :, 0], axis=1)
    x = embed(params, c, jnp.where(span.real(), tokens, 0), places)
    rotations, layers = Rotation.of_layers(params, c, places, x.dtype), []
    for i, node in enumerate(base.layers):
        kept = source_of(cache, i)

        def run(x: Array, node: Any, i: int = i, kept: Any = kept) -> tuple[Array, Any]:
            x = x if kept is None else jnp.where(layer == i, given(kept), x)
            node = node if moves else node.rewind(start, base.shared, shared)
            opened = OpenCache((*(None,) * i, node), shared, span)
            x, opened = decoder_layer(params["layers"][str(i)], c, x, opened, i, rotations[i])
            return x, opened.layers[i]

        x, node = run(x, node) if moves else lax.cond(layer <= i, run, lambda x, node: (x, node), x, node)
        layers.append(node)
    last = jnp.clip(cache.lengths - 1 - start, 0, s - 1)[:, None, None]
    x = final_norm(params, c, jnp.take_along_axis(x, last, axis=1))  # [B, 1, M]
    flags = (flags | jnp.where(wrong, REWIND, 0)).astype(jnp.int32)
    logits, done = finish(model, cache.replace(layers=tuple(layers), shared=shared, flags=flags), x, span.valid)
    return logits[:, 0], done


def source_of(cache: Cache, layer: int) -> Any:
    """The store of a layer's input: as the layer kept it, or as the layer below showed it. None where neither did."""
    own = cache.layers[layer].recorded("below")
    if own is not None:
        return own
    return cache.recorded(layer - 1, "after_ffn") if layer else cache.recorded(0, "embedding")


def _limits(cache: Cache) -> list[tuple[int, int]]:
    """Layers that cannot go back any number of tokens, and how many they can."""
    if cache.replays:  # everything is fed again
        return []
    return [(i, node.max_rewind) for i, node in enumerate(cache.layers) if node.max_rewind is not None]


VALUE, DONATING = jax.jit(_resume), jax.jit(_resume, donate_argnums=1)
"""With the cache as a value, and with its buffers used up."""


def resume(
    model: Model, cache: Cache, layer: Any, position: Any, patch: Any = None, *, _run: Any = VALUE
) -> tuple[Array, Cache]:
    """Computes the layers from `layer` on again, at the positions from `position` on, with another stream if wanted.

    The result is that of running the whole text with the input of `layer` replaced by `patch`. The stream there comes
    from the cache: from the trace of the layer below (`after_ffn`; `embedding` for layer 0), or from kept layer
    inputs. Lengths stay; keys, values and traces from `layer` on are those of the new run, everything below is as it
    was, the trace of the layer below too. Where the input itself is kept (`output`, `layer_input`) the patch is what is
    kept, and what `Cache.trace` shows of the layer below. Kinds that keep nothing (`recompute`) forget the patch at the
    next call.

    Compiles once for each bucket (16, 32, 64, …) of the longest row's new positions, whatever layer and position;
    under `jit`, where these are not known, the bucket is the capacity. Kinds whose layers share something (pages)
    compute the layers below again as well, at these positions.

    Args:
        model: of this library's own layers (`kvjax.decoder`).
        cache: stays usable; made with `caches.hybrid()`, `caches.traced(…)`, `caches.output()` or
            `caches.layer_input()`.
        layer: whole number from 0, the first layer that runs.
        position: whole number, or one a row, the first position that runs; less than the row's length.
        patch: `[B, M]`, the stream at `position` as `layer` gets it, or `[B, n, M]` from there on; None leaves it.

    Returns:
        Logits `[B, V]` after each row's last token, and the cache.

    Raises:
        InputError: a model with an `apply` of its own; `layer` or `patch` does not fit.
        CacheError: the stream was not recorded; a position outside the row, or further back than the layers from
            `layer` on keep (under `jit` the row is flagged and its logits are NaN, as for a patch past its end).
    """
    if model.apply is not apply_decoder or not isinstance(model.config, Config):
        raise InputError("resume: needs a model of kvjax's own layers (kvjax.decoder); an apply of one's own is opaque")
    if not isinstance(cache, Cache) or len(cache.layers) != model.config.num_layers:
        have = f"has {len(cache.layers)} layers" if isinstance(cache, Cache) else f"is no cache but {cache!r}"
        raise InputError(f"resume: cache {have}, the model has {model.config.num_layers}")
    layer = whole("resume: layer", layer, ((),))
    position = whole("resume: position", position, ((), (cache.batch,)))
    # On the host where it can be looked at: nothing but the program itself is compiled.
    numeric: Any = np if is_concrete(position) else jnp
    position = numeric.broadcast_to(numeric.asarray(position), (cache.batch,))
    _check_layer(model.config.num_layers, cache, layer)
    lengths = cache.lengths
    if is_concrete(layer) and is_concrete(position) and is_concrete(lengths):
        _check_position(cache, int(layer), position)
        begin = 0 if cache.replays else position
        size = bucket(int((np.asarray(lengths) - begin).max()))
    else:
        size = cache.capacity
    return _run(model, cache, layer, position, *_padded(model, cache, position, patch, size))


def _check_layer(layers: int, cache: Cache, layer: Array) -> None:
    if is_concrete(layer) and not 0 <= int(layer) < layers:
        raise InputError(f"resume: layer {int(layer)} is outside the model's 0 to {layers - 1}")
    for i in [int(layer)] if is_concrete(layer) else range(layers):
        if source_of(cache, i) is None:
            site, below = ("after_ffn", i - 1) if i else ("embedding", 0)
            raise CacheError(
                f"resume: the input of layer {i} was not recorded: the cache has neither {site!r} of layer {below} nor "
                f"layer inputs; make it with caches.hybrid(), or caches.traced(kind, sites=({site!r}, …))"
            )


def _check_position(cache: Cache, layer: int, position: np.ndarray) -> None:
    for row, (at, length) in enumerate(zip(position, np.asarray(cache.lengths), strict=True)):
        if not 0 <= at < length:
            raise CacheError(f"resume: position {at} is outside row {row}, which has {length} tokens")
    behind = np.asarray(cache.written) - position
    for i, limit in _limits(cache):
        row = int(np.argmax(behind))
        if i >= layer and behind[row] > limit:
            raise CacheError(
                f"resume: row {row} at position {position[row]} is {behind[row]} behind the furthest token written "
                f"({int(cache.written[row])}), and layer {i} keeps {limit}; give the ring more slack"
            )
    if cache.shared:
        cache.rewind(position)  # says what is wrong


def _padded(model: Model, cache: Cache, position: Array, patch: Any, size: int) -> tuple[Any, Any]:
    """The patch as `[B, size, M]` and how many of its columns are meant, so that its length compiles nothing."""
    b, m, dtype = cache.batch, model.config.width, model.params["embed"]["table"].dtype
    if patch is None:
        return np.zeros((b, size, m), dtype), np.int32(0)
    numeric: Any = np if is_concrete(patch) else jnp
    try:
        x = numeric.asarray(patch)
    except (TypeError, ValueError) as error:
        raise InputError(f"resume: patch is no array of numbers ({error})") from error
    if not jnp.issubdtype(x.dtype, jnp.number) or jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise InputError(f"resume: patch has dtype {x.dtype}, it must be real numbers")
    x = x[:, None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[0] != b or x.shape[2] != m or not x.shape[1]:
        raise InputError(f"resume: patch has shape {list(np.shape(patch))}, it must be [{b}, {m}] or [{b}, n, {m}]")
    n = x.shape[1]
    if is_concrete(cache.lengths) and is_concrete(position):
        room = np.asarray(cache.lengths) - position
        if n > room.min():
            raise InputError(
                f"resume: patch has {n} positions, row {room.argmin()} only {room.min()} from its position"
            )
    if n > size:
        raise InputError(f"resume: patch has {n} positions, the capacity is {size}")
    return numeric.pad(x.astype(dtype), ((0, 0), (0, size - n), (0, 0))), np.int32(n)


__all__ = ["resume", "source_of"]
