"""Check of the contract suite on editing: after any script of edits a cache is that of the new text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from kvjax.caches.base import Cache
from kvjax.loops.decode import prefill, step
from kvjax.loops.edit import edit
from kvjax.testing.cases import PROMPTS, VOCAB, Case, bits, expect, kept, prompt_ids
from kvjax.testing.programs import Choose, seeded

MOST = 16
"""Tokens that a row has at most, so that a text is one bucket."""
FEED = prompt_ids(8, 3)[:, :3]


class Edit(NamedTuple):
    """What is done to each row: `start[B]`, `stop[B]`, `tokens[B, n]`, `valid[B]`."""

    start: np.ndarray
    stop: np.ndarray
    tokens: np.ndarray
    valid: np.ndarray

    def of(self, texts: list[list[int]]) -> list[list[int]]:
        """The rows afterwards, on lists."""
        rows = zip(texts, self.start, self.stop, self.tokens.tolist(), self.valid, strict=True)
        return [text[:at] + new[:n] + text[to:] for text, at, to, new, n in rows]


def script(choose: Choose, count: int, lengths: Any, most: int = MOST) -> Iterator[Edit]:
    """Edits of ragged rows: replacing, inserting, deleting, at the ends, of nothing, of everything."""
    lengths = np.array(lengths)
    for _ in range(count):
        start, stop, valid = (np.zeros(len(lengths), np.int32) for _ in range(3))
        for row, n in enumerate(lengths.tolist()):
            start[row], stop[row] = sorted((choose(0, n), choose(0, n)))
            how = choose(0, 7)
            if how == 0:  # at the end
                start[row] = stop[row] = n
            elif how == 1:  # from the beginning
                start[row] = 0
            elif how == 2:  # one place
                stop[row] = min(start[row] + choose(0, 1), n)
            same, room = stop[row] - start[row], most - n + stop[row] - start[row]
            valid[row] = min(same if how in (2, 3) else choose(0, 4), room)
            if how == 7:
                stop[row], valid[row] = start[row], 0
        tokens = [[choose(0, VOCAB - 1) for _ in range(max(int(valid.max()), 1))] for _ in lengths]
        yield Edit(start, stop, np.array(tokens, np.int32), valid)
        lengths = lengths - (stop - start) + valid


def padded(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """`[B, S]` ids and `[B]` lengths."""
    lengths = np.array([len(text) for text in texts], np.int32)
    ids = np.zeros((len(texts), max(int(lengths.max()), 1)), np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    return ids, lengths


def edits(case: Case, choose: Choose | None = None, count: int = 5) -> float:
    """After any script of edits a cache is that of the whole new text, prefilled: logits, contents, what is fed next,
    also after a rewind; the cache that was edited is as it was. Returns the largest relative difference of logits."""
    texts = [ids[:n] for ids, n in zip(prompt_ids().tolist(), PROMPTS, strict=True)]
    _, cache = case.filled()
    worst = 0.0
    for each in script(choose or seeded(0), count, PROMPTS):
        before = bits(cache)
        logits, edited = edit(case.model, cache, *each)
        expect(bits(cache) == before, "an edit changed the cache that it was given")
        texts = each.of(texts)
        worst = max(worst, as_fresh(case, np.asarray(logits), edited.check(), texts, f"{each}"))
        cache = edited
    return worst


def as_fresh(case: Case, logits: np.ndarray, cache: Cache, texts: list[list[int]], what: str = "") -> float:
    """Raises AssertionError unless a cache, and the logits after it, are those of texts fed to an empty one."""
    want, other = prefill(case.model, case.empty(len(texts)), *padded(texts))
    expect(np.asarray(cache.lengths).tolist() == [len(text) for text in texts], f"{what}: lengths {cache.lengths}")
    for row, text in enumerate(texts):
        found = np.asarray(cache.tokens)[row, : len(text)].tolist()
        expect(found == text, f"{what}: row {row} has the tokens {found}, not {text}")
    live = np.array([len(text) > 0 for text in texts])
    worst = near(case, logits[live], np.asarray(want)[live], f"{what}: logits")
    mine, theirs = contents(cache), contents(other)
    expect(mine.keys() == theirs.keys(), f"{what}: what is kept is {sorted(mine)}, not {sorted(theirs)}")
    for name in mine:
        if name.startswith("positions"):
            expect((mine[name] == theirs[name]).all(), f"{what}: {name}: {mine[name]}, not {theirs[name]}")
        elif mine[name].size:
            near(case, mine[name], theirs[name], f"{what}: {name}")
    back = np.maximum(np.asarray(cache.lengths) - 3, 0)
    if case.slack is not None:  # it counts from the furthest token written
        back = np.maximum(back, np.asarray(cache.written) - case.slack).clip(None, cache.lengths)
    for left, right in ((cache, other), (cache.rewind(back), other.rewind(back))):
        for tokens in FEED[:2]:
            (got, left), (want, right) = step(case.model, left, tokens), step(case.model, right, tokens)
            near(case, np.asarray(got), np.asarray(want), f"{what}: logits of what is fed next")
    return worst


def contents(cache: Cache) -> dict[str, np.ndarray]:
    """What live slots hold, and what layers showed, in the order of the text."""
    found = kept(cache)
    for layer in range(len(cache.layers)):
        for site in ("embedding", "after_self_attention", "after_cross_attention", "after_ffn"):
            if cache.recorded(layer, site) is not None:
                found[f"{site} {layer}"] = np.asarray(cache.trace(layer, site))
    return found


def near(case: Case, got: np.ndarray, want: np.ndarray, what: str) -> float:
    """Raises AssertionError unless two arrays agree: to 1e-5 of the largest number, 1e-12 in float64; approximations to
    their own error, as a code may fall to the other side. Returns the difference, of the largest number."""
    size = float(np.abs(want).max()) if want.size else 0.0
    limit = case.error if not case.exact else 1e-12 if want.dtype == np.float64 else 1e-5
    off = float(np.abs(got - want).max()) / max(size, 1e-9) if want.size else 0.0
    expect(off <= limit, f"{what} are off by {off:.1e} of their size, more than {limit:.0e}")
    return off


__all__ = ["edits", "as_fresh", "script", "padded", "contents", "near", "Edit"]
