"""Several samples of one prompt, log-probabilities of what is chosen, more text after a result, and branches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import ONE_LAYER, prompt_ids, tiny

import kvjax
from kvjax import InputError, caches, sampling
from kvjax.loops import beginning
from kvjax.ops.positions import Learned
from kvjax.timing import Compilations

MODEL = tiny(ONE_LAYER)
PROMPTS = [row[:n].tolist() for row, n in zip(prompt_ids(4, 2), (16, 7), strict=True)]
WARM = sampling.chain(sampling.temperature(0.9))
ENCODER = dataclasses.replace(ONE_LAYER, positions=Learned(24), max_positions=24, tied=True)
TRANSLATOR = kvjax.LM(
    tiny(dataclasses.replace(ONE_LAYER, positions=Learned(64), max_positions=64, encoder=ENCODER)), start_ids=(3,)
)
STEPS = 20
NEAR = 2e-5
"""A log-probability is a difference of logits of about 10, each right to 1e-6 of that."""


def generate(prompts=PROMPTS, model=MODEL, **options):
    return kvjax.generate(model, prompts, **({"sampler": WARM, "max_new_tokens": STEPS} | options))


# ---------------------------------------------------------------- samples


@pytest.mark.corner
@pytest.mark.parametrize(
    "plan",
    [
        caches.dense(),
        pytest.param(caches.paged(8, share=3), marks=pytest.mark.full),
        pytest.param(caches.layer_input(), marks=pytest.mark.full),
        pytest.param(caches.recompute(), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_sample_i_is_what_seed_plus_i_gives_alone(plan):
    out = generate(samples=3, seed=[5, 70], plan=plan)
    assert out.tokens.shape == (6, STEPS) and out.seeds.tolist() == [5, 6, 7, 70, 71, 72] and out.samples == 3
    assert out.prompts == [row for row in PROMPTS for _ in range(3)]
    for i in range(3):
        alone = generate(seed=[5 + i, 70 + i], plan=plan)
        np.testing.assert_array_equal(out.tokens[i::3], alone.tokens)
    assert len({tuple(row) for row in out.tokens.tolist()}) == 6


def test_a_prompt_is_fed_once_however_many_samples_it_has(monkeypatch):
    fed = []
    real = beginning.loop.prefill
    monkeypatch.setattr(beginning.loop, "prefill", lambda *args: fed.append(args[2].shape) or real(*args))
    generate(samples=4, max_new_tokens=1, prompts=[[*PROMPTS[0], 1]])
    assert fed == [(1, 32)]


@pytest.mark.full
def test_samples_share_the_memory_of_their_prompt():
    prompts = prompt_ids(9, 2, 200).tolist()
    one, many = (generate(prompts, samples=n, max_new_tokens=4, plan=caches.dense()) for n in (1, 8))
    assert many.cache.nbytes < 3 * one.cache.nbytes, "of which half is ids"
    kept = generate(prompts, samples=8, max_new_tokens=4, plan=caches.traced(caches.dense()))
    assert kept.cache.nbytes > 8 * one.cache.nbytes, "a kind that cannot go on from what rows share has copies"


def test_samples_of_a_target_share_its_source():
    sources = [[4, 5, 6], [7, 8]]
    out = generate(sources, TRANSLATOR, samples=3, seed=9)
    assert out.cache.batch == 6 and out.cache.shared["source"].lengths.shape == (2,), "kept once"
    for i in range(3):
        np.testing.assert_array_equal(out.tokens[i::3], generate(sources, TRANSLATOR, seed=9 + i).tokens)


def test_settings_of_each_prompt_hold_for_all_its_samples():
    cold = sampling.chain(sampling.temperature([0.0, 0.9]))
    out = generate(samples=2, sampler=cold, seed=3)
    np.testing.assert_array_equal(out.tokens[0], out.tokens[1])
    assert (out.tokens[2] != out.tokens[3]).any()
    more = kvjax.generate(MODEL, after=out, max_new_tokens=5)
    whole = generate(samples=2, sampler=cold, seed=3, max_new_tokens=STEPS + 5)
    np.testing.assert_array_equal(more.tokens, whole.tokens[:, STEPS:])
    each = sampling.chain(sampling.temperature([0.0, 0.9, 0.0, 0.9]))
    first = generate(samples=2, sampler=each, seed=3, max_new_tokens=4)
    rows = kvjax.generate(MODEL, after=first, samples=3, max_new_tokens=8).tokens.reshape(4, 3, 8)
    assert (rows[::2] == rows[::2, :1]).all() and (rows[1::2] != rows[1::2, :1]).any(), "greedy in every second row"
    with pytest.raises(InputError, match="3 values for 2 rows"):
        generate(samples=2, sampler=sampling.chain(sampling.temperature([1.0, 1.0, 1.0])))


def test_a_seed_for_every_sample():
    out = generate(samples=2, seed=[1, 9, 1, 9])
    np.testing.assert_array_equal(out.tokens[::2], generate(seed=1).tokens)
    np.testing.assert_array_equal(out.tokens[1::2], generate(seed=9).tokens)


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.corner
def test_log_probabilities_are_those_of_the_forward_pass_whatever_was_filtered():
    cold = sampling.chain(sampling.temperature(0.5), sampling.top_k(5))
    out = generate(sampler=cold, logprobs=4, max_new_tokens=[STEPS, 6])
    for row, n in enumerate(out.lengths):
        text = np.array([PROMPTS[row] + out.tokens[row, :n].tolist()])
        want = np.asarray(jax.nn.log_softmax(kvjax.forward(MODEL, text)[0, len(PROMPTS[row]) - 1 : -1], axis=-1))
        chosen = want[np.arange(n), out.tokens[row, :n]]
        np.testing.assert_allclose(out.logprobs.chosen[row, :n], chosen, atol=NEAR)
        np.testing.assert_array_equal(out.logprobs.ids[row, :n], np.argsort(-want, axis=1, kind="stable")[:, :4])
        np.testing.assert_allclose(out.logprobs.values[row, :n], -np.sort(-want, axis=1)[:, :4], atol=NEAR)
        assert np.isnan(out.logprobs.chosen[row, n:]).all() and (out.logprobs.ids[row, n:] == -1).all()
        shifted = want[np.arange(n - 1) + 1, out.tokens[row, : n - 1]]
        assert np.abs(out.logprobs.chosen[row, : n - 1] - shifted).max() > 0.1, "one position further they differ"
    assert generate().logprobs is None
    np.testing.assert_array_equal(generate(sampler=cold, logprobs=0).tokens, generate(sampler=cold).tokens)


@pytest.mark.full
def test_log_probabilities_are_kept_through_growth_samples_and_a_second_call():
    out = generate(samples=2, logprobs=1, max_new_tokens=300)
    assert np.isfinite(out.logprobs.chosen).all()
    first = generate(samples=2, logprobs=1, max_new_tokens=290)
    more = kvjax.generate(MODEL, after=first, max_new_tokens=10, logprobs=1)
    np.testing.assert_allclose(more.logprobs.chosen, out.logprobs.chosen[:, 290:], atol=NEAR)
    many = generate(logprobs=200)
    assert many.logprobs.ids.shape == (2, STEPS, 200) and (many.logprobs.ids[:, :, 96:] == -1).all(), "more than V"
    np.testing.assert_allclose(np.exp(many.logprobs.values[:, :, :96]).sum(axis=2), 1, atol=1e-5)


@pytest.mark.parametrize(
    "lm",
    [pytest.param(MODEL, id="decoder"), pytest.param(TRANSLATOR, id="with an encoder", marks=pytest.mark.full)],
)
def test_log_probabilities_of_the_best_of_a_search_add_up_to_its_score(lm):
    options = {"algorithm": kvjax.beam(3, length_penalty=0.0), "max_new_tokens": [9, 0]}
    out = kvjax.generate(lm, PROMPTS, logprobs=96, **options)
    want = kvjax.generate(lm, PROMPTS, **options)
    np.testing.assert_array_equal(out.tokens, want.tokens)
    np.testing.assert_allclose(out.logprobs.chosen[0].sum(), out.scores[0], atol=1e-4)  # of nine, each right to 1e-5
    assert np.isnan(out.logprobs.chosen[1]).all() and want.logprobs is None
    place = np.argmax(out.logprobs.ids[0] == out.tokens[0][:, None], axis=1)
    chosen = np.take_along_axis(out.logprobs.values[0], place[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, out.logprobs.chosen[0], atol=1e-6)


# ---------------------------------------------------------------- more text


@pytest.mark.corner
@pytest.mark.parametrize(
    "plan",
    [
        caches.dense(),
        pytest.param(caches.paged(8), marks=pytest.mark.full),
        pytest.param(caches.layer_input(), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_more_text_after_a_result_is_as_if_it_had_been_fed_at_once(plan):
    first = generate(max_new_tokens=9, plan=plan)
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves((first.cache, first.logits))]
    more = kvjax.generate(MODEL, [[1, 2, 3], [4]], after=first, max_new_tokens=STEPS)
    texts = [a + b.tolist() + c for a, b, c in zip(PROMPTS, first.tokens, ([1, 2, 3], [4]), strict=True)]
    assert more.prompts == texts and more.starts.tolist() == [len(text) for text in texts]
    np.testing.assert_array_equal(more.tokens, generate(texts, plan=plan).tokens)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves((first.cache, first.logits))] == before


def test_more_text_grows_a_cache_that_is_too_small_and_goes_on_after_a_stop():
    first = generate(max_new_tokens=9, stop_ids=tuple(range(96)))
    assert first.stop == ["eos"] * 2
    long = prompt_ids(9, 2, 300).tolist()
    more = kvjax.generate(MODEL, long, after=first, max_new_tokens=4, stop_ids=())
    assert more.cache.capacity == 512 and more.lengths.tolist() == [4, 4]
    texts = [a + b[:1].tolist() + c for a, b, c in zip(PROMPTS, first.tokens, long, strict=True)]
    np.testing.assert_array_equal(more.tokens, generate(texts, max_new_tokens=4).tokens)


@pytest.mark.full
def test_more_of_a_target_follows_what_was_made():
    first = generate([[4, 5, 6]], TRANSLATOR, max_new_tokens=4)
    more = kvjax.generate(TRANSLATOR, [[8, 9]], after=first, max_new_tokens=6)
    whole = generate([[4, 5, 6]], TRANSLATOR, target=[*first.tokens[0].tolist(), 8, 9], max_new_tokens=6)
    np.testing.assert_array_equal(more.tokens, whole.tokens)


def test_branches_of_a_result_are_forks_that_leave_it_usable():
    trunk = generate([PROMPTS[0]], max_new_tokens=8)
    many = kvjax.generate(MODEL, after=trunk, samples=3, seed=40, max_new_tokens=6, logprobs=0)
    for i in range(3):
        one = kvjax.generate(MODEL, after=trunk, seed=40 + i, max_new_tokens=6, logprobs=0)
        np.testing.assert_array_equal(many.tokens[i], one.tokens[0])
        np.testing.assert_allclose(many.logprobs.chosen[i], one.logprobs.chosen[0], atol=NEAR)
    left, right = (kvjax.generate(MODEL, [[token]], after=trunk, max_new_tokens=6, logprobs=0) for token in (5, 7))
    assert left.prompts[0][:-1] == right.prompts[0][:-1] and (left.tokens != right.tokens).any()
    again = generate([PROMPTS[0]], max_new_tokens=8)
    assert all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(trunk.cache), jax.tree.leaves(again.cache), strict=True)
    )


@pytest.mark.corner
def test_other_seeds_prompts_and_texts_compile_nothing():
    def run(seed, more):
        out = generate(samples=2, seed=seed, logprobs=2)
        return kvjax.generate(MODEL, more, after=out, max_new_tokens=seed, logprobs=2)

    run(3, [[1], [2, 3], [4], [5]])
    with Compilations() as made:
        run(8, [[1, 2, 3], [9], [6] * 15, [5]])
    assert made.count == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, not 0"),
        ({"samples": True}, "samples"),
        ({"samples": 2, "seed": [1, 2, 3]}, "seed"),
        ({"samples": 2, "algorithm": kvjax.beam(2), "sampler": None}, "sampler, seed and samples are for drawing"),
        ({"logprobs": -1}, "logprobs must be a whole number of at least 0, not -1"),
        ({"logprobs": 1.5}, "logprobs"),
    ],
)
def test_numbers_that_are_none_are_errors(options, message):
    with pytest.raises(InputError, match=message):
        generate(**options)


def test_more_text_that_is_none_is_an_error():
    out = generate(max_new_tokens=1)
    for prompts, message in (([[1]], "1 prompts are to follow the 2 rows"), ([[1], []], "prompt 1 is empty")):
        with pytest.raises(InputError, match=message):
            kvjax.generate(MODEL, prompts, after=out)
    with pytest.raises(InputError, match="prompt 0 has id 96"):
        kvjax.generate(MODEL, [[96], [1]], after=out)


@pytest.mark.full
def test_the_loops_note_log_probabilities_of_ones_own():
    cache = kvjax.init_cache(MODEL, batch=2, capacity=64)
    logits, cache = kvjax.prefill(MODEL, cache, np.array([[1, 2, 3], [4, 5, 6]]))
    state = kvjax.decode_until(MODEL, cache, logits, max_new_tokens=[4, 2], logprobs=2, sampler=WARM)
    first = jax.nn.log_softmax(logits, axis=-1)
    token = jnp.take_along_axis(first, state.cache.tokens[:, 3:4], axis=1)[:, 0]
    np.testing.assert_allclose(state.noted.chosen[:, 3], token, atol=NEAR)
    assert (state.noted.chosen[1, 5:] == 0).all() and (state.noted.ids[1, 5:] == -1).all(), "nothing after a row's last"
