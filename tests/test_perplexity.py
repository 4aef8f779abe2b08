"""Perplexity over long texts: every token once, with the context that the stride states, whatever the cache."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CAPACITY, LEARNED, ONE_LAYER, ONE_LAYER_WINDOWED, POSTNORM, VOCAB, WINDOW, prompt_ids, tiny

import kvjax
from kvjax import CacheError, InputError, caches
from kvjax.loops.windows import WINDOW as USUAL
from kvjax.loops.windows import windows
from kvjax.timing import Compilations
from kvjax.train import evaluate

IDS = prompt_ids(6, 1, 90)[0]
DENSE = caches.dense()
SUMS = 1e-5
"""Relative, of sums of some ninety float32 numbers."""


@given(st.integers(2, 60), st.integers(1, 20), st.data())
@settings(max_examples=100, deadline=None)
def test_windows_score_every_token_but_the_first_once(tokens, window, data):
    stride = data.draw(st.integers(1, window))
    ids, scored = np.arange(tokens), []
    for number, (before, new) in enumerate(windows(ids, window, stride)):
        read = [*before, *new[:-1]]
        assert read == list(range(read[0], new[-1])) and 1 <= len(read) <= window
        assert len(new) <= (stride if number else window) and (not number or len(before) >= window - stride + 1)
        scored += new.tolist()
    assert scored == list(range(1, tokens))


def by_hand(model, ids, window, stride, begins=None):
    """The definition, a forward pass a token: nats of all tokens but the first."""
    start, total, end = 0, 0.0, min(window, len(ids) - 1)
    for at in range(1, len(ids)):
        while at > end:
            start, end = start + stride, min(start + stride + window, len(ids) - 1)
        text = np.zeros((1, 96), np.int32)
        text[0, : at - start] = ids[start:at]
        text[0, 0] = ids[start] if begins is None else begins
        total -= logprob(model, text, at - start, ids[at])
    return total


def logprob(model, text, length, token):
    logits = np.asarray(kvjax.forward(model, text, [length]), np.float64)[0, length - 1]
    return logits[token] - logits.max() - math.log(np.exp(logits - logits.max()).sum())


@pytest.mark.parametrize(
    ("window", "stride"),
    [(16, 4), *(pytest.param(*pair, marks=pytest.mark.full) for pair in ((16, 16), (16, 8), (7, 1), (96, 48), (1, 1)))],
)
def test_figures_are_those_of_a_plain_loop(window, stride):
    model = tiny(ONE_LAYER)
    found = kvjax.perplexity(model, IDS, window=window, stride=stride, plan=DENSE, batch=4)
    assert found.nats == pytest.approx(by_hand(model, IDS, window, stride), rel=SUMS)
    assert found.tokens == 89 and (found.window, found.stride) == (window, stride)
    assert found.perplexity == pytest.approx(math.exp(found.nats / 89), rel=1e-12)
    if (window, stride) == (16, 4):
        forgets = by_hand(model, IDS, window - 1, stride)
        assert found.nats != pytest.approx(forgets, rel=1e-3), "a window that forgets a token would go unseen"
        assert found.windows == 1 + -(-(89 - 16) // 4)


@pytest.mark.full
def test_a_cache_that_forgets_shows_and_one_that_is_exact_does_not():
    model = tiny(ONE_LAYER)
    figures = [
        kvjax.perplexity(model, IDS, window=32, stride=16, plan=plan, chunk=chunk).nats
        for plan, chunk in ((DENSE, 64), (caches.recompute(), 5), (caches.paged(8), 1), (caches.ring(8), 64))
    ]
    assert figures[1:3] == pytest.approx([figures[0]] * 2, rel=SUMS)
    assert abs(figures[3] - figures[0]) > 1e-2 * figures[0]
    windowed = tiny(ONE_LAYER_WINDOWED)
    both = [kvjax.perplexity(windowed, IDS, window=32, plan=plan).nats for plan in (DENSE, caches.ring(WINDOW))]
    assert both[0] == pytest.approx(both[1], rel=SUMS)


class Letters:
    """A tokenizer of one letter a token, after a first one if it is told so; every token is two characters of text."""

    def __init__(self, begins):
        self.begins = begins

    def encode(self, text):
        return [0] * self.begins + [ord(each) % VOCAB for each in text]

    def continuation(self, prompt, new):
        return "é" * len(new)


def test_a_text_that_begins_with_bos_does_so_in_every_window_as_in_training():
    model, text = tiny(ONE_LAYER), "to be or not to be that is the question " * 2
    lm = kvjax.LM(model, Letters(True), bos_id=0)
    ids = lm.encode(text)
    found = kvjax.perplexity(lm, text, window=16, stride=8, plan=DENSE)
    assert found.nats == pytest.approx(by_hand(model, ids, 16, 8, begins=0), rel=SUMS)
    trained = evaluate.total_nll(kvjax.forward, model, np.array(ids[1:], np.int32), 16)
    assert found.nats == pytest.approx(trained, rel=SUMS)
    assert found.nats != pytest.approx(by_hand(model, ids, 16, 8), rel=10 * SUMS)
    assert (found.tokens, found.characters, found.bytes, found.begins) == (80, 80, 80, 0)
    said = str(found)
    for figure in (found.perplexity, found.nats_per_token, found.nats_per_character, found.nats_per_byte):
        assert f"{figure:.4g}" in said or f"{figure:.4f}" in said
    assert "80 tokens in 9 windows of 16 with stride 8, token 0 first in each" in said


@pytest.mark.full
def test_without_a_first_token_the_text_s_own_first_is_not_scored_nor_counted():
    model, text = tiny(ONE_LAYER), "to be or not to be "
    found = kvjax.perplexity(kvjax.LM(model, Letters(False)), text, window=16)
    assert (found.tokens, found.characters, found.bytes, found.begins) == (18, 18, 36, None)
    assert found.nats_per_character == pytest.approx(2 * found.nats_per_byte)
    ids = kvjax.perplexity(model, [ord(each) % VOCAB for each in text], window=16)
    assert ids.nats == found.nats and ids.characters is None is ids.nats_per_byte and "a byte" not in str(ids)


@pytest.mark.full
def test_a_window_is_as_long_as_the_model_allows_and_other_texts_compile_nothing():
    model = tiny(LEARNED)
    found = kvjax.perplexity(model, IDS)
    assert (found.window, found.stride, found.windows) == (CAPACITY, CAPACITY // 2, 1)
    assert kvjax.perplexity(tiny(ONE_LAYER), IDS[:20]).window == USUAL
    kvjax.perplexity(model, IDS[:80], window=16, batch=4)
    with Compilations() as made:
        kvjax.perplexity(model, prompt_ids(7, 1, 88)[0], window=16, batch=4)
    assert made.count == 0


def test_a_bar_counts_windows_of_a_long_text_only(monkeypatch):
    seen = []

    def bar(**options):
        seen.append((options["total"], options["disable"]))
        return inner(**(options | {"disable": True}))

    from kvjax.loops import windows as module

    inner = module.tqdm
    monkeypatch.setattr(module, "tqdm", bar)
    model = kvjax.Model({}, None, flat)
    for tokens in (40, 200):  # every token is one of seven that are equally probable
        assert kvjax.perplexity(model, [1] * tokens, window=8, stride=8).perplexity == pytest.approx(7, rel=1e-6)
    assert seen == [(5, True), (25, True)] and kvjax.perplexity(model, [1] * 300, window=8, stride=8).windows == 38
    assert seen[2] == (38, None)


def flat(params, config, cache, tokens, valid):
    x = jnp.zeros((*tokens.shape, 1, 2))
    _, cache = kvjax.attend(cache, 0, q=x, kv=(x, x))
    return jnp.zeros((*tokens.shape, 7)), cache


def test_what_has_no_perplexity_is_an_error_that_names_it():
    run = functools.partial(kvjax.perplexity, tiny(LEARNED))
    for options, message in (
        ({"window": CAPACITY + 1}, f"at most the model's {CAPACITY} positions, not {CAPACITY + 1}"),
        ({"window": 0}, "at least 1"),
        ({"window": 8, "stride": 9}, "stride must be a whole number from 1 to the window 8, not 9"),
        ({"stride": 0}, "stride must be"),
    ):
        with pytest.raises(InputError, match=message):
            run(IDS, **options)
    with pytest.raises(InputError, match="has 1 token; nothing comes before it"):
        run([3])
    with pytest.raises(InputError, match="has id 96, the vocabulary has 96"):
        run([3, 96])
    with pytest.raises(InputError, match="models without an encoder"):
        kvjax.perplexity(tiny(POSTNORM), IDS)
    with pytest.raises(CacheError, match="window 0: the model gave NaN logits"):
        kvjax.perplexity(kvjax.Model({}, None, broken), [1, 2, 3])


def broken(params, config, cache, tokens, valid):
    logits, cache = flat(params, config, cache, tokens, valid)
    return logits * jnp.nan, cache
