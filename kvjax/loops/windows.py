"""`perplexity`: how well a model foresees a long text, in windows that overlap by a stated stride; on the host."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from kvjax.errors import InputError
from kvjax.lm import LM
from kvjax.loops.prompts import encode, model_of
from kvjax.loops.scores import likelihoods
from kvjax.loops.scoring import CHUNK
from kvjax.model import Model

WINDOW = 1024
"""Tokens of a window, where none is given and the model has as many positions."""

LONG = 32
"""Windows from which on a bar shows how many are done."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What `perplexity` gives; `str` states all of it.

    Args:
        nats: the sum over all scored tokens.
        tokens: that were scored: all but the first of the text.
        characters, bytes: of their text, UTF-8; None where it was given as ids.
        window, stride, windows: tokens of each, tokens that each goes beyond the one before, and how many there were.
        begins: the token that stands first in every window; None where windows begin as the text does there.
    """

    nats: float
    tokens: int
    characters: int | None
    bytes: int | None
    window: int
    stride: int
    windows: int
    begins: int | None

    @property
    def nats_per_token(self) -> float:
        """The mean over tokens."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """`exp` of it."""
        with np.errstate(over="ignore"):
            return float(np.exp(np.float64(self.nats_per_token)))

    @property
    def nats_per_character(self) -> float | None:
        """Comparable between tokenizers; None without a text."""
        return None if self.characters is None else self.nats / self.characters

    @property
    def nats_per_byte(self) -> float | None:
        """The same by bytes of UTF-8."""
        return None if self.bytes is None else self.nats / self.bytes

    def __str__(self) -> str:
        each = f"{self.nats_per_token:.4f} nats a token"
        if self.characters:
            each += f", {self.nats_per_character:.4f} a character, {self.nats_per_byte:.4f} a byte"
        first = "" if self.begins is None else f", token {self.begins} first in each"
        cut = f"{self.windows:,} windows of {self.window:,} with stride {self.stride:,}{first}"
        return f"perplexity {self.perplexity:.4g} ({each}; {self.tokens:,} tokens in {cut})"


def perplexity(
    lm: LM | Model,
    text: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    plan: Any = None,
    batch: int = 8,
    chunk: int = CHUNK,
) -> Perplexity:
    """How well a model foresees a text: `exp` of the mean of the negative log-likelihoods of its tokens.

    The model reads windows of `window` tokens, each `stride` further on, and each scores what the one before did not:
    every token but the first of the text is scored once, and all but those of the first window have at least
    `window - stride` tokens before them. A stride of `window` is the cheapest, and its windows have nothing in common;
    a small one flatters the model most, so a figure without its stride says little.

    Where the text begins with the model's token for that (BOS), every window does, in the place of its first token:
    models are trained so.

    Args:
        lm: from `kvjax.load`; or a bare `Model`, for ids. Without an encoder.
        text: a str, or one list of ids, at least two tokens.
        window: tokens that are read at most; None is 1,024, or the model's positions if these are fewer.
        stride: 1 to `window`; None is half a window.
        plan: kind of cache; None is `caches.default`. An approximate one shows what it costs.
        batch: windows at a time.
        chunk: see `score`; 1 reads all that a prediction rests on from the cache.

    Returns:
        Nats a token, a character and a byte, and how they came about. A bar on standard error counts windows of a long
        text.

    Raises:
        InputError: a number is out of range, the text has fewer than two tokens or ids outside the vocabulary.
        CacheError: a window was flagged, for example because of NaN logits.
    """
    model = model_of(lm)
    if model.encode is not None:
        raise InputError("perplexity: is of models without an encoder; kvjax.score gives likelihoods of targets")
    (ids,) = encode(lm, [text], "perplexity")
    limit = model.max_positions
    window = min(WINDOW, limit or WINDOW) if window is None else window
    if not isinstance(window, int) or isinstance(window, bool) or not 1 <= window <= (limit or window):
        most = "" if limit is None else f" and at most the model's {limit} positions"
        raise InputError(f"perplexity: window must be a whole number of at least 1{most}, not {window!r}")
    stride = -(-window // 2) if stride is None else stride
    if not isinstance(stride, int) or isinstance(stride, bool) or not 1 <= stride <= window:
        raise InputError(f"perplexity: stride must be a whole number from 1 to the window {window}, not {stride!r}")
    if len(ids) < 2:
        raise InputError(f"perplexity: the text has {len(ids)} token; nothing comes before it, give at least two")
    begins = ids[0] if ids[0] == getattr(lm, "bos_id", None) else None
    cut = list(windows(np.asarray(ids, np.int32), window, stride))
    prompts = [before if begins is None else np.concatenate([[begins], before[1:]]) for before, _ in cut]
    nats, options = 0.0, {"plan": plan, "best": 0, "batch": batch, "chunk": chunk}
    hidden = True if len(cut) < LONG else None  # None: where nobody is looking
    with tqdm(total=len(cut), unit="window", disable=hidden, file=sys.stderr, leave=False) as bar:
        for part in (slice(0, 1), slice(1, None)):  # the first window has little before what it scores: another shape
            wanted = [(row, new) for row, (_, new) in enumerate(cut[part])]
            names = [f"window {row + part.start}" for row, _ in wanted]
            for _, found in likelihoods(model, prompts[part], wanted, names=names, **options):  # type: ignore[arg-type]
                nats -= float(found.logprobs.astype(np.float64).sum())
                bar.update()
    told = None
    if isinstance(text, str):
        tokenizer = lm.text_tokenizer()  # type: ignore[union-attr]
        told = text if begins is not None else tokenizer.continuation(ids[:1], ids[1:])
    characters, size = (None, None) if told is None else (len(told), len(told.encode()))
    return Perplexity(nats, len(ids) - 1, characters, size, window, stride, len(cut), begins)


def windows(ids: np.ndarray, window: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts ids `[N]` into what each window reads before it scores, and what it scores: `[1:N]`, one after the other.

    A window reads all of both but the last, `window` tokens at most.
    """
    done = start = 0  # `done` is the last token that was scored
    while done + 1 < len(ids):
        end = min(start + window, len(ids) - 1)
        yield ids[start : done + 1], ids[done + 1 : end + 1]
        done, start = end, start + stride


__all__ = ["Perplexity", "perplexity", "windows"]
