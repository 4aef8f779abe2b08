"""One prefix for many rows: kept once, and every row decodes as if it had a copy of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CAPACITY, FULL, MIXED, PROMPTS, WINDOW, prompt_ids, tiny

import kvjax
from kvjax import CacheError, InputError, caches, codecs, costs
from kvjax.caches.flags import PREFIX, REWIND
from kvjax.loops.decode import DONATING

P = 13
TEXT, REST, MORE = prompt_ids(3, 1)[:, :P] % 90, prompt_ids(4), prompt_ids(5, 8)[:, :3]
RING = (caches.ring(WINDOW, slack=8), caches.dense())
GROUPS = caches.dense(store=codecs.int4_channels(4, residual=2, slack=2))
PAIRS = {
    "dense": (caches.dense(), caches.dense()),
    "paged": (caches.dense(), caches.paged(4, share=2)),
    "ring": (RING, RING),
    "paged-prefix": (caches.paged(4), caches.dense(store=jnp.float32, rotated=False)),
    "un-rotated-prefix": (caches.dense(rotated=False), caches.paged(8)),
}
FAST = ("ring",)  # pages with a prefix are in the contract suite
EACH = pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.full) for n in PAIRS])


@functools.cache
def prefix(plan=None, config=MIXED, shift=0):
    ids = (TEXT + shift) % 90
    return kvjax.prefill(tiny(config), kvjax.init_cache(tiny(config), plan, capacity=20), ids)[1]


def shared(plan, of=None, config=MIXED):
    """Logits and a ragged cache after the prefix and `REST`."""
    cache = kvjax.init_cache(tiny(config), plan, batch=3, capacity=CAPACITY, prefix=prefix(of, config))
    return kvjax.prefill(tiny(config), cache, REST, PROMPTS)


@functools.cache
def whole(config=MIXED):
    """The same without sharing."""
    cache = kvjax.init_cache(tiny(config), caches.dense(), batch=3, capacity=CAPACITY)
    _, cache = kvjax.prefill(tiny(config), cache, np.repeat(TEXT, 3, axis=0))
    return kvjax.prefill(tiny(config), cache, REST, PROMPTS)


def steps(cache, tokens=MORE, config=MIXED):
    found = []
    for row in tokens:
        logits, cache = kvjax.step(tiny(config), cache, row)
        found.append(np.asarray(logits))
    cache.check()
    return np.array(found)


def close(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


OPERATIONS = {
    "nothing": lambda c: c,
    "rewind": lambda c: c.rewind(c.lengths - np.array([5, 7, 1])),
    "take": lambda c: c.take([2, 0, 0]),
    "reorder": lambda c: c.reorder([1, 2, 0]),
    "grow": lambda c: c.resize(CAPACITY + 32),
    "insert": lambda c: c.insert([1], c.take([0])),
    "keep": lambda c: c.keep(c.lengths - np.array([5, 6, 1]), np.array([[0, 2], [1, 4], [0, 0]]), np.array([2, 2, 1])),
}


@EACH
def test_rows_decode_as_with_a_copy_of_the_prefix_each(name):
    of, plan = PAIRS[name]
    (got, cache), (want, copied) = shared(plan, of), whole()
    close(got, want)
    for what in OPERATIONS if name in FAST[:1] else ("nothing", "take"):
        close(steps(OPERATIONS[what](cache)), steps(OPERATIONS[what](copied)))


def test_a_suffix_that_counts_from_zero_is_seen():
    (_, cache), (_, copied) = shared(caches.dense()), whole()
    entry = cache.shared["prefix"]
    wrong = cache.replace(shared={"prefix": entry.replace(lengths=entry.lengths - 1)})
    got, want = steps(wrong), steps(copied)
    assert np.abs(got - want).max() > 1e-3 * np.abs(want).max()


def test_a_ring_narrower_than_the_layer_sees_its_window_across_the_border():
    plan = caches.ring(WINDOW, sinks=2, slack=2)
    reference = kvjax.init_cache(tiny(FULL), caches.recompute(window=WINDOW, sinks=2), batch=3, capacity=CAPACITY)
    _, reference = kvjax.prefill(tiny(FULL), reference, np.repeat(TEXT, 3, axis=0))
    of = prefix(caches.ring(WINDOW, sinks=2, slack=2), FULL)
    cache = kvjax.init_cache(tiny(FULL), plan, batch=3, capacity=CAPACITY, prefix=of)
    got, cache = kvjax.prefill(tiny(FULL), cache, REST, PROMPTS)
    want, reference = kvjax.prefill(tiny(FULL), reference, REST, PROMPTS)
    close(got, want)
    close(steps(cache, config=FULL), steps(reference, config=FULL))


def test_bytes_are_the_prefix_once_and_a_suffix_a_row():
    slot = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    for rows in (1, 3):
        cache = kvjax.init_cache(tiny(FULL), caches.dense(), batch=rows, capacity=40, prefix=prefix(None, FULL))
        s = 40 - P
        assert cache.nbytes == slot * (P + rows * s) + costs.container_nbytes(rows, 40) + 4 * P + 4


def test_a_donated_step_leaves_the_prefix_in_place_and_single():
    _, cache = shared(caches.dense())
    _, stepped = kvjax.step(tiny(MIXED), cache, REST[:, 0])
    for each in (cache, stepped):
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(each) if x.size]
        assert len(set(pointers)) == len(pointers)
        assert len(jax.tree.leaves(each)) == 2 * 4 + 4 + 2, "keys and values of both parts, container, prefix"
    memory = DONATING.step.lower(tiny(MIXED), stepped, jnp.asarray(REST[:, 0])).compile().memory_analysis()
    assert memory.alias_size_in_bytes == stepped.nbytes
    again = kvjax.donating.step(tiny(MIXED), stepped, REST[:, 0])[1]
    assert not any(x.is_deleted() for x in jax.tree.leaves((prefix(), again)))
    assert stepped.layers[0].prefix.k.data.is_deleted()


def test_a_row_stays_above_the_prefix():
    _, cache = shared(caches.paged(4, share=2))
    np.testing.assert_array_equal(cache.lengths, P + PROMPTS)
    np.testing.assert_array_equal(cache.rewind(P).lengths, P)
    with pytest.raises(CacheError, match="row 1 to length 12 goes into what other rows share"):
        cache.rewind([P, P - 1, P])
    flagged = jax.jit(lambda c, to: c.rewind(to))(cache, jnp.array([P, P - 1, P + 1]))
    np.testing.assert_array_equal(flagged.flags, [0, REWIND, 0])
    np.testing.assert_array_equal(flagged.lengths, [P, P + 7, P + 1])
    gone = cache.release([0, 2])
    np.testing.assert_array_equal(gone.lengths, [P, P + 7, P])
    assert int((~gone.shared["prefix"].suffix["pages"].free).sum()) == 2
    close(kvjax.prefill(tiny(MIXED), gone, REST, PROMPTS * [1, 0, 1])[0][::2], whole()[0][::2])


def test_rows_of_another_prefix_cannot_be_joined():
    _, cache = shared(caches.dense())
    other = prefix(None, MIXED, 1)
    other = kvjax.init_cache(tiny(MIXED), caches.dense(), batch=1, capacity=CAPACITY, prefix=other)
    with pytest.raises(CacheError, match="join: the rows of the other cache go on from another prefix"):
        cache.insert([0], other)
    np.testing.assert_array_equal(jax.jit(lambda a, b: a.join(b))(cache, other).flags, [PREFIX] * 4)
    same = kvjax.init_cache(tiny(MIXED), caches.dense(), batch=1, capacity=CAPACITY, prefix=prefix())
    np.testing.assert_array_equal(cache.insert([1], same).lengths, [P + 16, P, P + 1])


def test_contents_are_prefix_and_suffix_as_one():
    (_, cache), (_, copied) = shared(caches.paged(4, share=2), caches.dense(store=jnp.float32)), whole()
    for layer in range(2):
        at = np.asarray(cache.positions(layer))
        width = copied.keys(layer).shape[2]
        np.testing.assert_array_equal(at[:, :width], copied.positions(layer))
        live = (np.asarray(copied.positions(layer)) < CAPACITY)[:, None, :, None]
        for ours, theirs in ((cache.keys(layer), copied.keys(layer)), (cache.values(layer), copied.values(layer))):
            close(np.where(live, ours[:, :, :width], 0), np.where(live, theirs, 0))


def test_a_saved_cache_comes_back_with_its_prefix(tmp_path):
    _, cache = shared(caches.paged(4, share=2), caches.dense(store="bfloat16"))
    kvjax.save_cache(tmp_path / "rows.safetensors", cache, tiny(MIXED))
    again = kvjax.load_cache(tmp_path / "rows.safetensors", tiny(MIXED))
    assert jax.tree.structure(again) == jax.tree.structure(cache)
    (want, _), (got, _) = (kvjax.step(tiny(MIXED), c, REST[:, 0]) for c in (cache, again))
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_generate_takes_a_prefix_that_its_prompts_begin_with():
    prompts = [TEXT[0].tolist() + row[:n].tolist() for row, n in zip(REST, PROMPTS, strict=True)]
    want = kvjax.generate(tiny(MIXED), prompts, max_new_tokens=8, seed=1)
    got = kvjax.generate(tiny(MIXED), prompts, max_new_tokens=8, seed=1, prefix=prefix())
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.prompts == want.prompts and "prefix" in got.cache.shared
    assert not any(x.is_deleted() for x in jax.tree.leaves(prefix()))
    for wrong, said in ((prompts[0][:P], "13 tokens and goes with the prefix for 13"), (prompts[0][1:], "for 0")):
        with pytest.raises(InputError, match=f"prompt 1 has .*{said}"):
            kvjax.generate(tiny(MIXED), [prompts[0], wrong], prefix=prefix())


def test_prefixes_that_cannot_be_shared_are_errors():
    make = functools.partial(kvjax.init_cache, tiny(MIXED), batch=2)
    for wrong, capacity, said in (
        (prefix().take([0, 0, 0]), 96, "3 rows and 2 layers; rows must divide the batch of 2"),
        (prefix().replace(layers=prefix().layers[:1]), 96, "1 rows and 1 layers"),
        (prefix().rewind(P - 1).resize(15), 12, "capacity 12 leaves no room after a prefix of 12"),
        (make(caches.dense(), batch=1, capacity=8), 96, "row 0 of the cache is empty"),
        (make(caches.recompute(), batch=1, capacity=8), 96, "recomputes"),
    ):
        with pytest.raises(InputError, match=said):
            make(caches.dense(), capacity=capacity, prefix=wrong)
    with pytest.raises(InputError, match="Recompute cannot be a suffix"):
        make(caches.recompute(), capacity=96, prefix=prefix())
    with pytest.raises(InputError, match="is no kind of cache"):
        caches.shared_prefix(caches.dense)


def test_a_prefix_of_group_codes_is_read_as_it_is_kept():
    (got, cache), (want, _) = shared(caches.dense(), GROUPS), whole()
    np.testing.assert_array_equal(cache.keys(1)[0, :, :P], prefix(GROUPS).keys(1)[0, :, :P])
    error = np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want)))
    assert 1e-3 < error < 0.25  # what int4_channels may err in tests/kinds.py


def test_kinds_whose_heads_differ_cannot_be_shown_as_one():
    _, cache = shared(caches.layer_input(), caches.dense())
    with pytest.raises(CacheError, match="the prefix keeps heads of another sort, 2 of width 8, than .* 1 of width 32"):
        cache.keys(0)


def test_sinks_that_the_prefix_does_not_keep_are_an_error():
    plan = (caches.ring(WINDOW, slack=8, sinks=2), caches.dense())
    with pytest.raises(InputError, match="sees 2 sinks, but the prefix's ring keeps 0"):
        shared(plan, RING)
    logits, _ = shared(plan, plan)
    assert np.isfinite(np.asarray(logits)).all()


def test_under_jit_a_prefix_may_be_shorter_than_its_buffers_and_nothing_is_lost():
    short = prefix().rewind(P - 3)
    cache = jax.jit(lambda one: kvjax.init_cache(tiny(MIXED), caches.dense(), batch=3, capacity=36, prefix=one))(short)
    np.testing.assert_array_equal(cache.lengths, P - 3)
    _, full = kvjax.prefill(tiny(MIXED), cache, REST)
    np.testing.assert_array_equal(full.lengths, P - 3 + 16)
    logits, over = kvjax.step(tiny(MIXED), full, REST[:, 0])  # 36 - 20 slots for suffixes
    assert np.isnan(logits).all() and (np.asarray(over.lengths) == P - 3 + 16).all()
    with pytest.raises(CacheError, match="past the capacity"):
        over.check()
