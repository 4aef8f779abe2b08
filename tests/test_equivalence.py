"""`kvjax.testing.check_equivalence`: what it compares, what it calls a tie, and what its report says."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from models import BATCH, CAPACITY, MIXED, ONE_LAYER, ONE_LAYER_WINDOWED, PROMPTS, WINDOW, prompt_ids, tiny

import kvjax
from kvjax import caches, sampling, testing
from kvjax.testing import equivalence


@pytest.mark.parametrize("config", [ONE_LAYER, pytest.param(MIXED, marks=pytest.mark.full)], ids=["full", "mixed"])
def test_recomputing_is_the_forward_pass(config):
    model, ids, steps = tiny(config), np.pad(prompt_ids(), ((0, 0), (0, CAPACITY - 16))), 64
    empty = kvjax.init_cache(model, caches.recompute(), batch=BATCH, capacity=CAPACITY)
    want = kvjax.decode(model, *kvjax.prefill(model, empty, ids[:, :16], PROMPTS)[::-1], steps=steps)[0]
    lengths = PROMPTS.copy()
    for i in range(steps):
        logits = np.asarray(kvjax.forward(model, ids, lengths))
        new = logits[np.arange(BATCH), lengths - 1].argmax(axis=1)
        np.testing.assert_array_equal(new, want[:, i])
        ids[np.arange(BATCH), lengths] = new
        lengths = lengths + 1


@pytest.fixture(scope="module")
def report():
    plans = {
        "ring": caches.ring(WINDOW),
        "ring, window too short by one": caches.ring(WINDOW - 1),
        "against its own reference": testing.against(caches.ring(4), caches.recompute(window=4)),
    }
    return testing.check_equivalence(tiny(ONE_LAYER_WINDOWED), plans, [testing.greedy(24)], seeds=[0], distinct=8)


def test_right_plans_are_equal_and_a_wrong_one_is_not(report):
    assert [each.ok for each in report.outcomes] == [True, False, True] and not report.ok
    assert report.outcomes[0].tokens == 4 * 3 * 24 and report.outcomes[0].worst < 1e-5 < report.outcomes[1].worst
    first = report.outcomes[1].differences[0]
    assert not first.tie and first.want != first.got and first.gap > 1e-5 * first.top


def test_the_report_is_a_table_of_eighty_columns_and_raises_on_request(report):
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "became" in text and "FAILED" in text and text.count("equal") == 2
    with pytest.raises(AssertionError, match="became"):
        report.raise_if_failed()
    good = dataclasses.replace(report, outcomes=report.outcomes[:1])
    assert good.raise_if_failed() is good


def outcome(*differences, tokens=20_000, worst=0.0, limit=None, distinct=20):
    return equivalence.Outcome("plan", "greedy", tokens, differences, worst, limit, distinct, 16)


def test_ties_are_few_and_near_and_listed():
    near = equivalence.Difference(0, 1, 2, 3, 4, gap=0.9e-5, top=1.0)
    far = dataclasses.replace(near, gap=1.1e-5)
    unknown = dataclasses.replace(near, gap=float("nan"))
    assert outcome(near).ok and outcome(near, near).ok
    assert "tie: seed 0, row 1, new token 2" in str(equivalence.Report((outcome(near),)))
    assert not outcome(far).ok and not outcome(unknown).ok
    assert not outcome(near, tokens=9_999).ok, "more than 1 in 10,000"
    assert not outcome(distinct=15).ok, "a row that repeats itself"
    assert outcome(worst=1e-13, limit=1e-12).ok and not outcome(worst=2e-12, limit=1e-12).ok


@pytest.mark.full
def test_a_model_that_repeats_itself_proves_nothing():
    model = tiny(ONE_LAYER)
    dull = model.replace(params=model.params | {"head": {"kernel": model.params["head"]["kernel"] * 0}})
    report = testing.check_equivalence(dull, [caches.dense()], [testing.greedy(20)], seeds=[0], splits=[(16,)])
    assert "1 distinct tokens, fewer than 16" in str(report) and not report.ok


def text(tokens, starts=3):
    """The same text in three rows."""
    rows = jnp.tile(jnp.asarray(tokens, jnp.int32), (3, 1))
    lengths = jnp.full(3, rows.shape[1], jnp.int32)
    return sampling.Text(rows, lengths, jnp.full(3, starts, jnp.int32), lengths + 9, jnp.zeros(0, jnp.int32))


def test_scores_are_what_the_draw_compares_with_filters_that_read_the_text():
    chain = sampling.chain(sampling.repetition_penalty(1.7), sampling.temperature([0.0, 0.9, 0.7]), sampling.top_k(10))
    draw, so_far = testing.sampled(chain), text([5, 7, 2, 90, 1])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 96)), jnp.float32)
    seeds = np.arange(3, dtype=np.uint32)
    keys = sampling.position_keys(sampling.row_keys(jnp.asarray(seeds)), so_far.lengths)
    found = draw.scores(logits, so_far, seeds)
    np.testing.assert_array_equal(jnp.argmax(found, axis=1), draw.sampler(logits, keys, so_far))
    assert (np.asarray(found) != np.asarray(draw.scores(logits, text([6, 8, 3, 91, 4]), seeds))).any()
    stops = testing.until(sampling.chain(sampling.min_new_tokens(9)), stop_ids=[4])
    assert np.isneginf(np.asarray(stops.scores(logits, so_far, seeds))[:, 4]).all(), "its stops are in the text"


def scored(new):
    """Made up: token 3 is the best by 0.5, 1 and 2 are equally good; after a 2 all are worse by one."""
    return np.array([-4.0, -1.0, -1.0, -0.5]) - (2 in new), 10.0


def test_texts_that_were_ranked_are_as_far_apart_as_their_scores():
    search = testing.beam(2, length_penalty=2.0)
    assert search.gap(scored, [1, 3], [3, 1]) == (0.0, 10.0)
    assert search.gap(scored, [1, 1], [3]) == (pytest.approx(0.5 - 2 / 4), 10.0)
    assert search.gap(scored, [2, 3], [3, 2])[0] == pytest.approx(1 / 4)
    draw = testing.sampled()
    assert draw.gap(scored, [1, 3], [2, 3]) == (0.0, 10.0)
    assert draw.gap(scored, [1, 3, 0], [1, 3, 1]) == (3.0, 10.0)
    assert draw.gap(scored, [1, 3], [1])[0] == float("inf"), "an end is no tie"
    wrong = dataclasses.replace(outcome(), scores=("seed 0, row 1: the same text, score 1 became 2",))
    assert not wrong.ok and "became 2" in str(equivalence.Report((wrong,)))


PUBLIC = [
    sampling.chain(sampling.frequency_penalty(0.5), sampling.temperature(0.9)),
    testing.until(
        sampling.chain(sampling.min_new_tokens(20), sampling.temperature(0.9)),
        stop_ids=(3, 50),
        stop_sequences=[(4, 5)],
        name="stops",
    ),
    testing.sampled(samples=2, steps=24),
    kvjax.beam(3),
    testing.beam(
        3,
        filters=[sampling.no_repeat_ngram(2), sampling.min_new_tokens(20)],
        stop_ids=(3, 50),
        length_penalty=0.0,
        name="beams, stops",
    ),
]


@pytest.mark.full
@pytest.mark.parametrize("which", range(5))
def test_what_public_loops_take_is_compared_and_finds_a_window_too_short(which):
    plans = {"ring": caches.ring(WINDOW), "too short by one": caches.ring(WINDOW - 1)}
    found = testing.check_equivalence(
        tiny(ONE_LAYER_WINDOWED), plans, [PUBLIC[which]], seeds=[0], splits=[(5, 11)], distinct=8
    )
    right, wrong = found.outcomes
    assert right.ok and not right.differences, found
    assert right.tokens >= 3 * 20 and not wrong.ok and wrong.differences and not wrong.differences[0].tie


def test_mistakes_are_errors():
    with pytest.raises(kvjax.InputError, match="at least one plan"):
        testing.check_equivalence(tiny(ONE_LAYER), [])
    with pytest.raises(kvjax.InputError, match="a prompt is empty"):
        testing.check_equivalence(tiny(ONE_LAYER), [caches.dense()], prompts=[[1], []])
    with pytest.raises(kvjax.InputError, match="chain"):
        testing.sampled(sampling.top_k(3))
    with pytest.raises(kvjax.InputError, match="is no algorithm"):
        testing.check_equivalence(tiny(ONE_LAYER), [caches.dense()], [sampling.top_k(3)])
