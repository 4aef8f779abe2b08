"""Promise: speculation gives what decoding gives. Greedy, and with shared noise, the same tokens, on every kind."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FULL, ONE_LAYER, RELATIVE, WINDOWED, prompt_ids, tiny
from test_stops import tokenizer

import kvjax
from kvjax import CacheError, InputError, caches, codecs, sampling, struct
from kvjax.caches.loosening import loosened
from kvjax.loops import speculative
from kvjax.loops.drafters import DraftModel
from kvjax.timing import Compilations

MODEL = tiny(FULL)
PROMPTS = [row[:n].tolist() for row, n in zip(prompt_ids(4, 3), (16, 7, 2), strict=True)]
STEPS = 24
WARM = sampling.chain(sampling.temperature(0.9), sampling.top_k(20), sampling.repetition_penalty(1.2))


@functools.cache
def near(config=FULL, noise=0.05):
    """A draft that often says what `tiny(config)` says: its weights and some noise."""
    key = iter(jax.random.split(jax.random.key(7), 200))
    model = tiny(config)
    blur = lambda x: x + noise * jnp.std(x) * jax.random.normal(next(key), x.shape, x.dtype)  # noqa: E731
    return model.replace(params=jax.tree.map(lambda x: blur(x) if x.ndim > 1 else x, model.params))


def generate(prompts=PROMPTS, model=MODEL, **options):
    return kvjax.generate(model, prompts, **({"max_new_tokens": STEPS} | options))


def same(out, want, error=1e-5):
    np.testing.assert_array_equal(out.tokens, want.tokens)
    assert out.stop == want.stop
    np.testing.assert_array_equal(out.cache.lengths, want.cache.lengths)
    for row, length in enumerate(np.asarray(want.cache.lengths)):
        np.testing.assert_array_equal(out.cache.tokens[row, :length], want.cache.tokens[row, :length])
    assert float(jnp.abs(out.logits - want.logits).max()) <= error * float(jnp.abs(want.logits).max())


@struct.node
class Nonsense(kvjax.Drafter):
    """The same id for ever, and ids that do not exist."""

    token: jax.Array

    drawn = False

    def propose(self, model, cache, state, tokens, most, active, drafted, choose):
        said = jnp.full((cache.batch, drafted), self.token).at[:, 2:].set(1000)
        return kvjax.Drafts(said, None, state)


@struct.node
class Free(DraftModel):
    """A draft that is said to cost nothing."""

    def cost(self, model):
        return 0.0


def drafters(config=FULL):
    yield "lookup", kvjax.prompt_lookup(2)
    yield "model", kvjax.draft_model(near(config))
    if config.num_layers > 1:
        yield "exit", kvjax.early_exit(1)


# ---------------------------------------------------------------- the same tokens


QUICK = (("lookup", False, None), ("model", True, 4), ("model", False, 4), ("exit", True, 4))


@functools.cache
def plain(sampled, config=FULL):
    return generate(model=tiny(config), sampler=WARM if sampled else None, seed=[1, 2, 3])


@pytest.mark.corner
@pytest.mark.parametrize(
    ("name", "sampled", "drafted"),
    [
        pytest.param(*each, marks=() if each in QUICK else pytest.mark.full)
        for each in itertools.product(("lookup", "model", "exit"), (False, True), (1, 4, None))
    ],
)
def test_tokens_are_those_without_speculation(name, sampled, drafted):
    how = kvjax.speculate(dict(drafters())[name], drafted=drafted, same_tokens=True)
    out = generate(algorithm=how, sampler=WARM if sampled else None, seed=[1, 2, 3])
    same(out, plain(sampled))
    tally = out.speculated
    assert tally.tokens.tolist() == [STEPS] * 3 and tally.calls.max() == sum(tally.rounds.values())
    assert (tally.kept + tally.calls + 1 >= tally.tokens).all(), "a call gives one token and what was kept"
    if name == "model" and not sampled:
        assert tally.kept.sum() > 0.2 * tally.tested.sum() > 0, "else nothing is tested here"


def test_the_draft_that_is_the_model_itself_is_always_right():
    for sampler in (None, WARM):
        how = kvjax.speculate(kvjax.draft_model(MODEL), drafted=4)
        tally = generate(algorithm=how, sampler=sampler, seed=[1, 2, 3]).speculated
        assert tally.acceptance == 1 and tally.tokens_per_call > 4.5


# Every kind of cache: `same_with_drafts` of the contract suite, and the tables of docs/equivalence.md.


@pytest.mark.corner
@pytest.mark.parametrize(
    "plan",
    [
        caches.ring(6),
        pytest.param(caches.ring(6, store=codecs.int8()), marks=pytest.mark.full),
        pytest.param(caches.paged(4, share=2), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_a_draft_has_a_cache_of_its_own_kind(plan):
    want = generate(model=tiny(WINDOWED), sampler=WARM, seed=3)
    how = kvjax.speculate(kvjax.draft_model(near(WINDOWED), plan), drafted=4, same_tokens=True)
    same(generate(model=tiny(WINDOWED), algorithm=how, sampler=WARM, seed=3, plan=caches.ring(6)), want)


@pytest.mark.full
def test_an_encoder_decoder_drafts_too_with_a_source_of_its_own():
    model, sources = tiny(RELATIVE), [row.tolist() for row in prompt_ids(6, 3)]
    want = generate(sources, model, target=[[5], [6, 7], [8]])
    for _, drafter in drafters(RELATIVE):
        same(generate(sources, model, target=[[5], [6, 7], [8]], algorithm=kvjax.speculate(drafter, drafted=2)), want)
    forced = kvjax.LM(model, tokenizer(), start_ids=(2, 0))
    assert generate(sources, forced, max_new_tokens=4, algorithm=LOOKUP).speculated.tokens.tolist() == [4] * 3
    after = generate(sources, model, target=[[5], [6, 7], [8]], max_new_tokens=4)
    with pytest.raises(InputError, match="the draft attends to sources, which are known with prompts"):
        generate(None, model, after=after, algorithm=kvjax.speculate(kvjax.draft_model(near(RELATIVE))))


# ---------------------------------------------------------------- what goes with it


LOOKUP = kvjax.speculate(kvjax.prompt_lookup(2), drafted=4)
COUPLED = kvjax.speculate(kvjax.draft_model(near()), drafted=4, same_tokens=True)


@pytest.mark.full
@pytest.mark.parametrize("how", [LOOKUP, COUPLED], ids=["lookup", "model"])
def test_budgets_stops_log_probabilities_and_samples_are_those_without_speculation(how):
    free = plain(True)
    inside, pair = int(free.tokens[0, 9]), free.tokens[1, 5:7].tolist()
    options = {
        "sampler": WARM,
        "seed": [1, 2, 3],
        "max_new_tokens": [STEPS, 1, 11],
        "stop_ids": [inside],
        "stop": [pair],
    }
    want, out = generate(logprobs=3, **options), generate(logprobs=3, algorithm=how, **options)
    same(out, want)
    assert out.stop[0] == "eos" and out.lengths[1] == 1 and "length" in out.stop
    np.testing.assert_allclose(out.logprobs.chosen, want.logprobs.chosen, atol=2e-5)
    np.testing.assert_array_equal(out.logprobs.ids, want.logprobs.ids)
    many = {"sampler": WARM, "seed": 5, "samples": 2}
    same(generate(PROMPTS[:2], algorithm=how, **many), generate(PROMPTS[:2], **many))


@pytest.mark.parametrize("how", [LOOKUP, pytest.param(COUPLED, marks=pytest.mark.full)], ids=["lookup", "model"])
def test_going_on_from_a_result_with_or_without_drafts_is_one_longer_call(how):
    first = generate(sampler=WARM, seed=[1, 2, 3], max_new_tokens=9, algorithm=how)
    same_rest = kvjax.generate(MODEL, after=first, max_new_tokens=STEPS - 9)
    np.testing.assert_array_equal(np.concatenate([first.tokens, same_rest.tokens], 1), plain(True).tokens)
    again = kvjax.generate(MODEL, after=first, max_new_tokens=STEPS - 9, algorithm=how)
    np.testing.assert_array_equal(again.tokens, same_rest.tokens)


def test_a_stream_shows_what_generate_gives_and_stop_strings_cut_where_they_should():
    text = kvjax.LM(MODEL, tokenizer())
    options = {"sampler": WARM, "seed": [1, 2, 3], "max_new_tokens": STEPS}
    want = kvjax.generate(text, PROMPTS, **options)
    stream = kvjax.stream(text, PROMPTS, algorithm=COUPLED, every=8, **options)
    pieces = [[], [], []]
    for n, piece in enumerate(stream):
        pieces[piece.row].append(piece.text)
        if n == 2:  # what there is in between goes on as the whole does
            part = stream.result()
            rest = kvjax.generate(text, after=part, max_new_tokens=STEPS - part.lengths)
            for row in range(3):
                both = [*part.tokens[row][part.tokens[row] >= 0], *rest.tokens[row][rest.tokens[row] >= 0]]
                assert both == want.tokens[row].tolist()
    assert ["".join(row) for row in pieces] == want.text
    stop = want.text[0][10:14]
    cut, plainly = (
        kvjax.generate(text, PROMPTS, stop=stop, **options, **more) for more in ({"algorithm": COUPLED}, {})
    )
    assert cut.text == plainly.text and cut.stop == plainly.stop and cut.stop[0] == "stop"
    np.testing.assert_array_equal(cut.tokens, plainly.tokens)


@pytest.mark.full
def test_a_stop_string_cuts_drawn_drafts_without_changing_what_came_before():
    """The row is run again up to where the string ends: there its drafts must be those of the first time."""
    text = kvjax.LM(MODEL, tokenizer())
    drawn = kvjax.speculate(kvjax.draft_model(near()), drafted=4)
    options = {"sampler": WARM, "seed": [1, 2, 3], "max_new_tokens": STEPS, "algorithm": drawn}
    free = kvjax.generate(text, PROMPTS, **options)
    for at in (4, 9, 10, 11):
        cut = kvjax.generate(text, PROMPTS, stop=free.text[0][at : at + 2], **options)
        kept = int(cut.lengths[0])
        assert cut.stop[0] == "stop" and cut.text[0] == free.text[0][:at]
        assert cut.tokens[0, :kept].tolist() == free.tokens[0, :kept].tolist()


def test_drafts_that_fill_the_cache_to_its_end_leave_room_for_the_token_after_them():
    model = tiny(ONE_LAYER)
    out = kvjax.generate(
        model, [[3]], max_new_tokens=256, algorithm=kvjax.speculate(kvjax.draft_model(model), drafted=4)
    )
    assert out.lengths.tolist() == [256] and out.speculated.acceptance == 1  # of 1 + 51 * 5 tokens, and one


@pytest.mark.full
def test_where_drafts_are_drawn_a_row_says_the_same_alone_and_beside_others():
    """With a fixed number of drafts, as `speculate` promises."""
    drawn = kvjax.speculate(kvjax.draft_model(near()), drafted=4)
    options = {"sampler": WARM, "algorithm": drawn}
    beside = generate(max_new_tokens=[STEPS, 1, 11], seed=[1, 2, 3], **options)
    alone = generate(PROMPTS[:1], seed=1, **options)
    np.testing.assert_array_equal(beside.tokens[:1], alone.tokens)
    assert beside.speculated.calls[0] == alone.speculated.calls[0] and 0 < alone.speculated.acceptance < 1


def test_drafts_take_no_page_that_the_text_needs():
    model, wrong = tiny(ONE_LAYER), kvjax.speculate(Nonsense(jnp.int32(5)), drafted=2)
    want = generate(PROMPTS[1:], model, max_new_tokens=[9, 6])  # 16 and 8 tokens: four pages and two, all full
    stops = [want.tokens[row][: want.lengths[row]][-2:].tolist() for row in range(2)]
    out = generate(PROMPTS[1:], model, stop=stops, plan=caches.paged(4, pages=6), algorithm=wrong)
    same(out, generate(PROMPTS[1:], model, stop=stops, plan=caches.paged(4, pages=6)))
    assert out.lengths.tolist() == [9, 6] and out.speculated.proposed.sum() > 0


@pytest.mark.full
def test_the_cache_grows_and_rows_end_where_the_model_has_no_more_positions():
    config = dataclasses.replace(ONE_LAYER, max_positions=300)
    draft = dataclasses.replace(ONE_LAYER, max_positions=280)
    model, small = tiny(config), kvjax.draft_model(tiny(draft))
    prompts = [prompt_ids(9, 1, 250)[0].tolist(), [4, 5]]
    want = kvjax.generate(model, prompts, max_new_tokens=[50, 30])
    out = kvjax.generate(model, prompts, max_new_tokens=[50, 30], algorithm=kvjax.speculate(small, drafted=8))
    same(out, want)
    assert out.cache.capacity > 256 and out.lengths.tolist() == [50, 30]
    assert out.speculated.calls[0] > 20, "past the draft's positions every token is a call"


# ---------------------------------------------------------------- programs, numbers, errors


@pytest.mark.full
def test_there_are_at_most_four_programs_of_the_loop():
    class Counted:
        def __init__(self):
            self.made = set()

        def __call__(self, *args, **static):
            self.made.add(static["drafted"])
            return inner(*args, **static)

    inner, counted = speculative.DONATING, Counted()
    how = kvjax.speculate(kvjax.draft_model(near(ONE_LAYER)), same_tokens=True)
    model = tiny(ONE_LAYER)
    speculative.DONATING = counted
    try:
        for seed in range(3):
            kvjax.generate(model, [row[:9].tolist() for row in prompt_ids(seed, 2)], max_new_tokens=60, algorithm=how)
    finally:
        speculative.DONATING = inner
    assert 1 <= len(counted.made) <= 4 and counted.made <= set(speculative.DRAFTED)


def test_new_prompts_samplers_seeds_stops_and_budgets_compile_nothing():
    model = tiny(ONE_LAYER)
    fixed = kvjax.speculate(kvjax.draft_model(near(ONE_LAYER)), drafted=4, same_tokens=True)
    kvjax.generate(model, PROMPTS[:2], max_new_tokens=30, algorithm=fixed, sampler=WARM)
    other = sampling.chain(sampling.temperature(0.5), sampling.top_k(9), sampling.repetition_penalty(1.1))
    with Compilations() as made:
        kvjax.generate(model, PROMPTS[1:], max_new_tokens=[9, 20], algorithm=fixed, sampler=other, seed=8, stop_ids=[3])
    assert made.count == 0


@pytest.mark.full
def test_more_drafts_are_chosen_where_more_are_kept():
    """Of what was kept the next number follows, and nothing else does: another run chooses the same."""
    right, wrong = (
        kvjax.generate(MODEL, PROMPTS, max_new_tokens=100, algorithm=kvjax.speculate(drafter)).speculated
        for drafter in (Free(MODEL, None), Free(tiny(FULL, 5), None))
    )
    assert right.acceptance == 1 and max(right.rounds) == 8, right.rounds
    assert wrong.acceptance < 0.2 and min(wrong.rounds) == 1 and 8 not in wrong.rounds, wrong.rounds


def test_a_lookup_copies_what_followed_the_longest_agreement_and_goes_round_where_the_text_ends():
    lookup = kvjax.prompt_lookup(3)
    cache = kvjax.init_cache(MODEL, caches.dense(), batch=4, capacity=32)
    texts = [[1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], [7, 8, 7, 8], [5, 5], [1, 2, 3]]
    tokens = np.full((4, 32), 99, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    cache = cache.replace(lengths=jnp.asarray([len(text) - 1 for text in texts], jnp.int32))
    most = jnp.full(4, 4, jnp.int32)
    found = lookup.propose(MODEL, cache, (), jnp.asarray(tokens), most, most > 0, 4, None).tokens
    assert found.tolist() == [[4, 9, 2, 3], [7, 8, 7, 8], [5, 5, 5, 5], [-1] * 4]
    least = kvjax.prompt_lookup(3, least=2).propose(MODEL, cache, (), jnp.asarray(tokens), most, most > 0, 4, None)
    assert least.tokens.tolist() == [[4, 9, 2, 3], [7, 8, 7, 8], [-1] * 4, [-1] * 4]


def test_nan_logits_of_model_or_draft_are_told_apart():
    def broken(model):
        head = model.params["head"] | {"kernel": model.params["head"]["kernel"].at[0, 3].set(jnp.nan)}
        return model.replace(params=model.params | {"head": head})

    with pytest.raises(CacheError, match="row 0.*NaN"):
        generate(model=broken(MODEL), algorithm=LOOKUP)
    with pytest.raises(CacheError, match="the draft's row 0.*NaN"):
        generate(algorithm=kvjax.speculate(kvjax.draft_model(broken(MODEL)), drafted=2))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: kvjax.prompt_lookup(0), "ngram must be a whole number of at least 1, not 0"),
        (lambda: kvjax.prompt_lookup(2, least=3), "least 3 is more than ngram 2"),
        (lambda: kvjax.early_exit(True), "layers must be a whole number"),
        (lambda: kvjax.draft_model("small"), "'small' is no model"),
        (lambda: kvjax.speculate(3), "3 is no drafter"),
        (lambda: kvjax.speculate(kvjax.prompt_lookup(), drafted=3), r"one of \(1, 2, 4, 8\) or None, not 3"),
        (lambda: generate(algorithm=kvjax.speculate(kvjax.early_exit(2))), "layers 2 must be less than the .*2"),
        (
            lambda: generate(
                algorithm=kvjax.speculate(kvjax.draft_model(tiny(dataclasses.replace(FULL, vocab_size=7))))
            ),
            "the draft has a vocabulary of 7 ids, the model one of 96",
        ),
        (
            lambda: generate(algorithm=kvjax.speculate(kvjax.draft_model(tiny(RELATIVE)))),
            "the draft attends to a source, and the model has none",
        ),
    ],
)
def test_bad_input_is_named(wrong, says):
    with pytest.raises(InputError, match=says):
        wrong()


def test_a_codec_that_cannot_take_back_so_much_says_so():
    plan = caches.dense(store=codecs.int4_channels(4, residual=4, slack=2))
    with pytest.raises(CacheError, match="must be rewound by 4 tokens, and a layer of this plan keeps 2"):
        generate(plan=plan, algorithm=kvjax.speculate(kvjax.prompt_lookup(), drafted=4))


def test_a_drafter_of_ones_own_may_say_anything():
    out = generate(algorithm=kvjax.speculate(Nonsense(jnp.int32(5)), drafted=4))
    same(out, generate())
    assert out.speculated.proposed.sum() > 0


def test_a_drafter_that_forgets_the_laws_of_what_it_draws_is_named():
    @struct.node
    class Forgets(Nonsense):
        drawn = True

    with pytest.raises(InputError, match="Forgets gives no laws"):
        generate(algorithm=kvjax.speculate(Forgets(jnp.int32(5)), drafted=4), sampler=WARM)


def test_a_loosened_ring_can_be_rewound_as_far_and_says_how_far():
    model = tiny(WINDOWED)
    logits, cache = kvjax.prefill(model, kvjax.init_cache(model, caches.ring(6, slack=1), batch=3, capacity=64), IDS)
    loose = loosened(cache, 5)
    assert loose.max_rewind == 5 and str(loose.words[0]) == "ring(6, slack=5)"
    with pytest.raises(CacheError, match="furthest token"):
        loose.rewind(cache.lengths - 2)  # was gone before
    more = prompt_ids(3)[:, :5]
    want, _ = kvjax.prefill(model, loose.rewind(cache.lengths - 1), IDS[:, -1:])
    np.testing.assert_allclose(want, logits, rtol=1e-5, atol=1e-4)
    _, ahead = kvjax.prefill(model, loose, more)
    back, _ = kvjax.prefill(model, ahead.rewind(cache.lengths + 1), more[:, 1:3])
    straight, _ = kvjax.prefill(model, cache, more[:, :3])
    np.testing.assert_allclose(back, straight, rtol=1e-5, atol=1e-4)


IDS = prompt_ids(8)
