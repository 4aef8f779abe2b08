"""`generate` for models with an encoder: sources, forced beginnings, what is compiled, what is refused."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import plain_beams
import pytest
from models import ONE_LAYER, prompt_ids, tiny

import kvjax
from kvjax import InputError, caches, sampling
from kvjax.loops.prompts import limits_of
from kvjax.ops.positions import Learned
from kvjax.timing import Compilations

ENCODER = dataclasses.replace(ONE_LAYER, positions=Learned(24), max_positions=24, tied=True)
CONFIG = dataclasses.replace(ONE_LAYER, positions=Learned(64), max_positions=64, encoder=ENCODER)
MODEL = tiny(CONFIG)
LM = kvjax.LM(MODEL, start_ids=(3,), eos_ids=(95,))
SOURCES = [row[:n].tolist() for row, n in zip(prompt_ids(8), (16, 5, 1), strict=True)]
TARGETS = [[7, 8, 9], [], [10]]
STEPS = 12
SUMS = 1e-4
"""What sums of twelve log-probabilities may differ by: each is right to about 1e-6 of logits of about ten."""


def generate(sources=SOURCES, lm=LM, **options):
    return kvjax.generate(lm, sources, **({"max_new_tokens": STEPS, "stop_ids": ()} | options))


@functools.cache
def source(row):
    return kvjax.encode(MODEL, np.array([SOURCES[row]]))


@functools.cache
def recomputed(row, text):
    """Log-probabilities of the next token, from no cache."""
    ids = np.zeros((1, 24), np.int32)
    ids[0, : len(text)] = text
    return naive.log_probabilities(kvjax.forward(MODEL, ids, [len(text)], source=source(row))[0, len(text) - 1])


def greedy(row, begin, steps=STEPS):
    text = list(begin)
    for _ in range(steps):
        text.append(int(recomputed(row, tuple(text)).argmax()))
    return text[len(begin) :]


@pytest.mark.corner
@pytest.mark.parametrize(
    "cross",
    [None, pytest.param(caches.encoder_output(absorb=True), marks=pytest.mark.full)],
    ids=("default", "absorbed"),
)
def test_targets_are_those_of_the_forward_pass_after_the_start_token_and_what_is_forced(cross):
    out = generate(target=TARGETS, cross=cross)
    for row, forced in enumerate(TARGETS):
        assert out.prompts[row] == [3, *forced]
        assert out.tokens[row].tolist() == greedy(row, [3, *forced])
    assert len({tuple(row) for row in out.tokens.tolist()}) == 3 and out.cache.capacity == 64
    assert generate(target=[7, 8], cross=cross).prompts == [[3, 7, 8]] * 3, "one for all"
    assert generate(cross=cross).prompts == [[3]] * 3


def test_an_earlier_result_goes_on_as_one_longer_call():
    out = generate(target=TARGETS)
    part = generate(target=TARGETS, max_new_tokens=[5, 0, 12])
    more = kvjax.generate(LM, after=part, max_new_tokens=[7, 12, 0])
    for row, n in enumerate([5, 0, 12]):
        assert more.tokens[row, : STEPS - n].tolist() == out.tokens[row, n:].tolist()


@pytest.mark.full
def test_beams_of_a_source_are_those_of_a_plain_search():
    crossed = 0
    stops = tuple(range(0, 96, 8))
    for penalty in (1.0, 2.0):
        out = generate(
            algorithm=kvjax.beam(3, length_penalty=penalty, returned=3),
            stop_ids=stops,
            target=TARGETS,
            plan=caches.dense(),
        )
        for row, forced in enumerate(TARGETS):
            score = functools.partial(recomputed, row)
            want, times = plain_beams.beam_search([3, *forced], STEPS, 3, score, penalty=penalty, stops=stops)
            crossed += times
            assert [x.tokens for x in out.candidates[row]] == [text for text, _ in want]
            np.testing.assert_allclose([x.score for x in out.candidates[row]], [s for _, s in want], atol=SUMS)
    assert crossed >= 5
    lm = dataclasses.replace(LM, start_ids=(3, 7))
    out = generate(lm=lm, algorithm=kvjax.beam(3, returned=3), stop_ids=stops)
    want, _ = plain_beams.beam_search([3, 7], STEPS, 3, functools.partial(recomputed, 0), stops=stops, given=1)
    assert out.prompts[0] == [3, 7] and [x.tokens for x in out.candidates[0]] == [text for text, _ in want]
    np.testing.assert_allclose([x.score for x in out.candidates[0]], [s for _, s in want], atol=SUMS)


@pytest.mark.corner
def test_sources_and_targets_of_one_bucket_share_programs():
    generate()
    with Compilations() as made:
        generate([[1], [2, 3], list(range(14))], target=[[4], [5, 6], [7] * 14], max_new_tokens=[0, 3, 30])
        kvjax.generate(LM, SOURCES)
    assert made.count == 0


@pytest.mark.full
def test_the_next_bucket_of_sources_compiles_three_programs():
    with Compilations() as made:
        generate([[1], [2, 3], list(range(20))])
    assert made.count == 3, "an encoder, a beginning, and a loop"


@pytest.mark.full
def test_tokens_that_are_never_chosen_are_not_and_the_others_keep_their_probabilities():
    never = tuple(dict.fromkeys(int(i) for i in generate().tokens[:, :4].ravel()))
    lm = dataclasses.replace(LM, filters=(sampling.banned(never),))

    def score(row, text):
        found = recomputed(row, text).copy()
        found[list(never)] = -np.inf
        return found

    assert not set(generate(lm=lm).tokens.ravel().tolist()) & set(never)
    out = generate(lm=lm, algorithm=kvjax.beam(3, returned=3))
    for row, made in enumerate(out.candidates):
        want, _ = plain_beams.beam_search([3], STEPS, 3, functools.partial(score, row))
        assert [x.tokens for x in made] == [text for text, _ in want]
        np.testing.assert_allclose([x.score for x in made], [s for _, s in want], atol=SUMS)


@pytest.mark.full
def test_no_beam_moves_or_copies_a_source():
    heads = {"query_heads": 2, "kv_heads": 2, "head_dim": 128}  # so that scores are small beside keys and values
    config = dataclasses.replace(ONE_LAYER, encoder=dataclasses.replace(ONE_LAYER, tied=True, **heads), **heads)
    model, shape, (rows, width) = tiny(config), jax.ShapeDtypeStruct, (3, 4)

    def begin(model, source):
        cache = kvjax.init_cache(model, caches.dense(), capacity=32, source=source)
        return kvjax.Beams.begin(cache, jnp.zeros((rows, 96)), width=width, max_new_tokens=9)

    def temporary(search, donated):
        states = shape((rows, 2**13, 32), jnp.float32)
        numbers = shape((rows,), jnp.int32)
        beams = jax.eval_shape(begin, model, kvjax.Source(states, numbers, numbers))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(beams.cache.shared))
        used = jax.jit(search, donate_argnums=donated).lower(model, beams).compile().memory_analysis()
        return used.temp_size_in_bytes / size, used.alias_size_in_bytes >= size

    temp, aliased = temporary(kvjax.beam_search, 1)
    assert temp < 0.1 and aliased

    def moved(model, beams):
        return kvjax.beam_search(model, beams.replace(cache=beams.cache.take(jnp.arange(rows * width))))

    assert temporary(moved, ())[0] > 1, "a copy for each beam would be found"


ran = []


def counting(params, config, tokens, valid):
    jax.debug.callback(lambda x: ran.append(int(x)), tokens.shape[0])
    return kvjax.decoder(CONFIG, params).encode(params, config, tokens, valid)


@pytest.mark.full
def test_the_encoder_runs_once():
    model = MODEL.replace(encode=counting)
    out = kvjax.generate(model, SOURCES, target=[3], max_new_tokens=20)
    kvjax.generate(model, after=out, max_new_tokens=4)
    jax.effects_barrier()
    assert ran == [3]


def test_the_budget_is_twice_the_source_where_that_is_more(monkeypatch):
    monkeypatch.setattr("kvjax.loops.run.BUDGET", 4)
    assert kvjax.generate(LM, SOURCES, stop_ids=()).lengths.tolist() == [32, 10, 4]
    assert limits_of(MODEL, [[3] * 51, [3]], None, np.array([32, 4])).tolist() == [64, 5], "64 positions"


def test_mistakes_are_errors_before_anything_runs():
    plain = kvjax.LM(tiny(ONE_LAYER))
    for lm, sources, options, message in (
        (LM, [[1], []], {}, "prompt 1 is empty"),
        (LM, ["", "a"], {}, "prompt 0 is empty"),
        (LM, ["a"], {}, "no tokenizer"),
        (LM, [[1], [2] * 25], {}, "row 1 has 25 tokens, the encoder has 24 positions"),
        (LM, [[1], [96]], {}, "prompt 1 has id 96, the vocabulary has 96"),
        (LM, SOURCES, {"target": [[1], [2]]}, "target has 2 rows, there are 3 sources"),
        (LM, SOURCES, {"target": [[1], [2], [96]]}, "target 2 has id 96"),
        (LM, SOURCES, {"target": [1.5]}, "target 0 must be text or"),
        (LM, SOURCES, {"target": [1] * 64}, "row 0 has 65 tokens"),
        (LM, SOURCES, {"prefix": generate().cache}, "prefix is for models without an encoder"),
        (LM, SOURCES, {"cross": caches.dense()}, "cross"),
        (MODEL, SOURCES, {}, "nothing begins target 0"),
        (plain, SOURCES, {"target": [1]}, "target and cross are for models with an encoder"),
        (plain, SOURCES, {"cross": caches.cross()}, "target and cross are for models with an encoder"),
    ):
        with pytest.raises(InputError, match=message):
            generate(sources, lm, **options)
    with pytest.raises(InputError, match="target and cross go with prompts"):
        generate(None, after=generate(), target=[1])
    with pytest.raises(InputError, match="only one has a source"):
        kvjax.generate(plain, after=generate())
