"""What goes into `generate`, as lists of ids and limits: read and checked on the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvjax.caches.base import Cache
from kvjax.errors import InputError
from kvjax.lm import LM
from kvjax.model import Model

BUDGET = 128
"""New tokens of a row for which no budget is given, at most."""


def model_of(lm: LM | Model) -> Model:
    """The pytree of a language model, or the model itself."""
    return lm.model if isinstance(lm, LM) else lm


def fed(cache: Cache) -> list[list[int]]:
    """Ids that each row of a cache holds."""
    tokens, lengths = np.asarray(cache.tokens), np.asarray(cache.lengths)
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def limits_of(model: Model, ids: list[list[int]], max_new_tokens: Any) -> np.ndarray:
    """`[B]` int32, tokens that each row may have, prompt included; 0 or more new ones, or None for the default.

    Raises:
        InputError: a budget is none, or passes the model's positions.
    """
    lengths = np.asarray([len(row) for row in ids], np.int64)
    if max_new_tokens is None:
        room = BUDGET if model.max_positions is None else np.maximum(model.max_positions - lengths, 0)
        max_new_tokens = np.minimum(BUDGET, room)
    budget = np.asarray(max_new_tokens)
    if budget.shape not in ((), (len(ids),)) or not np.issubdtype(budget.dtype, np.integer) or (budget < 0).any():
        raise InputError(f"generate: max_new_tokens {max_new_tokens!r} must be 0 or more, one or {len(ids)} numbers")
    limits = lengths + np.minimum(budget, np.iinfo(np.int32).max).astype(np.int64)
    if model.max_positions is not None and (limits > model.max_positions).any():
        row = int(np.argmax(limits))
        more = int(limits[row]) - len(ids[row])
        raise InputError(
            f"generate: row {row} has {len(ids[row])} tokens, and max_new_tokens {more} more pass the model's "
            f"{model.max_positions} positions"
        )
    return np.minimum(limits, np.iinfo(np.int32).max).astype(np.int32)


def encode(lm: LM | Model, prompts: Any) -> list[list[int]]:
    """Ids of each prompt.

    Raises:
        InputError: there is none, or one is empty, no text and no ids, or has ids outside the vocabulary.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    rows = []
    vocab = getattr(model_of(lm).config, "vocab_size", None)
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if not isinstance(lm, LM):
                raise InputError(f"generate: prompt {row} is text, but a bare Model has no tokenizer; give ids")
            prompt = lm.encode(prompt)
        ids = np.asarray(prompt)
        if ids.size == 0:
            raise InputError(f"generate: prompt {row} is empty; give at least one id")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"generate: prompt {row} must be text or a list of ids, not {ids.dtype}{list(ids.shape)}")
        if ids.min() < 0 or (vocab is not None and ids.max() >= vocab):
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise InputError(f"generate: prompt {row} has id {bad}, the vocabulary has {vocab} ids")
        rows.append(ids.astype(np.int64).tolist())
    if not rows:
        raise InputError("generate: prompts is empty")
    return rows


def beyond(ids: list[list[int]], prefix: Cache) -> tuple[list[list[int]], Cache]:
    """What each row feeds after a prefix, and the prefix without slots that it does not need."""
    begin = fed(prefix.check())[0]
    for row, values in enumerate(ids):
        if values[: len(begin)] != begin or len(values) == len(begin):
            same = int(np.argmin([a == b for a, b in zip(values, begin, strict=False)] + [False]))
            raise InputError(
                f"generate: prompt {row} has {len(values)} tokens and goes with the prefix for {same}; it must begin "
                f"with all {len(begin)} and have one more"
            )
    # A caller's cache of any size compiles what one that is just long enough does.
    return [values[len(begin) :] for values in ids], prefix.resize(len(begin)) if begin else prefix


__all__ = ["BUDGET", "model_of", "encode", "limits_of", "beyond", "fed"]
