"""One declaration of a model's parameters: abstract shapes and initialisation come from it.

Parameters are a nested dict with stable names, so `flax.traverse_util`, `optax.masked` and the like work unchanged:

    embed/table [V, M]              positions/table [positions, M]      (Learned; Relative: [buckets, H])
    embed_norm/scale [M]            (embed_norm only)
    layers/I/attn_norm/scale [M]    layers/I/ffn_norm/scale [M]         (and bias, for layer norm; or offset alone)
    layers/I/attn_post_norm/...     layers/I/ffn_post_norm/...          (norm_order SANDWICH only)
    layers/I/attn/qkv/kernel [M, (H + 2K) * D]   queries, keys, values side by side, each heads x D
    layers/I/attn/out/kernel [H * D, M]
    layers/I/attn/q_norm/scale [D]  layers/I/attn/k_norm/scale [D]      (qk_norm only)
    layers/I/ffn/gate_up/kernel [M, 2F]          gate, then up; `up/kernel [M, F]` when not gated
    layers/I/ffn/down/kernel [F, M]
    layers/I/cross_norm/scale [M]   layers/I/cross_post_norm/...        (with an encoder only, as all of `cross`)
    layers/I/cross/q/kernel [M, H * D]           layers/I/cross/kv/kernel [E, 2K * D], E the encoder's width
    layers/I/cross/out/kernel [H * D, M]
    final_norm/scale [M]            (but for norm_order POST)           head/kernel [M, V] (untied only), head/bias [V]
    encoder/...                     the same without a head; its embed/table only if it is not tied

A linear map with a bias has `bias [out]` beside its kernel.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.config import Config, NormOrder
from kvjax.types import Array, DType, Params


def declare(config: Config) -> dict[str, Any]:
    """Shapes of all parameters, as a nested dict of tuples of int."""
    tree = _stack(config)
    tree["embed"] = {"table": (config.vocab_size, config.width)}
    head: dict[str, tuple[int, ...]] = {} if config.tied else {"kernel": (config.width, config.vocab_size)}
    if config.head_bias:
        head["bias"] = (config.vocab_size,)
    if head:
        tree["head"] = head
    if config.encoder is not None:
        tree["encoder"] = _stack(config.encoder)
        if not config.encoder.tied:
            tree["encoder"]["embed"] = {"table": (config.encoder.vocab_size, config.encoder.width)}
    return tree


def _stack(config: Config) -> dict[str, Any]:
    """All but the embedding table and the head."""
    layer = _layer(config)
    tree: dict[str, Any] = {"layers": {str(i): layer for i in range(config.num_layers)}}
    if config.norm_order is not NormOrder.POST:
        tree["final_norm"] = config.norm.shapes(config.width)
    if config.embed_norm:
        tree["embed_norm"] = config.norm.shapes(config.width)
    if positions := config.positions.shapes(config.width, config.query_heads):
        tree["positions"] = positions
    return tree


def _layer(config: Config) -> dict[str, Any]:
    def linear(inputs: int, outputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
        return {"kernel": (inputs, outputs)} | ({"bias": (outputs,)} if bias else {})

    m, d, f = config.width, config.head_dim, config.ffn_width
    query, kv = config.query_heads * d, config.kv_heads * d
    norms = {} if config.qk_norm is None else {x: config.qk_norm.shapes(d) for x in ("q_norm", "k_norm")}
    out = linear(query, m, config.out_bias)
    first, outputs = ("gate_up", 2 * f) if config.gated else ("up", f)
    layer: dict[str, Any] = {
        "attn": {"qkv": linear(m, query + 2 * kv, config.qkv_bias), "out": out} | norms,
        "ffn": {first: linear(m, outputs, config.ffn_bias), "down": linear(f, m, config.ffn_bias)},
    }
    if config.encoder is not None:
        maps = {
            "q": linear(m, query, config.qkv_bias),
            "kv": linear(config.encoder.width, 2 * kv, config.qkv_bias),
            "out": out,
        }
        layer["cross"] = maps | norms
    parts = tuple(layer)
    layer |= {f"{part}_norm": config.norm.shapes(m) for part in parts}
    if config.norm_order is NormOrder.SANDWICH:
        layer |= {f"{part}_post_norm": config.norm.shapes(m) for part in parts}
    return layer


def abstract_params(config: Config, dtype: DType = jnp.float32) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`, nothing allocated."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), declare(config), is_leaf=_is_shape)


def init_params(config: Config, key: Array, dtype: DType = jnp.float32) -> Params:
    """Random parameters: scales one, biases and offsets zero, the rest normal with deviation 0.02 (GPT-2), maps back
    into the residual stream divided by sqrt(2L), or sqrt(3L) with cross-attention.

    Args:
        config: the model.
        key: a JAX random key.
        dtype: of every leaf.

    Returns:
        A nested dict as described in this module.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(declare(config), is_leaf=_is_shape)
    keys = jax.random.split(key, len(leaves))

    def leaf(path: Any, shape: tuple[int, ...], key: Array) -> Array:
        names = [p.key for p in path]
        if names[-1] == "scale":
            return jnp.ones(shape, dtype)
        if names[-1] in ("bias", "offset"):
            return jnp.zeros(shape, dtype)
        back = len(names) > 1 and names[-2] in ("out", "down")
        deviation = 0.02 / math.sqrt((2 if config.encoder is None else 3) * config.num_layers) if back else 0.02
        return (jax.random.normal(key, shape, jnp.float32) * deviation).astype(dtype)

    return jax.tree.unflatten(tree, [leaf(path, shape, k) for (path, shape), k in zip(leaves, keys, strict=True)])


def count_params(config: Config) -> int:
    """How many numbers the parameters hold."""
    return sum(math.prod(s) for s in jax.tree.leaves(declare(config), is_leaf=_is_shape))


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


__all__ = ["declare", "abstract_params", "init_params", "count_params"]
