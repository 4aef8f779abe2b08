"""Nats per character of a text under a language model, each window's context filled with stride half the context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from kvjax.errors import InputError
from kvjax.train.data import BOS_ID
from kvjax.types import Array


def windows(ids: np.ndarray, context: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cuts tokens into overlapping windows in which each token is scored exactly once.

    Every window is BOS and `context - 1` tokens as input and the next token of each as target; windows advance by
    `context // 2`, and all but the first score only what the one before did not.

    Args:
        ids: [N] int32 token ids, without BOS.
        context: input positions of a window, the BOS included; at least 2.

    Yields:
        (inputs [context], targets [context], weight [context] float32); padding has weight 0.

    Raises:
        InputError: if `context` is below 2.
    """
    if context < 2:
        raise InputError(f"context={context} has no half to advance by; use 2 or more")
    stride, scored = context // 2, 0
    for start in range(0, len(ids), stride):
        piece = ids[start : start + context]
        targets = np.zeros(context, np.int32)
        targets[: len(piece)] = piece
        inputs = np.concatenate([[BOS_ID], targets[:-1]]).astype(np.int32)
        where = start + np.arange(context)
        weight = ((where >= scored) & (where < len(ids))).astype(np.float32)
        yield inputs, targets, weight
        scored = start + len(piece)
        if scored == len(ids):
            return


@partial(jax.jit, static_argnums=0)
def _nll_of_rows(forward: Callable[..., Array], model: Any, inputs: Array, targets: Array, weight: Array) -> Array:
    logits = forward(model, inputs).astype(jnp.float32)  # [B, S, V]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weight, axis=-1)  # [B]


def total_nll(forward: Callable[..., Array], model: Any, ids: np.ndarray, context: int, *, rows: int = 8) -> float:
    """Total negative log-likelihood of a token stream, in nats.

    Args:
        forward: `(model, tokens [B, S]) -> logits [B, S, V]`, a module-level function (it keys the compiled program).
        model: what `forward` takes.
        ids: [N] int32 token ids, without BOS.
        context: positions of a window, the BOS included.
        rows: windows per call.

    Returns:
        Nats, summed over all tokens, rows in float64.
    """
    cut = list(windows(ids, context))
    blank = (np.zeros(context, np.int32), np.zeros(context, np.int32), np.zeros(context, np.float32))
    cut += [blank] * (-len(cut) % rows)  # one shape, one program
    total = 0.0
    for start in range(0, len(cut), rows):
        inputs, targets, weight = (np.stack(column) for column in zip(*cut[start : start + rows], strict=True))
        total += float(np.asarray(_nll_of_rows(forward, model, inputs, targets, weight), np.float64).sum())
    return total


def nats_per_char(forward: Callable[..., Array], model: Any, tokenizer: Tokenizer, text: str, context: int) -> float:
    """Total negative log-likelihood of `text` over its number of characters (nats; the context starts empty)."""
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    return total_nll(forward, model, ids, context) / len(text)


def best_temperature(loss: Callable[[float], float], low: float = 0.7, high: float = 2.0, tries: int = 12) -> float:
    """The temperature between `low` and `high` with the least loss, by golden section on its logarithm.

    Temperature scaling (Guo et al. 2017, 1706.04599): a model that has learnt its text by heart is too sure of itself
    on another.

    Args:
        loss: of a temperature; with one minimum.
        low, high: bounds.
        tries: steps; each narrows the bounds to 0.62.

    Returns:
        The best one tried; 1 if that is no worse.
    """
    ratio = (math.sqrt(5) - 1) / 2
    a, b = math.log(low), math.log(high)
    found = {0.0: loss(1.0)}

    def at(x: float) -> float:
        if x not in found:
            found[x] = loss(math.exp(x))
        return found[x]

    left, right = b - ratio * (b - a), a + ratio * (b - a)
    for _ in range(tries):
        if at(left) < at(right):
            b, right, left = right, left, right - ratio * (right - a)
        else:
            a, left, right = left, right, left + ratio * (b - left)
    return math.exp(min(found, key=lambda x: (found[x], abs(x))))


__all__ = ["best_temperature", "windows", "total_nll", "nats_per_char"]
