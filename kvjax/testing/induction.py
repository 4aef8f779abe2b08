"""What an approximate cache costs in quality: a copying task that needs its distant keys, and the loss of a text.

A text of the task is a random block of tokens, repeated. Every token from the second repeat on stands where a circuit
of two layers finds it (induction heads, Olsson et al. 2022, 2209.11895): a cache that loses or blurs a key loses it.
The bundled model `induction` was trained on it (`python -m kvjax.train induction`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax import LM, InputError, Model, caches
from kvjax.types import Array

VOCAB = 64
PERIODS = (16, 48)
"""Shortest and longest block, in tokens."""

EVALUATION_SEED = 20_000
"""No training run draws from it: those draw from a seed and a step."""

PROMPT = 64
"""Tokens that are prefilled: every block has come round by then."""


def induction_model() -> Model:
    """The bundled model of the copying task."""
    return kvjax.load("induction").model


def copy_task(seed: Any, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts of the task: blocks of different tokens, their periods uniform between `PERIODS`, repeated.

    A block has no token twice, so that after one token of a repeat the next is determined.

    Args:
        seed: int, or several, for NumPy's generator.
        rows: B, texts.
        length: tokens of each.

    Returns:
        Tokens `[B, length]` int32, and `[B, length]` bool: which of them follow from those before.
    """
    rng = np.random.default_rng(seed)
    periods = rng.integers(PERIODS[0], PERIODS[1] + 1, rows)
    tokens = np.stack([np.resize(rng.permutation(VOCAB)[:period], length) for period in periods]).astype(np.int32)
    return tokens, np.arange(length)[None, :] > periods[:, None]


def predictions(model: Model, plan: Any, tokens: Any, *, prompt: int = PROMPT, chunk: int | None = None) -> Array:
    """Logits for all tokens after a prompt, which is prefilled; the rest is fed one token a call, so that whatever a
    prediction rests on was read from the cache.

    Args:
        model: any model.
        plan: a kind of cache, or one a layer.
        tokens: `[B, length]` int32.
        prompt: tokens to prefill, at least 1.
        chunk: tokens of one call of prefill; None takes them in one.

    Returns:
        `[B, length - prompt, V]`, for `tokens[:, prompt:]`.

    Raises:
        InputError: nothing is left after the prompt, or `chunk` is less than 1.
        CacheError: a row was flagged.
    """
    tokens = np.asarray(tokens, np.int32)
    rows, length = tokens.shape
    size = prompt if chunk is None else chunk
    if not 1 <= prompt < length or size < 1:
        raise InputError(f"predictions: prompt {prompt} and chunk {chunk} must be at least 1, prompt below {length}")
    cache = kvjax.init_cache(model, plan, batch=rows, capacity=length)
    for start in range(0, prompt, size):
        logits, cache = kvjax.prefill(model, cache, tokens[:, start : min(start + size, prompt)])
    rest, cache = _fed(model, cache, tokens[:, prompt:-1])
    cache.check()
    return jnp.concatenate([logits[:, None], rest], axis=1)


@jax.jit
def _fed(model: Model, cache: kvjax.Cache, tokens: Array) -> tuple[Array, kvjax.Cache]:
    def one(cache: kvjax.Cache, fed: Array) -> tuple[kvjax.Cache, Array]:
        logits, cache = kvjax.step(model, cache, fed)
        return cache, logits

    cache, logits = jax.lax.scan(one, cache, tokens.T)
    return logits.swapaxes(0, 1), cache


def copy_loss(model: Model, tokens: Any, follows: Any) -> tuple[float, float]:
    """Nats per token that follows from those before, and the share of them with the largest logit, without a cache.

    Args:
        model: of a vocabulary of at least `VOCAB`.
        tokens, follows: as `copy_task` gives them.
    """
    logits = np.asarray(jax.nn.log_softmax(kvjax.forward(model, tokens[:, :-1]), axis=-1))
    picked = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    right = logits.argmax(axis=-1) == tokens[:, 1:]
    return float(-picked[follows[:, 1:]].mean()), float(right[follows[:, 1:]].mean())


def copy_accuracy(
    model: Model,
    plan: Any,
    *,
    seed: int = EVALUATION_SEED,
    rows: int = 16,
    length: int = 256,
    chunk: int | None = None,
) -> float:
    """Share of the tokens after the prompt for which the right one has the largest logit, on the copying task.

    Args:
        model: of a vocabulary of at least `VOCAB`.
        plan: see `predictions`, and `chunk`.
        seed: of the texts.
        rows: B, texts.
        length: tokens of each, more than `PROMPT`.
        chunk: tokens of one call of prefill; None takes the prompt in one.

    Returns:
        Between 0 and 1.
    """
    tokens, follows = copy_task(seed, rows, length)
    best = np.asarray(jnp.argmax(predictions(model, plan, tokens, chunk=chunk), axis=-1))
    return float((best == tokens[:, PROMPT:])[follows[:, PROMPT:]].mean())


def divergence(model: Model, plan: Any, tokens: Any, *, prompt: int = PROMPT, chunk: int | None = None) -> float:
    """Mean KL divergence of the next-token distributions under a plan from those under `dense()`, in nats.

    Args:
        model, plan, tokens, prompt, chunk: see `predictions`.

    Returns:
        The mean of KL(dense || plan) over rows and positions after the prompt.
    """
    exact, near = (
        jax.nn.log_softmax(predictions(model, which, tokens, prompt=prompt, chunk=chunk), axis=-1)
        for which in (caches.dense(), plan)
    )
    return float(jnp.mean(jnp.sum(jnp.exp(exact) * (exact - near), axis=-1)))


def plant_outlier(model: Model, layer: int, pair: int, factor: float = 20.0) -> Model:
    """The same function with an outlier channel in its keys: in one layer, one rotary pair of every key is multiplied
    by `factor`, and of every query divided by it. Logits stay as they are, to rounding; real models have such channels
    (Liu et al. 2024, KIVI, 2402.02750), and codes with one scale a token pay for them.

    Args:
        model: a decoder of this library without norms of queries and keys, which would undo it.
        layer: which.
        pair: of the D / 2 that rotate together, `pair` and `pair + D / 2`.
        factor: more than 0.

    Raises:
        InputError: a model of another kind, or a layer, pair or factor out of range.
    """
    c = model.config
    if not isinstance(c, kvjax.Config) or c.qk_norm is not None:
        raise InputError("plant_outlier: the model must be a kvjax.Config decoder without qk_norm")
    if not (0 <= layer < c.num_layers and 0 <= pair < c.head_dim // 2 and factor > 0):
        raise InputError(
            f"plant_outlier: layer {layer} of {c.num_layers}, pair {pair} of {c.head_dim // 2}, factor {factor}"
        )
    turned = np.isin(np.arange(c.head_dim), (pair, pair + c.head_dim // 2))
    query, key = np.where(turned, 1 / factor, 1.0), np.where(turned, factor, 1.0)
    columns = np.concatenate(
        [np.tile(query, c.query_heads), np.tile(key, c.kv_heads), np.ones(c.kv_heads * c.head_dim)]
    )
    layers = dict(model.params["layers"])
    own = layers[str(layer)]
    qkv = {
        name: (x * columns.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)
        for name, x in own["attn"]["qkv"].items()
    }
    layers[str(layer)] = dict(own, attn=dict(own["attn"], qkv=qkv))
    return model.replace(params=dict(model.params, layers=layers))


def nats_per_char(lm: LM, plan: Any, text: str, *, context: int = 256, rows: int = 16) -> float:
    """The loss of a language model on a text under a plan: negative log-likelihood over the number of characters.

    Windows of `context` tokens begin with the model's first token and advance by half; the first half is prefilled, the
    second fed one token a call and scored. `exp` of it is the perplexity per character.

    Args:
        lm: with a tokenizer and a token that begins texts.
        plan: see `predictions`.
        text: long enough for `rows` windows.
        context: tokens that the model sees at most.
        rows: windows of one call; those that do not fill one are left out.

    Returns:
        Nats per character of the scored part.

    Raises:
        InputError: the text is too short for one call.
    """
    ids = np.array(lm.encode(text)[1:], np.int32)
    prompt = context // 2 + 1
    stride = context + 1 - prompt
    calls = (len(ids) - (context - stride)) // stride // rows
    if calls < 1:
        raise InputError(f"nats_per_char: {len(ids)} tokens are too few for {rows} windows of {context}")
    total = 0.0
    for call in range(calls):
        starts = (call * rows + np.arange(rows)) * stride
        body = ids[starts[:, None] + np.arange(context)[None, :]]
        tokens = np.concatenate([np.full((rows, 1), lm.bos_id, np.int32), body], axis=1)
        logits = jax.nn.log_softmax(predictions(lm.model, plan, tokens, prompt=prompt), axis=-1)
        picked = jnp.take_along_axis(logits, jnp.asarray(tokens[:, prompt:, None]), axis=-1)
        total -= float(np.asarray(picked, np.float64).sum())
    scored = ids[prompt - 1 : prompt - 1 + calls * rows * stride]
    return total / len(lm.decode(scored.tolist()))


__all__ = [
    "VOCAB",
    "PERIODS",
    "EVALUATION_SEED",
    "PROMPT",
    "induction_model",
    "copy_task",
    "predictions",
    "copy_loss",
    "copy_accuracy",
    "divergence",
    "plant_outlier",
    "nats_per_char",
]
