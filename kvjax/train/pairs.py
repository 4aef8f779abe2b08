"""Pairs of names, their character tokenizer and their batches: what `kvjax.train seq2seq` reads.

A file of pairs holds a source and a target on each line, a tab between them. Every batch is a pure function of the
pairs, the settings and the step.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kvjax.errors import InputError

BOS, PAD, EOS, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"
BOS_ID, PAD_ID, EOS_ID, UNKNOWN_ID = range(4)
MARKS = "[\u064b-\u0652\u0640\u200b-\u200f\u202a-\u202e]"
"""Short vowels, the stretching line, and marks of direction: what a name may be written with or without."""

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Split:
    """The pairs to learn from, those that choose the checkpoint, and the SHA-256 of their file."""

    train: list[Pair]
    heldout: list[Pair]
    sha256: str


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a UTF-8 file.

    Raises:
        InputError: a line that is no pair, or no line at all.
    """
    pairs = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        parts = line.split("\t")
        if len(parts) != 2 or not all(parts):
            raise InputError(f"{path}: line {number} is no source and target with a tab between them: {line[:60]!r}")
        pairs.append((parts[0], parts[1]))
    if not pairs:
        raise InputError(f"{path}: no pairs")
    return pairs


def split_pairs(path: str | Path, heldout: int) -> Split:
    """Reads pairs and holds some of them out, spread evenly over the file, which may be sorted.

    Raises:
        InputError: the file has not twice as many as `heldout`.
    """
    pairs = read_pairs(path)
    if len(pairs) < 2 * heldout:
        raise InputError(f"{path}: {len(pairs):,} pairs are too few to hold {heldout:,} of them out")
    out = {i * len(pairs) // heldout for i in range(heldout)}
    return Split(
        [pair for i, pair in enumerate(pairs) if i not in out],
        [pairs[i] for i in sorted(out)],
        hashlib.sha256(Path(path).read_bytes()).hexdigest(),
    )


def character_tokenizer(pairs: Sequence[Pair]) -> Tokenizer:
    """One token a character of the pairs, sources and targets together; what is in none of them is `<unk>`.

    Texts are normed first: one form of each character, lower case, no white space around, no `MARKS`.
    """
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(MARKS), ""),
            normalizers.Strip(),
        ]
    )
    texts = {tokenizer.normalizer.normalize_str(text) for pair in pairs for text in pair}
    characters = sorted({character for text in texts for character in text})
    vocabulary = {token: i for i, token in enumerate([BOS, PAD, EOS, UNKNOWN, *characters])}
    tokenizer.model = models.WordLevel(vocabulary, unk_token=UNKNOWN)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([BOS, PAD, EOS, UNKNOWN])
    return tokenizer


class Rows(NamedTuple):
    """Pairs as ids, padded at the end. B rows, S columns for the source and T for the target.

    Args:
        source: `[B, S]` int32.
        source_valid: `[B]` int32.
        target: `[B, T]` int32, `BOS` and the target.
        wanted: `[B, T]` int32, the target and `EOS`.
        target_valid: `[B]` int32, of both.
    """

    source: np.ndarray
    source_valid: np.ndarray
    target: np.ndarray
    wanted: np.ndarray
    target_valid: np.ndarray

    def cut(self, picked: np.ndarray, columns: int) -> Rows:
        """Some rows, in columns that are enough for them."""
        return Rows(
            self.source[picked, :columns],
            self.source_valid[picked],
            self.target[picked, :columns],
            self.wanted[picked, :columns],
            self.target_valid[picked],
        )


def rows_of(tokenizer: Tokenizer, pairs: Sequence[Pair], positions: int) -> Rows:
    """Pairs as rows of `positions` columns.

    Raises:
        InputError: a source or target, with its end, is empty or longer than the model's positions.
    """
    columns: tuple[list[list[int]], list[list[int]]] = ([], [])
    for pair in pairs:
        for side, text in enumerate(pair):
            ids = tokenizer.encode(text).ids
            if not 0 < len(ids) < positions:
                raise InputError(f"pairs: {text!r} has {len(ids)} characters; the model takes 1 to {positions - 1}")
            columns[side].append(ids)
    sources, targets = columns
    return Rows(
        *_padded(sources, positions),
        _padded([[BOS_ID, *ids] for ids in targets], positions)[0],
        *_padded([[*ids, EOS_ID] for ids in targets], positions),
    )


def _padded(rows: list[list[int]], columns: int) -> tuple[np.ndarray, np.ndarray]:
    out = np.full((len(rows), columns), PAD_ID, np.int32)
    for row, ids in enumerate(rows):
        out[row, : len(ids)] = ids
    return out, np.asarray([len(ids) for ids in rows], np.int32)


WIDTHS = (8, 12, 16, 20)
"""Columns that a batch may have, below the model's positions; each is a compiled program."""


def block_of_batches(rows: Rows, *, seed: int, step: int, steps: int, batch: int) -> list[Rows]:
    """The batches of consecutive steps. The pairs are read in a new order each time, and batches of a block are made of
    pairs of like lengths.

    Args:
        rows: all of them.
        seed: what the order is a function of, with `step`.
        step: the first; blocks that begin elsewhere read other batches.
        steps, batch: how many, of how many pairs.
    """
    count, first, last = len(rows.source), step * batch, (step + steps) * batch
    orders = [
        np.random.default_rng([seed, number]).permutation(count)
        for number in range(first // count, (last - 1) // count + 1)
    ]
    picked = np.concatenate(orders)[first % count :][: steps * batch]
    sizes = np.maximum(rows.source_valid, rows.target_valid)[picked]
    picked = picked[np.argsort(sizes, kind="stable")].reshape(steps, batch)
    order = np.random.default_rng([seed, step, steps]).permutation(steps)
    most = rows.source.shape[1]
    out = []
    for part in picked[order]:
        size = int(np.maximum(rows.source_valid, rows.target_valid)[part].max())
        out.append(rows.cut(part, next((w for w in WIDTHS if size <= w < most), most)))
    return out


__all__ = [
    "BOS",
    "PAD",
    "EOS",
    "UNKNOWN",
    "BOS_ID",
    "PAD_ID",
    "EOS_ID",
    "UNKNOWN_ID",
    "Pair",
    "Split",
    "Rows",
    "read_pairs",
    "split_pairs",
    "character_tokenizer",
    "rows_of",
    "block_of_batches",
]
