"""Promise: an edit in the middle of a cache gives what prefilling the whole new text gives."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import FULL, WINDOW, WINDOWED, prompt_ids
from test_own_model import MODEL

import kvjax
from kvjax import CacheError, InputError, caches, codecs, costs, transformer
from kvjax.caches.base import Node
from kvjax.caches.flags import CAPACITY, COUNT, PAGES, REWIND
from kvjax.caches.ring import Ring
from kvjax.checks import bucket
from kvjax.loops import cone, decode, edit, rework
from kvjax.ops.positions import Learned
from kvjax.testing import Case, edits
from kvjax.testing.cases import bits
from kvjax.timing import Compilations

CASES = {case.name: case for case in (*kinds.cases(), *kinds.of_sources())}
DEEP = dataclasses.replace(WINDOWED, num_layers=3, windows=(WINDOW,) * 3)
BELOW = dataclasses.replace(FULL, num_layers=4, windows=(WINDOW, 4, None, WINDOW))
LENGTHS = np.array([90, 70, 40], np.int32)


FULL_ONLY = pytest.mark.full


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name == "ring" else FULL_ONLY) for name, case in CASES.items()],
)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_script_of_edits_leaves_the_cache_of_the_new_text(case, data):
    edits.edits(case, lambda low, high: data.draw(st.integers(low, high)), count=2)


# ---------------------------------------------------------------- long texts


@functools.cache
def text(case):
    """Ragged texts of several chunks, and their cache."""
    ids = prompt_ids(5, 3, 90)
    texts = [row[:n].tolist() for row, n in zip(ids, LENGTHS, strict=True)]
    return texts, kvjax.prefill(case.model, case.empty(), *edits.padded(texts))[1]


def an_edit(start, stop, valid, seed=4):
    start, stop, valid = (np.broadcast_to(x, (3,)).astype(np.int32) for x in (start, stop, valid))
    return edits.Edit(start, stop, prompt_ids(seed, 3, max(int(valid.max()), 1)), valid)


def planned(case, cache, each):
    """What an edit would run."""
    by = each.valid - (each.stop - each.start)
    lengths = np.asarray(cache.lengths) + by
    start = np.where((each.start == each.stop) & (each.valid == 0), lengths, each.start)
    return rework.plan(case.model, cache, start, start + each.valid, lengths, by)


def counted(case, cache, each):
    """What an edit gives, and of each layer the positions of each row that it ran, counted on the device."""
    found = [0] * len(cache.layers)

    def count(layer, valid):
        found[layer] = found[layer] + np.asarray(valid)

    def noted(run):
        def layer_run(params, config, x, cache, layer, rotation):
            jax.debug.callback(functools.partial(count, layer), cache.span.valid)
            return run(params, config, x, cache, layer, rotation)

        return layer_run

    with pytest.MonkeyPatch.context() as patch:
        for module in (rework, cone, transformer):
            patch.setattr(module, "decoder_layer", noted(module.decoder_layer))
        fed, layers = (jax.jit(lambda *x, f=f: f(*x)) for f in (decode._prefill, rework._layers))  # compiled for this
        part = jax.jit(lambda *x, **sizes: cone._cone(*x, **sizes), static_argnames=("sizes", "sources"))
        made = edit.edit(case.model, cache, *each, _run=rework.Programs(fed, layers, part))
        jax.effects_barrier()
    return made, np.array(found)


WINDOWED_CASES = (
    Case("dense", caches.dense(), DEEP),
    Case("pages", caches.paged(8, share=2), DEEP),
    Case("hybrid", caches.hybrid(), DEEP),
    Case("hybrid below a layer that sees everything", caches.hybrid(), BELOW),
    Case("layer input", caches.layer_input(), DEEP),
    Case("output", caches.output(), DEEP),
    Case("pages and a trace", caches.hybrid(caches.paged(8, share=2)), DEEP),
    Case("keys un-rotated", caches.dense(rotated=False), DEEP),
    Case("int8", caches.dense(store=codecs.int8()), DEEP, exact=False, error=0.06),
    Case("a trace of int8", caches.hybrid(store=codecs.int8()), DEEP, exact=False, error=0.06),
    Case("shared prefix", caches.shared_prefix(), DEEP),
    Case("beside a source", caches.dense(), dataclasses.replace(kinds.RELATIVE, windows=(WINDOW, WINDOW))),
)
QUICK = ("dense",)
REPLACED = (an_edit([3, 3, 3], [4, 4, 4], 1), an_edit([40, 69, 8], [47, 70, 8], [7, 1, 0]))
each_windowed = pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=() if c.name in QUICK else pytest.mark.full) for c in WINDOWED_CASES],
)


def reached(case, each, row, last):
    """For each layer, where its keys and values may change: a simulation of what spreads, token by token."""
    at = np.arange(last)
    changed, found = (at >= each.start[row]) & (at < each.stop[row]), []
    for window in case.config.windows:
        found.append(changed)
        near = at[:, None] - at[None, :]
        changed = ((near >= 0) & (near < (window or last)) & changed[None, :]).any(1)
    return found


@each_windowed
@pytest.mark.parametrize("each", REPLACED, ids=["one", "ragged"])
def test_replaced_tokens_change_their_cone_and_the_rest_stays_bitwise(case, each):
    texts, cache = text(case)
    before = bits(cache)
    logits, after = kvjax.edit(case.model, cache, *each)
    assert bits(cache) == before and planned(case, cache, each).cone is not None
    edits.as_fresh(case, np.asarray(logits), after.check(), each.of(texts))
    old, new = edits.kept(cache), edits.kept(after)
    for row, n in enumerate(LENGTHS):
        for layer, changed in enumerate(reached(case, each, row, n)):
            for what in ("keys", "values"):
                a, b = (x[f"{what} {layer} {row}"] for x in (old, new))
                np.testing.assert_array_equal(a[:, ~changed], b[:, ~changed])
                inputs = case.name in ("layer input", "output") and layer == 0  # codes and inputs may repeat
                assert (a != b).any(axis=(0, 2))[changed].all() or inputs or not case.exact


def test_a_trace_runs_about_half_of_the_cone():
    case, each = WINDOWED_CASES[0], an_edit(3, 4, 1)
    deep = dataclasses.replace(DEEP, num_layers=12, windows=(WINDOW,) * 12)
    for config, least, most in ((DEEP, 0.8, 0.9), (deep, 0.55, 0.62)):
        found = [
            costs.edit_positions(config.windows, length=90, start=3, stop=4, new=1, recorded=recorded)
            for recorded in (False, True)
        ]
        assert least < sum(found[1]) / sum(found[0]) < most
    traced = Case("layer input", caches.layer_input(), DEEP)
    works = [planned(c, c.empty().replace(lengths=LENGTHS), each) for c in (case, traced)]
    assert [work.positions[:, 0].tolist() for work in works] == [[12, 12, 12], [7, 12, 12]]


RINGS = Case("rings", caches.ring(WINDOW, slack=2), WINDOWED, slack=2)
MIXED_RINGS = Case("ring below dense", (caches.ring(WINDOW, slack=2), *(caches.dense(),) * 2), DEEP, slack=2)
ANYWHERE = (an_edit([3, 69, 0], [9, 70, 40], [2, 1, 3]), an_edit([89, 10, 40], [90, 10, 40], [1, 3, 0]))


@pytest.mark.parametrize(
    ("case", "each"),
    [
        pytest.param(case, each, id=f"{case.name} {where}", marks=() if (case, where) == (RINGS, "far") else FULL_ONLY)
        for case in (RINGS, MIXED_RINGS, WINDOWED_CASES[0])
        for where, each in zip(("far", "near"), ANYWHERE, strict=True)
    ],
)
def test_an_edit_of_long_rows_is_refused_nowhere_and_runs_what_the_costs_say(case, each):
    texts, cache = text(case)
    logits, after = kvjax.edit(case.model, cache, *each)
    edits.as_fresh(case, np.asarray(logits), after.check(), each.of(texts))
    kept = [kind.slack + WINDOW if hasattr(kind, "slack") else None for kind in case.empty().plan]
    rings = [None if x is None else (WINDOW, x - WINDOW) for x in kept]
    assert planned(case, cache, each).positions.tolist() == predicted(case, each, rings=rings)


def predicted(case, each, **more):
    """`[L][B]`, what `costs` says."""
    rows = zip(LENGTHS.tolist(), *(x.tolist() for x in (each.start, each.stop, each.valid)), strict=True)
    found = [
        costs.edit_positions(case.config.windows, length=n, start=a, stop=b, new=new, **more) for n, a, b, new in rows
    ]
    return [list(row) for row in zip(*found, strict=True)]


COUNTED = (
    (RINGS, ANYWHERE[0], {"rings": [(WINDOW, 2)] * 2}),
    (WINDOWED_CASES[0], REPLACED[0], {}),
    (WINDOWED_CASES[0], ANYWHERE[0], {}),
    (WINDOWED_CASES[2], REPLACED[0], {"recorded": True, "shown": True}),
)


@pytest.mark.parametrize(
    ("case", "each", "more"), [pytest.param(*x, marks=() if x is COUNTED[1] else FULL_ONLY) for x in COUNTED]
)
def test_what_runs_is_what_the_costs_say_counted_on_the_device(case, each, more):
    _, ran = counted(case, text(case)[1], each)
    assert ran.tolist() == predicted(case, each, **more)
    assert ran.tolist() != predicted(dataclasses.replace(case, config=FULL), each), "the count tells nothing"


MOVED = (
    WINDOWED_CASES[7],
    WINDOWED_CASES[4],
    Case("hybrid of keys un-rotated", caches.hybrid(caches.dense(rotated=False)), DEEP),
    WINDOWED_CASES[-1],
)


@pytest.mark.parametrize("case", [pytest.param(case, marks=FULL_ONLY) for case in MOVED], ids=lambda case: case.name)
def test_what_follows_moves_where_it_does_not_depend_on_its_place(case):
    texts, cache = text(case)
    for each in (an_edit([20, 3, 3], [20, 8, 4], [3, 1, 1]), an_edit([2, 30, 10], [9, 30, 10], [0, 2, 0])):
        work = planned(case, cache, each)
        assert work.cone is not None and work.cone.by is not None
        logits, after = kvjax.edit(case.model, cache, *each)
        edits.as_fresh(case, np.asarray(logits), after.check(), each.of(texts))
        sites = {"recorded": case in MOVED[1:3], "shown": case is MOVED[2]}
        assert work.positions.tolist() == predicted(case, each, moved=True, **sites)
    turned, learned = WINDOWED_CASES[0], dataclasses.replace(DEEP, positions=Learned(96))
    for other in (turned, Case("learned", caches.dense(rotated=False), learned)):
        assert planned(other, text(other)[1], an_edit(3, 3, 1)).cone is None


UNEQUAL = Case("slack differs", (caches.ring(WINDOW, slack=9), caches.ring(WINDOW, slack=1)), WINDOWED, slack=1)


def test_a_shortened_row_can_be_rewound_whatever_the_slack_of_its_rings():
    texts, cache = text(UNEQUAL)
    each = an_edit([88, 68, 40], [90, 70, 40], 0)
    logits, after = kvjax.edit(UNEQUAL.model, cache, *each)
    assert after.rewind(after.lengths).lengths.tolist() == [88, 68, 40]
    edits.as_fresh(UNEQUAL, np.asarray(logits), after.check(), each.of(texts))
    rings = [(WINDOW, kind.slack) for kind in UNEQUAL.plan]
    assert planned(UNEQUAL, cache, each).positions.tolist() == predicted(UNEQUAL, each, rings=rings)


# ---------------------------------------------------------------- negative controls


def breaks(case, each):
    """Whether an edit gives what it must."""
    texts, cache = text(case)
    try:
        logits, after = kvjax.edit(case.model, cache, *each)
        edits.as_fresh(case, np.asarray(logits), after.check(), each.of(texts))
    except (AssertionError, CacheError):
        return True
    return False


def test_an_edit_that_leaves_the_rest_as_it_is_would_be_seen(monkeypatch):
    case = WINDOWED_CASES[0]
    assert not breaks(case, REPLACED[0])
    monkeypatch.setattr(rework, "cone_of", lambda *given: shorter(cone.cone_of(*given), 10**6))
    assert breaks(case, REPLACED[0])


def shorter(found, by):
    """A cone whose layers stop too early, but for the first."""
    cut = np.maximum(found.until[1:] - by, found.until[:1])
    return found._replace(until=np.concatenate([found.until[:1], cut]).astype(np.int32))


def test_a_cone_one_too_short_would_be_seen(monkeypatch):
    case = WINDOWED_CASES[0]
    assert not breaks(case, REPLACED[0])
    monkeypatch.setattr(rework, "cone_of", lambda *given: shorter(cone.cone_of(*given), 1))
    assert breaks(case, REPLACED[0])


def test_a_ring_filled_without_what_its_windows_see_would_be_seen(monkeypatch):
    assert not breaks(RINGS, ANYWHERE[0])
    again = Ring.again
    with monkeypatch.context() as patch:  # nor what the layer above must be given
        patch.setattr(Ring, "again", lambda self, wanted, *given: again(self, wanted + 2, *given))
        assert breaks(RINGS, ANYWHERE[0])
    monkeypatch.setattr(Ring, "again", Node.again)  # from the beginning: right, and dearer
    assert not breaks(RINGS, ANYWHERE[0])
    assert planned(RINGS, text(RINGS)[1], ANYWHERE[0]).begin.tolist() == [0, 69, 0]


# ---------------------------------------------------------------- other ways


def of_ids(cache):
    return [np.asarray(cache.tokens)[row, :n].tolist() for row, n in enumerate(np.asarray(cache.lengths))]


@pytest.mark.full
@pytest.mark.parametrize("plan", [caches.dense(), (caches.ring(6, slack=2), caches.dense())], ids=["dense", "ring"])
def test_a_model_of_one_s_own_is_edited_too(plan):
    ids = prompt_ids(5, 3, 16) % 50
    _, cache = kvjax.prefill(MODEL, kvjax.init_cache(MODEL, plan, batch=3, capacity=48), ids)
    for each in (an_edit([2, 9, 16], [5, 9, 16], [3, 2, 0]), an_edit([0, 13, 16], [4, 16, 18 - 2], [0, 1, 2])):
        each = each._replace(tokens=each.tokens % 50)
        texts = each.of(of_ids(cache))
        logits, cache = kvjax.edit(MODEL, cache, *each)
        empty = kvjax.init_cache(MODEL, plan, batch=3, capacity=48)
        want, fresh = kvjax.prefill(MODEL, empty, *edits.padded(texts))
        np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5 * np.abs(want).max())
        after = [kvjax.step(MODEL, made, np.array([1, 2, 3]))[0] for made in (cache.check(), fresh)]
        np.testing.assert_allclose(*after, rtol=0, atol=1e-5 * np.abs(want).max())
        assert of_ids(cache) == texts


@pytest.mark.full
def test_a_ring_of_one_s_own_model_that_is_filled_again_can_be_rewound():
    cache = kvjax.init_cache(MODEL, caches.ring(6, slack=2), batch=1, capacity=48)
    _, cache = kvjax.prefill(MODEL, cache, prompt_ids(5, 1, 40) % 50)
    _, after = kvjax.edit(MODEL, cache, 5, 15)
    assert after.rewind(29).lengths.tolist() == [29]


@pytest.mark.full
@pytest.mark.parametrize("share", [1, 2])
def test_pages_beside_a_layer_that_keeps_nothing_are_edited(share):
    case = Case("pages beside recompute", (caches.paged(8, share=share), caches.recompute()), keeps=False)
    cache, each = case.fed([16, 9, 1])[1], an_edit([3, 0, 1], [4, 9, 1], [3, 0, 0])
    logits, after = kvjax.edit(case.model, cache, *each)
    want, _ = kvjax.prefill(case.model, case.empty(), *edits.padded(each.of(of_ids(cache))))
    np.testing.assert_allclose(logits[::2], want[::2], rtol=0, atol=1e-5 * np.abs(want).max())
    assert after.check().lengths.tolist() == [18, 0, 1]


@pytest.mark.full
def test_edits_of_one_cache_are_mapped_over_their_tokens():
    case = WINDOWED_CASES[0]
    cache, tokens = text(case)[1], np.array([[5, 6], [7, 8]], np.int32)
    found = jax.vmap(lambda new: kvjax.edit(case.model, cache, 3, 5, new)[0])(tokens)
    for new, logits in zip(tokens, found, strict=True):
        want, _ = kvjax.edit(case.model, cache, 3, 5, new)
        np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5 * np.abs(want).max())


JITTED = (
    (CASES["dense"], CASES["dense"].model),
    (CASES["ring"], CASES["ring"].model),
    (Case("opaque", (caches.ring(6, slack=2), caches.dense()), slack=2), MODEL),
)


@pytest.mark.corner
@pytest.mark.parametrize(("case", "model"), JITTED[1:2], ids=lambda x: getattr(x, "name", ""))
def test_under_jit_an_edit_gives_what_it_gives_eagerly_and_flags_what_it_cannot_do(case, model):
    _under_jit(case, model)


@pytest.mark.full
@pytest.mark.parametrize(("case", "model"), JITTED[::2], ids=lambda x: getattr(x, "name", ""))
def test_under_jit_an_edit_of_other_kinds_gives_what_it_gives_eagerly(case, model):
    _under_jit(case, model)


def _under_jit(case, model):
    ids = prompt_ids(5, 3, 16) % 50
    _, cache = kvjax.prefill(model, case.empty_for(model), ids, np.array([16, 9, 5]))
    jitted = jax.jit(kvjax.edit)
    for each in (an_edit([3, 2, 5], [5, 9, 5], [4, 0, 0], 6), an_edit([0, 9, 1], [16, 9, 2], [0, 3, 1], 6)):
        each = each._replace(tokens=np.resize(each.tokens % 50, (3, 4)))
        (want, one), (got, other) = kvjax.edit(model, cache, *each), jitted(model, cache, *each)
        live = np.asarray(one.lengths) > 0
        np.testing.assert_allclose(got[live], want[live], rtol=0, atol=1e-5 * np.abs(want[live]).max())
        assert of_ids(other.check()) == of_ids(one) and other.written.tolist() == one.written.tolist()
        after = [kvjax.step(model, made, np.array([1, 2, 3]))[0] for made in (one, other)]
        np.testing.assert_allclose(*after, rtol=0, atol=1e-5 * np.abs(want[live]).max())
    start, stop, valid = (np.array(x, np.int32) for x in ([3, 8, 0], [2, 12, 0], [0, 0, 5]))
    logits, after = jitted(model, cache, start, stop, np.zeros((3, 4), np.int32), valid)
    assert after.flags.tolist() == [REWIND, REWIND, COUNT] and np.isnan(logits).all()
    assert of_ids(after) == of_ids(cache)
    near = cache.resize(18) if cache.max_rewind is None else cache.resize(18)
    _, after = jitted(model, near, np.int32(0), np.int32(0), np.zeros((3, 4), np.int32))
    assert after.flags.tolist() == [CAPACITY, 0, 0] and after.lengths.tolist() == [16, 13, 9]


def test_what_cannot_be_edited_is_an_error_that_names_row_and_numbers():
    case = CASES["dense"]
    cache, one = case.empty().replace(lengths=jnp.array([16, 7, 1])), np.array([1])
    wrong = (
        (InputError, "row 1 has start 3, it must lie between 0 and its stop 2", ([0, 3, 0], [0, 2, 0], None)),
        (InputError, "row 0 has start -1", (-1, 0, None)),
        (CacheError, "row 1 has stop 8, but the row has 7 tokens", ([0, 2, 0], [0, 8, 0], None)),
        (CacheError, "row 0 of 16 tokens would have 97, there is room for 96", (0, 0, np.zeros(81, int))),
        (InputError, r"row 0 has id 96, the vocabulary has 96", (0, 0, [96])),
        (InputError, r"edit: tokens has shape \[2, 1\], it must be \[n\] or \[3, n\]", (0, 0, np.zeros((2, 1), int))),
        (InputError, "valid", (0, 0, np.zeros((3, 1), int), [0, 2, 0])),
        (InputError, "edit: start has shape", ([0, 1], 1, None)),
        (InputError, "tokens float64", (0, 0, 0.5 * one)),
        (InputError, "edit: tokens must be whole numbers in rows of equal length", (0, 0, [[1, 2], [3], [4]])),
    )
    for error, message, arguments in wrong:
        with pytest.raises(error, match=message):
            kvjax.edit(case.model, cache, *arguments)
    with pytest.raises(InputError, match="is no cache"):
        kvjax.edit(case.model, None, 0, 0)
    learned = kinds.TABLE[caches.layer_input][1]
    with pytest.raises(CacheError, match="the model has 96 positions"):
        kvjax.edit(learned.model, learned.empty(capacity=192), 0, 0, np.zeros(97, int))


@pytest.mark.full
def test_pages_that_run_out_are_an_error_and_nothing_is_lost():
    case = CASES["paged"].but(CASES["paged"].scarce)
    cache = case.filled()[1]
    before = bits(cache)
    with pytest.raises(CacheError, match="row 0 from 0 on: the page pool was exhausted"):
        kvjax.edit(case.model, cache, [0, 7, 1], [0, 7, 1], prompt_ids(1, 3), [1, 0, 0])
    assert bits(cache) == before
    assert kvjax.edit(case.model, cache, 0, 1, [5])[1].check().lengths.tolist() == [16, 7, 1]


@pytest.mark.full
def test_a_row_that_finds_no_page_under_jit_keeps_its_text():
    case = CASES["paged and shared"]
    cache = kvjax.init_cache(case.model, caches.paged(8, pages=3, share=2), batch=1, capacity=24)
    _, cache = kvjax.prefill(case.model, cache, prompt_ids()[:1, :9])
    both = cache.take([0, 0]).rewind([8, 9])
    _, both = kvjax.prefill(case.model, both, prompt_ids(1, 2)[:, :9], np.array([0, 9]))
    each = (np.array(x, np.int32) for x in ([3, 18], [4, 18], [[5], [5]], [1, 0]))
    _, after = jax.jit(kvjax.edit)(case.model, both, *each)
    assert after.flags.tolist() == [PAGES, 0] and of_ids(after) == of_ids(both)
    assert after.written.tolist() == both.written.tolist()


@pytest.mark.full
def test_an_edit_takes_no_page_that_it_leaves_as_it_is():
    case = Case("a pool", caches.paged(4, pages=9, share=2), WINDOWED)
    cache = kvjax.init_cache(case.model, case.plan, batch=1, capacity=24)
    _, cache = kvjax.prefill(case.model, cache, prompt_ids(5, 1, 24))
    both = cache.take([0, 0])  # five pages that both read, and the last one of each
    each = edits.Edit(*(np.array(x, np.int32) for x in ([1, 24], [2, 24], [[5], [5]], [1, 0])))
    logits, after = kvjax.edit(case.model, both, *each)  # layer 1 keeps other keys up to position 6, gives others to 11
    want, _ = kvjax.prefill(case.model, case.but(caches.dense()).empty(2), *edits.padded(each.of(of_ids(both))))
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert of_ids(after.check()) == each.of(of_ids(both))


@pytest.mark.full
@pytest.mark.parametrize("case", [CASES["paged and shared"], WINDOWED_CASES[6]], ids=lambda case: case.name)
def test_other_branches_of_a_fork_are_unharmed(case):
    _, cache = text(case) if case.config is DEEP else case.filled()
    both = cache.take([0, 0, 1])
    rows = of_ids(both)
    n = len(rows[0])
    each = an_edit([3, n, len(rows[2])], [4, n, len(rows[2])], [1, 0, 0])
    logits, after = kvjax.edit(case.model, both, *each)
    edits.as_fresh(case, np.asarray(logits), after.check(), each.of(rows))
    old, new = edits.kept(both), edits.kept(after)
    for name in old:
        what, _, row = name.split()
        if what != "positions" and row != "0":  # its last token was fed again
            kept = len(rows[int(row)]) - 1
            np.testing.assert_array_equal(old[name][:, :kept], new[name][:, :kept])


@pytest.mark.full
def test_what_rows_share_is_not_edited_and_what_follows_it_is():
    case = CASES["ring"]
    model, prefix = case.model, prompt_ids(2, 1, 16)
    _, common = kvjax.prefill(model, kvjax.init_cache(model, case.plan, batch=1, capacity=16), prefix)
    cache = kvjax.init_cache(model, case.plan, prefix=common, batch=3, capacity=48)
    _, cache = kvjax.prefill(model, cache, prompt_ids(), np.array([16, 7, 0]))
    with pytest.raises(CacheError, match="row 1 from 15 on goes into what other rows share, its first 16 tokens"):
        kvjax.edit(model, cache, [20, 15, 16], [21, 17, 16], prompt_ids(1, 3, 2))
    each = an_edit([17, 18, 16], [18, 20, 16], [3, 0, 0])
    logits, after = kvjax.edit(model, cache, *each)
    texts = each.of(of_ids(cache))
    want, _ = kvjax.prefill(model, case.empty(), *edits.padded(texts))
    np.testing.assert_allclose(logits[:2], want[:2], rtol=0, atol=1e-5 * np.abs(want).max())
    assert np.isnan(logits[2]).all() and after.check().lengths.tolist() == [34, 21, 16]


@pytest.mark.parametrize("case", [CASES["ring"], WINDOWED_CASES[0]], ids=lambda case: case.name)
def test_sync_makes_any_cache_that_of_any_text(case):
    texts, cache = (
        text(case) if case.config is DEEP else ([row.tolist() for row in prompt_ids()], case.fed([16] * 3)[1])
    )
    if case.config is not DEEP:
        texts = of_ids(cache)
    before = bits(cache)
    shorter, typed = [row[:5] for row in texts], [[*row[:3], 7, *row[4:]] for row in texts]
    for wanted in (typed, shorter, [texts[1][:16], [], texts[0][:1]], texts):
        logits, cache = kvjax.sync(case.model, cache, *edits.padded(wanted))
        edits.as_fresh(case, np.asarray(logits), cache.check(), wanted)
    logits, same = kvjax.sync(case.model, cache, *edits.padded(wanted))
    edits.as_fresh(case, np.asarray(logits), same, wanted)
    assert bits(text(case)[1] if case.config is DEEP else case.fed([16] * 3)[1]) == before


def test_sync_runs_the_last_token_only_where_nothing_changed(monkeypatch):
    case, found = WINDOWED_CASES[0], []
    texts, cache = text(case)
    plan = rework.plan
    monkeypatch.setattr(rework, "plan", lambda *given: found.append(plan(*given)) or found[-1])
    kvjax.sync(case.model, cache, *edits.padded(texts))
    kvjax.sync(case.model, cache, *edits.padded([[*row[:9], 95 - row[9], *row[10:]] for row in texts]))
    assert (found[0].positions == 1).all() and found[1].cone is not None
    assert found[1].positions[:, 0].tolist() == [12, 12, 12]


def test_the_rest_is_cut_into_few_buckets_with_little_to_spare():
    for n in range(1, 3000, 7):
        sizes, one = rework.cut(n), bucket(n)
        assert all(size == bucket(size) for size in sizes) and sizes == sorted(sizes, reverse=True)
        assert sum(sizes) >= n > sum(sizes[:-1]) and sum(sizes) + rework.CALL * (len(sizes) - 1) <= one
        assert sum(sizes) - n < 16 + rework.CALL * np.log2(one / 16)


def test_edits_of_one_bucket_share_their_programs_with_prefill_and_each_other():
    case = WINDOWED_CASES[0]
    cache = text(case)[1]
    kvjax.edit(case.model, cache, 10, 10, [1])  # in chunks of 64 and 32
    with Compilations() as made:
        for start, new in ((12, [1, 2]), (9, [3]), (10, None)):
            kvjax.edit(case.model, cache, start, start + 1, new)
    assert made.count == 0
    kvjax.edit(case.model, cache, *REPLACED[0])
    with Compilations() as made:
        for start in (5, 20, 24):
            kvjax.edit(case.model, cache, start, start + 2, [1, start])
    assert made.count == 0, "one program for the cone of up to 16 tokens, and one for the last token"
    with Compilations() as made:
        kvjax.edit(case.model, cache, 3, 20, np.arange(17))
    assert made.count == 1, "another bucket"


@pytest.mark.full
def test_the_donating_twin_gives_the_same_and_uses_its_cache_up():
    case = WINDOWED_CASES[0]
    cache = text(case)[1]
    for each in (REPLACED[0], ANYWHERE[0]):
        (want, one), mine = kvjax.edit(case.model, cache, *each), jax.tree.map(jnp.copy, cache)
        got, other = kvjax.donating.edit(case.model, mine, *each)
        np.testing.assert_array_equal(got, want)
        assert bits(one) == bits(other) and mine.layers[0].k.data.is_deleted()
