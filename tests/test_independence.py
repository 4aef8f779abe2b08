"""Promise: a row does not depend on its neighbours' content, on padding, or on what unused slots hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import PROMPTS, SAMPLER, STEPS, VOCAB, filled, prompt_ids

import kvjax
from kvjax.caches import storage
from kvjax.caches.paged import Paged
from kvjax.ops.attention import EMPTY


def continued(model, logits, cache):
    """Everything that decoding on gives, for bitwise comparison."""
    tokens, logits, cache = kvjax.decode(model, cache, logits, steps=STEPS, sampler=SAMPLER, seed=[4, 5, 6])
    return {"tokens": tokens, "logits": logits, "lengths": cache.lengths, "flags": cache.flags, **live(cache)}


def live(cache):
    """Keys and values of the slots in use, by layer and row."""
    found = {}
    for layer, node in enumerate(cache.layers):
        if not node.replays:
            used = np.asarray(cache.positions(layer)) != EMPTY
            for name, x in (("keys", cache.keys(layer)), ("values", cache.values(layer))):
                found |= {f"{name} {layer} {row}": np.asarray(x)[row][:, used[row]] for row in range(cache.batch)}
    return found


def assert_bitwise(got, want, row=None):
    assert got.keys() == want.keys()
    for name in want:
        a, b = np.asarray(got[name]), np.asarray(want[name])
        if row is not None and name.split()[0] in ("keys", "values"):
            if not name.endswith(f" {row}"):
                continue
        elif row is not None:
            a, b = a[row], b[row]
        assert a.tobytes() == b.tobytes(), name


@pytest.mark.corner
@kinds.each()
def test_a_row_does_not_depend_on_its_neighbours(case):
    model, plan, ids = case.model, case.plan, prompt_ids()
    want = continued(model, *filled(model, plan))
    for row in range(3):
        others = prompt_ids(77)
        others[row] = ids[row]
        valid = np.where(np.arange(3) == row, PROMPTS, [2, 16, 13])
        empty = kvjax.init_cache(model, plan, batch=3, capacity=96)
        got = continued(model, *kvjax.prefill(model, empty, others, valid))
        assert_bitwise(got, want, row)


@kinds.each()
def test_padding_may_hold_anything(case):
    model, plan, ids = case.model, case.plan, prompt_ids()
    want = continued(model, *filled(model, plan))
    for rubbish in (0, 5, -7, 10**6):
        padded = np.where(np.arange(16)[None, :] < PROMPTS[:, None], ids, rubbish)
        got = continued(
            model, *kvjax.prefill(model, kvjax.init_cache(model, plan, batch=3, capacity=96), padded, PROMPTS)
        )
        assert_bitwise(got, want)


def poison(cache, used=False):
    """Unused slots (or one used) with NaN keys and huge values; ids past a row's length are no ids."""
    past = jnp.arange(cache.capacity)[None, :] >= cache.lengths[:, None]
    layers = []
    for node in cache.layers:
        own, shared = (node.suffix, cache.shared["prefix"].suffix) if hasattr(node, "suffix") else (node, cache.shared)
        if node.replays or not hasattr(own, "k"):
            layers.append(node)
            continue
        paged = isinstance(own, Paged)
        at = shared["pages"].held(cache.lengths) if paged else own.contents(cache.lengths, shared)[2]
        where = (at == 0 if used else at == EMPTY)[:, None, :, None]
        assert bool(where.any())
        k = storage.repack(jnp.where(where, jnp.nan, own.k.unpacked()))
        v = storage.repack(jnp.where(where, 1e30, own.v.unpacked()))
        own = own.replace(k=own.k.replace(data=k), v=own.v.replace(data=v))
        layers.append(node.replace(suffix=own) if hasattr(node, "suffix") else own)
    return cache.replace(layers=tuple(layers), tokens=jnp.where(past, -12345, cache.tokens))


def makings(case):
    """Caches with unused slots, by how they came to have them, and logits to go on from."""
    model, plan = case.model, case.plan
    empty = kvjax.init_cache(model, plan, batch=3, capacity=96)
    logits, cache = filled(model, plan)
    yield "init", None, empty
    yield "prefill", logits, cache
    if case.slack != 0:
        yield "rewind", logits, cache.rewind(cache.lengths - jnp.array([1, 1, 0]))
    yield "take", logits, cache.take([2, 2, 1])


@kinds.each(lambda case: case.exact)
def test_unused_slots_may_hold_nan_keys_and_huge_values(case):
    model = case.model
    for how, logits, cache in makings(case):
        poisoned = poison(cache)
        if logits is None:
            want = kvjax.prefill(model, cache, prompt_ids(), PROMPTS)
            got = kvjax.prefill(model, poisoned, prompt_ids(), PROMPTS)
            assert_bitwise(dict(enumerate(got[:1])), dict(enumerate(want[:1])))
        else:
            want, got = (logits, cache), (logits, poisoned)
        assert_bitwise(continued(model, *got), continued(model, *want))
        assert not np.asarray(got[1].flags).any(), how


@kinds.each(lambda case: case.keeps and case.exact)
def test_poison_in_a_used_slot_is_seen(case):
    logits, cache = filled(case.model, case.plan, valid=np.array([3, 2, 1]))
    _, _, cache = kvjax.decode(
        case.model, poison(cache, used=True), logits, steps=STEPS, sampler=SAMPLER, seed=[4, 5, 6]
    )
    assert np.asarray(cache.flags).all()
    with pytest.raises(kvjax.CacheError, match="NaN"):
        cache.check()


def test_a_seed_samples_the_same_alone_and_in_any_row():
    case = kinds.cases()[0]
    model, ids = case.model, prompt_ids()
    logits, cache = filled(model, case.plan)
    want, _, _ = kvjax.decode(model, cache, logits, steps=STEPS, sampler=SAMPLER, seed=[4, 5, 6])
    order = jnp.array([2, 0, 1])
    got, _, _ = kvjax.decode(model, cache.take(order), logits[order], steps=STEPS, sampler=SAMPLER, seed=[6, 4, 5])
    np.testing.assert_array_equal(got, want[order])
    for row, seed in enumerate([4, 5, 6]):
        alone = kvjax.init_cache(model, case.plan, batch=1, capacity=96)
        first, alone = kvjax.prefill(model, alone, ids[row : row + 1], PROMPTS[row : row + 1])
        got, _, _ = kvjax.decode(model, alone, first, steps=STEPS, sampler=SAMPLER, seed=seed)
        np.testing.assert_array_equal(got[0], want[row])
    assert len({tuple(row) for row in want.tolist()}) == 3
    assert int(jnp.max(want)) < VOCAB and jax.device_get(want).min() >= 0
