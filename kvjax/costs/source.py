"""What a source text costs an encoder-decoder model: bytes of what is kept of it, and FLOPs of reading it.

R sources of S positions each, B rows that read them, E the width of the encoder's output.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.checks import bucket
from kvjax.config import Config
from kvjax.costs.memory import Stored, kv_nbytes, stored_as
from kvjax.costs.work import NORMS, Flops, attended, kv_flops, norm_flops
from kvjax.errors import InputError
from kvjax.types import DType


def _encoder(config: Config) -> Config:
    if config.encoder is None:
        raise InputError("costs: the model has no encoder (Config.encoder is None)")
    return config.encoder


def source_slots(config: Config, tokens: int) -> int:
    """S, positions that `kvjax.encode` pads sources to of which the longest has so many tokens (16, 32, 64, …)."""
    return bucket(tokens, most=_encoder(config).max_positions)


def source_nbytes(rows: int) -> int:
    """Bytes beside whatever is kept of sources: lengths and flags `[R]`, int32."""
    return 2 * 4 * rows


def cross_nbytes(
    config: Config,
    *,
    source: int,
    rows: int = 1,
    store: DType | Stored = jnp.float32,
    values: DType | Stored | None = None,
) -> int:
    """Bytes of cross-attention's keys and values: 2 · L · K · D · S · R · bytes per element, lengths and flags.

    Args:
        config: the model.
        source: S, padding included.
        rows: R, sources; rows that share one add nothing.
        store: dtype of a stored element, or a `Stored`.
        values: the same for values where they are stored unlike keys.
    """
    return config.num_layers * rows * kv_nbytes(config, source, store, values) + source_nbytes(rows)


def encoder_output_nbytes(config: Config, *, source: int, rows: int = 1, store: DType | Stored = jnp.float32) -> int:
    """Bytes of the encoder's output, once for all layers: E · S · R · bytes per element, lengths and flags.

    Args:
        config: the model.
        source: S, padding included.
        rows: R, sources; rows that share one add nothing.
        store: dtype of a stored element, or a `Stored`.
    """
    return rows * stored_as(store).nbytes(source, _encoder(config).width) + source_nbytes(rows)


def cross_ratio(config: Config) -> float:
    """Bytes of cross-attention's K/V ÷ bytes of the encoder's output at equal dtypes: 2 · L · K · D / E; 2L with as
    many kv heads as query heads, H · D = E."""
    return 2 * config.num_layers * config.kv_heads * config.head_dim / _encoder(config).width


def cross_layer_flops(config: Config, source: int) -> Flops:
    """One decoded token's cross-attention in one layer, keys and values kept: 4 · M · H · D + 4 · S · H · D.

    With H · D = M that is 4 M² + 4 S M: beside `layer_flops`, **28 M² + 4 t M + 4 S M** in all.

    Args:
        config: the model.
        source: S; padding is read as well.
    """
    _encoder(config)
    m, heads = config.width, config.query_heads * config.head_dim
    normed = NORMS[config.norm_order] // 2 * norm_flops(config, m)
    if config.qk_norm is not None:
        normed += config.query_heads * norm_flops(config, config.head_dim)
    return Flops(projections=4 * m * heads, scores=4 * source * heads, norms=normed)


def cross_flops(config: Config, *, source: int, batch: int = 1, queries: int = 1) -> Flops:
    """Cross-attention of one call in all layers, keys and values kept (`caches.cross()`); add it to `kv_flops`.

    Args:
        config: the model.
        source: S; padding is read as well.
        batch: B; whether rows share a source changes nothing.
        queries: tokens a row.
    """
    layer = cross_layer_flops(config, source)
    scores = Flops(scores=attended(queries, source) * layer.scores)
    return (dataclasses.replace(layer, scores=0) * queries + scores) * (config.num_layers * batch)


def projecting_flops(config: Config, *, source: int, rows: int = 1) -> Flops:
    """Making the keys and values of sources for all layers: 4 · E · K · D a position and layer. Once a source with
    `caches.cross()`."""
    again = Flops(projections=4 * _encoder(config).width * config.kv_heads * config.head_dim)
    if config.qk_norm is not None:
        again += Flops(norms=config.kv_heads * norm_flops(config, config.head_dim))
    return again * (config.num_layers * rows * source)


def cross_reprojected_flops(config: Config, *, source: int, rows: int = 1, batch: int = 1, queries: int = 1) -> Flops:
    """Cross-attention of one call that projects the sources again (`caches.encoder_output()`); a compiler may take
    that out of a loop."""
    again = projecting_flops(config, source=source, rows=rows)
    return cross_flops(config, source=source, batch=batch, queries=queries) + again


def cross_absorbed_flops(config: Config, *, source: int, batch: int = 1, queries: int = 1) -> Flops:
    """Cross-attention of one call over the encoder's output itself (`caches.encoder_output(absorb=True)`): scores of
    width E instead of D, 4 · S · H · E, and the way there and back, 4 · H · D · E, for each new token and layer.

    Biases add 2 · H · D for a query against the key's.
    """
    width, heads = _encoder(config).width, config.query_heads * config.head_dim
    usual = cross_flops(config, source=source, batch=batch, queries=queries)
    through = 4 * heads * width + (2 * heads if config.qkv_bias else 0)
    wide = Flops(projections=through, scores=4 * source * config.query_heads * width)
    return dataclasses.replace(usual, scores=0) + wide * (config.num_layers * batch * attended(queries, source))


def encoder_flops(config: Config, *, source: int, rows: int = 1) -> Flops:
    """The encoder over sources, once: all S positions through its layers, each seeing all; no head."""
    made = kv_flops(_encoder(config), slots=source, batch=rows, queries=source)
    return dataclasses.replace(made, head=0)


__all__ = [
    "source_slots",
    "source_nbytes",
    "cross_nbytes",
    "encoder_output_nbytes",
    "cross_ratio",
    "cross_layer_flops",
    "cross_flops",
    "projecting_flops",
    "cross_reprojected_flops",
    "cross_absorbed_flops",
    "encoder_flops",
]
