"""Bytes of every layout with every way of storing an element."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from kvjax.config import Config
from kvjax.types import DType


@dataclasses.dataclass(frozen=True)
class Stored:
    """How the numbers of one vector (a key, or a value) are stored.

    Args:
        bits: of one number.
        scales: bytes beside each vector: 4 for one float32 scale, 2 for bfloat16.
        group: G, slots that become codes together, behind a tail in full precision; None: every slot on its own.
        channel: bytes beside each channel of a group: 8 for a float32 scale and zero point.
        residual, slack: R and s; the tail has R + G + s slots, and no codes are kept for the last R.
        tail: bytes of one number in the tail.
    """

    bits: int = 32
    scales: int = 0
    group: int | None = None
    channel: int = 0
    residual: int = 0
    slack: int = 0
    tail: int = 4

    def nbytes(self, slots: int, width: int) -> int:
        """Bytes of `slots` vectors of `width` numbers."""
        if self.group is None:
            return math.ceil(slots * width * self.bits / 8) + slots * self.scales
        groups = max((slots - self.residual) // self.group, 1)
        coded = dataclasses.replace(self, group=None).nbytes(groups * self.group, width)
        return coded + (groups * self.channel + (self.residual + self.group + self.slack) * self.tail) * width


def stored_as(store: DType | Stored) -> Stored:
    return store if isinstance(store, Stored) else Stored(8 * jnp.dtype(store).itemsize)


def container_nbytes(batch: int, capacity: int) -> int:
    """Bytes that every cache has: tokens `[B, T]`, and lengths, furthest positions and flags `[B]`, all int32."""
    return 4 * batch * capacity + 3 * 4 * batch


def slot_nbytes(config: Config, store: DType | Stored = jnp.float32) -> int:
    """Bytes of one position's key and value in one layer of one row: 2 · K · D · bytes per element, and scales."""
    return kv_nbytes(config, 1, store)


def kv_nbytes(config: Config, slots: int, store: DType | Stored, values: DType | Stored | None = None) -> int:
    """Bytes of the keys and values of one layer of one row."""
    stores = (stored_as(store), stored_as(store if values is None else values))
    return config.kv_heads * sum(each.nbytes(slots, config.head_dim) for each in stores)


def dense_nbytes(
    config: Config,
    *,
    batch: int,
    capacity: int,
    store: DType | Stored = jnp.float32,
    values: DType | Stored | None = None,
) -> int:
    """Bytes of a dense cache: 2 · L · K · D · T · B · bytes per element, and the container.

    Args:
        config: the model.
        batch: B.
        capacity: T.
        store: dtype of a stored element, or a `Stored`.
        values: the same for values where they are stored unlike keys.
    """
    return config.num_layers * batch * kv_nbytes(config, capacity, store, values) + container_nbytes(batch, capacity)


def ring_nbytes(
    config: Config,
    *,
    batch: int,
    capacity: int,
    window: int,
    sinks: int = 0,
    slack: int = 0,
    store: DType | Stored = jnp.float32,
) -> int:
    """Bytes of a ring in every layer: 2 · L · K · D · (sinks + window + slack) · B · bytes per element, and the
    container, whose tokens alone grow with the text.

    Args:
        config: the model.
        batch: B.
        capacity: T, tokens of the text.
        window, sinks, slack: of the ring.
        store: dtype of a stored element, or a `Stored`.
    """
    slots = sinks + window + slack
    return config.num_layers * batch * kv_nbytes(config, slots, store) + container_nbytes(batch, capacity)


def recompute_nbytes(config: Config, *, batch: int, capacity: int) -> int:
    """Bytes without a cache: the container."""
    return container_nbytes(batch, capacity)


def paged_nbytes(
    config: Config,
    *,
    batch: int,
    capacity: int,
    pages: int,
    page_size: int,
    per_page: int = 2,
    other: int = 0,
    store: DType | Stored = jnp.float32,
) -> int:
    """Bytes of a pool of pages in every layer, one table for all layers, and the container.

    2 · L · K · D · pages · page_size · bytes per element + 4 · B · ⌈T / page_size⌉ + 4 · per_page · pages + other.

    Args:
        config: the model.
        batch: B, rows of the table.
        capacity: T, which gives the table its columns.
        pages, page_size: of the pool; slots of a page.
        per_page: int32 numbers kept for each page: its readers, one unless rows share pages, and its place.
        other: bytes of bookkeeping that depend on neither.
        store: dtype of a stored element, or a `Stored`.
    """
    pool = config.num_layers * pages * kv_nbytes(config, page_size, store)
    table = 4 * batch * math.ceil(capacity / page_size)
    return pool + table + 4 * per_page * pages + other + container_nbytes(batch, capacity)


def shared_prefix_nbytes(
    config: Config,
    *,
    batch: int,
    capacity: int,
    prefix: int,
    prefixes: int = 1,
    store: DType | Stored = jnp.float32,
) -> int:
    """Bytes of prompts that rows share and a suffix a row: 2 · L · K · D · (R · P + B · (T - P)) · bytes per element,
    the prompts' ids and lengths, and the container.

    Args:
        config: the model.
        batch: B.
        capacity: T, tokens of a row, prefix included.
        prefix: P, slots of a shared prompt.
        prefixes: R, how many there are.
        store: dtype of a stored element, or a `Stored`.
    """
    kv = prefixes * kv_nbytes(config, prefix, store) + batch * kv_nbytes(config, capacity - prefix, store)
    return config.num_layers * kv + 4 * prefixes * (prefix + 1) + container_nbytes(batch, capacity)


def layer_input_nbytes(
    config: Config, *, batch: int, capacity: int, factor: int = 0, store: DType | Stored = jnp.float32
) -> int:
    """Bytes of every layer's input: L · M · T · B · bytes per element, and the container.

    Args:
        config: the model.
        batch: B.
        capacity: T.
        factor: bytes beside each position for its norm's factor, which absorption needs: 4 in float32.
        store: dtype of a stored element, or a `Stored`.
    """
    stored = stored_as(store).nbytes(capacity, config.width) + factor * capacity
    return config.num_layers * batch * stored + container_nbytes(batch, capacity)


def layer_input_ratio(config: Config) -> float:
    """Bytes of layer inputs ÷ bytes of K/V at equal dtypes: M / (2 · K · D). Above 1 layer inputs are the larger."""
    return config.width / (2 * config.kv_heads * config.head_dim)


def trace_nbytes(
    config: Config,
    *,
    batch: int,
    capacity: int,
    sites: int,
    embedding: int = 1,
    store: DType | Stored = jnp.float32,
) -> int:
    """Bytes of what a trace adds to a cache: (sites · L + embedding) · M · T · B · bytes per element.

    Args:
        config: the model.
        batch: B.
        capacity: T.
        sites: how many sites of each layer are kept.
        embedding: 1 where the embedding is kept too, once for all layers; else 0.
        store: dtype of a stored element, or a `Stored`.
    """
    return (sites * config.num_layers + embedding) * batch * stored_as(store).nbytes(capacity, config.width)


def output_nbytes(config: Config, *, batch: int, capacity: int, store: DType | Stored = jnp.float32) -> int:
    """Bytes of the embedding and every layer's output: (L + 1) · M · T · B · bytes per element, and the container."""
    kept = trace_nbytes(config, batch=batch, capacity=capacity, sites=1, store=store)
    return kept + container_nbytes(batch, capacity)


def sites_of(config: Config) -> int:
    """Sites of each layer: after self-attention and feed-forward, and after cross-attention where there is any."""
    return 2 if config.encoder is None else 3


def hybrid_nbytes(config: Config, *, batch: int, capacity: int, store: DType | Stored = jnp.float32) -> int:
    """Bytes of dense K/V and a trace of all sites of each layer and the embedding, stored alike."""
    sites = sites_of(config)
    trace = trace_nbytes(config, batch=batch, capacity=capacity, sites=sites, store=store)
    return dense_nbytes(config, batch=batch, capacity=capacity, store=store) + trace


def step_temporaries_nbytes(config: Config, *, batch: int, slots: int, source: int = 0, itemsize: int = 4) -> int:
    """Bytes that one step needs beside weights and cache, at most, where it reads the cache as it is stored and writes
    it in place: B · (V + 2 · H · (T + S)) · max(4, b) for logits, scores and their weights, and
    B · ((H + 2 · K) · D + 2 · F + 4 · M) · b for what one layer makes. Layers follow each other and use the same
    memory; a compiler may need less.

    Args:
        config: the model.
        batch: B.
        slots: T.
        source: S, positions of the source.
        itemsize: b, bytes of a number that is computed with.
    """
    heads = (config.query_heads + 2 * config.kv_heads) * config.head_dim
    made = heads + 2 * config.ffn_width + 4 * config.width
    wide = config.vocab_size + 2 * config.query_heads * (slots + source)
    return batch * (wide * max(4, itemsize) + made * itemsize)


def latent_nbytes(layers: int, latent: int, rotary: int, capacity: int, batch: int, itemsize: int = 4) -> int:
    """Bytes of latents (DeepSeek-V2, 2405.04434): L · (d_c + d_r) · T · B · itemsize."""
    return layers * (latent + rotary) * capacity * batch * itemsize


__all__ = [
    "Stored",
    "container_nbytes",
    "slot_nbytes",
    "dense_nbytes",
    "ring_nbytes",
    "recompute_nbytes",
    "paged_nbytes",
    "shared_prefix_nbytes",
    "layer_input_nbytes",
    "layer_input_ratio",
    "trace_nbytes",
    "output_nbytes",
    "sites_of",
    "hybrid_nbytes",
    "step_temporaries_nbytes",
    "latent_nbytes",
]
