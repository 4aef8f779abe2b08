"""generation_config.json: what begins and ends a text, and the filters that every generation applies."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import sampling
from kvjax.checkpoint.fields import Fields
from kvjax.checkpoint.folder import read_json_if_there
from kvjax.checkpoint.reader import show
from kvjax.errors import CheckpointError
from kvjax.sampling import Text
from kvjax.sampling.drawing import own
from kvjax.types import Array

NOT_APPLIED: Mapping[str, tuple[Any, ...]] = {
    "encoder_no_repeat_ngram_size": (0, None),
    "encoder_repetition_penalty": (1.0, None),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (1.0, None),
    "watermarking_config": (None,),
}
"""Keys that change what is generated, and are not implemented: key -> values that change nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """What a folder says of generation; see `LM`."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    start_ids: tuple[int, ...]
    filters: tuple[Any, ...]


def read_generation(
    folder: Path, hf: Mapping[str, Any], *, vocab_size: int, encoder: bool, strict: bool = False
) -> Asked:
    """What begins, ends and changes a text, as generation_config.json says, or config.json where that does not.

    Args:
        folder: of the checkpoint.
        hf: config.json.
        vocab_size: ids that may be written.
        encoder: whether the model has one, so that targets begin with a start token.
        strict: keys that change what is generated and are not implemented are an error instead of a warning.

    Raises:
        CheckpointError: a value makes no sense, or an id is outside the vocabulary.
    """
    generation = read_json_if_there(folder / "generation_config.json")

    def ids(key: str) -> tuple[int, ...]:
        return _ids(generation, key, folder) or _ids(hf, key, folder)

    bos, eos, start = ids("bos_token_id")[:1], ids("eos_token_id"), ids("decoder_start_token_id")[:1]
    forced = ids("forced_bos_token_id")[:1] or (bos if hf.get("force_bos_token_to_be_generated") is True else ())
    start = (start or bos) + forced if encoder else ()
    if wrong := [i for i in start if i >= vocab_size]:
        raise CheckpointError(
            f"{folder}: decoder_start_token_id or forced_bos_token_id is {wrong[0]}, the vocabulary has "
            f"{vocab_size} ids"
        )
    # Transformers reads either file, not both: a generation_config.json without a key says that it is not asked for.
    there = (folder / "generation_config.json").exists()
    asked = _Asking(folder, generation if there else hf, vocab_size)
    asked.report(strict)
    return Asked(bos[0] if bos else None, eos, start, asked.filters(eos, start))


class _Asking:
    def __init__(self, folder: Path, values: Mapping[str, Any], vocab_size: int):
        self._folder, self._values, self._vocab = folder, values, vocab_size
        self._fields = Fields(values, where=str(folder))

    def report(self, strict: bool) -> None:
        asked = [
            f"{key} = {show(self._values[key])}"
            for key, neutral in NOT_APPLIED.items()
            if self._values.get(key) not in neutral
        ]
        if asked:
            message = f"{self._folder}: asks for {', '.join(asked)}, which kvjax does not apply"
            if strict:
                raise CheckpointError(message)
            warnings.warn(message, stacklevel=4)  # the caller of load

    def filters(self, eos: tuple[int, ...], start: tuple[int, ...]) -> tuple[Any, ...]:
        """In the order of Transformers (`_get_logits_processor` in generation/utils.py)."""
        made: list[Any] = []
        if biases := self._biases():
            made.append(sampling.sequence_bias(biases))
        penalty = self._fields.number("repetition_penalty", None, nullable=True)
        if penalty not in (None, 1.0):
            made.append(sampling.repetition_penalty(penalty))
        if n := self._whole("no_repeat_ngram_size"):
            made.append(sampling.no_repeat_ngram(n))
        if words := [word for word in self._sequences("bad_words_ids") if word not in [[i] for i in eos]]:
            made.append(sampling.bad_words(words))
        new, length = self._whole("min_new_tokens"), self._whole("min_length")
        if new:
            made.append(sampling.min_new_tokens(new))
        elif length and new is None:  # either of them
            made.append(sampling.min_length(length))
        if last := self._ids("forced_eos_token_id"):
            made.append(sampling.forced_last(last))
        if never := self._ids("suppress_tokens"):
            made.append(sampling.banned(never))
        if never := self._ids("begin_suppress_tokens"):
            made.append(sampling.banned_first(never, len(start)))
        if self._values.get("renormalize_logits") is not None and self._fields.flag("renormalize_logits", False):
            made.append(own(renormalized))
        return tuple(made)

    def _whole(self, key: str) -> int | None:
        return self._fields.integer(key, None, nullable=True, least=0)

    def _ids(self, key: str) -> tuple[int, ...]:
        found = _ids(self._values, key, self._folder)
        self._inside(key, found)
        return found

    def _inside(self, key: str, ids: tuple[int, ...]) -> None:
        if wrong := [i for i in ids if i >= self._vocab]:
            raise CheckpointError(f"{self._folder}: {key} has {wrong[0]}, the vocabulary has {self._vocab} ids")

    def _sequences(self, key: str) -> list[list[int]]:
        words = self._values.get(key) or []
        if not isinstance(words, list) or not all(_is_sequence(word) for word in words):
            raise CheckpointError(f"{self._folder}: {key} must be a list of lists of ids, not {show(words)}")
        self._inside(key, tuple(i for word in words for i in word))
        return words

    def _biases(self) -> dict[tuple[int, ...], float]:
        key = "sequence_bias"
        pairs = self._values.get(key) or []
        good = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
        if not good or not all(_is_sequence(word) and _is_bias(value) for word, value in pairs):
            raise CheckpointError(
                f"{self._folder}: {key} must be a list of pairs of a list of ids and a number, not {show(pairs)}"
            )
        self._inside(key, tuple(i for word, _ in pairs for i in word))
        return {tuple(word): value for word, value in pairs}


def renormalized(logits: Array, text: Text) -> Array:
    """Log-probabilities of what the filters before leave: beams are then summed as of that."""
    return jnp.where(jnp.isneginf(logits), -jnp.inf, jax.nn.log_softmax(logits, axis=1))  # of nothing it would be NaN


def _is_sequence(word: Any) -> bool:
    return isinstance(word, list) and bool(word) and all(type(i) is int and 0 <= i < 2**31 for i in word)


def _is_bias(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30  # far inside of float32


def _ids(values: Mapping[str, Any], key: str, folder: Path) -> tuple[int, ...]:
    value = values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or not -1 <= i < 2**31:
            raise CheckpointError(f"{folder}: {key} must be an id or a list of ids, not {show(value)}")
    return tuple(i for i in ids if i >= 0)


__all__ = ["Asked", "read_generation", "NOT_APPLIED", "renormalized"]
