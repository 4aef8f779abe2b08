"""Beam search: equal to trying every text, and to a plain NumPy search over recomputed logits, on any kind of cache."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from models import ONE_LAYER_WINDOWED, WINDOW, prompt_ids, tiny
from naive import log_probabilities

import kvjax
from kvjax import CacheError, InputError, caches, codecs
from kvjax.caches.base import Cache
from kvjax.loops import beam as loop
from kvjax.loops import search as search_of
from kvjax.timing import Compilations

MODEL, WIDTH = tiny(ONE_LAYER_WINDOWED), 3
PROMPTS = [row[:n].tolist() for row, n in zip(prompt_ids(4), (16, 7, 1), strict=True)]
BUDGETS = [20, 12, 1]
STOPS = tuple(range(0, 96, 8))
NUMBERS = ((1.0, False, STOPS), (0.0, True, STOPS), (2.0, False, tuple(range(1, 96, 9))), (-0.5, True, STOPS))
"""Length penalty, early stopping, stop ids."""
RING = caches.ring(WINDOW)
INT8 = caches.dense(store=codecs.int8())


def search(prompts=PROMPTS, penalty=1.0, early=False, width=WIDTH, model=MODEL, **options):
    beam = kvjax.beam(width, length_penalty=penalty, early_stopping=early, returned=width)
    return kvjax.generate(model, prompts, algorithm=beam, **({"max_new_tokens": BUDGETS, "plan": RING} | options))


# ---------------------------------------------------------------- every text


def toy(params, config, cache, tokens, valid):
    q = params["embed"][tokens][:, :, None, :]
    out, cache = kvjax.attend(cache, 0, q=q, kv=(q, q))
    return (out[:, :, 0] + params["embed"][tokens]) @ params["head"], cache


def toy_model():
    draw = np.random.default_rng(3).normal(size=(2, 4, 4)).astype(np.float32) * 1.5
    return kvjax.Model({"embed": jnp.asarray(draw[0]), "head": jnp.asarray(draw[1])}, None, toy)


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_a_width_that_covers_everything_finds_the_best_of_all_texts(penalty):
    model, steps, stop, prompt = toy_model(), 4, 2, [1, 3]
    full = np.array([prompt + list(x) for x in itertools.product(range(4), repeat=steps)])
    logp = log_probabilities(kvjax.forward(model, full))[:, 1:-1]
    each = np.take_along_axis(logp, full[:, 2:, None], axis=2)[:, :, 0]
    found = {}
    for row, scores in zip(full[:, 2:].tolist(), each, strict=True):
        n = row.index(stop) + 1 if stop in row else steps
        found[tuple(row[:n])] = scores[:n].sum() / n**penalty
    want = sorted(found.items(), key=lambda x: -x[1])
    width = 4**steps
    out = search([prompt], penalty, width=width, model=model, plan=None, max_new_tokens=steps, stop_ids=(stop,))
    (made,) = out.candidates
    assert len(made) == len(want) == 121 < width, "as many as there are texts, and none twice"
    assert [tuple(x.tokens) for x in made] == [text for text, _ in want]
    np.testing.assert_allclose([x.score for x in made], [score for _, score in want], atol=1e-5)
    assert {x.stop for x in made} == {"eos", "length"}


# ---------------------------------------------------------------- a search written out


@functools.cache
def recomputed(text):
    """Log-probabilities of the next token, from no cache."""
    ids = np.zeros((1, 48), np.int32)
    ids[0, : len(text)] = text
    return log_probabilities(kvjax.forward(MODEL, ids, [len(text)])[0, len(text) - 1])


@functools.cache
def with_int8(text):
    """The same from a cache of int8 that the whole text was fed to at once."""
    ids = np.zeros((1, 48), np.int32)
    ids[0, : len(text)] = text
    cache = kvjax.init_cache(MODEL, INT8, capacity=48)
    return log_probabilities(kvjax.prefill(MODEL, cache, ids, [len(text)])[0][0])


def plain(prompt, budget, penalty, early, stops, score=recomputed):
    return naive.beam_search(prompt, budget, WIDTH, score, penalty=penalty, early=early, stops=stops)


SUMS = 1e-4
"""What sums of at most twenty log-probabilities may differ by: each is right to about 1e-6 of logits of about ten."""


def agrees(out, score=recomputed, penalty=1.0, early=False, stops=STOPS, atol=SUMS):
    """Whether all candidates are those of the plain search; how often beams crossed."""
    crossed, good = 0, True
    for prompt, budget, made in zip(PROMPTS, BUDGETS, out.candidates, strict=True):
        want, times = plain(prompt, budget, penalty, early, stops, score)
        crossed += times
        good &= [x.tokens for x in made] == [text for text, _ in want]
        good &= len(made) == len(want) and np.allclose([x.score for x in made], [s for _, s in want], atol=atol)
    return good, crossed


@pytest.mark.corner
@pytest.mark.parametrize(
    "plan",
    [
        RING,
        pytest.param(caches.dense(), marks=pytest.mark.full),
        pytest.param(caches.paged(8), marks=pytest.mark.full),
        pytest.param(caches.paged(8, share=4), marks=pytest.mark.full),
        pytest.param(caches.layer_input(), marks=pytest.mark.full),
        pytest.param(caches.recompute(), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_it_is_the_search_written_out_in_numpy(plan):
    for penalty, early, stops in NUMBERS:
        out = search(plan=plan, penalty=penalty, early=early, stop_ids=stops)
        good, crossed = agrees(out, penalty=penalty, early=early, stops=stops)
        assert good and crossed >= 5
    lengths = {len(x.tokens) for row in out.candidates for x in row}
    assert len(lengths) > 2 and any(x.stop == "eos" for row in out.candidates for x in row)


@pytest.mark.full
def test_codes_move_with_the_beams():
    out = search(plan=INT8, stop_ids=STOPS)
    good, crossed = agrees(out, with_int8)
    assert good and crossed >= 5
    assert not agrees(out)[0], "int8 is told from float32"


def test_a_search_that_moves_no_cache_is_found(monkeypatch):
    def still(self, beams):
        return self._rows(beams, "reorder").replace(layers=self.layers)

    monkeypatch.setattr(Cache, "reorder", still)
    fresh = jax.jit(lambda *args, chunk: search_of._search(*args, chunk=chunk), static_argnames="chunk")
    monkeypatch.setattr(loop, "DONATING", fresh)
    assert not agrees(search(stop_ids=STOPS))[0]


# ---------------------------------------------------------------- the promises of every loop


@pytest.mark.corner
def test_other_prompts_numbers_stops_and_budgets_compile_nothing():
    first = search(stop_ids=STOPS)
    with Compilations() as made:
        again = search(stop_ids=STOPS)
        search([[1, 2], PROMPTS[0][:9], [3]], 0.5, True, stop_ids=tuple(range(9)), max_new_tokens=[0, 1, 40])
        beam = kvjax.beam(WIDTH, length_penalty=-1)
        kvjax.generate(MODEL, PROMPTS, algorithm=beam, plan=RING, max_new_tokens=3, stop_ids=STOPS)
    assert made.count == 0
    assert again.candidates == first.candidates


def test_the_best_is_what_generate_gives_and_it_is_fed():
    out = search(stop_ids=STOPS)
    for row, made in enumerate(out.candidates):
        text = (*PROMPTS[row], *made[0].tokens)
        assert out.tokens[row, : out.lengths[row]].tolist() == made[0].tokens
        assert out.scores[row] == made[0].score and out.stop[row] == made[0].stop
        assert out.cache.tokens[row, : out.cache.lengths[row]].tolist() == list(text)
        np.testing.assert_allclose(log_probabilities(out.logits[row]), recomputed(text), atol=1e-3)
    assert out.text is None and out.timings.steps == 16 and out.timings.wasted > 0
    one = kvjax.generate(MODEL, PROMPTS, algorithm=kvjax.beam(WIDTH), plan=RING, max_new_tokens=BUDGETS, stop_ids=STOPS)
    assert [row[:1] for row in out.candidates] == one.candidates


def test_a_search_goes_on_after_what_is_there_and_leaves_it_usable():
    out = search(stop_ids=STOPS)
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves((out.cache, out.logits))]
    more = search(None, after=out, plan=None, max_new_tokens=9)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves((out.cache, out.logits))] == before
    for row, made in enumerate(more.candidates):
        text = [*PROMPTS[row], *out.candidates[row][0].tokens]
        if out.stop[row] == "eos":
            assert made == [(None, [], 0.0, "eos")]
        else:
            assert [x.tokens for x in made] == [x for x, _ in plain(text, 9, 1.0, False, STOPS)[0]]
    assert set(out.stop) == {"eos", "length"}


def test_budgets_of_none_and_one_and_an_end_at_once():
    none = search(max_new_tokens=0)
    assert none.candidates == [[(None, [], 0.0, "length")]] * 3
    assert none.tokens.shape == (3, 0) and none.timings.steps == 0 and none.stop == ["length"] * 3
    one = search(max_new_tokens=[1, 0, 1], stop_ids=STOPS)
    for row in (0, 2):
        scores = recomputed(tuple(PROMPTS[row]))
        best = np.argsort(-scores)[:WIDTH]
        assert [x.tokens for x in one.candidates[row]] == [[i] for i in best.tolist()]
    likely = {x.tokens[0] for row in search(max_new_tokens=1, stop_ids=STOPS).candidates for x in row}
    every = search(stop_ids=(*likely, *STOPS)[:16])
    assert every.lengths.tolist() == [1] * 3 and every.stop == ["eos"] * 3
    assert [[len(x.tokens) for x in row] for row in every.candidates] == [[1] * WIDTH] * 3


@pytest.mark.full
def test_a_width_of_one_that_stops_early_is_greedy():
    greedy = kvjax.generate(MODEL, PROMPTS, max_new_tokens=BUDGETS, stop_ids=STOPS, plan=RING)
    made = search(width=1, early=True, penalty=0.0, stop_ids=STOPS)
    np.testing.assert_array_equal(made.tokens, greedy.tokens)
    total = sum(recomputed((*PROMPTS[1], *greedy.tokens[1, :n]))[greedy.tokens[1, n]] for n in range(greedy.lengths[1]))
    assert made.scores[1] == pytest.approx(total, abs=SUMS)


@pytest.mark.full
def test_a_loop_of_ones_own_grows_when_a_row_is_full_and_finds_the_same():
    want = search(stop_ids=STOPS)
    ids, lengths = prompt_ids(4), np.array([16, 7, 1])
    logits, cache = kvjax.prefill(MODEL, kvjax.init_cache(MODEL, RING, batch=3, capacity=17), ids, lengths)
    beams = kvjax.Beams.begin(cache, logits, width=WIDTH, max_new_tokens=np.array(BUDGETS), room=4)
    looks = 0
    while not np.asarray(beams.done).all():
        if (~np.asarray(beams.done) & (np.asarray(beams.reached) >= np.asarray(beams.room))).any():
            beams = beams.resize(beams.cache.doubled)
        beams, looks = kvjax.beam_search(MODEL, beams, stop_ids=(*STOPS, *STOPS), chunk=4), looks + 1
    assert looks >= 3 and beams.cache.capacity == 17 + 32 and cache.check().lengths.tolist() == [16, 7, 1]
    for row, made in enumerate(want.candidates):
        texts, sizes = np.asarray(beams.texts[row]), np.asarray(beams.lengths[row])
        assert [x[lengths[row] : n].tolist() for x, n in zip(texts, sizes, strict=True)] == [x.tokens for x in made]
        np.testing.assert_allclose(beams.scores[row], [x.score for x in made], atol=1e-5)


@pytest.mark.full
def test_generate_grows_its_cache_and_goes_on_from_a_prefix():
    prompt = prompt_ids(6, 1, 120)[0].tolist()
    out = search([prompt, [*prompt[:100], 5]], max_new_tokens=[150, 30], early=True)
    assert out.cache.capacity == 512 and out.cache.lengths.tolist() == [270, 131]
    _, prefix = kvjax.prefill(MODEL, kvjax.init_cache(MODEL, RING, capacity=100), [prompt[:100]])
    same = search([prompt, [*prompt[:100], 5]], max_new_tokens=[150, 30], early=True, prefix=prefix)
    assert [[x.tokens for x in row] for row in same.candidates] == [[x.tokens for x in row] for row in out.candidates]
    assert prefix.check().lengths.tolist() == [100]


@pytest.mark.full
def test_a_pool_that_is_exhausted_raises():
    with pytest.raises(CacheError, match="prompt 2, beam 0 .*pool"):
        search(plan=caches.paged(16, pages=6), max_new_tokens=30)


def test_what_goes_wrong_on_the_device_raises():
    broken = MODEL.replace(params=jax.tree.map(lambda x: x * jnp.nan, MODEL.params))
    with pytest.raises(CacheError, match="NaN"):
        search(model=broken)


def test_mistakes_are_errors_before_anything_runs():
    for wrong, message in (
        ({"width": 0}, "width"),
        ({"width": True}, "width"),
        ({"width": 2, "returned": 3}, "returned must be a whole number from 1 to the width 2"),
        ({"width": 2, "length_penalty": float("nan")}, "length_penalty"),
        ({"width": 2, "early_stopping": "always"}, "True, False or \"never\", not 'always'"),
        ({"width": 2, "early_stopping": 1}, "early_stopping"),
        ({"width": 2, "filters": [kvjax.sampling.greedy()]}, "is no filter"),
    ):
        with pytest.raises(InputError, match=message):
            kvjax.beam(**wrong)
    with pytest.raises(InputError, match="sampler, seed and samples"):
        search(seed=1)
    assert hash(kvjax.beam(4)) == hash(kvjax.beam(4))
