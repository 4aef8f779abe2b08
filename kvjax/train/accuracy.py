"""How right a transliterator is: exact matches, and the share of characters that must change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvjax.checkpoint.source import resolve
from kvjax.errors import InputError
from kvjax.lm import LM, load
from kvjax.loops.algorithms import Algorithm
from kvjax.loops.beam import beam
from kvjax.loops.host import generate
from kvjax.train import pairs

BATCH = 128
"""Names in one call of `generate`."""
BEAMS = 4


class Accuracy(NamedTuple):
    """Of answers, against one written answer each.

    Args:
        exact: share of names that are right.
        errors: character error rate: the fewest insertions, deletions and substitutions that make the answers right,
            over the characters of the right ones.
    """

    exact: float
    errors: float


def distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of a character that make `b` of `a` (Levenshtein 1966)."""
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
        last = row
    return last[-1]


def accuracy(answers: Sequence[str], wanted: Sequence[str]) -> Accuracy:
    """Compares answers with what is wanted; as many, at least one character in all."""
    lost = sum(distance(a, b) for a, b in zip(answers, wanted, strict=True))
    right = sum(a == b for a, b in zip(answers, wanted, strict=True))
    return Accuracy(right / len(wanted), lost / sum(map(len, wanted)))


def answer(lm: LM, sources: Sequence[str], algorithm: Algorithm | None = None) -> list[str]:
    """The best answer to each source; the greedy one if `algorithm` is None."""
    out: list[str] = []
    for start in range(0, len(sources), BATCH):
        part = list(sources[start : start + BATCH])
        filled = part + part[:1] * (BATCH - len(part))  # one shape, one program
        found = generate(lm, filled, algorithm=algorithm).text
        assert found is not None
        out += found[: len(part)]
    return out


def length_penalty(folder: Path) -> float:
    """That of the beam search that a package asks for."""
    values = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    return float(values.get("length_penalty", 1.0))


def measure(source: str, text: Path) -> dict[str, Accuracy]:
    """Greedy and beam search of a package on a file of pairs.

    Args:
        source: a bundled name or the directory of a package that `kvjax.train seq2seq` wrote.
        text: pairs; see `kvjax.train.pairs`.

    Raises:
        CheckpointError: the package is missing or damaged.
        InputError: the file holds no pairs, or the package is no transliterator.
    """
    wanted = pairs.read_pairs(text)
    folder, _ = resolve(source, None)
    lm = load(source)
    if lm.model.encode is None:
        raise InputError(f"{source} has no encoder: it answers no sources")
    search = beam(BEAMS, length_penalty=length_penalty(folder))
    sources, targets = [x for x, _ in wanted], [y for _, y in wanted]
    return {
        name: accuracy(answer(lm, sources, algorithm), targets)
        for name, algorithm in (("greedy", None), (f"beam {BEAMS}", search))
    }


__all__ = ["Accuracy", "distance", "accuracy", "answer", "length_penalty", "measure"]
