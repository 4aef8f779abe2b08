"""`generate`: rows and budgets of their own, stops, going on after an earlier call, growth, wasted steps, errors."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from models import MIXED, ONE_LAYER, prompt_ids, tiny

import kvjax
from kvjax import CacheError, InputError, caches, sampling
from kvjax.loops import beginning
from kvjax.loops.decode import CHUNK
from kvjax.loops.run import Run

MODEL = tiny(ONE_LAYER)
PROMPTS = [row[:n].tolist() for row, n in zip(prompt_ids(4), (16, 7, 1), strict=True)]
WARM = sampling.chain(sampling.temperature(0.9), sampling.top_k(50), sampling.top_p(0.99))
PLAN = caches.dense()


def generate(prompts=PROMPTS, **options):
    """Sampled with seeds 1, 2, 3; the one shape that these tests share."""
    return kvjax.generate(MODEL, prompts, **({"sampler": WARM, "seed": [1, 2, 3]} | options))


@pytest.fixture(scope="module")
def forty():
    return generate(max_new_tokens=40)


def test_the_tokens_are_those_of_prefill_and_decode(forty):
    ids = prompt_ids(4)
    cache = kvjax.init_cache(MODEL, PLAN, batch=3, capacity=256)
    logits, cache = kvjax.prefill(MODEL, cache, ids, np.array([16, 7, 1]))
    want, _, _ = kvjax.decode(MODEL, cache, logits, steps=40, sampler=WARM, seed=[1, 2, 3])
    np.testing.assert_array_equal(forty.tokens, want)
    assert forty.lengths.tolist() == [40] * 3 and forty.stop == ["length"] * 3 and forty.text is None
    assert forty.cache.lengths.tolist() == [56, 47, 41] and forty.prompts == PROMPTS
    assert forty.tokens.dtype == np.int32 and forty.cache.check() is forty.cache


def test_budgets_of_each_row(forty):
    out = generate(max_new_tokens=[0, 1, 19])
    assert out.lengths.tolist() == [0, 1, 19] and out.tokens.shape == (3, 19)
    for row, n in enumerate([0, 1, 19]):
        np.testing.assert_array_equal(out.tokens[row, :n], forty.tokens[row, :n])
        assert (out.tokens[row, n:] == -1).all()
    none = generate(max_new_tokens=0)
    assert none.tokens.shape == (3, 0) and none.timings.steps == 0 and none.stop == ["length"] * 3


def test_a_row_stops_at_a_stop_id_and_the_others_go_on(forty):
    stops = (int(forty.tokens[0, 5]), int(forty.tokens[1, 20]))
    out = generate(max_new_tokens=40, stop_ids=stops)
    for row in range(3):
        found = np.flatnonzero(np.isin(forty.tokens[row], stops))
        n = int(found[0]) + 1 if found.size else 40
        assert out.lengths[row] == n
        assert out.stop[row] == ("eos" if found.size else "length")
        np.testing.assert_array_equal(out.tokens[row, :n], forty.tokens[row, :n])
    assert out.stop[:2] == ["eos"] * 2 and out.lengths[0] <= 6
    assert int(out.cache.lengths[0]) == 16 + out.lengths[0], "the stop id itself is fed"


def test_the_end_of_sequence_ids_of_a_language_model_stop_it(forty):
    lm = kvjax.LM(MODEL, eos_ids=(int(forty.tokens[0, 3]),))
    options = {"max_new_tokens": 9, "sampler": WARM, "seed": [1, 2, 3]}
    assert kvjax.generate(lm, PROMPTS, **options).stop[0] == "eos"
    assert kvjax.generate(lm, PROMPTS, stop_ids=(), **options).lengths.tolist() == [9] * 3
    with pytest.raises(InputError, match="no tokenizer"):
        kvjax.generate(lm, "text")


def test_after_goes_on_as_one_longer_call_and_leaves_what_it_had(forty):
    out = generate(max_new_tokens=[13, 0, 1])
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves((out.cache, out.logits))]
    more = kvjax.generate(MODEL, after=out, max_new_tokens=[27, 40, 39])
    for row, n in enumerate([13, 0, 1]):
        np.testing.assert_array_equal(more.tokens[row, : 40 - n], forty.tokens[row, n:])
    again = kvjax.generate(MODEL, after=out, max_new_tokens=20, seed=[9, 9, 9])
    assert (again.tokens[:, :20] != forty.tokens[:, 13:33]).any()
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves((out.cache, out.logits))] == before
    np.testing.assert_array_equal(more.cache.tokens, forty.cache.tokens)
    assert np.asarray(more.logits).tobytes() == np.asarray(forty.logits).tobytes()


def test_after_a_stop_nothing_more_comes_however_often_one_asks(forty):
    stop = (int(forty.tokens[0, 5]),)
    out = generate(max_new_tokens=10, stop_ids=stop)
    assert out.stop[0] == "eos"
    for _ in range(3):
        length = int(out.cache.lengths[0])
        out = kvjax.generate(MODEL, after=out, max_new_tokens=3)
        assert out.lengths[0] == 0 and out.stop[0] == "eos" and int(out.cache.lengths[0]) == length
    freed = kvjax.generate(MODEL, after=out, max_new_tokens=3, stop_ids=())
    assert freed.lengths[0] == 3


def test_a_stop_id_at_the_end_of_a_prompt_does_not_stop_it():
    out = generate(max_new_tokens=4, stop_ids=(PROMPTS[0][-1],))
    none = generate(max_new_tokens=0, stop_ids=(PROMPTS[0][-1],))
    more = kvjax.generate(MODEL, after=none, max_new_tokens=4)
    assert out.lengths[0] > 0
    np.testing.assert_array_equal(more.tokens, out.tokens)


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        pytest.param(ONE_LAYER, PLAN, id="dense"),
        pytest.param(MIXED, None, id="default", marks=pytest.mark.full),
    ],
)
def test_growth_past_256_gives_the_tokens_of_a_cache_that_was_large_from_the_start(monkeypatch, config, plan):
    prompts = [prompt_ids(6, 1, 120)[0].tolist(), prompt_ids(7, 1, 9)[0].tolist()]
    options = {"max_new_tokens": [150, 160], "sampler": sampling.greedy(), "plan": plan}
    grown = kvjax.generate(tiny(config), prompts, **options)
    assert grown.cache.capacity == 512 and grown.cache.lengths.tolist() == [270, 169]
    monkeypatch.setattr(beginning, "CAPACITY", 512)
    large = kvjax.generate(tiny(config), prompts, **options)
    assert large.cache.capacity == 512
    np.testing.assert_array_equal(grown.tokens, large.tokens)
    np.testing.assert_array_equal(grown.cache.tokens, large.cache.tokens)


def test_a_row_that_is_done_does_not_make_the_cache_grow():
    prompts = [prompt_ids(6, 1, 120)[0].tolist(), prompt_ids(7, 1, 9)[0].tolist()]
    out = kvjax.generate(MODEL, prompts, max_new_tokens=[136, 40], plan=PLAN)
    assert out.cache.lengths.tolist() == [256, 49]
    more = kvjax.generate(MODEL, after=out, max_new_tokens=[0, 30])
    assert more.cache.capacity == 256


def test_wasted_steps_are_those_that_no_row_needed():
    assert CHUNK == 16
    for budgets, steps in (([1, 1, 1], 1), ([16, 2, 0], 16), ([0, 17, 5], 17), ([32, 32, 32], 32)):
        timings = generate(max_new_tokens=budgets).timings
        assert timings.steps == -(-steps // CHUNK) * CHUNK
        assert timings.wasted == timings.steps - steps


def test_a_run_can_be_watched_chunk_by_chunk(forty):
    options = {"after": None, "sampler": WARM, "seed": [1, 2, 3], "plan": None, "stop_ids": None}
    run = Run.start(MODEL, PROMPTS, max_new_tokens=40, **options)
    seen = []
    for run in run.chunks(1):
        seen.append([len(row) for row in run.new()])
    assert seen == [[16] * 3, [32] * 3, [40] * 3]
    np.testing.assert_array_equal(run.result().tokens, forty.tokens)


def test_a_seed_gives_the_same_row_in_any_batch(forty):
    order = [2, 0, 1]
    out = kvjax.generate(MODEL, [PROMPTS[i] for i in order], max_new_tokens=40, sampler=WARM, seed=[3, 1, 2])
    np.testing.assert_array_equal(out.tokens, forty.tokens[order])


def test_mistakes_are_errors_before_anything_runs(forty):
    for options, message in (
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, "prompt 1"),
        ({"prompts": [[1.5]]}, "prompt 0 must be text or"),
        ({"prompts": [[1], [96]]}, "prompt 1 has id 96, the vocabulary has 96 ids"),
        ({"prompts": [[-1]]}, "prompt 0 has id -1"),
        ({"prompts": ["text"]}, "bare Model has no tokenizer"),
        ({"prompts": None}, "give prompts, or after, or both"),
        ({"prompts": [[1]] * 7, "after": forty}, "7 prompts are to follow the"),
        ({"prompts": None, "after": forty, "plan": PLAN}, "plan, prefix, target and cross go with prompts"),
        ({"max_new_tokens": -1}, "max_new_tokens -1"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"seed": [1, 2]}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"plan": (PLAN, PLAN)}, "2 kinds for 1 layers"),
    ):
        with pytest.raises(InputError, match=message):
            generate(**options)


def test_ids_that_only_the_model_can_judge_raise_too():
    def apply(params, config, cache, tokens, valid):
        q = params["embed"][tokens.clip(0, 9)][:, :, None, :]
        out, cache = kvjax.attend(cache, 0, q=q, kv=(q, q))
        return out[:, :, 0] @ params["embed"].T, cache

    model = kvjax.Model({"embed": np.eye(10, dtype=np.float32)}, None, apply)
    assert kvjax.generate(model, [[9]], max_new_tokens=2).lengths.tolist() == [2]
    with pytest.raises(CacheError, match="row 0.*outside the vocabulary"):
        kvjax.generate(model, [[10]], max_new_tokens=2)


def test_decode_until_is_the_loop_under_it_and_a_budget_may_be_as_large_as_it_likes(forty):
    logits, cache = kvjax.prefill(
        MODEL, kvjax.init_cache(MODEL, PLAN, batch=3, capacity=256), prompt_ids(4), np.array([16, 7, 1])
    )
    stop = (int(forty.tokens[0, 5]), int(forty.tokens[1, 9]), int(forty.tokens[2, 30]))
    want = generate(max_new_tokens=40, stop_ids=stop)
    assert want.stop == ["eos"] * 3
    how = {"stop_ids": stop, "sampler": WARM, "seed": [1, 2, 3]}
    for budget in (40, 2**31 - 1, np.array([40, 2**31 - 1, 200], np.int32)):
        state = kvjax.decode_until(MODEL, cache, logits, max_new_tokens=budget, **how)
        np.testing.assert_array_equal(state.cache.lengths, want.cache.lengths)
        np.testing.assert_array_equal(state.cache.tokens, want.cache.tokens)
        assert np.asarray(state.stopped).all() and int(state.wasted) == want.timings.wasted
    for wrong in ([1, 2], 1.5, np.ones((3, 1), np.int32)):
        with pytest.raises(InputError, match="decode_until: max_new_tokens"):
            kvjax.decode_until(MODEL, cache, logits, max_new_tokens=wrong)
    with pytest.raises(InputError, match="chunk must be a whole number of at least 1"):
        kvjax.decode_until(MODEL, cache, logits, max_new_tokens=3, chunk=0)


def test_a_budget_too_large_for_an_int32_is_a_budget(forty):
    out = generate(max_new_tokens=2**40, stop_ids=tuple(set(forty.tokens.ravel().tolist())))
    assert out.stop == ["eos"] * 3 and out.lengths.tolist() == [1] * 3
