"""generation_config.json: what a folder asks of every generation is done, and gives the tokens of Transformers."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax import CheckpointError, sampling
from kvjax.checkpoint.generation import NOT_APPLIED, read_generation, renormalized
from kvjax.lm import load
from kvjax.sampling.drawing import own

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import parity

META, _ = parity.read("processors")
EVERY = {
    "renormalize_logits": True,
    "begin_suppress_tokens": [5, 6],
    "suppress_tokens": [7],
    "forced_eos_token_id": 2,
    "min_length": 9,
    "bad_words_ids": [[2], [3], [1, 2]],
    "no_repeat_ngram_size": 3,
    "repetition_penalty": 1.2,
    "sequence_bias": [[[1, 4], -2], [[8], 1.5]],
    "eos_token_id": [2],
    "decoder_start_token_id": 4,
    "forced_bos_token_id": 0,
}


def asked(folder, generation=None, config=None, encoder=True, **options):
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_generation(folder, config or {}, vocab_size=10, encoder=encoder, **options)


def same(found, wanted):
    assert [jax.tree.structure(each) for each in found] == [jax.tree.structure(each) for each in wanted]
    jax.tree.map(np.testing.assert_array_equal, found, tuple(wanted))


def test_filters_are_what_the_file_asks_for_in_the_order_of_transformers(tmp_path):
    found = asked(tmp_path, EVERY)
    assert (found.start_ids, found.eos_ids, found.bos_id) == ((4, 0), (2,), None)
    wanted = [
        sampling.sequence_bias({(1, 4): -2.0, (8,): 1.5}),
        sampling.repetition_penalty(1.2),
        sampling.no_repeat_ngram(3),
        sampling.bad_words([[3], [1, 2]]),  # an end alone is no bad word
        sampling.min_length(9),
        sampling.forced_last([2]),
        sampling.banned([7]),
        sampling.banned_first([5, 6], 2),
        own(renormalized),
    ]
    same(found.filters, wanted)
    wanted[4] = sampling.min_new_tokens(3)
    same(asked(tmp_path, EVERY | {"min_new_tokens": 3}).filters, wanted)
    del wanted[4]
    same(asked(tmp_path, EVERY | {"min_new_tokens": 0}).filters, wanted)
    wanted[-2] = sampling.banned_first([5, 6])
    same(asked(tmp_path, EVERY | {"min_new_tokens": 0}, encoder=False).filters, wanted)


def test_what_changes_nothing_makes_no_filter_and_config_json_counts_where_there_is_no_other_file(tmp_path):
    same(asked(tmp_path, config=EVERY).filters, asked(tmp_path, config=EVERY).filters)
    assert len(asked(tmp_path, config=EVERY).filters) == 9
    assert asked(tmp_path, {}, config=EVERY).filters == ()
    nothing = {
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_length": 0,
        "min_new_tokens": None,
        "bad_words_ids": None,
        "suppress_tokens": [],
        "forced_eos_token_id": None,
        "sequence_bias": [],
        "renormalize_logits": False,
        "guidance_scale": 1,
        "encoder_no_repeat_ngram_size": 0,
        "temperature": 0.3,
        "top_k": 50,
        "num_beams": 4,
        "max_length": 20,
    }
    assert asked(tmp_path, nothing).filters == ()


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("bad_words_ids", [[7], 7, [["a"]], [[1.5]], [[]], [[-1]], [[True]]]),
        ("sequence_bias", [[[1, 2]], {"1": 2.0}, [[[1], "x"]], [[[], 1.0]], [[[1], 1e40]], [[[1], True]]]),
        ("repetition_penalty", [0, -1.0, "1.2", True, 1e40]),
        ("no_repeat_ngram_size", [-1, 2.0, "2"]),
        ("min_length", [-1, 2.5]),
        ("min_new_tokens", [-1, [3]]),
        ("forced_eos_token_id", ["x", 1.5, [[1]]]),
        ("suppress_tokens", ["x", [-2]]),
        ("begin_suppress_tokens", [[None], {}]),
        ("renormalize_logits", [1, "yes"]),
    ],
)
def test_a_value_that_makes_no_sense_is_an_error_that_names_key_and_value(tmp_path, key, values):
    for value in values:
        with pytest.raises(CheckpointError, match=rf"{key}'? must be .*, not "):
            asked(tmp_path, {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bad_words_ids", [[1, 10]]),
        ("sequence_bias", [[[10, 1], 1.0]]),
        ("forced_eos_token_id", 10),
        ("suppress_tokens", [1, 10]),
        ("begin_suppress_tokens", [10]),
        ("decoder_start_token_id", 10),
    ],
)
def test_an_id_outside_the_vocabulary_is_an_error(tmp_path, key, value):
    with pytest.raises(CheckpointError, match=rf"{key} .*10, the vocabulary has 10 ids"):
        asked(tmp_path, {key: value})


def test_what_is_not_applied_is_named_or_under_strict_refused(tmp_path):
    for key in NOT_APPLIED:
        with pytest.warns(UserWarning, match=rf"asks for {key} = 3, which kvjax does not apply"):
            asked(tmp_path, {key: 3})
        with pytest.raises(CheckpointError, match=key):
            asked(tmp_path, {key: 3}, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(2):
            asked(tmp_path, {key: values[-number] for key, values in NOT_APPLIED.items()})


@functools.cache
def loaded(name, folder):
    parity.write_folder(folder, parity.read(name)[0], 0)
    (folder / "generation_config.json").write_text(json.dumps(META["runs"][name]["config"]))
    return load(folder)


def generated(name, lm, **options):
    """What `generate` writes after each text of a golden run, and how many tokens before that Transformers counts."""
    run = META["runs"][name]
    forced = max(len(lm.start_ids) - 1, 0)
    out = kvjax.generate(lm, run["texts"], max_new_tokens=len(run["tokens"][0]) - forced, **options)
    return out, [row[row >= 0].tolist() for row in out.tokens], forced


def written(name, lm):
    """What `generate` writes after each text of a golden run, and what Transformers writes."""
    _, ours, forced = generated(name, lm)
    return ours, [row[forced:] for row in META["runs"][name]["tokens"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tmp_path_factory.mktemp(name) for name in META["runs"]}


SOONER = [name if name != "bart" else pytest.param(name, marks=pytest.mark.full) for name in META["runs"]]


@pytest.mark.parametrize("name", SOONER)
def test_greedy_text_is_that_of_transformers_under_the_same_file(name, folders):
    """Without any one key Transformers writes another text: scripts/processors.py makes no other files."""
    lm = loaded(name, folders[name])
    assert len(lm.filters) == 8
    ours, theirs = written(name, lm)
    assert ours == theirs
    plain, _ = written(name, dataclasses.replace(lm, filters=()))
    assert plain != theirs


@pytest.mark.full
def test_without_any_one_of_its_filters_the_text_is_another(folders):
    lm = loaded("llama_bias_wide_heads", folders["llama_bias_wide_heads"])
    for left_out in range(len(lm.filters)):
        less = lm.filters[:left_out] + lm.filters[left_out + 1 :]
        ours, theirs = written("llama_bias_wide_heads", dataclasses.replace(lm, filters=less))
        assert ours != theirs, lm.filters[left_out]


@pytest.mark.full
@pytest.mark.parametrize("name", META["runs"])
def test_beams_and_their_scores_are_those_of_transformers_under_the_same_file(name, folders):
    lm = loaded(name, folders[name])
    scores = []
    for more in (False, True):
        want = META["runs"][name][f"beams/{more}"]
        each = dataclasses.replace(lm, filters=lm.filters + (own(renormalized),) * more)
        out, ours, forced = generated(name, each, algorithm=kvjax.beam(3))
        assert ours == [row[forced:] for row in want["tokens"]]
        np.testing.assert_allclose(out.scores, want["scores"], atol=1e-5)
        scores.append(want["scores"])
    assert np.abs(np.subtract(*scores)).max() > 1e-3, "without renormalizing the scores are others"
