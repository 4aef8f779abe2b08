"""Streaming: pieces that add up to the text of `generate`, never half a character, for any number of rows."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from models import ONE_LAYER, tiny
from test_stops import PROMPTS, tokenizer

import kvjax
from kvjax import CacheError, InputError, sampling

MODEL = tiny(ONE_LAYER)
BROKEN = "\N{REPLACEMENT CHARACTER}"


def halves(logits, text):
    """Makes the two bytes of é likely."""
    return logits.at[:, 94:].add(6.0)


WARM = sampling.chain(halves, sampling.temperature(2.0))


def lm():
    return kvjax.LM(MODEL, tokenizer())


OPTIONS = {"sampler": WARM, "seed": [0, 5, 6], "max_new_tokens": [60, 33, 1], "stop_ids": (3,)}


@functools.cache
def whole():
    return kvjax.generate(lm(), PROMPTS, **OPTIONS)


def only_half(ids):
    """How many are halves of é."""
    return sum(i in (94, 95) for i in ids)


@pytest.mark.corner
@pytest.mark.parametrize("every", [16, pytest.param(7, marks=pytest.mark.full)])
def test_pieces_add_up_to_the_text_and_show_no_half_character(every):
    stream = kvjax.stream(lm(), PROMPTS, every=every, **OPTIONS)
    texts, tokens, pieces = [""] * 3, [[], [], []], 0
    for piece in stream:
        texts[piece.row] += piece.text
        tokens[piece.row] += piece.tokens
        pieces += 1
    out = stream.result()
    assert texts == out.text == whole().text and pieces > 3
    assert tokens == [row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)]
    np.testing.assert_array_equal(out.tokens, whole().tokens)
    assert out.stop == whole().stop and only_half(tokens[0]) > 5


def test_a_character_is_given_when_it_is_whole():
    ids = [5] * 15 + [94, 95, 6]
    sampler = scripted(np.array(ids, np.int32))
    pieces = [p.text for p in kvjax.stream(lm(), [[1]], sampler=sampler, max_new_tokens=len(ids), seed=0)]
    assert pieces[0] == "&" * 15 and BROKEN not in "".join(pieces) and "".join(pieces) == "&" * 15 + "é'"


def test_a_stop_string_may_end_in_a_character_of_which_an_earlier_call_made_half():
    script = {"sampler": scripted(np.array([5, 94, 95, 6] * 8, np.int32)), "stop": "&é", "seed": 0}
    whole = kvjax.generate(lm(), [[1]], max_new_tokens=8, **script)
    first = kvjax.generate(lm(), [[1]], max_new_tokens=2, **script)
    more = kvjax.generate(lm(), after=first, max_new_tokens=6)
    assert (whole.lengths[0], whole.stop, first.text, more.lengths[0], more.stop) == (
        3,
        ["stop"],
        ["&" + BROKEN],
        1,
        ["stop"],
    )
    without = kvjax.generate(lm(), after=first, max_new_tokens=2, stop="zz")
    assert without.text == ["é'"]


def scripted(ids):
    """A sampler that follows a script."""
    return jax.tree_util.Partial(follow, ids)


def follow(ids, logits, keys, text):
    """The next id of a script, whatever the logits are."""
    return ids[text.new]


def test_an_id_that_no_vocabulary_has_is_the_error_of_its_row_where_texts_are_watched_too():
    for options in ({}, {"stop": "zz"}):
        with pytest.raises(CacheError, match="row 0, .* a token id was outside the vocabulary"):
            list(kvjax.stream(lm(), [[1]], sampler=scripted(np.array([5, 300] * 20, np.int32)), seed=0, **options))


def test_a_stream_without_a_tokenizer_gives_ids():
    stream = kvjax.stream(MODEL, PROMPTS, **OPTIONS)
    pieces = list(stream)
    assert {piece.text for piece in pieces} == {None}
    rows = [sum((p.tokens for p in pieces if p.row == row), []) for row in range(3)]
    assert rows == [row[:n].tolist() for row, n in zip(whole().tokens, whole().lengths, strict=True)]


def test_a_stream_that_is_left_early_still_has_a_result():
    stream = kvjax.stream(lm(), PROMPTS, **OPTIONS)
    first = next(stream)
    out = stream.result()
    assert first.row == 0 and out.lengths.tolist() == [16, 16, 1]
    np.testing.assert_array_equal(out.tokens[0, :16], whole().tokens[0, :16])
    more = kvjax.generate(lm(), after=out, max_new_tokens=44)
    np.testing.assert_array_equal(more.tokens[0], whole().tokens[0, 16:])
    rest = "".join(piece.text for piece in stream if piece.row == 0)
    assert first.text + rest == whole().text[0], "and goes on"
    again = kvjax.generate(lm(), after=out, max_new_tokens=44)
    np.testing.assert_array_equal(again.tokens, more.tokens, "what was given early is not used up")


def test_a_search_gives_its_text_at_the_end():
    options = {"algorithm": kvjax.beam(3, returned=2), "max_new_tokens": 20}
    stream = kvjax.stream(lm(), PROMPTS[:1], **options)
    pieces = list(stream)
    want = kvjax.generate(lm(), PROMPTS[:1], **options)
    assert [(p.row, p.text, p.tokens) for p in pieces] == [(0, want.text[0], want.tokens[0].tolist())]
    assert stream.result().candidates == want.candidates


def test_a_wrong_option_is_an_error_before_the_first_piece():
    for options in ({"every": 0}, {"every": 1.5}, {"max_new_tokens": -1}):
        with pytest.raises(InputError):
            kvjax.stream(lm(), PROMPTS, **options)
    with pytest.raises(TypeError):
        kvjax.stream(lm(), PROMPTS, temprature=1)
