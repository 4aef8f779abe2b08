"""Beam search: equal to trying every text, and to a plain NumPy search over recomputed logits, on any kind of cache."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import plain_beams
import pytest
from models import ONE_LAYER, ONE_LAYER_WINDOWED, WINDOW, prompt_ids, tiny
from naive import log_probabilities

import kvjax
from kvjax import CacheError, InputError, caches, codecs, sampling
from kvjax.caches.base import Cache
from kvjax.loops import beam as loop
from kvjax.loops import search as search_of
from kvjax.loops.algorithms import Wanted
from kvjax.loops.decode import Progress
from kvjax.stopping import stops_of
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
    return plain_beams.beam_search(prompt, budget, WIDTH, score, penalty=penalty, early=early, stops=stops)


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


# ---------------------------------------------------------------- prompts are kept once


def compiled_search(plan, given=lambda beams: beams):
    """Bytes that a compiled search of prompts of 8,192 tokens needs besides what it is given, and that it updates in
    place; of those of the prompts."""
    heads = {"query_heads": 2, "kv_heads": 2, "head_dim": 128}  # so that scores are small beside keys and values
    model, rows = tiny(dataclasses.replace(ONE_LAYER, **heads)), 3

    def begin(model):
        cache = kvjax.init_cache(model, plan, batch=rows, capacity=2**13)
        return kvjax.Beams.begin(cache, jnp.zeros((rows, 96)), width=4, max_new_tokens=9)

    beams = jax.eval_shape(begin, model)
    size = sum(x.size * x.dtype.itemsize for node in beams.cache.layers for x in jax.tree.leaves(node.prefix))
    assert size == rows * 2**13 * 2 * 2 * 128 * 4, "keys and values of each prompt once"

    def run(model, beams):
        return kvjax.beam_search(model, given(beams))

    used = jax.jit(run, donate_argnums=1).lower(model, beams).compile().memory_analysis()
    return used.temp_size_in_bytes / size, used.alias_size_in_bytes / size


@pytest.mark.parametrize("plan", [caches.dense(), pytest.param(caches.paged(128), marks=pytest.mark.full)], ids=str)
def test_no_beam_moves_or_copies_a_prompt(plan):
    temporary, aliased = compiled_search(plan)
    assert temporary < 0.1 and aliased >= 1


@pytest.mark.full
def test_a_prompt_for_each_beam_would_be_found():
    assert (
        compiled_search(
            caches.dense(),
            lambda b: b.replace(
                cache=b.cache.replace(
                    layers=tuple(
                        node.replace(prefix=node.prefix.take(jnp.arange(3), None, None)) for node in b.cache.layers
                    )
                )
            ),
        )[0]
        > 0.5
    )


def test_what_generate_keeps_has_each_prompt_once():
    cache = kvjax.init_cache(MODEL, caches.dense(), batch=3, capacity=32)
    logits, cache = kvjax.prefill(MODEL, cache, prompt_ids(4), [16, 7, 1])
    sizes = cache.layers[0].k.data.shape
    wanted = Wanted(np.array([36, 19, 2]), np.array([16, 7, 1]), stops_of("", STOPS))
    state = kvjax.beam(WIDTH).begin(Progress.begin(cache, logits, starts=np.array([16, 7, 1])), wanted)
    pointers = []
    for _ in range(2):
        kept = [x for x in jax.tree.leaves((state.prompts, state.beams)) if x.shape == sizes]
        assert len(kept) == 2, "the keys and the values of the prompts, nothing else"
        pointers.append([x.unsafe_buffer_pointer() for x in kept])
        state = state.advance(MODEL, 1)
    assert pointers[0] == pointers[1], "steps leave them where they are"
    assert cache.layers[0].k.data.is_deleted(), "they are those that the prompts were prefilled into"


# ---------------------------------------------------------------- rules and edges


def test_never_goes_on_while_a_longer_text_could_be_better():
    """By hand: one text ends at once; another is better only at its full length."""
    found = {early: search(penalty=1.0, early=early, stop_ids=STOPS) for early in (True, False, "never")}
    for early, out in found.items():
        assert agrees(out, early=early)[0]
    assert found["never"].timings.steps >= found[False].timings.steps >= found[True].timings.steps


def test_filters_see_log_probabilities_and_the_text_so_far():
    beam = kvjax.beam(WIDTH, returned=WIDTH, filters=[sampling.min_new_tokens(4), sampling.no_repeat_ngram(1)])
    out = kvjax.generate(MODEL, PROMPTS, algorithm=beam, plan=RING, max_new_tokens=BUDGETS, stop_ids=STOPS)
    for prompt, budget, made in zip(PROMPTS, BUDGETS, out.candidates, strict=True):

        def score(text, prompt=prompt):
            found = recomputed(text).copy()
            found[list(set(text))] = -np.inf
            found[list(STOPS) if len(text) - len(prompt) < 4 else []] = -np.inf
            return found

        want, _ = plain(prompt, budget, 1.0, False, STOPS, score)
        assert [x.tokens for x in made] == [text for text, _ in want]
        np.testing.assert_allclose([x.score for x in made], [s for _, s in want], atol=SUMS)


@pytest.mark.full
def test_a_prompt_for_which_every_token_is_banned_is_named():
    beam = kvjax.beam(WIDTH, filters=[only_after_sixteen])
    with pytest.raises(CacheError, match="prompt 1, beam 0 of length 7, .*no token may be chosen"):
        kvjax.generate(MODEL, PROMPTS, algorithm=beam, plan=RING, max_new_tokens=4)
    out = kvjax.generate(MODEL, PROMPTS[:1], algorithm=beam, plan=RING, max_new_tokens=4)
    assert out.lengths.tolist() == [4]
    some = kvjax.beam(WIDTH, returned=WIDTH, filters=[sampling.allowed([5, 6])])
    made = kvjax.generate(MODEL, PROMPTS, algorithm=some, plan=RING, max_new_tokens=1).candidates
    assert [sorted(x.tokens for x in row) for row in made] == [[[5], [6]]] * 3, "as many as there are, and none twice"


def only_after_sixteen(logits, text):
    return jnp.where((text.lengths >= 16)[:, None], logits, -jnp.inf)


@pytest.mark.full
def test_an_end_inside_the_prompt_ends_nothing_and_a_sequence_ends_some_beams():
    prompt = [*PROMPTS[0][:5], STOPS[1], *PROMPTS[0][5:]]
    out = search([prompt], stop_ids=STOPS, max_new_tokens=20)
    assert [x.tokens for x in out.candidates[0]] == [text for text, _ in plain(prompt, 20, 1.0, False, STOPS)[0]]
    free = search([prompt], 0.0, max_new_tokens=8)
    sequence = free.candidates[0][0].tokens[2:4]
    out = search([prompt], 0.0, max_new_tokens=8, stop=[sequence])
    whole = [x.tokens[-2:] == sequence for x in out.candidates[0]]
    assert any(whole) and [x.stop == "stop" for x in out.candidates[0]] == whole
    assert all(len(x.tokens) == 8 or end for x, end in zip(out.candidates[0], whole, strict=True))
    inside = search([[*prompt, sequence[0]]], max_new_tokens=1, stop=[[sequence[0], i] for i in range(96)])
    assert all(x.stop == "length" for x in inside.candidates[0]), "a sequence must lie in what is new"


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
    assert looks >= 3 and beams.cache.capacity == 17 + 16 and cache.check().lengths.tolist() == [16, 7, 1]
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
    with pytest.raises(CacheError, match="prompt 0, beam 0 .*pool"):
        search(plan=caches.paged(16, pages=6), max_new_tokens=30)


def begun(n=12, width=2):
    """Beams after a prompt of five tokens, which a longer text was rewound to."""
    _, cache = kvjax.prefill(MODEL, kvjax.init_cache(MODEL, caches.dense(), capacity=7), prompt_ids(4)[:1, :7])
    cache = cache.rewind(4)
    logits, cache = kvjax.step(MODEL, cache, prompt_ids(4)[:1, 4])
    return kvjax.Beams.begin(cache, logits, width=width, max_new_tokens=n, room=8)


def test_a_finished_text_has_nothing_past_its_end_and_is_not_cut():
    beams = kvjax.beam_search(MODEL, begun(1))
    texts = np.asarray(beams.texts)[0]
    assert beams.lengths.tolist() == [[6, 6]] and (texts[:, :6] >= 0).all() and (texts[:, 6:] == -1).all()
    done = kvjax.beam_search(MODEL, begun(4))  # the last token of a text is not fed
    assert done.resize(10).lengths.max() == 9
    longer = done.replace(lengths=done.lengths + 2)
    with pytest.raises(CacheError, match="capacity 10 is less than the length 11 of a finished text"):
        longer.resize(10)


def test_a_penalty_beyond_what_floats_can_hold_is_refused():
    for penalty in (40.0, -40.0):
        with pytest.raises(InputError, match=f"length_penalty {penalty} is too much for texts of up to 20 tokens"):
            search(penalty=penalty)
    for penalty in (float("inf"), float("nan"), np.ones(2)):
        with pytest.raises(InputError, match="length_penalty must be a finite number"):
            kvjax.beam_search(MODEL, begun(), length_penalty=penalty)
    every = kvjax.beam_search(MODEL, begun(2, 3), length_penalty=200.0, filters=(sampling.allowed([5]),))
    assert np.isneginf(every.scores[0, 1:]).all(), "no text beside the only one"


def test_a_single_beam_is_never_moved(monkeypatch):
    beams = begun(width=1)
    monkeypatch.setattr(Cache, "reorder", None)
    how = search_of.numbers(1.0, False)
    jax.eval_shape(lambda b: search_of._step(MODEL, b, *how, stops_of("test", (), ()), ()), beams)


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
        ({"width": 2, "filters": kvjax.sampling.top_k(3)}, "filters must be a list or tuple"),
    ):
        with pytest.raises(InputError, match=message):
            kvjax.beam(**wrong)
    with pytest.raises(InputError, match="sampler, seed and samples"):
        search(seed=1)
    assert hash(kvjax.beam(4)) == hash(kvjax.beam(4))


def sorted_numbers(model, prompts, logits, width):
    """How many numbers the sorts of a compiled search take in, the largest first."""
    given = (prompts, logits, prompts.lengths, prompts.lengths, prompts.lengths + 8, jnp.zeros((1,), bool))
    beams = jax.eval_shape(functools.partial(search_of.begin, width=width, room=16), *given)
    settings = (jnp.float32(1), jnp.int32(0), stops_of("search", (), ()), (), jnp.int32(1))
    program = jax.jit(lambda *x: search_of._search(*x, chunk=2)).lower(model, beams, *settings).compile()
    found = re.findall(r"= \(f32\[1,(\d+)\][^=]* sort\(", program.as_text())
    return sorted(map(int, found), reverse=True)


@pytest.mark.corner
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA makes of a top_k on a CPU")
def test_a_search_sorts_its_candidates_and_never_the_vocabulary(monkeypatch):
    model, width = tiny(ONE_LAYER), 4
    cache = kvjax.init_cache(model, caches.dense(), batch=1, capacity=32)
    logits, prompts = kvjax.prefill(model, cache, jnp.ones((1, 4), jnp.int32))
    assert max(sorted_numbers(model, prompts, logits, width)) <= 2 * width
    monkeypatch.setattr(search_of.lax, "optimization_barrier", lambda x: x)  # what went wrong once
    assert max(sorted_numbers(model, prompts, logits, width)) == width * model.vocab_size
