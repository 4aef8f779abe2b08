"""Checks of the contract suite on what is kept of a source; for a case whose model has no encoder they pass."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import SOURCE, Cache
from kvjax.caches.flags import NO_SOURCE
from kvjax.caching import encode
from kvjax.loops.decode import prefill, step
from kvjax.testing.cases import BATCH, PROMPTS, SOURCES, VOCAB, Case, equal, expect, prompt_ids, source_ids, steps_over

FEED = prompt_ids(8, 8)[:, :3]


def own_source(case: Case) -> None:
    """A row reads all of its own source and nothing else: neither its padding nor another row's, bit by bit."""
    if case.config.encoder is None:
        return
    model, rows = case.model, BATCH // case.share
    ids, lengths = source_ids(rows), SOURCES[:rows]

    def played(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        cache = case.empty_for(model, source=encode(model, ids, lengths))
        first, cache = prefill(model, cache, prompt_ids(), PROMPTS)
        return np.concatenate([np.asarray(first)[None], steps_over(model, cache, FEED[:2])[0]])

    want = played(ids, lengths)
    for rubbish in (5, -7, 10**6):
        padded = np.where(np.arange(16)[None, :] < lengths[:, None], ids, rubbish)
        equal(played(padded, lengths), want, f"logits where padding of the source is {rubbish}")
    for row in range(rows):
        readers = np.arange(BATCH) // case.share == row
        mine = np.arange(rows) == row
        got = played(np.where(mine[:, None], ids, source_ids(rows, 77)), np.where(mine, lengths, [16, 5, 3][:rows]))
        equal(got[:, readers], want[:, readers], f"logits beside other sources than {row}")
        for place in (0, lengths[row] - 1):
            other = ids.copy()
            other[row, place] = (other[row, place] + 1) % VOCAB
            changed = (played(other, lengths) != want).any(axis=(0, 2))
            expect((changed == readers).all(), f"token {place} of source {row} changed, and so did rows {changed}")


def source_stays(case: Case) -> None:
    """No rewind, fork, or reordering inside a source moves or copies it, and no call changes it; `take` gives every row
    its own."""
    if case.config.encoder is None:
        return
    _, cache = case.filled()
    same: dict[str, Cache] = {
        "rewind": cache.rewind(cache.lengths),
        "release": cache.release([1]),
        "resize": cache.resize(cache.capacity + 32),
        "fork": cache.fork(2),
    }
    if case.share > 1:
        same["reorder"] = cache.reorder([2, 0, 1])
    for name, after in same.items():
        expect(_where(after) == _where(cache), f"{name}: the source lies elsewhere")
    equal(_entry(step(case.model, cache, FEED[0])[1]), _entry(cache), "the source after a step")
    rows = {name: len(_entry(after).lengths) for name, after in same.items()}
    expect(set(rows.values()) == {BATCH // case.share}, f"rows of the source: {rows}")
    taken = cache.take([2, 2, 0])
    expect(
        len(_entry(taken).lengths) == BATCH and not set(_where(taken)) & set(_where(cache)), "take leaves the source"
    )


def refused_source(case: Case) -> None:
    """A row whose source is empty or was refused takes in nothing and gives NaN, as long as it reads it; under `jit`,
    where nothing can be raised. The others are unharmed."""
    if case.config.encoder is None:
        return
    model, rows = case.model, BATCH // case.share
    ids, lengths = source_ids(rows), SOURCES[:rows]
    good, row = encode(model, ids, lengths), min(1, rows - 1)
    empty = jax.jit(encode)(model, ids, jnp.asarray(lengths).at[row].set(0))
    expect((np.asarray(empty.flags) != 0).tolist() == [i == row for i in range(rows)], f"flags {empty.flags}")
    bad = np.arange(BATCH) // case.share == row
    first, beside = prefill(model, _begun(model, good, case=case), prompt_ids(), PROMPTS)
    logits, cache = prefill(model, _begun(model, empty, case=case), prompt_ids(), PROMPTS)
    for what in ("a prompt", "a step", "a rewind"):
        equal(np.asarray(logits)[~bad], np.asarray(first)[~bad], f"{what}: logits beside a refused source")
        expect(np.isnan(np.asarray(logits)[bad]).all(), f"{what}: a row without a source gives logits")
        expect((np.asarray(cache.lengths)[bad] == 0).all(), f"{what}: a row without a source has {cache.lengths}")
        expect((np.asarray(cache.flags)[bad] & NO_SOURCE).all(), f"{what}: flags {cache.flags}")
        cache, beside = (x.rewind(x.lengths) if what == "a step" else x for x in (cache, beside))
        (first, beside), (logits, cache) = (step(model, x, FEED[0]) for x in (beside, cache))


@functools.partial(jax.jit, static_argnames="case")
def _begun(model: Any, source: Any, *, case: Case) -> Cache:
    return case.empty_for(model, source=source)


def _entry(cache: Cache) -> Any:
    return cache.shared[SOURCE]


def _where(cache: Cache) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(_entry(cache)) if x.size]


__all__ = ["own_source", "source_stays", "refused_source"]
