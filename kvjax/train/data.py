"""Text, tokenizer and batches: everything the training run reads, as a pure function of (text, seed, block).

The text is cut in three, from the front: *train*, *held-out* (chooses the checkpoint) and *test* (the tail, read by
`kvjax.train.evaluate` alone). The tokenizer learns from *train* only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kvjax.errors import InputError

TEST_CHARS = 111_540
BOS = "<|bos|>"
BOS_ID = 0


@dataclass(frozen=True)
class Split:
    """One text in three consecutive parts, and the SHA-256 of the whole file."""

    train: str
    heldout: str
    test: str
    sha256: str


def read_split(path: str | Path, *, heldout_chars: int, test_chars: int = TEST_CHARS) -> Split:
    """Reads a UTF-8 text and cuts it in train, held-out and test parts.

    Args:
        path: the text file; line ends are kept as they are.
        heldout_chars: characters before the test part that choose the checkpoint.
        test_chars: characters at the end of the text that only the evaluation reads.

    Returns:
        A `Split`; `train + heldout + test` is the text.

    Raises:
        InputError: if the text is too short for the two parts and at least as much again to train on.
    """
    raw = Path(path).read_bytes()
    text = raw.decode("utf-8")
    cut = len(text) - test_chars
    if cut - heldout_chars < heldout_chars + 1:
        raise InputError(
            f"{path}: {len(text):,} characters are too few for {heldout_chars:,} held out and {test_chars:,} of test"
        )
    return Split(
        text[: cut - heldout_chars], text[cut - heldout_chars : cut], text[cut:], hashlib.sha256(raw).hexdigest()
    )


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE with one special token, `<|bos|>` (id 0), which `encode` puts in front.

    Args:
        text: what the merges are learnt from.
        vocab_size: entries including the special token and the 256 bytes, so at least 257.

    Returns:
        A tokenizer that encodes any string and decodes it back exactly.

    Raises:
        InputError: if `vocab_size` leaves no room for the bytes.
    """
    if vocab_size < 257:
        raise InputError(f"vocab_size={vocab_size} leaves no room for 256 bytes and one special token; use 257 or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Lines, not one string: the trainer counts words in parallel over its inputs, and the counts are the same.
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def split_word(
    symbols: list[str], ranks: dict[tuple[str, str], int], drop: float, rng: np.random.Generator
) -> list[str]:
    """One BPE segmentation of a word, each possible merge being skipped with probability `drop`.

    BPE-dropout (Provilkov et al. 2020, https://arxiv.org/abs/1910.13267); `drop=0` is plain BPE. The tokenizers
    library has it too, but draws from a generator that cannot be seeded.

    Args:
        symbols: the word as byte-level symbols.
        ranks: merge -> its rank, lower first.
        drop: probability of skipping a merge, in [0, 1].
        rng: where the draws come from; untouched when `drop` is 0.

    Returns:
        The pieces; joined they are the word.
    """
    symbols = list(symbols)
    while len(symbols) > 1:
        found = [(ranks[p], i) for i, p in enumerate(zip(symbols, symbols[1:], strict=False)) if p in ranks]
        if drop > 0:
            found = [f for f, keep in zip(found, rng.random(len(found)) >= drop, strict=True) if keep]
        if not found:
            break
        i = min(found)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


class Segmenter:
    """Encodes one text again and again, a share of its words cut differently each time.

    For every distinct word a few segmentations are drawn once; `stream` then picks one for each occurrence. That is
    BPE-dropout at the price of a NumPy gather (milliseconds for a million characters).

    Args:
        tokenizer: a byte-level BPE tokenizer.
        text: the text to encode.
        drop: BPE-dropout of the drawn segmentations.
        variants: how many are drawn for each word.
        seed: of the draws.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, *, drop: float = 0.25, variants: int = 8, seed: int = 0):
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        ranks = {tuple(m if isinstance(m, list) else m.split(" ")): r for r, m in enumerate(merges)}
        ids = tokenizer.get_vocab()
        words = [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        types: dict[str, int] = {}
        self._words = np.array([types.setdefault(w, len(types)) for w in words], np.int32)
        self._variants = variants
        rng = np.random.default_rng([seed, 0x5E6])
        pieces: list[list[int]] = []
        for word in types:
            for v in range(variants + 1):
                pieces.append([ids[s] for s in split_word(list(word), ranks, drop if v else 0.0, rng)])
        sizes = np.array([len(p) for p in pieces], np.int32)
        self._sizes = sizes
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self._flat = np.concatenate([np.array(p, np.int32) for p in pieces])

    def stream(self, rng: np.random.Generator, share: float) -> np.ndarray:
        """The whole text as token ids [N] int32, each word re-cut with probability `share` (0: plain BPE)."""
        row = self._words.astype(np.int64) * (self._variants + 1)
        recut = rng.random(len(row)) < share
        row = row + np.where(recut, rng.integers(1, self._variants + 1, len(row)), 0)
        sizes = self._sizes[row]
        ends = np.cumsum(sizes)
        inside = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        return self._flat[np.repeat(self._starts[row], sizes) + inside]


def block_of_batches(
    segmenter: Segmenter, *, seed: int, block: int, steps: int, batch: int, context: int, share: float
) -> np.ndarray:
    """The windows for `steps` consecutive optimiser steps.

    Within a block no token is a target twice while the text is long enough; blocks are independent, so a run that
    resumes at a block reads what an uninterrupted one would have read.

    Args:
        segmenter: of the training text.
        seed, block: what the draw is a function of.
        steps, batch, context: shape of the answer; `context` in tokens, the BOS included.
        share: probability that a word is re-cut.

    Returns:
        [steps, batch, context + 1] int32: BOS, then `context` consecutive tokens.

    Raises:
        InputError: if the text is shorter than one window.
    """
    rng = np.random.default_rng([seed, block])
    ids = segmenter.stream(rng, share)
    if len(ids) < context:
        raise InputError(f"the training text has {len(ids)} tokens, fewer than a window of {context}; shorten context")
    ids = np.roll(ids, -int(rng.integers(len(ids))))
    windows = ids[: len(ids) // context * context].reshape(-1, context)
    need = steps * batch
    order = np.concatenate([rng.permutation(len(windows)) for _ in range(-(-need // len(windows)))])[:need]
    out = np.full((need, context + 1), BOS_ID, np.int32)
    out[:, 1:] = windows[order]
    return out.reshape(steps, batch, context + 1)


__all__ = [
    "TEST_CHARS",
    "BOS",
    "BOS_ID",
    "Split",
    "read_split",
    "train_tokenizer",
    "split_word",
    "Segmenter",
    "block_of_batches",
]
