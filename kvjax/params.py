"""One declaration of a model's parameters: abstract shapes and initialisation come from it.

Parameters are a nested dict with stable names, so `flax.traverse_util`, `optax.masked` and the like work unchanged:

    embed/table [V, M]              positions/table [positions, M]      (learned positions only)
    layers/I/attn_norm/scale [M]    layers/I/ffn_norm/scale [M]         (and bias, for layer norm; or offset alone)
    layers/I/attn_post_norm/...     layers/I/ffn_post_norm/...          (norm_order SANDWICH only)
    layers/I/attn/qkv/kernel [M, (H + 2K) * D]   queries, keys, values side by side, each heads x D
    layers/I/attn/out/kernel [H * D, M]
    layers/I/attn/q_norm/scale [D]  layers/I/attn/k_norm/scale [D]      (qk_norm only)
    layers/I/ffn/gate_up/kernel [M, 2F]          gate, then up; `up/kernel [M, F]` when not gated
    layers/I/ffn/down/kernel [F, M]
    final_norm/scale [M]            (but for norm_order POST)           head/kernel [M, V] (untied only)

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

    def linear(inputs: int, outputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
        return {"kernel": (inputs, outputs)} | ({"bias": (outputs,)} if bias else {})

    m, d = config.width, config.head_dim
    query, kv = config.query_heads * d, config.kv_heads * d
    attn: dict[str, Any] = {
        "qkv": linear(m, query + 2 * kv, config.qkv_bias),
        "out": linear(query, m, config.out_bias),
    }
    if config.qk_norm is not None:
        attn |= {"q_norm": config.qk_norm.shapes(d), "k_norm": config.qk_norm.shapes(d)}
    first, outputs = ("gate_up", 2 * config.ffn_width) if config.gated else ("up", config.ffn_width)
    layer = {
        "attn_norm": config.norm.shapes(m),
        "attn": attn,
        "ffn_norm": config.norm.shapes(m),
        "ffn": {first: linear(m, outputs, config.ffn_bias), "down": linear(config.ffn_width, m, config.ffn_bias)},
    }
    if config.norm_order is NormOrder.SANDWICH:
        layer |= {"attn_post_norm": config.norm.shapes(m), "ffn_post_norm": config.norm.shapes(m)}
    tree: dict[str, Any] = {
        "embed": {"table": (config.vocab_size, m)},
        "layers": {str(i): layer for i in range(config.num_layers)},
    }
    if config.norm_order is not NormOrder.POST:
        tree["final_norm"] = config.norm.shapes(m)
    if positions := config.positions.shapes(m):
        tree["positions"] = positions
    if not config.tied:
        tree["head"] = linear(m, config.vocab_size, False)
    return tree


def abstract_params(config: Config, dtype: DType = jnp.float32) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`, nothing allocated."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), declare(config), is_leaf=_is_shape)


def init_params(config: Config, key: Array, dtype: DType = jnp.float32) -> Params:
    """Random parameters: scales one, biases and offsets zero, the rest normal with deviation 0.02 (GPT-2), maps back
    into the residual stream divided by sqrt(2L).

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
        deviation = 0.02 / math.sqrt(2 * config.num_layers) if back else 0.02
        return (jax.random.normal(key, shape, jnp.float32) * deviation).astype(dtype)

    return jax.tree.unflatten(tree, [leaf(path, shape, k) for (path, shape), k in zip(leaves, keys, strict=True)])


def count_params(config: Config) -> int:
    """How many numbers the parameters hold."""
    return sum(math.prod(s) for s in jax.tree.leaves(declare(config), is_leaf=_is_shape))


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


__all__ = ["declare", "abstract_params", "init_params", "count_params"]
