"""The yardstick: the fastest decoder written by hand for one kind of cache, rows in step, and nothing else.

It knows the model (Llama's layer, tied head), keeps one buffer of keys and one of values a layer, `[B * K, T, D]`,
unrolls the layers, and takes the largest logit by comparison. Parameters are those of `kvjax.params.init_params`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.config import Config

Array = jax.Array
State = dict[str, Any]


def init(config: Config, batch: int, capacity: int, fill: int, dtype: Any = jnp.float32) -> State:
    """A cache of zeros that counts `fill` tokens."""
    c = config
    one = lambda: jnp.zeros((batch * c.kv_heads, capacity, c.head_dim), dtype)  # noqa: E731
    return {"kv": tuple((one(), one()) for _ in range(c.num_layers)), "at": jnp.full((), fill, jnp.int32)}


def norm(x: Array, scale: Array) -> Array:
    """Root mean square, in float32."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale[None, :]


def dot(x: Array, kernel: Array, axis: int = 0) -> Array:
    """`[B, in] · [in, out]`, or a table's rows with axis 1."""
    return lax.dot_general(x, kernel, (((1,), (axis,)), ((), ())))


def batched(a: Array, b: Array, axis: int) -> Array:
    """A product for each head of each row, summed in float32."""
    return lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def step(params: Any, config: Config, state: State, tokens: Array) -> tuple[State, Array]:
    """One token a row: `[B]` to logits `[B, V]`."""
    c, at, b = config, state["at"], tokens.shape[0]
    h, k, d = c.query_heads, c.kv_heads, c.head_dim
    slots = jnp.arange(state["kv"][0][0].shape[1])
    angles = at.astype(jnp.float32) * 10_000.0 ** (-jnp.arange(d // 2, dtype=jnp.float32) * 2 / d)
    cos, sin = jnp.cos(angles)[None, None, :], jnp.sin(angles)[None, None, :]

    def rotate(x: Array) -> Array:
        low, high = x[..., : d // 2], x[..., d // 2 :]
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)

    x, kept = params["embed"]["table"][tokens], []
    for i, (keys, values) in enumerate(state["kv"]):
        layer = params["layers"][str(i)]
        qkv = dot(norm(x, layer["attn_norm"]["scale"]), layer["attn"]["qkv"]["kernel"])
        q, new, v = (y.reshape(b, -1, d) for y in jnp.split(qkv, [h * d, (h + k) * d], axis=1))
        keys = lax.dynamic_update_slice(keys, rotate(new).reshape(b * k, 1, d), (0, at, 0))
        values = lax.dynamic_update_slice(values, v.reshape(b * k, 1, d), (0, at, 0))
        scores = batched((rotate(q) * d**-0.5).reshape(b * k, h // k, d), keys, 2)
        scores = jnp.where((slots <= at)[None, None, :], scores, -1e30)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        y = batched(weights.astype(x.dtype), values, 1) / jnp.sum(weights, axis=-1, keepdims=True)
        x = x + dot(y.astype(x.dtype).reshape(b, h * d), layer["attn"]["out"]["kernel"])
        gate, up = jnp.split(dot(norm(x, layer["ffn_norm"]["scale"]), layer["ffn"]["gate_up"]["kernel"]), 2, axis=1)
        x = x + dot(jax.nn.silu(gate) * up, layer["ffn"]["down"]["kernel"])
        kept.append((keys, values))
    logits = dot(norm(x, params["final_norm"]["scale"]), params["embed"]["table"], 1)
    return {"kv": tuple(kept), "at": at + 1}, logits


def decode(params: Any, config: Config, state: State, tokens: Array, steps: int) -> tuple[State, Array]:
    """Greedy, `steps` tokens a row `[B, steps]` after `tokens[B]`."""

    def one(carry: tuple[State, Array], _: None) -> tuple[tuple[State, Array], Array]:
        state, logits = step(params, config, *carry)
        best = logits == jnp.max(logits, axis=1, keepdims=True)  # faster than argmax on XLA:CPU
        ids = jnp.where(best, jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :], logits.shape[1])
        return (state, jnp.min(ids, axis=1)), jnp.min(ids, axis=1)

    (state, _), out = lax.scan(one, (state, tokens), None, length=steps)
    return state, out.T
