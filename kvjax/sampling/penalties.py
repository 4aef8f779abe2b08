"""Penalties on what a text has already: on tokens, and on sequences of n tokens."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax import struct
from kvjax.sampling.contract import Text, never, number, per_row, text_of, wide
from kvjax.types import Array


@struct.node
class RepetitionPenalty(struct.Value):
    """Divides the positive logits of tokens that the text has, prompt included, and multiplies the negative ones
    (Keskar et al. 2019, 1909.05858).

    Args:
        penalty: float32, scalar or `[B]`; 1 changes nothing, more makes repetition less likely.
    """

    penalty: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        text = text_of("repetition_penalty", text)
        penalty, x = per_row(self.penalty, logits, text), wide(logits)
        seen = counted(text, jnp.zeros_like(text.lengths), logits.shape[1]) > 0
        return jnp.where(seen, jnp.where(x < 0, x * penalty, x / penalty), x).astype(logits.dtype)


@struct.node
class PresencePenalty(struct.Value):
    """Takes a number from the logits of tokens that are among the new ones, as OpenAI's API does: the prompt is not
    counted.

    Args:
        penalty: float32, scalar or `[B]`; 0 changes nothing.
    """

    penalty: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        text = text_of("presence_penalty", text)
        seen = counted(text, text.starts, logits.shape[1]) > 0
        return (wide(logits) - jnp.where(seen, per_row(self.penalty, logits, text), 0)).astype(logits.dtype)


@struct.node
class FrequencyPenalty(struct.Value):
    """Takes a number from the logits of tokens, as often as they are among the new ones; see `PresencePenalty`.

    Args:
        penalty: float32, scalar or `[B]`; 0 changes nothing.
    """

    penalty: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        text = text_of("frequency_penalty", text)
        times = counted(text, text.starts, logits.shape[1])
        return (wide(logits) - times * per_row(self.penalty, logits, text)).astype(logits.dtype)


@struct.node
class NoRepeatNgram(struct.Value):
    """Bans tokens that would complete a sequence of n tokens which the text has already, prompt included (Paulus et al.
    2017, 1705.04304).

    Args:
        n: int32, scalar or `[B]`; 0 bans nothing, 1 every token that the text has.
    """

    n: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`, -inf where banned. T times the largest n comparisons a row."""
        text = text_of("no_repeat_ngram", text)
        n, lengths, places = per_row(self.n, logits, text), text.lengths[:, None], _places(text)

        def same(back: Array, alike: Array) -> Array:
            # [B, T]: whether the tokens `back` before each place, and before the next one to come, are the same
            here = jnp.take(text.tokens, jnp.maximum(places[0] - back, 0), axis=1)
            end = jnp.take_along_axis(text.tokens, jnp.maximum(lengths - back, 0), axis=1)
            return alike & ((here == end) | (back >= n))

        # Each place as the last of n tokens: it needs n - 1 before it.
        last = (places >= n - 1) & (places < lengths) & (n > 0)
        most = jnp.minimum(jnp.max(n), text.tokens.shape[1] + 1)
        last = lax.fori_loop(1, most, same, last)
        return never(_scattered(text, last, logits.shape[1]) > 0, logits)


def counted(text: Text, since: Array, vocab: int) -> Array:
    """`[B, V]` int32, how often each row has each id, from `since[B]` on."""
    places = _places(text)
    return _scattered(text, (places >= since[:, None]) & (places < text.lengths[:, None]), vocab)


def _places(text: Text) -> Array:
    return jnp.arange(text.tokens.shape[1], dtype=jnp.int32)[None, :]


def _scattered(text: Text, which: Array, vocab: int) -> Array:
    # [B, V] int32, how often each id stands at `which[B, T]` of the places
    ids = jnp.where(which & (text.tokens >= 0), text.tokens, vocab)
    rows = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((ids.shape[0], vocab), jnp.int32).at[rows, ids].add(1, mode="drop")


def repetition_penalty(penalty: Any) -> RepetitionPenalty:
    """Makes tokens that the text has, prompt included, less likely by the factor `penalty`, float or one a row.

    Raises:
        InputError: a value is not finite, or not above 0.
    """
    good = lambda x: np.isfinite(x) & (x > 0)  # noqa: E731
    return RepetitionPenalty(number("repetition_penalty", "penalty", penalty, jnp.float32, good))


def presence_penalty(penalty: Any) -> PresencePenalty:
    """Takes `penalty`, float or one a row, from the logits of tokens that are among the new ones; negative adds.

    Raises:
        InputError: a value is not finite.
    """
    return PresencePenalty(number("presence_penalty", "penalty", penalty, jnp.float32, np.isfinite))


def frequency_penalty(penalty: Any) -> FrequencyPenalty:
    """Takes `penalty`, float or one a row, from the logits of tokens, as often as they are among the new ones.

    Raises:
        InputError: a value is not finite.
    """
    return FrequencyPenalty(number("frequency_penalty", "penalty", penalty, jnp.float32, np.isfinite))


def no_repeat_ngram(n: Any) -> NoRepeatNgram:
    """No sequence of `n` tokens, int or one a row, comes twice in a text, prompt included; 0 allows all.

    Raises:
        InputError: a value is negative.
    """
    return NoRepeatNgram(number("no_repeat_ngram", "n", n, jnp.int32, lambda x: x >= 0))


__all__ = ["RepetitionPenalty", "PresencePenalty", "FrequencyPenalty", "NoRepeatNgram", "counted"]
__all__ += ["repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram"]
