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


def test_sampled_scores_are_what_the_draw_compares():
    draw = testing.sampled(sampling.chain(sampling.temperature([0.0, 0.9, 0.7]), sampling.top_k(10)))
    logits, seeds = (
        jnp.asarray(np.random.default_rng(0).normal(size=(3, 96)), jnp.float32),
        np.arange(3, dtype=np.uint32),
    )
    keys = sampling.position_keys(sampling.row_keys(jnp.asarray(seeds)), jnp.full(3, 7))
    np.testing.assert_array_equal(jnp.argmax(draw.scores(logits, 7, seeds), axis=1), draw.sampler(logits, keys))


def test_mistakes_are_errors():
    with pytest.raises(kvjax.InputError, match="at least one plan"):
        testing.check_equivalence(tiny(ONE_LAYER), [])
    with pytest.raises(kvjax.InputError, match="a prompt is empty"):
        testing.check_equivalence(tiny(ONE_LAYER), [caches.dense()], prompts=[[1], []])
    with pytest.raises(kvjax.InputError, match="chain"):
        testing.sampled(sampling.greedy())
