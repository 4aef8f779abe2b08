"""References of the hard cases that no cache computes, and a decoder with cross-attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches import storage
from kvjax.caches.base import OpenCache, Project
from kvjax.config import Config
from kvjax.layers import Rotation, feed_forward, linear, self_attention
from kvjax.model import Model
from kvjax.ops.attention import Absorb
from kvjax.transformer import decoder_head
from kvjax.types import Array, Params


def apply_translator(
    params: Params, config: Config, cache: OpenCache, tokens: Array, valid: Array, absorbed: bool = True
) -> tuple[Array, OpenCache]:
    """A decoder with cross-attention: layer i attends to the text at node i and to the source at node L + i."""
    x = jnp.take(params["embed"]["table"], tokens, axis=0, mode="clip")
    rotations, (h, k, d) = (
        Rotation.of_layers(params, config, cache.positions, x.dtype),
        (config.query_heads, 2, config.head_dim),
    )
    for i in range(config.num_layers):
        own, cross = params["layers"][str(i)], params["cross"][str(i)]
        y, cache = self_attention(own, config, x, cache, i, rotations[i])
        x = x + y
        q = linear(cross["q"], config.norm(cross["norm"], x)).reshape(*x.shape[:2], h, d)
        maps = cross["kv"]["kernel"].reshape(-1, 2, k, d)  # [E, keys and values, K, D]
        if absorbed:
            absorb = Absorb(maps[:, 0].transpose(1, 2, 0), maps[:, 1].transpose(1, 0, 2))
            project = Project(kv=_no_kv, rotate=_still, absorb=lambda _, absorb=absorb: (absorb, None))
            y, cache = cache.attend(config.num_layers + i, q, project, None, kv_heads=k)
        else:  # the reference: keys and values of the whole source for every row, no cache and no view
            source = cache.shared["source"]
            text = jnp.repeat(storage.unpack(source.x.data, 1, 1)[:, 0], x.shape[0] // source.lengths.shape[0], axis=0)
            lengths = jnp.repeat(source.lengths, x.shape[0] // source.lengths.shape[0])
            keys, values = (jnp.repeat(jnp.einsum("bte,ekd->btkd", text, maps[:, n]), h // k, axis=2) for n in (0, 1))
            scores = jnp.einsum("bshd,bthd->bhst", q, keys) * d**-0.5
            there = jnp.arange(text.shape[1])[None, :] < lengths[:, None]
            weights = jax.nn.softmax(jnp.where(there[:, None, None, :], scores, -jnp.inf), axis=-1)
            y = jnp.einsum("bhst,bthd->bshd", weights, values)
        x = x + linear(cross["out"], y.reshape(*x.shape[:2], h * d))
        x = x + feed_forward(own["ffn"], config, config.norm(own["ffn_norm"], x))
    return config.norm(params["final_norm"], x), cache


def apply_plain_translator(params: Params, config: Config, cache: OpenCache, tokens: Array, valid: Array) -> Any:
    """The same with cross-attention written out."""
    return apply_translator(params, config, cache, tokens, valid, absorbed=False)


def _no_kv(h: Any, positions: Array | None) -> Any:
    raise AssertionError("absorbed cross-attention makes no keys and values")


def _still(x: Array, positions: Array) -> Array:
    return x


def naive_sinks(m: Model, tokens: np.ndarray, window: int, sinks: int) -> np.ndarray:
    """Logits `[N, V]` of one row, from nothing but the tokens: every score with its own two positions."""
    c, n = m.config, len(tokens)
    x = m.params["embed"]["table"][tokens][None]
    q_at, k_at = np.arange(n)[:, None], np.arange(n)[None, :]
    in_cache = np.where(k_at < sinks, np.minimum(q_at, sinks + window - 1), q_at)  # [N, N], where the query stands
    seen = (k_at <= q_at) & ((q_at - k_at < window) | (k_at < sinks))
    for i in range(c.num_layers):
        layer = m.params["layers"][str(i)]
        qkv = linear(layer["attn"]["qkv"], c.norm(layer["attn_norm"], x)).reshape(1, n, -1, c.head_dim)
        q, k, v = jnp.split(qkv[0], [c.query_heads, c.query_heads + c.kv_heads], axis=1)
        k, v = (jnp.repeat(y, c.query_heads // c.kv_heads, axis=1) for y in (k, v))
        turn = lambda y, at: c.positions.rotate(y, c.positions.tables(jnp.asarray(at), c.head_dim, jnp.float32))  # noqa: E731
        k = turn(k[None], np.arange(n)[None])[0]
        q = turn(jnp.repeat(q[:, None], n, axis=1), in_cache)  # [N, N, H, D], turned for each key
        scores = jnp.einsum("sthd,thd->hst", q, k) * c.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(seen[None], scores, -jnp.inf), axis=-1)
        y = jnp.einsum("hst,thd->shd", weights, v).reshape(1, n, -1)
        x = x + linear(layer["attn"]["out"], y)
        x = x + feed_forward(layer["ffn"], c, c.norm(layer["ffn_norm"], x))
    return np.asarray(decoder_head(m.params, c, c.norm(m.params["final_norm"], x))[0])
