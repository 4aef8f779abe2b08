"""How right a transliterator is: exact matches, and the share of characters that must change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvjax.errors import InputError
from kvjax.lm import LM
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


def measure(lm: LM, wanted: Sequence[pairs.Pair]) -> dict[str, Accuracy]:
    """Greedy and beam search of a transliterator on pairs.

    Raises:
        InputError: there are no pairs, or the model has no encoder.
    """
    if lm.model.encode is None:
        raise InputError(f"model {lm.name!r} has no encoder: it answers no sources")
    if not wanted:
        raise InputError("accuracy: no pairs to measure on")
    sources, targets = [x for x, _ in wanted], [y for _, y in wanted]
    searches = {"greedy": None, f"beam {BEAMS}": beam(BEAMS)}
    return {name: accuracy(answer(lm, sources, algorithm), targets) for name, algorithm in searches.items()}


__all__ = ["Accuracy", "distance", "accuracy", "answer", "measure"]
