"""References of the hard cases that no cache computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.layers import feed_forward, linear
from kvjax.model import Model
from kvjax.transformer import decoder_head


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
