"""A decoder, and an encoder, written out in NumPy, one row at a time, from nothing but the parameters: no cache, no
masks of kvjax's.

It gives the stream at every site, and takes patches: what the tests of traces and of `resume` compare with.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from kvjax.config import NormOrder
from kvjax.ops.norms import LayerNorm
from kvjax.ops.positions import Relative, Sinusoidal


def norm(config, params, x):
    if isinstance(config.norm, LayerNorm):
        x = x - x.mean(axis=-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.norm.eps) * params["scale"]
    return y + params["bias"] if "bias" in params else y


def normed(config, layer, part, x):
    return x if config.norm_order is NormOrder.POST else norm(config, layer[f"{part}_norm"], x)


def joined(config, layer, part, x, y):
    if config.norm_order is NormOrder.PRE:
        return x + y
    if config.norm_order is NormOrder.SANDWICH:
        return x + norm(config, layer[f"{part}_post_norm"], y)
    return norm(config, layer[f"{part}_norm"], x + y)


def linear(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def rotate(config, x, at):
    """`x[N, heads, D]` turned to positions `at[N]`."""
    half = config.head_dim // 2
    angle = at[:, None, None] * config.positions.theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def bucket(ahead, buckets, far, both):
    """T5's bucket of `key - query`, from the description in the paper's appendix: one distance at a time."""
    first = 0
    if both:
        buckets //= 2
        first = buckets if ahead > 0 else 0
        distance = abs(ahead)
    else:
        distance = max(-ahead, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    grown = exact + int(math.log(distance / exact) / math.log(far / exact) * (buckets - exact) + 1e-9)
    return first + min(grown, buckets - 1)


def biases(config, params, n):
    """`[H, N, N]`, what is added to the scores of queries and keys."""
    if not isinstance(config.positions, Relative):
        return np.zeros((config.query_heads, n, n))
    own = config.positions
    where = [[bucket(j - i, own.buckets, own.max_distance, own.bidirectional) for j in range(n)] for i in range(n)]
    return params["positions"]["table"][np.array(where)].transpose(2, 0, 1)


def embedded(config, params, table, tokens):
    """Tokens `[N]` as the first layer gets them."""
    x, n = table[tokens] * config.embed_scale, len(tokens)
    if isinstance(config.positions, Sinusoidal):
        wave = np.arange(config.width) // 2
        angle = np.arange(n)[:, None] / config.positions.theta ** (2 * wave / config.width)
        return x + np.where(np.arange(config.width) % 2, np.cos(angle), np.sin(angle))
    return (
        x
        if isinstance(config.positions, Relative) or "positions" not in params
        else x + params["positions"]["table"][:n]
    )


def attend(config, q, k, v, window, sinks, in_cache, both=False, added=None):
    n, group = len(q), config.query_heads // config.kv_heads
    out = np.zeros((n, config.query_heads, config.head_dim))
    at = np.arange(n)
    turned = (lambda x, at: rotate(config, x, at)) if config.positions.rotates else (lambda x, at: x)
    keys = turned(k, at)
    for i in range(n):
        seen = at[((at <= i) | both) & ((window is None) | (i - at < (window or n)) | (at < sinks))]
        far = min(i, sinks + window - 1) if in_cache else i
        for h in range(config.query_heads):
            near, other = (turned(q[i : i + 1, h : h + 1], np.array([p]))[0, 0] for p in (i, far))
            scores = np.array([(other if j < sinks else near) @ keys[j, h // group] for j in seen])
            scores = scores * config.head_dim**-0.5 + (0 if added is None else added[h, i, seen])
            weights = np.exp(scores - scores.max())
            out[i, h] = weights @ v[seen, h // group] / weights.sum()
    return out.reshape(n, -1)


def attend_to(config, layer, x, states):
    """What `x[N, M]` reads of a source's `states[S, E]`."""
    group = config.query_heads // config.kv_heads
    q = linear(layer["q"], x).reshape(len(x), -1, config.head_dim)
    k, v = np.split(linear(layer["kv"], states).reshape(len(states), -1, config.head_dim), 2, axis=1)
    out = np.zeros_like(q)
    for h in range(config.query_heads):
        scores = q[:, h] @ k[:, h // group].T * config.head_dim**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = weights @ v[:, h // group] / weights.sum(-1, keepdims=True)
    return linear(layer["out"], out.reshape(len(x), -1))


def encode(model, tokens):
    """States `[S, E]` of one source `[S]`, in float64."""
    c, p = model.config.encoder, jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    own = p["encoder"]
    x = embedded(c, own, (p if c.tied else own)["embed"]["table"], tokens)
    return layers(c, own, x, {}, both=True)


def run(model, tokens, patches=(), *, source=None, window=None, sinks=0, in_cache=False):
    """Logits `[N, V]` and `{(layer, site): [N, M]}` of one row, in float64.

    Args:
        model: a decoder of kvjax's.
        tokens: `[N]`.
        source: states `[S, E]` of a source, from `encode`.
        patches: `(layer, position, vector [M])`, what the layer is given there.
        window, sinks, in_cache: how all layers attend, in place of the model's own windows.
    """
    c, p = model.config, jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    sites = {}
    x = sites[0, "embedding"] = embedded(c, p, p["embed"]["table"], tokens)
    how = {"source": source, "window": window, "sinks": sinks, "in_cache": in_cache}
    y = layers(c, p, x, sites, patches, **how)
    return y @ (p["embed"]["table"].T if c.tied else p["head"]["kernel"]), sites


def layers(c, p, x, sites, patches=(), *, source=None, window=None, sinks=0, in_cache=False, both=False):
    """The stream `[N, M]` after the last norm; what it is at every site goes into `sites`."""
    n = len(x)
    added = biases(c, p, n)
    for i in range(c.num_layers):
        layer, x = p["layers"][str(i)], x.copy()
        for at, position, vector in patches:
            if at == i:
                x[position] = vector
        qkv = linear(layer["attn"]["qkv"], normed(c, layer, "attn", x)).reshape(n, -1, c.head_dim)
        q, k, v = np.split(qkv, [c.query_heads, c.query_heads + c.kv_heads], axis=1)
        y = attend(c, q, k, v, c.windows[i] if window is None else window, sinks, in_cache, both, added)
        x = sites[i, "after_self_attention"] = joined(c, layer, "attn", x, linear(layer["attn"]["out"], y))
        if source is not None:
            y = attend_to(c, layer["cross"], normed(c, layer, "cross", x), source)
            x = sites[i, "after_cross_attention"] = joined(c, layer, "cross", x, y)
        y = normed(c, layer, "ffn", x)
        if c.gated:
            gate, up = np.split(linear(layer["ffn"]["gate_up"], y), 2, axis=-1)
            y = linear(layer["ffn"]["down"], gate / (1 + np.exp(-gate)) * up)  # silu
        else:
            y = linear(layer["ffn"]["down"], linear(layer["ffn"]["up"], y).clip(0))  # relu
        x = sites[i, "after_ffn"] = joined(c, layer, "ffn", x, y)
    return norm(c, p["final_norm"], x) if "final_norm" in p else x


def gap(got, want):
    """Largest difference over the largest of `want`; 1 for NaN."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    return 1.0 if np.isnan(got).any() else float(np.abs(got - want).max() / np.abs(want).max())


def log_probabilities(logits):
    """Of `[..., V]`, in float64."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
