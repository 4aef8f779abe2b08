"""What ends a row: sequences of ids on the device, strings in the text; wherever a chunk ends, on every kind."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import tokenizers
from models import ONE_LAYER, ONE_LAYER_WINDOWED, WINDOW, prompt_ids, tiny

import kvjax
from kvjax import CacheError, InputError, caches, sampling, stopping
from kvjax.loops.watch import Strings, Watch
from kvjax.ops.positions import Learned
from kvjax.text import Tokenizer
from kvjax.timing import Compilations

MODEL = tiny(ONE_LAYER)
PROMPTS = [row[:n].tolist() for row, n in zip(prompt_ids(4), (16, 7, 1), strict=True)]
WARM = sampling.chain(sampling.temperature(0.9), sampling.top_k(50), sampling.top_p(0.99))
STEPS = 40


def generate(prompts=PROMPTS, model=MODEL, **options):
    default = {"sampler": WARM, "seed": [1, 2, 3][: len(prompts)], "max_new_tokens": STEPS}
    return kvjax.generate(model, prompts, **(default | options))


@functools.cache
def unstopped():
    return generate().tokens


def written_out(tokens, sequences):
    """How many tokens a row has, by looking for sequences in plain Python."""
    for n in range(1, len(tokens) + 1):
        if any(list(tokens[max(n - len(one), 0) : n]) == list(one) for one in sequences):
            return n, "stop"
    return len(tokens), "length"


def sequences_of(rows, places, length):
    """Sequences that the rows do emit, which end at some of their tokens."""
    return [tuple(rows[row][at - length + 1 : at + 1].tolist()) for row, at in places]


@pytest.mark.corner
@pytest.mark.parametrize(
    "every", [16, pytest.param(1, marks=pytest.mark.full), pytest.param(5, marks=pytest.mark.full)]
)
def test_a_sequence_ends_a_row_wherever_a_chunk_ends(every):
    free = unstopped()
    for places, length in (([(0, 16), (1, 15)], 2), ([(0, 17), (1, 31), (2, 33)], 3), ([(2, 3)], 4), ([(1, 0)], 1)):
        wanted = sequences_of(free, places, length)
        stream = kvjax.stream(
            MODEL, PROMPTS, sampler=WARM, seed=[1, 2, 3], max_new_tokens=STEPS, stop=wanted, every=every
        )
        pieces = [piece.tokens for piece in stream if piece.row == places[0][0]]
        out = stream.result()
        for row in range(3):
            n, how = written_out(free[row].tolist(), wanted)
            assert (int(out.lengths[row]), out.stop[row]) == (n, how)
            np.testing.assert_array_equal(out.tokens[row, :n], free[row, :n])
        assert "stop" in out.stop and sum(pieces, []) == out.tokens[places[0][0], : out.lengths[places[0][0]]].tolist()
        assert int(out.cache.lengths[0]) == 16 + int(out.lengths[0]), "what completes it is fed"


def test_a_sequence_that_begins_in_the_prompt_ends_nothing():
    free = unstopped()
    begun = (PROMPTS[0][-1], int(free[0, 0]))
    assert generate(stop=[begun]).lengths[0] == STEPS
    assert generate(stop=[begun[1:]]).lengths[0] == 1, "the same without the part in the prompt"


def test_a_sequence_may_begin_in_one_call_and_end_in_the_next():
    free = unstopped()
    wanted = sequences_of(free, [(0, 14)], 4)
    whole = generate(stop=wanted)
    first = generate(stop=wanted, max_new_tokens=[13, 13, 13])
    second = kvjax.generate(MODEL, after=first, max_new_tokens=STEPS - 13)
    assert whole.lengths[0] == 15 and first.lengths[0] == 13 and first.stop[0] == "length"
    assert second.lengths[0] == 2 and second.stop[0] == "stop"
    third = kvjax.generate(MODEL, after=second, max_new_tokens=3)
    assert third.lengths[0] == 0 and third.stop[0] == "stop", "however often one asks"


@pytest.mark.corner
def test_a_thousand_sequences_find_what_plain_python_finds_and_other_thousands_compile_nothing():
    free, rng = unstopped(), np.random.default_rng(0)
    many = [tuple(rng.integers(0, 96, int(n)).tolist()) for n in rng.integers(3, 9, 1000)]
    there = [*many[:500], *sequences_of(free, [(0, 20), (1, 9)], 5), *many[500:]]
    generate(stop=many)
    with Compilations() as made:
        out = generate(stop=there)
    assert made.count == 0
    for row in range(3):
        assert (int(out.lengths[row]), out.stop[row]) == written_out(free[row].tolist(), there)
    assert int(out.lengths[0]) <= 21 and int(out.lengths[1]) <= 10


def test_sequences_that_stop_say_which_next_tokens_end_a_row():
    stops = stopping.stops_of("test", (3,), [(1, 2), (9,), (5, 1, 2), (7, 1, 4)])
    tokens = jnp.asarray([[7, 1, 0, 0], [5, 1, 0, 0], [1, 0, 0, 0]])
    text = sampling.Text(
        tokens, jnp.asarray([2, 2, 1]), jnp.asarray([0, 1, 1]), jnp.full(3, 9), jnp.zeros(0, jnp.int32)
    )
    got = np.asarray(stops.ends(text, 12))
    assert [np.flatnonzero(row).tolist() for row in got] == [[2, 3, 4, 9], [2, 3, 9], [3, 9]]
    for token in range(12):
        np.testing.assert_array_equal(stops.hit(text, jnp.full(3, token)), got[:, token])


def test_rows_that_stop_at_once_and_budgets_of_nothing():
    free = unstopped()
    firsts = [(int(token),) for token in free[:, 0]]
    out = generate(stop=firsts)
    assert out.lengths.tolist() == [1, 1, 1] and out.stop == ["stop"] * 3 and out.timings.steps <= 16
    assert generate(stop=firsts, max_new_tokens=[0, 1, 0]).lengths.tolist() == [0, 1, 0]
    with Compilations() as made:
        generate(stop=[(1, 2), (3, 4, 5)], max_new_tokens=[1, 0, 7])
    assert made.count == 0, "sequences of the same buckets"


@kinds.mixed()
def test_sequences_end_rows_of_every_kind(case):
    model, plan = case.model, case.plan
    free = generate(model=model, plan=plan).tokens
    wanted = sequences_of(free, [(0, 17), (1, 15), (2, 3)], 3)
    out = generate(model=model, plan=plan, stop=wanted)
    for row in range(3):
        n, how = written_out(free[row].tolist(), wanted)
        assert (int(out.lengths[row]), out.stop[row]) == (n, how)
        np.testing.assert_array_equal(out.tokens[row, :n], free[row, :n])


# ---------------------------------------------------------------- strings


@functools.cache
def tokenizer():
    """94 signs and the two bytes of é."""
    signs = {chr(33 + i) if i < 94 else f"<0x{(0xC3, 0xA9)[i - 94]:02X}>": i for i in range(96)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=signs, merges=[], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    return Tokenizer(backend)


def texts():
    lm = kvjax.LM(MODEL, tokenizer())
    return lm, [tokenizer().continuation(p, row.tolist()) for p, row in zip(PROMPTS, unstopped(), strict=True)]


@pytest.mark.corner
def test_a_stop_string_ends_the_text_before_it_and_the_tokens_with_it():
    lm, whole = texts()
    for wanted in ([whole[0][15:18]], [whole[0][3:5], whole[1][30:33], "nowhere at all"], [whole[2][0]]):
        out = generate(model=lm, stop=wanted)
        for row in range(3):
            found = [whole[row].find(one) for one in wanted if one in whole[row]]
            if not found:
                assert (out.text[row], out.stop[row], int(out.lengths[row])) == (whole[row], "length", STEPS)
                continue
            ends = min(whole[row].find(one) + len(one) for one in wanted if one in whole[row])
            assert out.stop[row] == "stop" and out.text[row] == whole[row][: min(found)]
            n = int(out.lengths[row])
            assert tokenizer().continuation(PROMPTS[row], unstopped()[row, :n].tolist()) == whole[row][:ends]
            np.testing.assert_array_equal(out.tokens[row, :n], unstopped()[row, :n])


def same_as_with_a_budget(out, **options):
    """Whether cache and logits are those of a run that was told to stop there."""
    told = generate(max_new_tokens=out.lengths, **options)
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(*(jax.tree.leaves((x.cache, x.logits)) for x in (out, told)), strict=True)
    )


@pytest.mark.parametrize("plan", [caches.dense(), pytest.param(caches.paged(8), marks=pytest.mark.full)], ids=str)
def test_after_a_stop_string_the_cache_is_that_of_a_run_that_ended_there(plan):
    lm, whole = texts()
    out = generate(model=lm, stop=[whole[0][5:8], whole[1][20:23]], plan=plan)
    assert out.stop[:2] == ["stop"] * 2 and same_as_with_a_budget(out, plan=plan)


@pytest.mark.corner
def test_a_ring_that_cannot_be_rewound_ends_at_a_string_too():
    model = tiny(ONE_LAYER_WINDOWED)
    lm, ring = kvjax.LM(model, tokenizer()), caches.ring(WINDOW)
    free = generate(model=model, plan=ring)
    whole = [tokenizer().continuation(p, row.tolist()) for p, row in zip(PROMPTS, free.tokens, strict=True)]
    out = generate(model=lm, stop=[whole[0][5:8], whole[1][20:23]], plan=ring)
    assert free.cache.max_rewind == 0 and out.stop[:2] == ["stop"] * 2
    assert same_as_with_a_budget(out, model=model, plan=ring)
    with pytest.raises(CacheError, match="behind the furthest token"):
        out.cache.rewind(out.cache.lengths - 1)


@pytest.mark.full
def test_targets_end_at_strings_and_sequences_too():
    encoder = dataclasses.replace(ONE_LAYER, positions=Learned(24), max_positions=24, tied=True)
    config = dataclasses.replace(ONE_LAYER, positions=Learned(64), max_positions=64, encoder=encoder)
    lm = kvjax.LM(tiny(config), tokenizer(), start_ids=(3,))
    free = generate(model=lm)
    assert free.cache.shared["source"].lengths.tolist() == [16, 7, 1]
    sequence = tuple(free.tokens[1, 14:18].tolist())
    out = generate(model=lm, stop=[free.text[0][15:18], sequence])
    for row in range(3):
        n, text = int(out.lengths[row]), free.text[row]
        at = text.find(free.text[0][15:18])
        assert out.text[row] == (text[:at] if 0 <= at < n else text[: len(out.text[row])])
        np.testing.assert_array_equal(out.tokens[row, :n], free.tokens[row, :n])
    pairs = [tuple(free.tokens[1, i : i + 4].tolist()) for i in range(STEPS - 3)]
    ends = [free.text[0].find(free.text[0][15:18]) + 3, pairs.index(sequence) + 4]
    assert out.stop[:2] == ["stop"] * 2 and out.lengths[:2].tolist() == ends
    stream = kvjax.stream(lm, PROMPTS, sampler=WARM, seed=[1, 2, 3], max_new_tokens=STEPS, stop=[free.text[0][15:18]])
    assert "".join(piece.text for piece in stream if piece.row == 0) == out.text[0]


def test_a_row_that_ends_at_a_string_has_the_tokens_that_its_filters_chose_for_its_budget():
    lm, whole = texts()
    last = sampling.chain(*WARM.filters, sampling.forced_last([0]))
    out = generate(model=lm, stop=[whole[0][5:8]], sampler=last)
    n = int(out.lengths[0])
    assert out.stop[0] == "stop" and n < STEPS and out.tokens[0, n - 1] != 0
    np.testing.assert_array_equal(out.tokens[0, :n], unstopped()[0, :n])
    assert out.tokens[1, -1] == 0, "the last that a budget allows"


def test_a_string_may_begin_in_one_call_and_end_in_the_next():
    lm, whole = texts()
    wanted = [whole[0][11:16]]
    at = whole[0].find(wanted[0])
    first = generate(model=lm, stop=wanted, max_new_tokens=at + 2)
    second = kvjax.generate(lm, after=first, max_new_tokens=20)
    assert first.stop[0] == "length" and second.stop[0] == "stop"
    assert int(first.lengths[0] + second.lengths[0]) == int(generate(model=lm, stop=wanted).lengths[0])
    third = kvjax.generate(lm, after=second, max_new_tokens=5)
    assert third.lengths[0] == 0 and third.stop[0] == "stop" and third.text[0] == ""


def test_a_string_that_lies_in_an_earlier_call_ends_a_later_one_no_more_than_a_sequence_does():
    lm, whole = texts()
    first = generate(model=lm, max_new_tokens=12)
    for stop in ([whole[0][3:6], whole[1][2:7]], [unstopped()[0, 3:6].tolist()]):
        more = kvjax.generate(lm, after=first, max_new_tokens=STEPS - 12, stop=stop)
        assert more.text == [text[12:] for text in whole] and more.stop == ["length"] * 3
    ended = kvjax.generate(lm, after=first, max_new_tokens=3, stop=whole[0][10:12])
    assert ended.lengths[0] == 0 and ended.stop[0] == "stop", "what ends with one has ended"
    with pytest.raises(InputError, match="stop is text, but a bare Model has no tokenizer"):
        kvjax.generate(MODEL, after=ended)
    strings = Strings(["ab", "abc", "bd", "x" * 9])
    assert [strings.first(text, 2) for text in ("ab", "abc", "abd", "abe", "abab")] == [None, 0, 1, None, 2]


def test_where_a_string_is_found_does_not_depend_on_how_tokens_arrive():
    rng, text = np.random.default_rng(3), tokenizer()
    for trial in range(60):
        ids = rng.choice([1, 2, 3, 94, 95], 30).tolist()
        whole = text.continuation([], ids)
        strings = Strings([whole[i : i + n] for i, n in rng.integers(1, 20, (3, 2)) if whole[i : i + n]] or ["zz"])
        found = []
        for every in (1, 4, 30):
            watch, pieces, keep = Watch(text, [], strings), [], None
            for at in range(0, 30, every):
                kept = watch.push(ids[at : at + every])
                pieces.append(watch.piece())
                if kept is not None:
                    keep = at + kept
                    break
            pieces.append(watch.finish())
            found.append((keep, "".join(pieces), watch.whole()[0]))
            assert found[-1][1] == found[-1][2], "the pieces are the text"
        assert len(set(found)) == 1


def test_a_piece_never_shows_the_beginning_of_a_stop_string():
    watch = Watch(tokenizer(), [], Strings(["!#%x", "%%"]))
    shown = []
    for token in (5, 0, 2, 4, 4, 9):  # & ! # % %
        watch.push([token])
        shown.append(watch.piece())
    assert shown == ["&", "", "", "", "!#", ""] and watch.ended and watch.whole() == ("&!#", True)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("", "stop 0 is empty"),
        ([[1], []], "stop 1"),
        ([[1.5]], "stop 0 must be text or a list of ids"),
        ([[1, 96]], "stop 0 has id 96, the vocabulary has 96 ids"),
        ([3, -1], "stop 0 has id -1"),
        (["text"], "stop 0 is text, but a bare Model has no tokenizer"),
        (7, "stop"),
    ],
)
def test_what_is_no_stop_is_an_error(stop, message):
    lm = MODEL if stop == ["text"] else kvjax.LM(MODEL, tokenizer())
    with pytest.raises(InputError, match=message):
        generate(model=lm, stop=stop)


def test_a_beam_search_takes_sequences_and_refuses_strings():
    lm = kvjax.LM(MODEL, tokenizer())
    with pytest.raises(InputError, match="give an algorithm lists of ids"):
        kvjax.generate(lm, PROMPTS, algorithm=kvjax.beam(2), stop="x")
