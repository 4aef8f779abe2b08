"""`score`: log-likelihoods of continuations, on the host. Each prompt is prefilled once, whatever follows it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import Cache
from kvjax.caches.cross import Source
from kvjax.caches.flags import meaning
from kvjax.caching import encode as encoded
from kvjax.caching import init_cache
from kvjax.checks import bucket, count
from kvjax.errors import CacheError, InputError
from kvjax.lm import LM
from kvjax.loops import decode as loop
from kvjax.loops.prompts import encode, ids_of, model_of, padded, targets_of, with_tokenizer
from kvjax.loops.scoring import CHUNK, Likelihood, scored
from kvjax.model import Model
from kvjax.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """One continuation of one prompt, on the host.

    Args:
        ids: of its tokens.
        text: theirs; None without a tokenizer.
        logprobs: `[n]` float64, of each token under the model itself, before any filter.
        greedy: whether greedy decoding, without filters, gives just these tokens.
        top_ids: `[n, k]` int32, the k most probable in the place of each, best first; -1 where there are fewer.
        top_logprobs: `[n, k]` float64, theirs.
    """

    ids: list[int]
    text: str | None
    logprobs: np.ndarray
    greedy: bool
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    @property
    def loglikelihood(self) -> float:
        """Nats: the sum of `logprobs`."""
        return float(self.logprobs.sum())

    @property
    def tokens(self) -> int:
        """How many were scored."""
        return len(self.ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What `score` gives.

    Args:
        rows: of each prompt its continuations, in the order given.
    """

    rows: list[list[Scored]]

    @property
    def loglikelihoods(self) -> np.ndarray:
        """`[B, N]` float64, nats; NaN where a prompt has fewer than N continuations."""
        found = np.full((len(self.rows), max(map(len, self.rows))), np.nan)
        for line, row in zip(found, self.rows, strict=True):
            line[: len(row)] = [each.loglikelihood for each in row]
        return found

    @property
    def best(self) -> list[Scored]:
        """Of each prompt the first of its most probable continuations."""
        return [max(row, key=lambda each: each.loglikelihood) for row in self.rows]


def score(
    lm: LM | Model,
    prompts: Any,
    continuations: Any,
    *,
    plan: Any = None,
    cross: Any = None,
    logprobs: int = 0,
    batch: int = 16,
    chunk: int = CHUNK,
) -> Scores:
    """Log-likelihoods of given continuations of prompts. With an encoder, prompts are source texts and continuations
    are targets, after what the model begins targets with.

    A prompt is prefilled once, however many continuations it has: the cache is a value, and each starts from it.
    Prompts, continuations and how many there are come in buckets; others of the same buckets compile nothing.

    The text of a continuation is cut into tokens together with its prompt, and is what the whole has beyond the
    prompt's own tokens. Where the whole does not begin with these (a token crosses the border, often because a prompt
    ends in a space), that is an error: move the border, or give ids. After a prompt of ids, and for targets, a text is
    cut by itself, with nothing around it. No end of sequence is added: it counts if it is among the ids.

    Args:
        lm: from `kvjax.load`; or a bare `Model`, for ids.
        prompts: a str, a list of str, or a list of lists of ids.
        continuations: one for each prompt: a text or a list of ids, or a list of several of these.
        plan: kind of cache; None is `caches.default`.
        cross: what is kept of the sources; None is `caches.cross()`.
        logprobs: also of so many of the most probable tokens in the place of each token.
        batch: rows at a time: of prompts that are prefilled, and of continuations.
        chunk: tokens of a continuation that are fed at once; 1 feeds them as decoding does, so that with a quantised
            cache all that a prediction rests on was read from it.

    Returns:
        Of each prompt, its continuations with their log-likelihoods.

    Raises:
        InputError: other than one entry of continuations a prompt, one that is empty, no text and no ids, has ids
            outside the vocabulary, passes the model's positions, or is text that cannot be cut at the border.
        CacheError: a row was flagged, for example because of NaN logits.
    """
    model = model_of(lm)
    if cross is not None and model.encode is None:
        raise InputError("score: cross is for models with an encoder, and this one has none")
    for name, value, least in (("logprobs", logprobs, 0), ("batch", batch, 1), ("chunk", chunk, 1)):
        count(f"score: {name}", value, least)
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = encode(lm, given, "score")
    sources = None if model.encode is None else ids
    begun = ids if sources is None else targets_of(lm, None, len(ids))
    asked: Any = [continuations] if isinstance(prompts, str) else continuations
    if isinstance(asked, str) or not isinstance(asked, Iterable):
        raise InputError(f"score: continuations must be a list with an entry for each prompt, not {asked!r}")
    asked = list(asked)
    if len(asked) != len(ids):
        raise InputError(f"score: continuations has {len(asked)} entries, there are {len(ids)} prompts")
    wanted: list[tuple[int, list[int]]] = []
    places: list[int] = []
    rows: list[list[Any]] = []
    for row, entry in enumerate(asked):
        if not isinstance(entry, Iterable):
            raise InputError(
                f"score: continuations of prompt {row} must be text, ids, or a list of these, not {entry!r}"
            )
        entry = entry if isinstance(entry, str) else list(entry)
        several = not isinstance(entry, str) and any(isinstance(each, str) or np.ndim(each) for each in entry)
        rows.append([None] * len(entry if several else [entry]))
        text = given[row] if isinstance(given[row], str) and sources is None else None
        for k, each in enumerate(entry if several else [entry]):
            wanted.append((row, _new(lm, f"continuation {k} of prompt {row}", text, begun[row], each)))
            places.append(k)
    names = [f"continuation {k} of prompt {row}" for (row, _), k in zip(wanted, places, strict=True)]
    every = likelihoods(
        model,
        begun,
        wanted,
        names=names,
        sources=sources,
        plan=plan,
        cross=cross,
        best=logprobs,
        batch=batch,
        chunk=chunk,
    )
    for at, found in every:
        row, new = wanted[at]
        tokenizer = getattr(lm, "tokenizer", None)
        text = None if tokenizer is None else tokenizer.continuation(begun[row], new)
        many = found.values.astype(np.float64)
        rows[row][places[at]] = Scored(
            new, text, found.logprobs.astype(np.float64), bool(found.greedy.all()), found.ids, many
        )
    return Scores(rows)


def _new(lm: LM | Model, name: str, prompt: str | None, begun: list[int], given: Any) -> list[int]:
    """Ids of a continuation; `prompt` is its text where both are cut together."""
    model = model_of(lm)
    if isinstance(given, str):
        tokenizer = with_tokenizer(lm, name, "score")
        if prompt is None:
            given = (tokenizer.encode_bare if model.encode is None else tokenizer.encode_target)(given)
        else:
            whole = tokenizer.encode(prompt + given)
            if whole[: len(begun)] != begun:
                same = int(np.argmin([a == b for a, b in zip(whole, begun, strict=False)] + [False]))
                raise InputError(
                    f"score: {name} cannot be cut from its prompt: alone the prompt has tokens …{begun[same:][:8]} "
                    f"from token {same} on, with {given[:20]!r} after it {whole[same:][:8]}; move the border between "
                    f"them (a space belongs to the continuation), or give ids"
                )
            given = whole[len(begun) :]
    if not np.size(given):
        raise InputError(f"score: {name} is empty; give at least one token")
    return ids_of(name, given, model.vocab_size, "score")


def likelihoods(
    model: Model,
    prompts: Sequence[Any],
    wanted: Sequence[tuple[int, Any]],
    *,
    names: Sequence[str],
    sources: list[list[int]] | None = None,
    plan: Any,
    cross: Any = None,
    best: int,
    batch: int,
    chunk: int,
) -> Iterator[tuple[int, Any]]:
    """Log-likelihoods of continuations of prompts, longest first.

    Args:
        model: any model.
        prompts: ids of each.
        wanted: of each continuation its prompt and its ids.
        names: of each, for errors.
        sources: of each prompt, with an encoder.
        plan, cross, best, batch, chunk: see `score`.

    Yields:
        Which of `wanted`, and its `Likelihood` in NumPy, without a batch and without padding.

    Raises:
        InputError: one passes the model's positions.
        CacheError: a row was flagged.
    """
    plan = tuple(plan) if isinstance(plan, list) else plan
    sizes = np.zeros((len(prompts),), np.int64)  # tokens that are fed: the last of a continuation is not
    for name, (row, ids) in zip(names, wanted, strict=True):
        fed = len(prompts[row]) + len(ids) - 1
        if model.max_positions is not None and fed > model.max_positions:
            raise InputError(
                f"score: {name} has {len(ids)} tokens after {len(prompts[row])}, all but the last of which are fed: "
                f"{fed} tokens pass the model's {model.max_positions} positions"
            )
        sizes[row] = max(sizes[row], fed)
    of: list[list[int]] = [[] for _ in prompts]
    for at, (row, _) in enumerate(wanted):
        of[row].append(at)
    for group in _slices(np.argsort(-sizes, kind="stable").tolist(), batch):
        rows = _room(len(group), len(prompts), batch)
        tokens, lengths = padded([list(prompts[row]) for row in group])
        source = None
        if sources is not None:
            whole = [sources[row] for row in group]
            source = encoded(model, *padded(whole + whole[:1] * (rows - len(group))))
        capacity = bucket(int(sizes[group].max()))
        cache, logits = _begin(model, *_rows(rows, tokens, lengths), source, plan=plan, cross=cross, capacity=capacity)
        asked = sorted(((at, i) for i, row in enumerate(group) for at in of[row]), key=lambda x: -len(wanted[x[0]][1]))
        for part in _slices(asked, batch):
            new, valid = padded([list(wanted[at][1]) for at, _ in part])
            places = np.asarray([i for _, i in part], np.int32)
            some = _room(len(part), len(wanted), batch)
            found, flags = _go_on(model, cache, logits, *_rows(some, places, new, valid), best=best, chunk=chunk)
            for i, ((at, _), bits) in enumerate(zip(part, np.asarray(flags), strict=False)):
                if bits:
                    raise CacheError(f"score: {names[at]}: {meaning(int(bits))}")
            found = jax.tree.map(np.asarray, found)
            for i, (at, _) in enumerate(part):
                yield at, jax.tree.map(lambda x, i=i, n=int(valid[i]): x[i, :n], found)


def _slices(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _room(count: int, all_: int, batch: int) -> int:
    """Rows of a call: where there are several calls, each has as many as the first."""
    return batch if all_ > batch else bucket(count, 1, batch)


def _rows(rows: int, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """With rows of zeros at the end: without a token, and without one that is wanted."""
    return tuple(np.pad(x, ((0, rows - len(x)), *((0, 0),) * (x.ndim - 1))) for x in columns)


@functools.partial(jax.jit, static_argnames=("plan", "cross", "capacity"))
def _begin(
    model: Model, tokens: Array, lengths: Array, source: Source | None, *, plan: Any, cross: Any, capacity: int
) -> tuple[Cache, Array]:
    cache = init_cache(model, plan, batch=tokens.shape[0], capacity=capacity, source=source, cross=cross)
    return loop.prefill(model, cache, tokens, lengths)[::-1]


@functools.partial(jax.jit, static_argnames=("best", "chunk"))
def _go_on(
    model: Model, cache: Cache, logits: Array, rows: Array, tokens: Array, valid: Array, *, best: int, chunk: int
) -> tuple[Likelihood, Array]:
    cache, logits = cache.take(rows), jnp.take(logits, rows, axis=0)
    fed = jnp.maximum(valid - 1, 0)
    found, _, cache = scored(model, cache, logits, tokens, valid, fed, best=best, chunk=chunk)
    return found, cache.flags


__all__ = ["Scored", "Scores", "score", "likelihoods"]
