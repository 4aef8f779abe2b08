"""What could be kept of a text, and of the source that it reads: each with what that should cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import caches, costs
from kvjax.config import Config
from kvjax.costs import Flops
from kvjax.errors import InputError
from kvjax.model import Model, decoder
from kvjax.ops.positions import Learned
from kvjax.params import init_params
from kvjax.types import DType


@dataclasses.dataclass(frozen=True)
class OfSource:
    """What is kept of a source.

    Args:
        cross: word for it.
        nbytes: `(config, source=, rows=, store=) -> int`.
        flops: `(config, source=, rows=, batch=, queries=) -> Flops` of cross-attention in one call.
    """

    cross: Any
    nbytes: Callable[..., int]
    flops: Callable[..., Flops]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What is kept, and what that should cost.

    Args:
        name: for people.
        plan: kind of cache.
        nbytes: `(config, batch=, capacity=, store=) -> int`.
        flops: `(config, batch=, slots=) -> Flops` of one step, cross-attention left out.
        source: what is kept of the source, for models with an encoder.
        whole: whether a step runs the whole text again.
    """

    name: str
    plan: Any
    nbytes: Callable[..., int]
    flops: Callable[..., Flops]
    source: OfSource | None = None
    whole: bool = False


def _nothing(config: Config, *, batch: int, capacity: int, store: Any) -> int:
    return costs.recompute_nbytes(config, batch=batch, capacity=capacity)


def _with_factor(config: Config, *, batch: int, capacity: int, store: Any) -> int:
    factor = jnp.promote_types(jnp.float32, store).itemsize
    return costs.layer_input_nbytes(config, batch=batch, capacity=capacity, store=store, factor=factor)


def _sub_layers(config: Config, *, batch: int, capacity: int, store: Any) -> int:
    sites = costs.sites_of(config)
    kept = costs.trace_nbytes(config, batch=batch, capacity=capacity, sites=sites, store=store)
    return kept + costs.container_nbytes(batch, capacity)


def _cross_flops(config: Config, *, source: int, rows: int, batch: int, queries: int) -> Flops:
    return costs.cross_flops(config, source=source, batch=batch, queries=queries)


def _cross_absorbed_flops(config: Config, *, source: int, rows: int, batch: int, queries: int) -> Flops:
    return costs.cross_absorbed_flops(config, source=source, batch=batch, queries=queries)


NONE, KV, OUTPUT, ABSORBED = "none", "K/V", "output", "input, absorbed"
STRATEGIES = (
    Strategy(NONE, caches.recompute(), _nothing, costs.recompute_flops, whole=True),
    Strategy(KV, caches.dense(), costs.dense_nbytes, costs.kv_flops),
    Strategy("input, projected", caches.layer_input(), costs.layer_input_nbytes, costs.reprojected_flops),
    Strategy(ABSORBED, caches.layer_input(absorb=True), _with_factor, costs.absorbed_flops),
    Strategy(OUTPUT, caches.output(), costs.output_nbytes, costs.reprojected_flops),
    Strategy("hybrid", caches.hybrid(), costs.hybrid_nbytes, costs.kv_flops),
)
"""The first one is the reference for the tokens, the second one for the figures."""

SITES = ("after_self_attention", "after_cross_attention")
PROJECTED = OfSource(caches.cross(), costs.cross_nbytes, _cross_flops)
AGAIN = OfSource(caches.encoder_output(), costs.encoder_output_nbytes, costs.cross_reprojected_flops)
MAPPED = OfSource(caches.encoder_output(absorb=True), costs.encoder_output_nbytes, _cross_absorbed_flops)

BOTH_KV, SOURCE_ABSORBED, SOURCE_AGAIN = "K/V, source K/V", "K/V, source absorbed", "K/V, source projected"
SUB_LAYERS = "sub-layers, source K/V"
WITH_SOURCE = (
    Strategy(NONE, caches.recompute(), _nothing, costs.recompute_flops, AGAIN, whole=True),
    Strategy(BOTH_KV, caches.dense(), costs.dense_nbytes, costs.kv_flops, PROJECTED),
    Strategy(SOURCE_ABSORBED, caches.dense(), costs.dense_nbytes, costs.kv_flops, MAPPED),
    Strategy(SOURCE_AGAIN, caches.dense(), costs.dense_nbytes, costs.kv_flops, AGAIN),
    Strategy("input, source K/V", caches.layer_input(), costs.layer_input_nbytes, costs.reprojected_flops, PROJECTED),
    Strategy(SUB_LAYERS, caches.traced(caches.output(), SITES), _sub_layers, costs.reprojected_flops, PROJECTED),
    Strategy("everything", caches.hybrid(), costs.hybrid_nbytes, costs.kv_flops, PROJECTED),
)
"""The same for models with an encoder, whose output all of them have; "none" projects it again with every call.
"sub-layers" keeps the embedding and the stream after self-attention, cross-attention and feed-forward; "everything"
that and all K/V."""


def without_rotation(config: Config, size: int, dtype: DType = jnp.float32, seed: int = 0) -> Model:
    """A random model of the same shape with learned positions and no norm of heads: layer inputs can be absorbed.

    Args:
        config: of the model that it is like.
        size: positions that it knows.
        dtype: of its parameters.
        seed: of its parameters, which are large enough that it does not repeat itself.
    """
    like = dataclasses.replace(config, positions=Learned(size), layer_positions=(), max_positions=size, qk_norm=None)
    factor = 100 * config.width**-0.5  # a deviation of 2 / sqrt(M)
    params = init_params(like, jax.random.key(seed), dtype)
    return decoder(like, jax.tree.map(lambda x: x * factor if x.ndim > 1 else x, params))


def with_encoder(config: Config, size: int, dtype: DType = jnp.float32, seed: int = 0) -> Model:
    """The same with an encoder of as many layers of the same shape, that reads the same table.

    Args:
        config: of the model that it is like.
        size: positions that encoder and decoder know.
        dtype: of its parameters.
        seed: of its parameters.

    Raises:
        InputError: the model has an encoder.
    """
    if config.encoder is not None:
        raise InputError("with_encoder: the model has an encoder already")
    stack = dataclasses.replace(config, positions=Learned(size), layer_positions=(), max_positions=size, qk_norm=None)
    encoder = dataclasses.replace(stack, windows=(), tied=True, logit_softcap=None, head_bias=False, logit_scale=1.0)
    return without_rotation(dataclasses.replace(config, encoder=encoder), size, dtype, seed)


__all__ = [
    "OfSource",
    "Strategy",
    "STRATEGIES",
    "WITH_SOURCE",
    "NONE",
    "KV",
    "OUTPUT",
    "ABSORBED",
    "BOTH_KV",
    "SOURCE_ABSORBED",
    "SOURCE_AGAIN",
    "SUB_LAYERS",
    "without_rotation",
    "with_encoder",
]
