"""What goes into `generate`, as lists of ids and limits: read and checked on the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvjax.caches.base import Cache
from kvjax.caching import source_limits
from kvjax.checks import array, bucket
from kvjax.errors import InputError
from kvjax.lm import LM
from kvjax.model import Model
from kvjax.text import Tokenizer

BUDGET = 128
"""New tokens of a row for which no budget is given, at most."""


def model_of(lm: LM | Model) -> Model:
    """The pytree of a language model, or the model itself."""
    return lm.model if isinstance(lm, LM) else lm


def padded(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """`[B, S]` int32, S a bucket, and how many of a row's tokens are real, `[B]`."""
    lengths = np.asarray([len(row) for row in ids], np.int32)
    tokens = np.zeros((len(ids), bucket(int(np.max(lengths)))), np.int32)
    for row, values in enumerate(ids):
        tokens[row, : len(values)] = values
    return tokens, lengths


def fed(cache: Cache) -> list[list[int]]:
    """Ids that each row of a cache holds."""
    tokens, lengths = np.asarray(cache.tokens), np.asarray(cache.lengths)
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def limits_of(model: Model, ids: list[list[int]], max_new_tokens: Any, usual: Any = BUDGET) -> np.ndarray:
    """`[B]` int32, tokens that each row may have, prompt included.

    Args:
        model: its positions are the bound.
        ids: of the prompts.
        max_new_tokens: 0 or more, or one a row; None is as many as there is room for, at most `usual`.
        usual: a number, or one a row.

    Raises:
        InputError: a budget is none, or passes the model's positions.
    """
    lengths = np.asarray([len(row) for row in ids], np.int64)
    if max_new_tokens is None:
        room = usual if model.max_positions is None else np.maximum(model.max_positions - lengths, 0)
        max_new_tokens = np.minimum(usual, room)
    budget = array("generate: max_new_tokens", max_new_tokens)
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


def encode(lm: LM | Model, prompts: Any, name: str = "generate") -> list[list[int]]:
    """Ids of each prompt; errors say that they come from `name`.

    Raises:
        InputError: there is none, or one is empty, no text and no ids, or has ids outside the vocabulary.
    """
    model = model_of(lm)
    if not np.iterable(prompts):
        raise InputError(f"{name}: prompts must be text, or a list of texts or of lists of ids, not {prompts!r}")
    rows, vocab = [], model.vocab_size if model.encode is None else source_limits(model)[1]
    for row, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        if isinstance(prompt, str):
            if not prompt and model.encode is not None:
                raise InputError(f"{name}: prompt {row} is empty; a source needs at least one token")
            tokenizer, text = with_tokenizer(lm, f"prompt {row}", name), prompt
            prompt = tokenizer.encode(text)
            if model.encode is not None and not tokenizer.encode_bare(text):
                raise InputError(f"{name}: prompt {row}, {text[:40]!r}, has nothing the tokenizer knows")
        if array(f"{name}: prompt {row}", prompt).size == 0:
            raise InputError(f"{name}: prompt {row} is empty; give at least one id")
        rows.append(ids_of(f"prompt {row}", prompt, vocab, name))
    if not rows:
        raise InputError(f"{name}: prompts is empty")
    return rows


def targets_of(lm: LM | Model, target: Any, rows: int) -> list[list[int]]:
    """What each target begins with: the model's own beginning, then what is forced.

    Args:
        lm: with an encoder.
        target: text or ids, one for all rows, or a list of these with one a row; None is nothing.
        rows: how many sources there are.

    Raises:
        InputError: another number of targets than rows, one that is no text and no ids, or nothing to begin with.
    """
    each = (
        target if isinstance(target, list | tuple) and any(np.ndim(x) or isinstance(x, str) for x in target) else None
    )
    each = [() if target is None else target] * rows if each is None else each
    if len(each) != rows:
        raise InputError(f"generate: target has {len(each)} rows, there are {rows} sources")
    found = []
    for row, forced in enumerate(each):
        if isinstance(forced, str):
            forced = with_tokenizer(lm, f"target {row}").encode_target(forced)
        more = ids_of(f"target {row}", forced, model_of(lm).vocab_size) if np.size(forced) else []
        found.append([*getattr(lm, "start_ids", ()), *more])
        if not found[-1]:
            raise InputError(
                f"generate: nothing begins target {row}: the model names no start token, give it in target"
            )
    return found


def more_of(lm: LM | Model, prompts: Any, rows: int) -> list[list[int]]:
    """Ids of what is fed to each row of an earlier result.

    Raises:
        InputError: another number than rows, one that is empty, no text and no ids, or with ids outside the vocabulary.
    """
    each = [prompts] if isinstance(prompts, str) or not np.iterable(prompts) else list(prompts)
    if len(each) != rows:
        raise InputError(f"generate: {len(each)} prompts are to follow the {rows} rows of after")
    model, found = model_of(lm), []
    for row, given in enumerate(each):
        if isinstance(given, str):
            tokenizer = with_tokenizer(lm, f"prompt {row}")
            given = tokenizer.encode_bare(given) if model.encode is None else tokenizer.encode_target(given)
        if array(f"generate: prompt {row}", given).size == 0:
            raise InputError(f"generate: prompt {row} is empty; give at least one id to follow after")
        found.append(ids_of(f"prompt {row}", given, model.vocab_size))
    return found


def stop_at_of(lm: LM | Model, stop: Any) -> tuple[str | tuple[int, ...], ...]:
    """Stop strings and sequences of ids, from one or a list of them.

    Raises:
        InputError: one that is neither, or empty; a string without a tokenizer.
    """
    if stop is None:
        return ()
    lists = (list, tuple, np.ndarray)
    every = list(stop) if isinstance(stop, lists) else [stop]
    if isinstance(stop, lists) and every and not any(isinstance(each, (str, *lists)) for each in every):
        every = [every]  # one sequence
    found: list[str | tuple[int, ...]] = []
    for i, each in enumerate(every):
        if isinstance(each, str):
            with_tokenizer(lm, f"stop {i}")
        elif not isinstance(each, lists):
            raise InputError(f"generate: stop {i} must be a str or a list of ids, not {each!r}")
        if not len(each):
            raise InputError(f"generate: stop {i} is empty")
        found.append(each if isinstance(each, str) else tuple(ids_of(f"stop {i}", each, model_of(lm).vocab_size)))
    return tuple(found)


def with_tokenizer(lm: LM | Model, what: str, name: str = "generate") -> Tokenizer:
    """The tokenizer.

    Raises:
        InputError: a bare `Model` has none; names `what`.
    """
    if not isinstance(lm, LM):
        raise InputError(f"{name}: {what} is text, but a bare Model has no tokenizer; give ids")
    return lm.text_tokenizer()


def ids_of(what: str, given: Any, vocab: int | None, name: str = "generate") -> list[int]:
    """Ids as a list.

    Raises:
        InputError: no ids, or one outside the vocabulary; names `what`.
    """
    ids = array(f"{name}: {what}", given)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{name}: {what} must be text or a list of ids, not {ids.dtype}{list(ids.shape)}")
    if ids.min() < 0 or ids.max() >= (vocab or 2**31):
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        known = "ids are 0 or more, and int32" if vocab is None else f"the vocabulary has {vocab} ids"
        raise InputError(f"{name}: {what} has id {bad}, {known}")
    return ids.astype(np.int64).tolist()


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
    return [values[len(begin) :] for values in ids], prefix.resize(prefix.needed(len(begin))) if begin else prefix


__all__ = [
    "BUDGET",
    "model_of",
    "encode",
    "more_of",
    "stop_at_of",
    "targets_of",
    "limits_of",
    "beyond",
    "padded",
    "with_tokenizer",
    "ids_of",
    "fed",
]
