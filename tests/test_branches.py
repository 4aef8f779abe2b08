"""Rows that go on from a text which is kept once for every few of them: as if each had a copy of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MIXED, POSTNORM, PROMPTS, WINDOW, prompt_ids, tiny

import kvjax
from kvjax import CacheError, InputError, caches, codecs, costs
from kvjax.caches.flags import CAPACITY, REWIND, ROWS
from kvjax.loops.decode import VALUE

N, MORE, NEW = 2, prompt_ids(5, 8)[:, :6], prompt_ids(6, 6)
"""Rows of a prompt; tokens for six rows."""
RING = (caches.ring(WINDOW, slack=8), caches.dense())
PLANS = {
    "ring and pages": (caches.ring(WINDOW, slack=8), caches.paged(4, share=2)),
    "dense": caches.dense(),
    "sinks": (caches.ring(WINDOW, sinks=2, slack=8), caches.dense()),
    "pages": caches.paged(4, share=2),
    "un-rotated": caches.dense(rotated=False),
    "un-rotated pages": caches.paged(8, rotated=False),
    "layer input": caches.layer_input(),
    "int8": caches.dense(store=codecs.int8()),
    "shared prefix": caches.shared_prefix(),
}
FIRST = "ring and pages"
EACH = pytest.mark.parametrize("name", [n if n == FIRST else pytest.param(n, marks=pytest.mark.full) for n in PLANS])


@functools.cache
def prompts(plan):
    """Logits and a ragged cache of three prompts."""
    return kvjax.prefill(tiny(MIXED), kvjax.init_cache(tiny(MIXED), plan, batch=3, capacity=32), prompt_ids(), PROMPTS)


def branched(plan, room=32):
    return jax.jit(lambda c: kvjax.branched(c, N, room=room))(prompts(plan)[1])


def forked(plan, capacity=64):
    return jax.jit(lambda c: c.resize(capacity).fork(N))(prompts(plan)[1])


def fed(cache, model=MIXED):
    """Logits of a ragged chunk, and the cache."""
    logits, cache = kvjax.prefill(tiny(model), cache, NEW, [8, 1, 16, 3, 1, 7])
    return np.asarray(logits), cache.check()


def close(got, want, within=1e-5):
    got, want = np.asarray(got), np.asarray(want)
    assert np.abs(got - want).max() <= within * np.abs(want).max()


MOVES = {
    "reorder": lambda c: c.reorder(jnp.asarray([1, 0, 2, 2, 5, 5])),
    "rewind": lambda c: c.rewind(c.lengths - np.array([3, 1, 8, 2, 0, 5])),
    "take": lambda c: c.take(jnp.asarray([4, 0, 3, 3, 1, 2])).reorder(jnp.asarray([1, 2, 0, 3, 5, 4])),
    "grow": lambda c: c.resize(c.capacity + 32),
    "insert": lambda c: c.take(jnp.arange(6)).insert(jnp.asarray([3, 1]), c.take(jnp.asarray([2, 5]))),
    "fork": lambda c: c.take(jnp.asarray([5, 0, 2])).fork(2),
}


@EACH
def test_rows_decode_as_with_a_copy_of_the_prompt_each(name):
    ours, theirs, within = branched(PLANS[name]), forked(PLANS[name]), 0.02 if name == "int8" else 1e-5
    np.testing.assert_array_equal(ours.lengths, np.repeat(PROMPTS, N))
    (got, ours), (want, theirs) = fed(ours), fed(theirs)
    close(got, want, within)  # of int8 a chunk reads its own numbers as they are, not as codes
    for what in ("reorder",) if name == FIRST else MOVES:
        moved = [jax.jit(MOVES[what])(cache) for cache in (ours, theirs)]
        close(*(kvjax.step(tiny(MIXED), cache, MORE[0])[0] for cache in moved), within)


def test_a_row_that_reads_its_neighbours_prompt_is_seen():
    cache = branched(PLANS["dense"])  # pages would find that they were not reserved
    entry = cache.shared["prefix"]
    wrong = cache.replace(shared={"prefix": entry.replace(lengths=entry.lengths[::-1])})
    want = fed(forked(PLANS["dense"]))[0]
    assert np.abs(fed(wrong)[0] - want).max() > 1e-3 * np.abs(want).max()


def test_prompts_are_kept_once_and_never_copied():
    _, one = prompts(caches.dense())
    cache = kvjax.branched(one, N, room=32)
    moved = jax.jit(lambda c: c.reorder(jnp.asarray([1, 0, 2, 2, 5, 5])), donate_argnums=0)
    own = jax.tree.map(jnp.copy, cache)
    pointers = [x.unsafe_buffer_pointer() for node in own.layers for x in jax.tree.leaves(node.prefix)]
    after = moved(own)
    assert [x.unsafe_buffer_pointer() for node in after.layers for x in jax.tree.leaves(node.prefix)] == pointers
    for a, b in zip(one.layers, cache.layers, strict=True):
        assert [x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b.prefix), strict=True)] == [True] * 2
    sizes = costs.shared_prefix_nbytes(MIXED, batch=6, capacity=64, prefix=32, prefixes=3)
    assert cache.nbytes == sizes < costs.dense_nbytes(MIXED, batch=6, capacity=64)


def test_what_a_row_can_hold_depends_on_its_prompt_and_nothing_is_lost():
    cache = branched(caches.dense(), room=8)
    np.testing.assert_array_equal(cache.room, np.repeat(PROMPTS, N) + 8)
    assert cache.capacity == 40 and cache.doubled == 48
    logits, over = VALUE.prefill(tiny(MIXED), cache, NEW[:, :9], np.array([8, 9, 9, 8, 1, 8]))
    np.testing.assert_array_equal(over.flags, np.array([0, 1, 1, 0, 0, 0]) * CAPACITY)
    assert np.isnan(np.asarray(logits)[1:3]).all() and np.isfinite(np.asarray(logits)[3:]).all()
    np.testing.assert_array_equal(over.lengths - cache.lengths, [8, 0, 0, 8, 1, 8])
    with pytest.raises(CacheError, match="capacity 39, which leaves room for 23, is less than the length 24 of row 0"):
        over.resize(39)
    np.testing.assert_array_equal(over.resize(cache.doubled).room, np.repeat(PROMPTS, N) + 16)
    with pytest.raises(CacheError, match="row 0 has length 16, 9 more do not fit: room for 24"):
        kvjax.prefill(tiny(MIXED), cache, NEW[:, :9])


def test_room_is_never_less_than_none_after_what_rows_share():
    _, one = prompts(caches.dense())
    cache = kvjax.branched(one.take([2]), N, room=8)  # a prompt of one token in 32 slots
    with pytest.raises(CacheError, match="resize: capacity 20 leaves no room after a prefix of 32 slots"):
        cache.resize(20)
    least = cache.resize(cache.needed(2))
    assert least.capacity == 33 and least.doubled == 34 and least.enough(9) == 40
    np.testing.assert_array_equal(least.resize(40).room, [9, 9])


def test_rows_that_were_taken_join_whatever_they_shared_before(tmp_path):
    _, one = prompts(caches.dense())
    ours, theirs = (kvjax.branched(one, n, room=8).take([n, 0]) for n in (2, 3))
    kvjax.save_cache(tmp_path / "rows.safetensors", theirs, tiny(MIXED))
    want = kvjax.step(tiny(MIXED), ours, MORE[0, :2])[0]
    for other in (theirs, kvjax.load_cache(tmp_path / "rows.safetensors", tiny(MIXED))):
        got = kvjax.step(tiny(MIXED), ours.join(other).take([2, 3]), MORE[0, :2])[0]
        close(got, want)


def test_rows_stay_above_their_own_prompt():
    cache, least = branched(PLANS[FIRST]), np.repeat(PROMPTS, N)
    np.testing.assert_array_equal(fed(cache)[1].release(range(6)).lengths, least)
    below = least - np.eye(6, dtype=np.int32)[2]
    with pytest.raises(CacheError, match="row 2 to length 6 goes into what other rows share"):
        cache.rewind(below)
    flagged = jax.jit(lambda c, to: c.rewind(to))(cache, below)
    np.testing.assert_array_equal(flagged.flags, np.eye(6, dtype=np.int32)[2] * REWIND)
    np.testing.assert_array_equal(flagged.lengths, least)


def test_a_row_cannot_go_on_from_another_prompt():
    cache = branched(caches.dense())
    with pytest.raises(CacheError, match="row 1 goes on from prefix 0, row 2 from another .1.; `take` moves"):
        cache.reorder([0, 2, 2, 3, 4, 5])
    flagged = jax.jit(lambda c: c.reorder(jnp.asarray([0, 2, 2, 3, 4, 5])))(cache)
    np.testing.assert_array_equal(flagged.flags, [0, ROWS, 0, 0, 0, 0])
    with pytest.raises(CacheError, match="join: rows share a prefix: 2 here and 1 there"):
        cache.insert([0], cache.take([1]))
    other = kvjax.branched(prompts(caches.dense())[1].resize(24), N, room=32)
    with pytest.raises(CacheError, match="join: slots: 32 here and 24 there"):
        cache.join(other)
    assert jax.jit(lambda c: c.take(jnp.asarray([7])))(cache).flags.tolist() == [ROWS]


@pytest.mark.full
def test_contents_are_those_of_a_copy_each():
    ours, theirs = (fed(x)[1] for x in (branched(RING), forked(RING)))
    for layer in range(2):
        for row in range(6):
            places = [np.asarray(cache.positions(layer))[row] for cache in (ours, theirs)]
            kept = [np.asarray(cache.values(layer))[row] for cache in (ours, theirs)]
            least = int(theirs.lengths[row]) - WINDOW if layer == 0 else 0
            for position in range(max(least, 0), int(theirs.lengths[row])):
                (a,), (b,) = (np.flatnonzero(at == position) for at in places)
                close(kept[0][:, a], kept[1][:, b])


@pytest.mark.parametrize("taken", [False, pytest.param(True, marks=pytest.mark.full)], ids=("shared", "taken"))
def test_a_saved_cache_comes_back_with_its_prompts(taken, tmp_path):
    _, cache = fed(branched(PLANS[FIRST]))
    cache = cache.take([5, 0, 1, 3, 3, 2]) if taken else cache
    kvjax.save_cache(tmp_path / "rows.safetensors", cache, tiny(MIXED))
    again = kvjax.load_cache(tmp_path / "rows.safetensors", tiny(MIXED))
    assert again.shared["prefix"].share == cache.shared["prefix"].share == (1 if taken else 2)
    want, got = (kvjax.step(tiny(MIXED), c, NEW[:, 0])[0] for c in (cache, again))
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.full
def test_a_plan_of_ones_own_and_prompts_of_several_rows_go_into_init_cache():
    logits, one = prompts(RING)
    cache = kvjax.init_cache(tiny(MIXED), caches.paged(8), batch=6, capacity=64, prefix=one)
    assert cache.shared["prefix"].tokens.shape == (3, 16), "no slots that no prompt needs"
    close(fed(cache)[0], fed(forked(RING))[0])
    kvjax.donating.step(tiny(MIXED), cache, NEW[:, 0])
    assert not any(x.is_deleted() for x in jax.tree.leaves(one))


@pytest.mark.full
def test_branches_of_rows_that_share_a_prefix_go_on():
    model = tiny(MIXED)
    _, text = kvjax.prefill(model, kvjax.init_cache(model, RING, capacity=13), prompt_ids(3, 1)[:, :13])
    ours = kvjax.init_cache(model, caches.paged(4), batch=3, capacity=32, prefix=text)
    theirs = kvjax.init_cache(model, caches.dense(), batch=3, capacity=64)
    _, theirs = kvjax.prefill(model, theirs, np.repeat(prompt_ids(3, 1)[:, :13], 3, axis=0))
    ours, theirs = (kvjax.prefill(model, c, prompt_ids(), PROMPTS)[1] for c in (ours, theirs))
    ours = kvjax.branched(ours, 2, room=32)
    assert ours.layers[0].prefix.prefix.k.data.shape[0] == 2 and jax.tree.leaves(ours.layers[0].prefix)
    (got, ours), (want, theirs) = fed(ours), fed(theirs.fork(2))
    close(got, want)
    close(fed(ours.take([4, 0, 3, 3, 1, 2]))[0], fed(theirs.take([4, 0, 3, 3, 1, 2]))[0])


@pytest.mark.full
def test_branches_read_the_sources_of_their_prompts():
    model = tiny(POSTNORM)
    source = kvjax.encode(model, prompt_ids(2), [16, 5, 9])
    cache = kvjax.init_cache(model, caches.dense(), source=source, batch=3, capacity=64)
    _, cache = kvjax.prefill(model, cache, prompt_ids(), PROMPTS)
    ours = kvjax.branched(cache, 2, room=32)
    assert ours.shared["source"].share == 2 and ours.shared["source"].k[0].data is cache.shared["source"].k[0].data
    close(fed(ours, POSTNORM)[0], fed(cache.fork(2), POSTNORM)[0])


def test_kinds_that_see_more_than_their_own_tokens_are_forked():
    for plan, name in (
        (caches.recompute(), "Recompute"),
        (caches.traced(caches.dense()), "Traced"),
        (caches.ring(WINDOW, sinks=2, sinks_in_cache=True), "SinksInCache"),
    ):
        cache = kvjax.init_cache(tiny(MIXED), plan, batch=2, capacity=16)
        assert not cache.branches
        with pytest.raises(CacheError, match=f"branched: {name} sees more than its own tokens"):
            kvjax.branched(cache, 2)
    with pytest.raises(InputError, match="branched: copies"):
        kvjax.branched(prompts(caches.dense())[1], 0)
    with pytest.raises(InputError, match="share is 2, which does not divide a batch of 3"):
        kvjax.init_cache(tiny(MIXED), caches.shared_prefix(share=2), batch=3, capacity=16)
