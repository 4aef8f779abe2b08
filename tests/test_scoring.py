"""Log-likelihoods of given tokens are those of the forward pass, under any kind of cache, in any chunks and batches."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import MIXED, ONE_LAYER, POSTNORM, PROMPTS, VOCAB, prompt_ids, tiny

import kvjax
from kvjax import CacheError, InputError, caches, codecs
from kvjax.caches.flags import CAPACITY as FULL
from kvjax.caches.flags import COUNT, TOKEN
from kvjax.loops import scores as host
from kvjax.timing import Compilations

IDS, MORE = prompt_ids(0), prompt_ids(1, 3, 24)
VALID = np.array([24, 9, 1], np.int32)
PROMPT = [row[:n].tolist() for row, n in zip(IDS, PROMPTS, strict=True)]
AFTER = [
    [MORE[0].tolist(), MORE[0, 3:5].tolist()],
    [MORE[1, :9].tolist(), MORE[1, :1].tolist(), MORE[1, 1:].tolist()],
    MORE[2, :1].tolist(),
]
FIRST = [listed[0] for listed in (*kinds.TABLE.values(), *kinds.CROSS_TABLE.values())]
NEAR = 1e-5
"""Of the largest, in float32: sums in another order."""


def near(found, want, limit=NEAR):
    return np.max(np.abs(np.asarray(found) - want)) <= limit * np.max(np.abs(want))


def direct(model, prompt, new, source=None):
    """Log-probabilities `[len(new), V]` in the places of `new`, from one forward pass, in float64."""
    ids = np.zeros((1, 48), np.int32)
    ids[0, : len(prompt) + len(new)] = [*prompt, *new]
    logits = np.asarray(kvjax.forward(model, ids, [len(prompt) + len(new)], source=source), np.float64)[0]
    wide = logits - logits.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide[len(prompt) - 1 : len(prompt) + len(new) - 1]


def picked(table, new):
    return table[np.arange(len(new)), new]


def wanted(model):
    rows = [row[:n].tolist() for row, n in zip(MORE, VALID, strict=True)]
    return [picked(direct(model, prompt, row), row) for prompt, row in zip(PROMPT, rows, strict=True)]


def after_prompts(case, **options):
    logits, cache = case.filled()
    return kvjax.loglikelihood(case.model, cache, logits, MORE, VALID, **options)


def live(found):
    return np.concatenate([np.asarray(found)[row, : VALID[row]] for row in range(3)])


@pytest.mark.corner
@pytest.mark.parametrize("chunk", [64, pytest.param(5, marks=pytest.mark.full)])
def test_log_probabilities_are_those_of_the_forward_pass(chunk):
    case = kinds.cases()[0]
    found, logits, cache = after_prompts(case, chunk=chunk, best=3)
    want = np.concatenate(wanted(case.model))
    assert near(live(found.logprobs), want)
    assert not near(live(found.logprobs)[1:], want[:-1], 1e-2), "a shift by one would go unseen"
    np.testing.assert_array_equal(np.asarray(found.logprobs)[1, 9:], 0)
    table = direct(case.model, PROMPT[0], MORE[0])
    np.testing.assert_array_equal(found.ids[0], np.argsort(-table, axis=1)[:, :3])
    assert near(found.values[0], -np.sort(-table, axis=1)[:, :3])
    np.testing.assert_array_equal(found.greedy[0], table.argmax(axis=1) == MORE[0])
    # What it gives back is where a prefill of the same tokens would be.
    first, filled = case.filled()
    again, fed = kvjax.prefill(case.model, filled, MORE, VALID)
    assert near(logits, np.asarray(again)) and bool((cache.check().lengths == fed.lengths).all())
    np.testing.assert_array_equal(cache.tokens, fed.tokens)
    assert float(jnp.abs(first - again).max()) > 0.1


@pytest.mark.full
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name.replace(" ", "-")) for case in FIRST])
def test_every_kind_scores_what_it_should(case):
    if case.exact:
        wanted, found = (live(after_prompts(each, chunk=5)[0].logprobs) for each in (case.of_reference(), case))
    else:  # what its own steps give: one token at a time, in a loop or in a scan
        logits, cache = case.filled()
        found, each = live(after_prompts(case, chunk=1)[0].logprobs), []
        for column in MORE.T:
            each.append(np.asarray(jax.nn.log_softmax(logits, axis=-1))[np.arange(3), column])
            logits, cache = kvjax.step(case.model, cache, column)
        wanted = live(np.stack(each, axis=1))
    assert near(found, wanted) and not near(found[1:], wanted[:-1], 1e-2)


def test_a_row_without_tokens_is_left_as_it_is():
    case = kinds.cases()[0]
    logits, cache = case.filled()
    found, after, other = kvjax.loglikelihood(case.model, cache, logits, MORE, [24, 0, 1], best=3)
    assert not np.asarray(found.logprobs)[1].any() and not np.asarray(found.greedy)[1].any()
    np.testing.assert_array_equal(after[1], logits[1])
    np.testing.assert_array_equal(other.lengths, PROMPTS + [24, 0, 1])


@pytest.mark.full
def test_greedy_tokens_are_greedy_and_another_is_not():
    case = kinds.cases()[0]
    logits, cache = case.filled()
    tokens = np.array(kvjax.decode(case.model, cache, logits, steps=12)[0])
    assert np.asarray(kvjax.loglikelihood(case.model, cache, logits, tokens)[0].greedy).all()
    tokens[1, 4] = (tokens[1, 4] + 1) % VOCAB
    greedy = np.asarray(kvjax.loglikelihood(case.model, cache, logits, tokens)[0].greedy)[1]
    assert greedy[:5].tolist() == [True] * 4 + [False]


# ---------------------------------------------------------------- a model of one's own, and the transformations


def toy(params, config, cache, tokens, valid):
    q = params["embed"][tokens][:, :, None, :]
    out, cache = kvjax.attend(cache, 0, q=q, kv=(q, q))
    return (out[:, :, 0] + params["embed"][tokens]) @ params["head"], cache


def toy_model(vocab=7, width=4, seed=3):
    draw = np.random.default_rng(seed).normal(size=(2, vocab, width)).astype(np.float32) * 1.5
    return kvjax.Model({"embed": jnp.asarray(draw[0]), "head": jnp.asarray(draw[1].T)}, None, toy)


def likelihood(model, prompt, tokens, chunk=4):
    cache = kvjax.init_cache(model, caches.dense(), batch=prompt.shape[0], capacity=32)
    logits, cache = kvjax.prefill(model, cache, prompt)
    return kvjax.loglikelihood(model, cache, logits, tokens, chunk=chunk)[0].logprobs.sum(axis=1)


def plain(model, prompt, tokens):
    both = jnp.concatenate([prompt, tokens], axis=1)
    table = jax.nn.log_softmax(kvjax.forward(model, both), axis=-1)[:, prompt.shape[1] - 1 : -1]
    return jnp.take_along_axis(table, tokens[:, :, None], axis=-1)[:, :, 0].sum(axis=1)


@pytest.mark.full
def test_it_can_be_jitted_vmapped_and_differentiated_on_a_model_of_ones_own():
    model, rng = toy_model(), np.random.default_rng(0)
    prompt, tokens = (jnp.asarray(rng.integers(0, 7, shape), jnp.int32) for shape in ((2, 3), (2, 9)))
    np.testing.assert_allclose(jax.jit(likelihood)(model, prompt, tokens), plain(model, prompt, tokens), rtol=NEAR)
    many = jnp.asarray(rng.integers(0, 7, (3, 2, 9)), jnp.int32)
    each = jax.vmap(lambda tokens: likelihood(model, prompt, tokens))(many)
    np.testing.assert_allclose(each, [plain(model, prompt, tokens) for tokens in many], rtol=NEAR)
    found, want = (
        jax.grad(lambda params, f=f: f(model.replace(params=params), prompt, tokens).sum())(model.params)
        for f in (likelihood, plain)
    )
    for name in ("embed", "head"):
        np.testing.assert_allclose(found[name], want[name], rtol=1e-4, atol=1e-5)  # sums of some hundred products


def test_logits_take_as_much_memory_as_a_chunk_and_not_as_the_text():
    model, size = toy_model(4096), 512
    cache = kvjax.init_cache(model, caches.dense(), capacity=1024)
    tokens, logits = jnp.zeros((1, size), jnp.int32), jnp.zeros((1, 4096))

    def temporary(chunk):
        run = jax.jit(lambda *given: kvjax.loglikelihood(*given, chunk=chunk))
        return run.lower(model, cache, logits, tokens).compile().memory_analysis().temp_size_in_bytes

    whole = 4 * size * 4096
    assert temporary(32) < whole / 2 < temporary(size)


def test_under_jit_what_is_wrong_is_flagged_and_its_row_is_nan():
    model = toy_model()
    cache = kvjax.init_cache(model, caches.dense(), batch=4, capacity=8)
    logits, cache = kvjax.prefill(model, cache, np.array([[1, 2], [3, 4], [5, 6], [1, 2]]))
    tokens, valid = np.ones((4, 9), np.int32), np.array([7, 3, 10, 6])
    tokens[1, 2] = 7
    found, _, after = jax.jit(lambda *given: kvjax.loglikelihood(*given, chunk=4))(model, cache, logits, tokens, valid)
    np.testing.assert_array_equal(after.flags, [FULL, TOKEN, COUNT, 0])
    broken = np.isnan(found.logprobs)
    assert broken[0, :7].all() and broken[1, :3].all() and broken[2].all() and not broken[3].any()


def test_mistakes_are_errors_that_name_them():
    model = toy_model()
    cache = kvjax.init_cache(model, caches.dense(), batch=2, capacity=8)
    logits, cache = kvjax.prefill(model, cache, np.array([[1, 2], [3, 4]]))
    run = functools.partial(kvjax.loglikelihood, model, cache, logits)
    with pytest.raises(InputError, match="row 1 has id 7, the vocabulary has 7"):
        run([[1, 2], [3, 7]])
    with pytest.raises(CacheError, match="row 0 has length 2, 7 more do not fit"):
        run(np.ones((2, 7), np.int32))
    with pytest.raises(InputError, match=r"valid \[3, 1\]"):
        run([[1, 2], [3, 4]], [3, 1])
    with pytest.raises(InputError, match="chunk must be a whole number of at least 1, not 0"):
        run([[1], [3]], chunk=0)
    with pytest.raises(InputError, match="best must be a whole number of at least 0, not -1"):
        run([[1], [3]], best=-1)
    with pytest.raises(InputError, match=r"logits \[1, 7\]"):
        kvjax.loglikelihood(model, cache, logits[:1], [[1], [2]])


# ---------------------------------------------------------------- `score`


@pytest.fixture(scope="module")
def found():
    return kvjax.score(tiny(ONE_LAYER), PROMPT, AFTER, logprobs=2, plan=caches.dense())


def test_each_continuation_scores_as_a_forward_pass_of_its_own_prompt(found):
    model = tiny(ONE_LAYER)
    assert [len(row) for row in found.rows] == [2, 3, 1] and found.loglikelihoods.shape == (3, 3)
    assert np.isnan(found.loglikelihoods).tolist() == [[False, False, True], [False] * 3, [False, True, True]]
    for prompt, row, given in zip(PROMPT, found.rows, [*AFTER[:2], AFTER[2:]], strict=True):
        for each, new in zip(row, given, strict=True):
            table = direct(model, prompt, new)
            assert each.ids == new and each.tokens == len(new) and each.text is None
            assert near(each.logprobs, picked(table, new)) and each.logprobs.dtype == np.float64
            assert each.loglikelihood == pytest.approx(picked(table, new).sum(), rel=NEAR)
            assert each.greedy == bool((table.argmax(axis=1) == new).all())
            np.testing.assert_array_equal(each.top_ids, np.argsort(-table, axis=1)[:, :2])
    assert [each.loglikelihood for each in found.best] == np.nanmax(found.loglikelihoods, axis=1).tolist()


@pytest.mark.full
@pytest.mark.parametrize("batch", [2, 1])
def test_batches_and_chunks_change_nothing_and_each_prompt_is_prefilled_once(batch, found, monkeypatch):
    prefilled, inner = [], host._begin

    def counted(model, tokens, lengths, *rest, **options):
        prefilled.extend(n for n in lengths.tolist() if n)
        return inner(model, tokens, lengths, *rest, **options)

    monkeypatch.setattr(host, "_begin", counted)
    again = kvjax.score(tiny(ONE_LAYER), PROMPT, AFTER, plan=caches.dense(), batch=batch, chunk=5)
    assert sorted(prefilled) == sorted(PROMPTS.tolist())
    for row, same in zip(found.rows, again.rows, strict=True):
        assert [each.ids for each in row] == [each.ids for each in same]
        assert all(near(a.logprobs, b.logprobs) for a, b in zip(row, same, strict=True))
        assert same[0].top_ids.shape == (same[0].tokens, 0)


def test_other_prompts_and_continuations_of_the_same_buckets_compile_nothing(found):
    model, ids = tiny(ONE_LAYER, 1), prompt_ids(9, 3, 40)
    prompts = [ids[0, :2].tolist(), ids[1, :11].tolist(), ids[2, :15].tolist()]
    more = [[ids[0, 11:30].tolist()], [ids[1, :n].tolist() for n in (3, 28)], [ids[2, :n].tolist() for n in (17, 1)]]
    with Compilations() as made:
        kvjax.score(model, prompts, more, logprobs=2, plan=caches.dense())
    assert made.count == 0


@pytest.mark.full
def test_the_greedy_text_is_greedy_and_more_probable_than_another():
    model = tiny(ONE_LAYER)
    out = kvjax.generate(model, PROMPT, max_new_tokens=9)
    rows = [[tokens.tolist(), MORE[0, :9].tolist()] for tokens in out.tokens]
    found = kvjax.score(model, PROMPT, rows)
    assert [[each.greedy for each in row] for row in found.rows] == [[True, False]] * 3
    assert [each.ids for each in found.best] == out.tokens.tolist()


@pytest.mark.parametrize("cross", [None, pytest.param(caches.encoder_output(absorb=True), marks=pytest.mark.full)])
def test_with_an_encoder_prompts_are_sources_and_continuations_targets(cross):
    model = tiny(POSTNORM)
    lm, sources = kvjax.LM(model, start_ids=(3, 5)), [row[:n].tolist() for row, n in zip(IDS, (16, 7, 1), strict=True)]
    found = kvjax.score(lm, sources, AFTER, cross=cross, plan=caches.dense())
    for row, given in enumerate([*AFTER[:2], AFTER[2:]]):
        source = kvjax.encode(model, np.array([sources[row]]))
        other = kvjax.encode(model, np.array([sources[row - 1]]))
        for each, new in zip(found.rows[row], given, strict=True):
            assert near(each.logprobs, picked(direct(model, [3, 5], new, source), new))
        assert not near(found.rows[row][0].logprobs, picked(direct(model, [3, 5], given[0], other), given[0]), 1e-3)


@pytest.mark.full
def test_a_quantised_cache_shows_what_it_costs():
    model = tiny(MIXED)
    exact, near_by = (
        kvjax.score(model, PROMPT, AFTER, plan=plan, chunk=1).loglikelihoods
        for plan in (caches.dense(), caches.dense(store=codecs.int8()))
    )
    error = np.nanmax(np.abs(exact - near_by) / np.abs(exact))
    assert 1e-4 < error < 0.2


class Words:
    """A tokenizer of two letters a token where these are "ab", of one elsewhere, after a first token."""

    def encode(self, text):
        return [0, *self.encode_bare(text)]

    def encode_bare(self, text):
        return [27 if each == "~" else ord(each) - 96 for each in text.replace("ab", "~")]

    def continuation(self, prompt, new):
        return "".join("ab" if i == 27 else chr(i + 96) for i in new)


def test_texts_are_cut_as_the_whole_is_and_a_border_inside_a_token_is_an_error():
    lm = kvjax.LM(tiny(ONE_LAYER), Words(), bos_id=0)
    found = kvjax.score(lm, ["cad", "b"], [["abe", "b"], "aab"])
    assert [[each.ids for each in row] for row in found.rows] == [[[27, 5], [2]], [[1, 27]]]
    assert found.rows[0][0].text == "abe"
    assert kvjax.score(lm, "cad", ["b", "abe"]).rows[0][1].loglikelihood == pytest.approx(
        found.rows[0][0].loglikelihood, rel=NEAR
    )
    assert kvjax.score(lm, [[0, 3]], ["ab"]).rows[0][0].ids == [27], "by itself after ids"
    with pytest.raises(InputError, match=r"continuation 1 of prompt 0 .* tokens …\[1\] from token 2 on, .* \[27, 3\]"):
        kvjax.score(lm, ["ca"], [["c", "bc"]])


def test_what_cannot_be_scored_is_an_error_that_names_it():
    config = dataclasses.replace(ONE_LAYER, max_positions=20)
    model = tiny(config)
    score = functools.partial(kvjax.score, model)
    with pytest.raises(InputError, match="continuation 1 of prompt 0 is empty"):
        score([[1, 2]], [[[3], []]])
    with pytest.raises(InputError, match="continuation 0 of prompt 1 has id 96, the vocabulary has 96"):
        score([[1], [2]], [[3], [96]])
    with pytest.raises(InputError, match="4 tokens after 18, .* 21 tokens pass the model's 20 positions"):
        score([[1] * 18], [[1, 2, 3, 4]])
    with pytest.raises(InputError, match="continuations has 1 entries, there are 2 prompts"):
        score([[1], [2]], [[3]])
    for wrong in ("ab", None, 3):
        with pytest.raises(InputError, match="continuations must be a list with an entry for each prompt, not "):
            score([[1], [2]], wrong)
    with pytest.raises(InputError, match="continuations of prompt 1 must be text, ids, or a list of these, not 3"):
        score([[1], [2]], [[3], 3])
    with pytest.raises(InputError, match="is text, but a bare Model has no tokenizer"):
        score([[1]], ["a"])
    with pytest.raises(InputError, match="must be text or a list of ids"):
        score([[1]], [[0.5]])
    with pytest.raises(InputError, match="cross is for models with an encoder"):
        score([[1]], [[2]], cross=caches.cross())
    with pytest.raises(InputError, match="batch must be a whole number of at least 1, not 0"):
        score([[1]], [[2]], batch=0)
    broken = model.replace(params=model.params | {"head": {"kernel": model.params["head"]["kernel"] * np.nan}})
    with pytest.raises(CacheError, match="continuation 0 of prompt 0: the model gave NaN logits"):
        kvjax.score(broken, [[1, 2]], [[3]])
    score([[1] * 18], [[1, 2, 3]])  # the last is not fed: it fits
