"""The edges of a generation, for drawing and for beams, with and without an encoder."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import ONE_LAYER, prompt_ids, tiny

import kvjax
from kvjax import CacheError, InputError, sampling
from kvjax.checkpoint.generation import renormalized
from kvjax.ops.positions import Learned

PROMPTS = [row[:n].tolist() for row, n in zip(prompt_ids(4), (16, 7, 1), strict=True)]
ENCODER = dataclasses.replace(ONE_LAYER, positions=Learned(24), max_positions=24, tied=True)
MODELS = {
    "decoder": kvjax.LM(tiny(ONE_LAYER)),
    "with an encoder": kvjax.LM(
        tiny(dataclasses.replace(ONE_LAYER, positions=Learned(64), max_positions=64, encoder=ENCODER)), start_ids=(3,)
    ),
}
DRAW = {"sampler": sampling.chain(sampling.temperature(0.9)), "seed": [1, 2, 3]}
ALGORITHMS = {"drawn": DRAW, "beams": {"algorithm": kvjax.beam(3)}}
STEPS = 18


BOTH = [
    pytest.param((model, algorithm), id=f"{model}, {algorithm}", marks=pytest.mark.full if dear else ())
    for model, algorithm, dear in (
        ("decoder", "drawn", False),
        ("decoder", "beams", True),
        ("with an encoder", "drawn", True),
        ("with an encoder", "beams", False),
    )
]


@pytest.fixture(params=BOTH)
def names(request):
    return request.param


@pytest.fixture
def lm(names):
    return MODELS[names[0]]


@pytest.fixture
def options(names):
    return ALGORITHMS[names[1]]


def generate(lm, options, **more):
    return kvjax.generate(lm, PROMPTS, **({"max_new_tokens": STEPS} | options | more))


@functools.cache
def _free(model, algorithm):
    return generate(MODELS[model], ALGORITHMS[algorithm])


@pytest.fixture
def free(names):
    return _free(*names)


def test_a_row_that_stops_at_once_leaves_the_others_as_they_were(lm, options):
    first = first_logits(lm)
    stop = int(first.argmax())
    if "algorithm" in options:
        out = generate(lm, {"algorithm": kvjax.beam(3, returned=3)}, stop_ids=(stop,))
        assert any(each.tokens == [stop] and each.stop == "eos" for each in out.candidates[0])
        return
    greedy = {"sampler": sampling.greedy()}
    out, want = generate(lm, greedy, stop_ids=(stop,)), generate(lm, greedy)
    assert (out.lengths[0], out.stop[0]) == (1, "eos")
    for row in (1, 2):
        n = int(out.lengths[row])
        np.testing.assert_array_equal(out.tokens[row, :n], want.tokens[row, :n])


def first_logits(lm):
    """Logits after the first prompt, from the forward pass."""
    if lm.model.encode is None:
        return np.asarray(kvjax.forward(lm.model, np.array(PROMPTS[:1]))[0, -1])
    source = kvjax.encode(lm.model, np.array(PROMPTS[:1]))
    return np.asarray(kvjax.forward(lm.model, np.array([[3]]), source=source)[0, -1])


def test_all_rows_may_stop_at_once(lm, options):
    out = generate(lm, options, stop_ids=tuple(range(96)))
    assert out.lengths.tolist() == [1, 1, 1] and out.stop == ["eos"] * 3 and out.timings.steps <= 16
    more = kvjax.generate(lm, after=out, max_new_tokens=4) if "algorithm" not in options else None
    assert more is None or more.lengths.tolist() == [0, 0, 0]


def test_what_stops_a_row_does_not_stop_it_inside_the_prompt(lm, options, free):
    inside = tuple({PROMPTS[0][3], PROMPTS[0][-1]} - set(free.tokens.ravel().tolist()))
    assert inside, "every id of the prompt is also made: nothing would be tested"
    sequence = (PROMPTS[1][-2], PROMPTS[1][-1])
    out = generate(lm, options, stop_ids=inside, stop=[sequence])
    np.testing.assert_array_equal(out.tokens, free.tokens)


def test_budgets_of_nothing_and_of_one(lm, options, free):
    out = generate(lm, options, max_new_tokens=[0, 1, STEPS])
    assert out.lengths.tolist() == [0, 1, STEPS] and out.stop == ["length"] * 3
    np.testing.assert_array_equal(out.tokens[2], free.tokens[2])
    none = generate(lm, options, max_new_tokens=0)
    assert none.lengths.tolist() == [0, 0, 0] and none.timings.steps == 0


def banned_after(logits, text):
    """Bans everything in rows of an odd number of tokens."""
    return jnp.where((text.lengths % 2 == 1)[:, None], -jnp.inf, logits)


def test_when_every_token_is_banned_the_error_says_so_and_names_the_row(lm, options):
    everything = sampling.banned(range(96))
    with pytest.raises(CacheError, match=r"(row|prompt) 0.*no token may be chosen: all of them are banned"):
        generate(lm, _with(options, everything))
    if lm.model.encode is None:
        with pytest.raises(CacheError, match=r"(row|prompt) [01].*no token may be chosen"):
            generate(lm, _with(options, banned_after))


def _with(options, each):
    if "algorithm" in options:
        return {"algorithm": kvjax.beam(3, filters=(each,))}
    return options | {"sampler": sampling.chain(each, sampling.temperature(0.9))}


def test_nan_logits_are_an_error_that_names_the_row(lm, options):
    table = lm.model.params["embed"]["table"]  # of sources too
    params = jax.tree.map(lambda x: x.at[PROMPTS[1][2]].set(jnp.nan) if x is table else x, lm.model.params)
    broken = dataclasses.replace(lm, model=lm.model.replace(params=params))
    said = "the model gave NaN logits" if lm.model.encode is None else "its source .* holds what the cache cannot keep"
    with pytest.raises(CacheError, match=f"row 1, .*{said}"):
        generate(broken, options)


def test_more_is_asked_for_than_the_vocabulary_has():
    small = kvjax.Model({"table": jnp.asarray([[0.0, 1.0], [2.0, 0.0]])}, None, coin)
    many = sampling.chain(sampling.top_k(50), sampling.top_p(0.99))
    out = kvjax.generate(small, [[0], [1]], sampler=many, max_new_tokens=6, logprobs=5, seed=3)
    assert set(out.tokens.ravel().tolist()) <= {0, 1} and (out.logprobs.ids[:, :, 2:] == -1).all()
    wide = kvjax.generate(small, [[0]], algorithm=kvjax.beam(5, returned=5), max_new_tokens=2)
    assert sorted(tuple(c.tokens) for c in wide.candidates[0]) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def coin(params, config, cache, tokens, valid):
    """A model of two tokens and a few lines: the logits are a row of a table."""
    q = jnp.ones((*tokens.shape, 1, 2))
    out, cache = kvjax.attend(cache, 0, q=q, kv=(q, q))
    return params["table"][tokens] + 0 * out[:, :, 0], cache


def one_for_all(logits, text):
    return logits[:1]


def column(logits, keys, text):
    return jnp.argmax(logits, axis=1)[:, None]


def fraction(logits, keys, text):
    return text.new.astype(jnp.float32)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (sampling.greedy(one_for_all), r"a filter must give logits \[3, 96\], not float32\[1, 96\]"),
        (column, r"a sampler must give ids \[3\], not int32\[3, 1\]"),
        (fraction, r"a sampler must give ids \[3\], not float32\[3\]"),
    ],
)
def test_what_a_filter_or_sampler_of_ones_own_gives_is_not_broadcast_to_other_rows(sampler, message):
    with pytest.raises(InputError, match=message):
        generate(MODELS["decoder"], {}, sampler=sampler)


def broken(logits, text):
    return logits.at[1, 7].set(jnp.nan)


@pytest.mark.parametrize("filters", [(broken,), (sampling.banned(range(96)), renormalized)], ids=("NaN", "none left"))
def test_no_token_is_drawn_of_what_a_filter_made_nan(filters):
    for sampler in (sampling.greedy(*filters), sampling.chain(*filters)):
        with pytest.raises(CacheError, match="all of them are banned, or a filter made one NaN"):
            generate(MODELS["decoder"], {}, sampler=sampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_ids": 5}, "stop_ids must be a list of ids"),
        ({"max_new_tokens": [[1], [2, 3]]}, "max_new_tokens"),
        ({"seed": [[1], [2, 3]], "samples": 2}, "seed"),
        ({"seed": 2**32 - 1, "samples": 2}, "seed: .* must lie between 0 and 4294967295"),
        ({"prompts": 5}, "prompts must be text, or a list"),
        ({"prompts": [[[1, 2], [3]]]}, "prompt 0 must be whole numbers in rows of equal length"),
        ({"after": "text"}, "after must be what generate gave, not str"),
    ],
)
def test_arguments_of_the_wrong_sort_are_errors_that_name_them(options, message):
    with pytest.raises(InputError, match=message):
        kvjax.generate(MODELS["decoder"], **({"prompts": PROMPTS} | options))
