"""Checks of the contract suite on what decoding gives: tokens, rewinding, independence, flags.

Each check takes a `Case` and raises AssertionError. Its docstring is the promise. They share three compiled programs a
plan: a prefill of 16, a step, and a scan of 64 steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import sampling
from kvjax.caches import storage
from kvjax.caches.base import SOURCE, Cache
from kvjax.caches.codecs import Store
from kvjax.caches.flags import CAPACITY as FULL_CACHE
from kvjax.caches.flags import POSITIONS, REWIND
from kvjax.errors import CacheError
from kvjax.loops.decode import VALUE, decode, prefill, step
from kvjax.testing.algorithms import cuts_of, fed_in_chunks, sampled
from kvjax.testing.cases import (
    BATCH,
    CAPACITY,
    PROMPTS,
    Case,
    equal,
    expect,
    prompt_ids,
    same,
    slots,
    steps_over,
)
from kvjax.testing.equivalence import against, check_equivalence

KEPT, DROPPED, FEED = prompt_ids(3, 10)[:, :3], prompt_ids(4, 8)[:, :3], prompt_ids(8, 8)[:, :3]
BOTH = sampling.chain(sampling.temperature([0.0, 0.9, 0.7]), sampling.top_k(60), sampling.top_p(0.97))
"""Greedy in row 0, drawn in the others, in one program."""

LONG = sampled(BOTH)
NEAR = np.array([94, 7, 1])
"""The first row is two tokens from the capacity."""


def same_logits(case: Case) -> float:
    """The prompt cut anywhere, then step by step: the logits of recomputing from scratch.

    Exact kinds to 1e-5 of the largest logit, 1e-12 where the model computes in float64. Approximations to the error
    that the case states, root mean squares of the difference and of the logits compared. Returns the largest ratio.
    """
    want, worst = _wanted(case.of_reference()), 0.0
    limit = case.error if not case.exact else 1e-12 if want.dtype == np.float64 else 1e-5
    size = np.max if case.exact else lambda x: np.sqrt(np.mean(x**2))
    for cut in cuts_of(16):
        got = want.copy()
        for i, logits in enumerate(_taught(case, cut)):  # what is wrong after the prompt is seen before a step
            got[i] = logits
            off = float(size(np.abs(got - want)) / size(np.abs(want)))
            expect(
                off <= limit, f"prompt as {cut[:3]}: logits are off by {off:.1e} of their size, more than {limit:.0e}"
            )
        worst = max(worst, off)
    return worst


@functools.cache
def _wanted(case: Case) -> np.ndarray:
    return np.stack(list(_taught(case, (16,))))


def _taught(case: Case, cut: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Logits `[B, V]` after the prompt and after each of 24 given tokens."""
    logits, cache = fed_in_chunks(case.model, case.empty(), prompt_ids(), PROMPTS, cut)
    yield np.asarray(logits)
    for tokens in prompt_ids(9, 24, BATCH):
        logits, cache = step(case.model, cache, tokens)
        yield np.asarray(logits)
    cache.check()


def same_tokens(case: Case, seeds: tuple[int, ...] = (0,)) -> None:
    """Greedy and sampled, ragged, the prompt cut anywhere: the tokens of recomputing from scratch."""
    if case.exact:
        for seed in seeds:
            ids = prompt_ids(seed)
            prompts = [ids[row, :n].tolist() for row, n in enumerate(PROMPTS)]
            plans = {case.name: against(case.plan, case.reference)}
            model = case.seeded(seed)
            sources: dict[str, Any] = {"source": case.source(model), "cross": case.cross if model.encode else None}
            check_equivalence(model, plans, [LONG], prompts=prompts, seeds=[seed], **sources).raise_if_failed()


def scan_is_the_step_loop(case: Case) -> None:
    """One scan of 64 steps gives the tokens that a loop of `kvjax.step` gives, and a cache of the same contents."""
    first, cache = case.filled()
    try:
        tokens, _, end = decode(case.model, cache, first, steps=LONG.steps, sampler=BOTH, seed=[0, 1, 2])
    except TypeError as error:
        raise AssertionError(f"the cache cannot be carried through a scan: {error}") from None
    logits, after = steps_over(case.model, cache, np.asarray(tokens).T)
    keys = sampling.row_keys(jnp.arange(3, dtype=jnp.uint32))
    every = np.concatenate([np.asarray(first)[None], logits[:-1]])
    for i, scores in enumerate(every):
        want = _draw(BOTH, jnp.asarray(scores), keys, cache.lengths + i)
        expect((np.asarray(want) == np.asarray(tokens)[:, i]).all(), f"step {i} draws {want}, the scan {tokens[:, i]}")
    equal((end.lengths, end.tokens, end.flags), (after.lengths, after.tokens, after.flags), "the scan's cache")


@jax.jit
def _draw(sampler: Any, logits: Any, keys: Any, positions: Any) -> Any:
    return sampler(logits, sampling.position_keys(keys, positions))


# ---------------------------------------------------------------- rewind


def _drops(case: Case) -> list[tuple[int, int, int]]:
    """How many tokens the rows take back: at once, ragged, as many as possible."""
    most = min(case.slack if case.slack is not None else len(DROPPED), len(DROPPED))
    return sorted({(most,) * 3, (most, 0, most // 2), (1 if most else 0, most, 0)})


def rewind(case: Case) -> None:
    """After a rewind the live part is bitwise what it would be had the dropped tokens never been fed."""
    model = case.model
    _, start = case.filled()
    _, start = steps_over(model, start, KEPT[:2])  # rings have wrapped in the longest row, not in the shortest
    want, end = steps_over(model, start, KEPT[2:])
    for drop in _drops(case):
        # Rows that drop fewer saw fewer: they are rewound to where the others' text parts.
        _, ahead = steps_over(model, start, DROPPED[: max(drop)])
        back = ahead.rewind(start.lengths)
        same(back, start, f"rewound by {max(drop)}")
        got, cache = steps_over(model, back, KEPT[2:])
        equal(got, want, f"logits after a rewind by {max(drop)}")
        same(cache, end, "fed on after a rewind")


def ragged_rewind(case: Case) -> None:
    """Rows rewind to lengths of their own, also into the prompt, and twice in a row."""
    model = case.model
    _, start = case.filled()
    rows = [start]
    for tokens in KEPT[:9]:
        rows.append(steps_over(model, rows[-1], [tokens])[1])
    for drop in _drops(case):
        back = rows[8].rewind(np.asarray(rows[8].lengths) - drop)
        for row, n in enumerate(drop):
            same(back, rows[8 - n], f"rewound by {n}", row)
        steps = np.stack([KEPT[8 - np.array(drop) + i, np.arange(3)] for i in range(2)])
        logits, _ = steps_over(model, back, steps)
        for row, n in enumerate(drop):
            want, _ = steps_over(model, rows[8 - n], KEPT[8 - n : 10 - n])
            equal(logits[:, row], want[:, row], f"logits of row {row} after a rewind by {n}")
    n = 3 if case.slack is None else min(case.slack, 3)
    lengths = PROMPTS - np.minimum(n, PROMPTS)
    back, (_, short) = start.rewind(lengths), case.filled(valid=lengths)
    same(back, short, "rewound into the prompt")
    equal(steps_over(model, back, KEPT[:4])[0], steps_over(model, short, KEPT[:4])[0], "logits after it")
    if case.slack is None or case.slack >= 2:
        same(rows[2].rewind(rows[2].lengths - 1).rewind(start.lengths), start, "rewound twice")
        # back, forth on another way, and back again: the slack counts from the furthest token
        _, again = steps_over(model, rows[2].rewind(start.lengths), DROPPED[:2])
        same(again.rewind(start.lengths), start, "rewound, fed and rewound")


def rewind_beyond_the_slack(case: Case) -> None:
    """Further back than the kind keeps is an error on the host and a flag under `jit`, never a wrong answer."""
    _, cache = case.filled()
    expect(cache.max_rewind == case.slack, f"max_rewind is {cache.max_rewind}, the case says {case.slack}")
    if case.slack is None:
        return
    lengths = jnp.asarray(PROMPTS - np.array([case.slack + 1, 0, 0]), jnp.int32)
    _raises(lambda: cache.rewind(lengths), f"a rewind by {case.slack + 1}")
    back = jax.jit(Cache.rewind)(cache, lengths)
    equal(back.flags, np.array([REWIND, 0, 0], np.int32), "flags of a rewind beyond the slack")


def _raises(call: Any, what: str) -> None:
    try:
        call()
    except CacheError:
        return
    raise AssertionError(f"{what} is no CacheError")


# ---------------------------------------------------------------- independence


def neighbours(case: Case) -> None:
    """A row depends neither on its neighbours' content nor on what its padding holds, bit by bit."""
    model, ids = case.model, prompt_ids()

    def played(ids: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, Cache]:
        first, cache = prefill(model, case.empty(), ids, valid)
        logits, cache = steps_over(model, cache, KEPT[:4])
        return np.concatenate([np.asarray(first)[None], logits]), cache

    want, end = played(ids, PROMPTS)
    for row in range(BATCH):
        others = prompt_ids(77)
        others[row] = ids[row]
        got, cache = played(others, np.where(np.arange(3) == row, PROMPTS, [2, 16, 13]))
        equal(got[:, row], want[:, row], f"logits of row {row} beside others")
        same(cache, end, "beside others", row)
    for rubbish in (5, -7, 10**6):
        padded = np.where(np.arange(16)[None, :] < PROMPTS[:, None], ids, rubbish)
        got, cache = played(padded, PROMPTS)
        equal(got, want, f"logits where padding is {rubbish}")
        same(cache, end, f"padding of {rubbish}")


def poisoned(cache: Cache) -> Cache:
    """An empty cache whose slots, and those behind its sources, hold NaN keys and scales of keys, huge finite values,
    and ids of nothing."""
    source = cache.shared.get(SOURCE)

    def spoil(path: Any, part: Any, used: Any = None) -> Any:
        if not isinstance(part, Store):
            return part
        key = any(getattr(step, "name", None) == "k" for step in path)

        def each(buffer: Any, heads: int, rest: int) -> Any:
            poison = jnp.full_like(buffer, _poison(buffer.dtype, key))
            if used is None:
                return poison
            x, bad = (storage.unpack(y, heads, rest) for y in (buffer, poison))
            if x.shape[2] != used.shape[1]:
                return buffer  # codes of groups, and the tail behind them, lie in no slot of their own
            return storage.repack(jnp.where(jnp.expand_dims(used[:, None], range(3, x.ndim)), x, bad))

        return part.each(each)

    each_store = functools.partial(jax.tree_util.tree_map_with_path, is_leaf=lambda x: isinstance(x, Store))
    shared = cache.shared
    if source is not None:
        used = jnp.arange(source.slots)[None, :] < source.lengths[:, None]
        shared = shared | {SOURCE: each_store(functools.partial(spoil, used=used), source)}
    return cache.replace(
        layers=each_store(spoil, cache.layers), shared=shared, tokens=jnp.full_like(cache.tokens, -12345)
    )


def _poison(dtype: Any, key: bool) -> Any:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.iinfo(dtype).max
    return jnp.nan if key else min(1e30, float(jnp.finfo(dtype).max) / 2)


def unused_slots(case: Case) -> None:
    """What unused slots hold is never read: NaN keys, huge finite values, ids of nothing."""
    model, found = case.model, []
    for cache in (case.empty(), poisoned(case.empty())):
        first, cache = prefill(model, cache, prompt_ids(), PROMPTS)
        ways = [cache, cache.take([2, 2, 1]), cache.resize(2 * CAPACITY).resize(CAPACITY)]
        if case.slack != 0:
            ways.append(cache.rewind(PROMPTS - np.array([1, 1, 0])))
        ended = [steps_over(model, each, KEPT[:4]) for each in ways]
        found.append((first, [logits for logits, _ in ended], [end.flags for _, end in ended]))
    equal(found[1], found[0], "logits and flags beside poisoned slots")


# ---------------------------------------------------------------- flags


def _only_the_first_is_full(cache: Any) -> None:
    first, *others = np.asarray(cache.flags).tolist()  # where the model ends with the capacity, that is flagged too
    expect(first & FULL_CACHE and first & ~(FULL_CACHE | POSITIONS) == 0 and others == [0, 0], f"flags {cache.flags}")


def past_capacity(case: Case) -> None:
    """Past the capacity tokens are dropped and the row is flagged; nothing is clamped, wrapped or partly written."""
    model = case.model
    _, full = case.fed(NEAR)
    _, other = case.fed(np.array([9, 7, 1]))
    before = full
    for i in range(4):
        before = full if i == 2 else before
        logits, full = step(model, full, FEED[i])
        want, other = step(model, other, FEED[i])
        equal(np.asarray(logits)[1:], np.asarray(want)[1:], "logits of neighbours of a full row")
        nan = np.isnan(np.asarray(logits)[0])
        expect(nan.all() == nan.any() == (i >= 2), f"step {i} of 2 that fit: NaN in {nan.sum()} of {nan.size} logits")
    expect(full.lengths.tolist() == [CAPACITY, 11, 5], f"lengths {full.lengths}")
    _only_the_first_is_full(full)
    equal(np.asarray(full.tokens)[0], np.asarray(before.tokens)[0], "tokens of a full row")
    expect(slots(full, 0) == slots(before, 0), "a token past the capacity was written")
    _raises(full.check, "a full cache")


def runs_out(case: Case) -> None:
    """Where what layers share runs out, the row is flagged and left as it was, and its neighbours are unharmed."""
    if case.scarce is None:
        return
    poor = case.but(case.scarce)
    (_, cache), (_, rich) = poor.filled(), case.filled()
    for i in range(3):
        logits, cache = step(case.model, cache, FEED[i])
        want, rich = step(case.model, rich, FEED[i])
        # Pools of two sizes are summed in two orders.
        close = np.allclose(np.asarray(logits)[1:], np.asarray(want)[1:], rtol=1e-3, atol=1e-3)
        expect(close, "logits of neighbours of a refused row are not those beside a larger pool")
        expect(np.isnan(np.asarray(logits)[0]).all(), "a row that was refused gives logits")
        expect(cache.lengths.tolist() == [PROMPTS[0], *(PROMPTS[1:] + i + 1)], f"lengths {cache.lengths}")
    expect(np.asarray(cache.flags).astype(bool).tolist() == [True, False, False], f"flags {cache.flags}")
    _raises(cache.check, "what was refused")


def idle_rows(case: Case) -> None:
    """A row that is given nothing, or a chunk that does not fit, is left bitwise as it was, unused slots included."""
    _, cache = case.fed(NEAR)
    if case.slack != 0:  # behind the end lies a token that was dropped, where padding would be seen
        cache = prefill(case.model, cache, FEED[0][:, None])[1].rewind(NEAR)
    ids = prompt_ids(6)
    logits, after = VALUE.prefill(case.model, cache, ids, np.array([3, 3, 0], np.int32))  # no look on the host
    expect(after.lengths.tolist() == [94, 10, 1], f"lengths {after.lengths}")
    _only_the_first_is_full(after)
    expect(np.isnan(logits).all(axis=1).tolist()[:2] == [True, False], "NaN in wrong rows")
    equal(np.asarray(after.tokens)[0], np.asarray(cache.tokens)[0], "tokens of a row that a chunk did not fit")
    for row, what in ((0, "a chunk that does not fit"), (2, "no tokens")):
        expect(slots(after, row) == slots(cache, row), f"row {row} was given {what}, and was written to")


__all__ = [
    "same_logits",
    "same_tokens",
    "scan_is_the_step_loop",
    "rewind",
    "ragged_rewind",
    "rewind_beyond_the_slack",
    "neighbours",
    "unused_slots",
    "poisoned",
    "past_capacity",
    "runs_out",
    "idle_rows",
]
