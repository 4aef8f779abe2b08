"""Promise: an approximate edit is exact where it can be, says how far it is off elsewhere, and keeps its books."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import (
    CAPACITY,
    FULL,
    LEARNED,
    MIXED,
    ONE_LAYER,
    ONE_LAYER_WINDOWED,
    PROMPTS,
    RELATIVE,
    VOCAB,
    fed,
    filled,
    prompt_ids,
    tiny,
)

import kvjax
from kvjax import CacheError, InputError, approximate, caches, codecs
from kvjax.caches.flags import CAPACITY as FULL_FLAG
from kvjax.caches.flags import POSITIONS, REWIND
from kvjax.ops.positions import Rope, YarnScaling
from kvjax.testing import edits
from kvjax.testing.cases import Case, bits
from kvjax.testing.induction import induction_model
from kvjax.testing.programs import seeded
from kvjax.timing import Compilations

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import drift
import editing_page

EXACT = 1e-5
"""Of the largest logit; float32, sums in another order."""
FAR = 1e-2

START, STOP = np.array([3, 0, 0]), np.array([5, 4, 1])
NEW, VALID = np.array([[7, 9, 11], [4, 5, 6], [8, 2, 1]]), np.array([3, 1, 0])
"""Of rows of 16, 7 and 1 tokens: one longer, one shorter by three, one emptied."""

full = functools.partial(pytest.param, marks=pytest.mark.full)
PLANS = {
    "dense": caches.dense(),
    "un-rotated": caches.dense(rotated=False),
    "paged": caches.paged(4, share=2),
    "layer input": caches.layer_input(),
    "traced": caches.traced(caches.dense(), sites=("embedding",)),
    "prefix": caches.shared_prefix(),
    "recompute": caches.recompute(),
}
TURNED = {"dense", "paged", "traced", "prefix"}
"""Where keys are kept turned to their positions."""


@functools.cache
def text(plan, config=ONE_LAYER):
    """A model and a cache with ragged prompts."""
    return tiny(config), filled(tiny(config), plan)[1]


@functools.cache
def edited(plan, config=ONE_LAYER, rerotate=True):
    model, cache = text(plan, config)
    return approximate.splice(model, cache, START, STOP, NEW, VALID, rerotate=rerotate)


def ids_after(cache, row, start=START, stop=STOP, new=NEW, valid=VALID):
    ids = np.asarray(cache.tokens)[row, : int(cache.lengths[row])].tolist()
    return ids[: start[row]] + new[row, : valid[row]].tolist() + ids[stop[row] :]


def off(model, found, ids):
    """How far logits `[V]` are from those after the whole text, as a share of the largest."""
    want = np.asarray(kvjax.forward(model, np.pad(ids, (0, CAPACITY - len(ids)))[None])[0, len(ids) - 1])
    return np.abs(np.asarray(found) - want).max() / np.abs(want).max()


def errors(result, model, before):
    return [off(model, result.logits[row], ids_after(before, row)) for row in (0, 1)]


@pytest.mark.corner
def test_where_keys_and_values_know_their_own_token_alone_it_is_exact():
    """In one layer nothing is approximate but the turning; and the book-keeping is that of the edited text."""
    model, before = text(PLANS["dense"])
    kept = bits(before)
    result = edited(PLANS["dense"])
    logits, cache = result
    assert max(errors(result, model, before)) < EXACT
    assert bits(before) == kept, "the cache that was given"
    cache.check()
    for row in range(3):
        ids = ids_after(before, row)
        assert int(cache.lengths[row]) == len(ids) and np.asarray(cache.tokens)[row, : len(ids)].tolist() == ids
    moved = result.divergence(model)
    assert np.asarray(moved.logits)[:2].max() < EXACT * np.abs(np.asarray(logits)).max()
    assert np.abs(np.asarray(moved.kl)[:2]).max() < 1e-6 and np.asarray(moved.agrees)[:2].all()
    # and it goes on as the edited text does
    after, _ = kvjax.prefill(model, cache, np.array([[3], [5], [9]]))
    assert max(off(model, after[row], [*ids_after(before, row), (3, 5, 9)[row]]) for row in range(3)) < EXACT


@pytest.mark.full
@pytest.mark.parametrize("name", PLANS)
def test_any_script_of_splices_in_one_layer_leaves_the_cache_of_the_new_text(name):
    case = Case(name, PLANS[name], ONE_LAYER, keeps=name != "recompute")
    texts = [ids[:n] for ids, n in zip(prompt_ids().tolist(), PROMPTS, strict=True)]
    _, cache = case.filled()
    for each in edits.script(seeded(1), 4, PROMPTS):
        logits, spliced = approximate.splice(case.model, cache, *each)
        wrong = approximate.splice(case.model, cache, *each, rerotate=False)
        texts = each.of(texts)
        edits.as_fresh(case, np.asarray(logits), spliced.check(), texts, f"{each}")
        cache = spliced
    if name in TURNED:
        with pytest.raises(AssertionError, match="logits"):
            edits.as_fresh(case, np.asarray(wrong.logits), wrong.cache, texts)


def test_keys_left_turned_to_where_they_stood_are_off():
    model, before = text(PLANS["dense"])
    result = edited(PLANS["dense"], rerotate=False)
    assert min(errors(result, model, before)) > FAR and min(result.divergence(model).kl[:2]) > FAR


@pytest.mark.full
def test_keys_that_are_kept_un_turned_are_left_as_they_are():
    model, bare = text(PLANS["un-rotated"])
    kept = approximate.splice(model, bare, START, STOP, NEW, VALID, rerotate=False)
    assert bits(kept) == bits(edited(PLANS["un-rotated"]))


@pytest.mark.parametrize(
    "config, plan",
    [
        full(dataclasses.replace(ONE_LAYER, positions=Rope(100.0, YarnScaling(4.0, 16))), caches.dense()),
        full(ONE_LAYER_WINDOWED, caches.dense()),
    ],
    ids=["yarn", "window"],
)
def test_other_rotations_and_masks_are_right_too(config, plan):
    model, before = text(plan, config)
    assert max(errors(edited(plan, config), model, before)) < EXACT


def test_a_scaling_that_stretches_keys_is_not_applied_twice():
    rope, x = Rope(100.0, YarnScaling(4.0, 16)), np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    at, by = np.array([[9, 4, 0]]), np.array([[-9, 3, 7]])
    there, want = (rope.rotate(x, rope.tables(places, 8, np.float32)) for places in (at, at + by))
    np.testing.assert_allclose(rope.turn(there, by), want, atol=1e-5)
    twice = rope.rotate(there, rope.tables(by, 8, np.float32))
    assert np.abs(np.asarray(twice) - np.asarray(want)).max() > 0.1


@pytest.mark.parametrize("store, near", [full(codecs.int8(), 0.02), full(codecs.fp8(), 0.2)])
def test_codes_are_decoded_turned_and_coded_again(store, near):
    plan = caches.dense(store=store)
    model, before = text(plan)
    found, other = edited(plan).divergence(model), edited(plan, rerotate=False).divergence(model)
    size = np.abs(np.asarray(edited(plan).logits)).max()
    assert 1e-4 < np.asarray(found.logits)[:2].max() / size < near < np.asarray(other.logits)[:2].max() / size


def test_what_stands_before_stays_bitwise_and_what_does_not_move_too():
    model, before = text(PLANS["dense"])
    at = np.array([3, 3, 0])
    same_length = approximate.splice(model, before, at, at + [2, 2, 1], [[1, 2], [3, 4], [5, 0]], [2, 2, 1]).cache
    for cache, start in ((edited(PLANS["dense"]).cache, START), (same_length, at)):
        for row, n in enumerate(start):
            new, old = (np.asarray(x.keys(0))[row, :, :n] for x in (cache, before))
            assert new.tobytes() == old.tobytes()
    for of in ("keys", "values"):
        new, old = (np.asarray(getattr(x, of)(0)) for x in (same_length, before))
        assert new[0, :, 5:15].tobytes() == old[0, :, 5:15].tobytes() and (new[0, :, 3:5] != old[0, :, 3:5]).any()
    values = np.asarray(edited(PLANS["dense"]).cache.values(0))
    assert values[0, :, 6:16].tobytes() == np.asarray(before.values(0))[0, :, 5:15].tobytes(), "moved as stored"


@pytest.mark.parametrize(
    "plan, config",
    [
        full(caches.hybrid(), MIXED),
        full(caches.paged(8), LEARNED),
    ],
    ids=["hybrid", "pages and learned positions"],
)
def test_in_deeper_models_it_is_approximate_and_with_everything_refreshed_exact(plan, config):
    model, before = text(plan, config)
    result = edited(plan, config)
    assert max(errors(result, model, before)) > FAR, "a splice that were exact here would have computed everything"
    start = START + VALID
    again = approximate.refresh(model, result.cache, start, np.asarray(result.cache.lengths) - start)
    assert max(errors(again, model, before)) < EXACT
    some = approximate.refresh(model, result.cache, start, np.minimum(1, np.asarray(result.cache.lengths) - start))
    assert max(errors(some, model, before)) > FAR


@pytest.mark.full
def test_positions_in_the_stream_stay_in_keys_and_values():
    """Where nothing moves one layer is exact with learned positions too; what moves says that it stands elsewhere."""
    config = dataclasses.replace(LEARNED, num_layers=1, windows=())
    model, before = text(caches.dense(), config)
    replaced = approximate.splice(model, before, 0, np.array([3, 3, 1]), NEW, np.array([3, 3, 1]))
    assert np.asarray(replaced.divergence(model).logits).max() < EXACT * np.abs(np.asarray(replaced.logits)).max()
    assert max(errors(edited(caches.dense(), config), model, before)) > FAR


@pytest.mark.full
def test_targets_of_an_encoder_are_edited_beside_their_source():
    config = dataclasses.replace(RELATIVE, num_layers=1, windows=())
    case = Case("one layer", caches.dense(), config)
    result = approximate.splice(case.model, case.filled()[1], START, STOP, NEW, VALID)
    found = result.divergence(case.model)
    assert np.asarray(found.logits)[:2].max() < EXACT * np.abs(np.asarray(result.logits)).max()
    late = approximate.splice(case.model, case.filled()[1], START + [1, 0, 0], STOP + [1, 0, 0], NEW, VALID)
    assert np.abs(np.asarray(late.logits - result.logits))[0].max() > FAR


# --- moves are gathers: TRAPS of compiled overlapping updates


@pytest.mark.parametrize(
    "plan, heads, rows, by",
    [
        (plan, *size, by) if (plan, *size, by) == ("dense()", 2, 2, 1) else full(plan, *size, by)
        for plan, size in itertools.product(["dense()", "dense(store=int8())", "paged(4)"], ((1, 1), (2, 2)))
        for by in (1, -3)
    ],
)
def test_compiled_moves_and_turns_are_those_of_plain_python(plan, heads, rows, by):
    kind, slots, rng = caches.parse(plan), 16, np.random.default_rng(1)
    shape = kvjax.caches.base.LayerShape(heads, 8, 8, jnp.float32)
    model = tiny(dataclasses.replace(ONE_LAYER, head_dim=8))
    node, shared = kind.init(shape, rows, slots), kind.shared(rows, slots)
    places = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None, :], (rows, slots))
    span = kvjax.caches.base.Span(jnp.zeros((rows,), jnp.int32), jnp.full((rows,), slots, jnp.int32), places)
    shared = {name: entry.reserve(span)[0] for name, entry in shared.items()}
    k, v = (jnp.asarray(rng.normal(size=(rows, slots, heads, 8)), jnp.float32) for _ in "kv")
    node = node.extend(None, kvjax.caches.base.Project(lambda h, at: (k, v), lambda x, at: x), span, shared)[1]
    source = places[:, 4:12]
    target = jnp.where(source < 11, source + by, kvjax.caches.base.EMPTY)
    turn = functools.partial(model.config.turns[0].turn, by=jnp.full(source.shape, by, jnp.int32))

    def run(node):
        moved = node.move(source, target, shared)
        return moved, moved.turn(target, turn, shared)

    lengths = jnp.full((rows,), slots, jnp.int32)
    held = lambda node: [np.asarray(x) for x in node.contents(lengths, shared)[:2]]  # noqa: E731
    (moved, turned), (plain, slow) = jax.jit(run)(node), run(node)
    assert bits(moved) == bits(plain)
    for before, after in zip(held(node), held(moved), strict=True):
        want = before.copy()
        want[:, :, 4 + by : 11 + by] = before[:, :, 4:11]
        np.testing.assert_array_equal(after, want)
        assert (after != before).any()
    step = np.abs(np.asarray(held(moved)[0])).max() / 127 if "int8" in plan else 1e-6  # a code may round to either side
    np.testing.assert_allclose(held(turned)[0], held(slow)[0], atol=1.01 * step)
    assert np.abs(held(turned)[0] - held(moved)[0]).max() > 0.1
    np.testing.assert_array_equal(held(turned)[1], held(moved)[1])


# --- what is shared, flagged, refused


@pytest.mark.full
def test_rows_that_share_pages_or_a_prefix_are_not_changed_by_an_edit_of_one():
    model, before = text(PLANS["paged"])
    both = before.fork(2)
    held = [np.asarray(x) for x in both.layers[0].contents(both.lengths, both.shared)]
    start = np.array([3, 7, 1, 1, 0, 1])  # an end for rows that stay as they are
    stop = np.array([9, 7, 2, 1, 1, 1])
    start, stop = (np.where(np.arange(6) % 2, np.asarray(both.lengths), x) for x in (start, stop))
    result = approximate.splice(model, both, start, stop, np.tile([5, 6], (6, 1)), np.array([2, 0, 1, 0, 1, 0]))
    result.cache.check()
    now = [np.asarray(x) for x in result.cache.layers[0].contents(result.cache.lengths, result.cache.shared)]
    for row in (1, 3, 5):
        n = int(both.lengths[row]) - 1  # the last one was computed again
        assert all(a[row, :, :n].tobytes() == b[row, :, :n].tobytes() for a, b in zip(held[:2], now[:2], strict=True))
    assert np.asarray(result.divergence(model).logits).max() < EXACT * np.abs(np.asarray(result.logits)).max()


@pytest.mark.full
def test_a_splice_takes_no_page_that_it_leaves_as_it_is():
    model = tiny(ONE_LAYER)
    one = kvjax.init_cache(model, caches.paged(4, pages=6, share=2), batch=1, capacity=24)
    both = kvjax.prefill(model, one, prompt_ids(0, 1))[1].take([0, 0])  # three pages that both read, the last of each
    result = approximate.splice(model, both, np.array([1, 0]), np.array([2, 0]), [[5], [0]], np.array([1, 0]))
    old, new = (np.asarray(x.keys(0)) for x in (both, result.cache.check()))
    assert off(model, result.logits[0], ids_after(both, 0, [1], [2], np.array([[5]]), [1])) < EXACT
    assert old[1, :, :15].tobytes() == new[1, :, :15].tobytes() and (old[0, :, 1] != new[0, :, 1]).any()


@pytest.mark.full
def test_what_rows_share_as_a_prefix_is_refused_and_what_follows_is_not():
    model = tiny(ONE_LAYER)
    _, prompt = kvjax.prefill(model, kvjax.init_cache(model, capacity=8), prompt_ids(0, 1)[:, :5])
    rows = kvjax.init_cache(model, caches.dense(), prefix=prompt, batch=3, capacity=CAPACITY)
    _, rows = kvjax.prefill(model, rows, prompt_ids(1, 3), np.array([9, 4, 1]))
    result = approximate.splice(model, rows, np.array([6, 5, 5]), np.array([9, 7, 5]), NEW, VALID)
    found = result.divergence(model)
    assert np.asarray(found.logits).max() < EXACT * np.abs(np.asarray(result.logits)).max()
    ended = approximate.splice(model, rows, 5, np.array([14, 6, 6]))
    assert ended.cache.lengths.tolist() == [5, 8, 5] and np.isnan(ended.logits).all(1).tolist() == [True, False, True]
    with pytest.raises(CacheError, match="row 0 from 4 on goes into what other rows share, its first 5 tokens"):
        approximate.splice(model, rows, 4, 6, [1])
    flags = jax.jit(lambda c, at: approximate.splice(model, c, at, 6, [1]).cache.flags)(rows, np.array([4, 5, 6]))
    np.testing.assert_array_equal(flags, [REWIND, 0, 0])


def test_mistakes_are_errors_on_the_host():
    model, cache = text(PLANS["dense"])
    splice = functools.partial(approximate.splice, model, cache)
    for start, stop in ((5, 3), (-1, 0), ([0, 3, 0], [0, 2, 0])):
        with pytest.raises(InputError, match=r"row \d has start -?\d, it must lie between 0 and its stop \d"):
            splice(start, stop, [1])
    for start, stop in ((3, 17), (0, [16, 8, 1])):
        with pytest.raises(CacheError, match=r"row \d has stop \d+, but the row has \d+ tokens"):
            splice(start, stop, [1])
    with pytest.raises(CacheError, match=rf"row 0 would have {16 + CAPACITY} tokens, room for {CAPACITY}: resize"):
        splice(0, 0, np.zeros(CAPACITY, np.int32))
    short = model.replace(config=dataclasses.replace(model.config, max_positions=20))
    with pytest.raises(CacheError, match="row 0 would have 21 tokens, positions of the model 20"):
        approximate.splice(short, cache, 0, 0, [0] * 5)
    for wrong in (
        {"tokens": [[1, 2], [3], [4]]},
        {"tokens": [[1, 2]]},
        {"tokens": [1.5]},
        {"tokens": [VOCAB]},
        {"tokens": 3},
        {"start": [1, 2]},
    ):
        with pytest.raises(InputError, match=f"splice: ({'|'.join(wrong)}|row 0 has id)"):
            splice(**{"start": 0, "stop": 1, "tokens": [1], **wrong})
    with pytest.raises(InputError, match="rerotate"):
        splice(0, 1, [1], rerotate="no")
    with pytest.raises(CacheError, match="refresh: row 2 has stop 2, but the row has 1 tokens"):
        approximate.refresh(model, cache, 0, [2, 2, 2])
    with pytest.raises(CacheError, match="row 1 has stop 10, but the row has 7 tokens"):
        approximate.shift(model, cache, 8, keep=[2, 2, 1])


@pytest.mark.parametrize(
    "plan", [caches.ring(6), caches.ring(6, sinks=2, sinks_in_cache=True), caches.dense(store=codecs.int4_channels())]
)
def test_kinds_that_do_not_keep_every_token_by_itself_are_refused_by_name(plan):
    model, plans = tiny(FULL), (caches.dense(), plan)
    with pytest.raises(CacheError, match=r"layer 1 is kept by .*kvjax\.edit is exact"):
        approximate.splice(model, kvjax.init_cache(model, plans, batch=1, capacity=8), 0, 0, [1])


def test_under_jit_a_row_that_is_refused_is_flagged_and_stays_as_it_was():
    model, cache = text(PLANS["dense"])
    cache, tokens = cache.resize(24), np.tile(np.arange(24), (3, 1))
    short = model.replace(config=dataclasses.replace(model.config, max_positions=20))
    run = jax.jit(functools.partial(approximate.splice, rerotate=True))
    found = run(model, cache, np.array([3, 2, 0]), np.array([5, 8, 1]), tokens, np.array([3, 1, 2]))
    np.testing.assert_array_equal(found.cache.flags, [0, REWIND, 0])
    assert np.isnan(found.logits[1]).all() and np.isfinite(found.logits[::2]).all()
    for row, ids in ((0, ids_after(cache, 0, new=tokens)), (2, [0, 1])):
        assert off(model, found.logits[row], ids) < EXACT
    of = lambda c: [np.asarray(c.keys(0))[1, :, :7], np.asarray(c.values(0))[1, :, :7], np.asarray(c.tokens)[1]]  # noqa: E731
    assert bits(of(found.cache)) == bits(of(cache)) and bits(of(found.cache)) != bits(of(edited(PLANS["dense"]).cache))
    assert found.cache.lengths.tolist() == [17, 7, 2]
    many = np.array([3, 2, 0]), np.array([5, 3, 1]), tokens, np.array([11, 1, 24])
    assert run(model, cache, *many).cache.flags.tolist() == [FULL_FLAG, 0, 0]
    assert run(short, cache, *many).cache.flags.tolist() == [FULL_FLAG | POSITIONS, 0, POSITIONS]


def test_nothing_new_may_be_said_in_any_way():
    model, cache = text(PLANS["dense"])
    none = [approximate.splice(model, cache, 0, 1, *x) for x in ((), ([],), (np.zeros((3, 0)),), ([[7]] * 3, [0] * 3))]
    assert all(bits(x) == bits(none[0]) for x in none) and none[0].cache.lengths.tolist() == [15, 6, 0]
    assert bits(approximate.shift(model, cache, 1)) == bits(none[0])


def test_other_places_tokens_and_numbers_of_them_compile_nothing():
    model, cache = text(PLANS["dense"])
    edited(PLANS["dense"])
    with Compilations() as made:
        approximate.splice(model, cache, [2, 1, 0], [3, 7, 0], [[5] * 9, [6] * 9, [7] * 9], [9, 2, 5])
    assert made.count == 0


def apply(params, config, cache, tokens, valid):
    x = params["embed"][tokens]
    q = (x @ params["q"])[:, :, None]
    y, cache = kvjax.attend(cache, 0, q=q, kv=(x[:, :, None], x[:, :, None]))
    return (x + y[:, :, 0]) @ params["embed"].T, cache


@pytest.mark.full
def test_keys_of_an_apply_of_ones_own_are_turned_by_nobody():
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    mine = kvjax.Model({"embed": draw(0, 50, 8), "q": draw(1, 8, 8)}, None, apply)
    for plan, options in ((caches.dense(), {"rerotate": False}), (caches.dense(rotated=False), {})):
        _, cache = kvjax.prefill(mine, kvjax.init_cache(mine, plan, batch=1, capacity=16), prompt_ids(0, 1)[:, :9] % 50)
        found = approximate.splice(mine, cache, 2, 4, [9, 8, 7], **options).divergence(mine)
        assert float(found.logits[0]) < EXACT
    with pytest.raises(InputError, match="rerotate=False"):
        approximate.splice(mine, kvjax.prefill(mine, kvjax.init_cache(mine, capacity=16), [[1, 2, 3]])[1], 0, 1, [])


# --- context shift


def test_a_shift_lets_a_text_go_on_past_its_capacity():
    """Of one layer, so that what comes afterwards is what follows the shortened text."""
    model = tiny(ONE_LAYER)
    logits, cache = fed(model, caches.dense(), np.array([CAPACITY, CAPACITY - 2, 20]))
    with pytest.raises(CacheError, match="do not fit"):
        kvjax.prefill(model, cache, prompt_ids(0, 3))
    logits, shifted = approximate.shift(model, cache, [24, 24, 10], keep=[4, 0, 2])
    assert shifted.lengths.tolist() == [CAPACITY - 24, CAPACITY - 26, 10]
    more = prompt_ids(3, 3)
    after, longer = kvjax.prefill(model, shifted, more)
    longer.check()
    late = []
    for row, (drop, keep) in enumerate(((24, 4), (24, 0), (10, 2))):
        ids = np.asarray(cache.tokens)[row, : int(cache.lengths[row])].tolist()
        ids = ids[:keep] + ids[keep + drop :]
        assert off(model, logits[row], ids) < EXACT and off(model, after[row], ids + more[row].tolist()) < EXACT
        late.append(off(model, after[row], ids[:-1] + more[row].tolist()))
    assert max(late) > FAR


@pytest.mark.parametrize("rotated", [full(True), False])
def test_repeated_shifts_drift_where_keys_are_kept_turned_and_nowhere_else(rotated):
    model, shifts = tiny(ONE_LAYER), 30
    _, cache = fed(model, caches.dense(store=jnp.bfloat16, rotated=rotated), np.full(3, 48))
    before = np.asarray(cache.keys(0), np.float32)[:, :, shifts : shifts + 8]
    for _ in range(shifts):
        cache = approximate.shift(model, cache, 1).cache
    after = np.asarray(cache.keys(0), np.float32)[:, :, :8]
    assert (after.tobytes() == before.tobytes()) == (not rotated)
    if rotated:
        exact = np.asarray(model.config.turns[0].turn(before.swapaxes(1, 2), np.full((3, 8), -shifts)).swapaxes(1, 2))
        assert 1e-2 < np.linalg.norm(after - exact) / np.linalg.norm(exact) < 0.1


DRIFT = {"bfloat16": (0.3, 0.8, 4e-3), "int8()": (0.6, 1.8, 1.2e-2), "float32": (1e-6, 1e-4, 2e-5)}
"""Of keys turned a thousand times: at least, at most; and at most of keys turned once. docs/editing.md has figures."""


@pytest.mark.parametrize("store", ["bfloat16", full("int8()"), full("float32")])
def test_a_thousand_turns_by_one_ruin_what_one_turn_by_a_thousand_does_not(store):
    keys = np.random.default_rng(0).normal(size=(1, 64, 1, 64)).astype(np.float32)
    found, (least, most, single) = drift.errors(store, keys), DRIFT[store]
    assert least < found["repeated"][-1] < most and found["once"][-1] < single
    np.testing.assert_allclose(found["un-rotated"], found["un-rotated"][0], rtol=1e-6)
    assert found["un-rotated"][0] <= found["once"].min()


# --- what it loses


@pytest.mark.parametrize("edit", ["replace", full("insert"), full("delete")])
def test_a_spliced_token_is_not_known_to_the_next_until_that_is_refreshed(edit):
    model, given = induction_model(), editing_page.texts(edit, rows=64)
    how = functools.partial(editing_page.copied, model, caches.dense(), given)
    naive, refreshed, exact = how(0), how(1), how(given.lengths - given.stop)
    assert editing_page.exact(model, given) == exact["right"] > 0.95 and abs(exact["kl"]) < 1e-6
    assert naive["right"] < 0.15 and naive["kl"] > 2
    assert refreshed["right"] > 0.95 and refreshed["kl"] < 0.1
