"""Filters that name sequences of tokens: a text that ends with all of one but the last gets another logit for that."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.checks import bucket, whole
from kvjax.errors import InputError
from kvjax.sampling.contract import Text, bias, text_of, wide
from kvjax.types import Array


@struct.node
class SequenceBias(struct.Value):
    """Adds to the logit of a sequence's last token where the text, prompt included, ends with what stands before it.

    Args:
        sequences: `[m, k]` int32, each at the end of its line, -1 before it; lines of -1 alone are none.
        values: `[m]` float32.
    """

    sequences: Array
    values: Array

    def __call__(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]` to `[B, V]`."""
        text, v = text_of("sequence_bias", text), logits.shape[1]
        begun = begun_by(self.sequences, text, jnp.zeros_like(text.lengths))  # [B, m]
        last = jnp.where(begun, self.sequences[:, -1][None], v)
        more = jnp.zeros(logits.shape, self.values.dtype)
        more = more.at[jnp.arange(logits.shape[0])[:, None], last].add(self.values[None], mode="drop")
        return (wide(logits) + more).astype(logits.dtype)


def begun_by(sequences: Array, text: Text, since: Array) -> Array:
    """`[B, m]` bool, which of `sequences[m, k]` a row has all of but the last id, at its end and from `since[B]` on."""
    k = sequences.shape[1]
    at = text.lengths[:, None] - jnp.arange(k - 1, 0, -1, dtype=jnp.int32)[None, :]  # [B, k - 1]
    before = jnp.take_along_axis(text.tokens, jnp.maximum(at, 0), axis=1)
    before = jnp.where(at >= since[:, None], before, -1)[:, None, :]
    wanted = sequences[None, :, :-1]
    return jnp.all((before == wanted) | (wanted < 0), axis=2) & (sequences[:, -1] >= 0)[None]


def sequence_table(name: str, sequences: Any) -> np.ndarray:
    """`[m, k]` int32, each sequence at the end of its line, -1 before it; both padded to buckets.

    Args:
        name: of one sequence, for the error.
        sequences: lists of ids, possibly none.

    Raises:
        InputError: a sequence is empty, or no list of ids.
    """
    rows = [np.asarray(whole(f"{name} {i}", row)) if np.size(row) else np.zeros(0) for i, row in enumerate(sequences)]
    for i, row in enumerate(rows):
        if row.ndim != 1 or not row.size or (row < 0).any():
            raise InputError(f"{name} {i} is {row.tolist()}; give one or more ids, each 0 or more")
    longest = max((row.size for row in rows), default=0)
    table = np.full((bucket(len(rows), 8) if rows else 0, bucket(longest, 4) if rows else 1), -1, np.int32)
    for line, row in zip(table, rows, strict=False):
        line[len(line) - row.size :] = row
    return table


def sequence_bias(biases: Any) -> SequenceBias:
    """Adds to the logit of the last id of a sequence where a text ends with the others: `{(7, 8): -2.0, (9,): 1.0}`.

    The rule of Hugging Face Transformers: what the text ends with may be part of the prompt, and biases of several
    sequences add up. Ids past the vocabulary are nothing.

    Args:
        biases: dict from sequences of ids to numbers; -inf for never.

    Raises:
        InputError: a sequence is empty or no ids, or a bias is neither finite nor -inf.
    """
    name = "sampling.sequence_bias: biases"
    if not isinstance(biases, dict):
        raise InputError(f"{name} must be a dict from tuples of ids to numbers, not {biases!r}")
    values = [bias(f"{name}: that of {sequence}", value) for sequence, value in biases.items()]
    return _made(sequence_table("sampling.sequence_bias: sequence", list(biases)), values)


def bad_words(sequences: Any) -> SequenceBias:
    """Never completes any of `sequences`, lists of ids: the last is banned where a text ends with the others.

    Args:
        sequences: of ids; those of one id are banned everywhere.

    Raises:
        InputError: a sequence is empty or no ids.
    """
    sequences = _listed("sampling.bad_words: sequences", sequences)
    return _made(sequence_table("sampling.bad_words: sequence", sequences), [-np.inf] * len(sequences))


def _made(table: np.ndarray, values: list[float]) -> SequenceBias:
    padded = np.zeros(len(table), np.float32)
    padded[: len(values)] = values
    return SequenceBias(jnp.asarray(table), jnp.asarray(padded))


def _listed(name: str, sequences: Any) -> list[Any]:
    if not np.iterable(sequences) or isinstance(sequences, str | bytes):
        raise InputError(f"{name} must be a list of lists of ids, not {sequences!r}")
    return list(sequences)


__all__ = ["SequenceBias", "sequence_bias", "bad_words", "begun_by", "sequence_table"]
