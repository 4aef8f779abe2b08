"""Beams and scores are those of Hugging Face Transformers, by the golden file of scripts/beams_golden.py, on every kind
of cache that is exact."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import plain_beams
import pytest
from naive import log_probabilities

import kvjax
from kvjax import caches, codecs, sampling
from kvjax.caches.base import Cache
from kvjax.lm import load
from kvjax.loops import beam as generating
from kvjax.loops import search as searching
from kvjax.sampling import Text

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import parity

GOLDEN = json.loads((parity.GOLDEN / "beams.json").read_text())
WIDTH, NEW = GOLDEN["about"]["width"], GOLDEN["about"]["new"]
MODELS = tuple(dict.fromkeys(run["model"] for run in GOLDEN["runs"]))
FILTERS = {
    "repetition_penalty": sampling.repetition_penalty,
    "no_repeat_ngram_size": sampling.no_repeat_ngram,
    "min_new_tokens": sampling.min_new_tokens,
}
"""In the order of Transformers."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def model(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            parity.write_folder(folder, parity.read(name)[0], GOLDEN["about"]["seed"])
            made[name] = load(folder, strict=True).model
        return made[name]

    return model


def runs_of(name):
    return [run for run in GOLDEN["runs"] if run["model"] == name]


def filters_of(run):
    return [make(run["filters"][name]) for name, make in FILTERS.items() if name in run.get("filters", {})]


def searched(model, run, plan=None, **other):
    how = {"length_penalty": run["length_penalty"], "early_stopping": run["early_stopping"]} | other
    beam = kvjax.beam(WIDTH, returned=WIDTH, filters=filters_of(run), **how)
    text, target = (run["prompt"], None) if run["source"] is None else (run["source"], run["prompt"])
    how = {"algorithm": beam, "target": target, "stop_ids": run["stops"], "max_new_tokens": NEW, "plan": plan}
    return kvjax.generate(model, [text], **how).candidates[0]


def same(made, run, want=None):
    """Texts, and scores within 1e-5: of sums over twenty tokens twenty times that, which is what `sequences_scores` are
    right to themselves."""
    want = [(x["tokens"], x["score"]) for x in run["found"]] if want is None else want
    if [x.tokens for x in made] != [tokens for tokens, _ in want]:
        return False
    within = [1e-5 * len(tokens) ** max(1 - run["length_penalty"], 0) for tokens, _ in want]
    return all(abs(x.score - score) <= most for x, (_, score), most in zip(made, want, within, strict=True))


def test_the_file_shows_what_could_differ():
    assert set(MODELS) == {"gpt2", "llama_tied_theta", "t5", "bart"}
    for name in MODELS:
        runs = runs_of(name)
        assert {run["early_stopping"] for run in runs} == {True, False, "never"}
        assert len({run["length_penalty"] for run in runs}) == 5 and sum("filters" in run for run in runs) == 1
        assert all(run["crossed"] >= 3 and len(run["stops"]) > 1 for run in runs)
        assert sum(min(len(x["tokens"]) for x in run["found"]) < NEW for run in runs) == 5


LLAMA = "llama_tied_theta"
OTHERS = (
    ("gpt2", caches.ring(64)),
    (LLAMA, caches.paged(4, share=4)),
    (LLAMA, caches.ring(64, sinks=2)),
    ("t5", caches.paged(8)),
    ("bart", caches.ring(64)),
)
EACH = pytest.mark.parametrize(
    "name", [name if name == LLAMA else pytest.param(name, marks=pytest.mark.full) for name in MODELS]
)


@EACH
def test_beams_and_scores_are_those_of_transformers(name, models):
    for run in runs_of(name):
        assert same(searched(models(name), run), run), run["length_penalty"]


@pytest.mark.full
@pytest.mark.parametrize(("name", "plan"), OTHERS, ids=str)
def test_so_are_those_of_other_kinds_of_cache(name, plan, models):
    for run in runs_of(name):
        assert same(searched(models(name), run, plan), run), run["length_penalty"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["bart"])
def test_beams_of_int8_are_those_of_a_plain_search_over_int8(name, models):
    model, plan, differ = models(name), caches.dense(store=codecs.int8()), 0
    feed = jax.jit(lambda cache, ids, n: kvjax.prefill(model, cache, ids, n)[0])
    for run in runs_of(name):
        source = None if run["source"] is None else kvjax.encode(model, np.array([run["source"]], np.int32))
        empty, given = kvjax.init_cache(model, plan, capacity=48, source=source), len(run["prompt"])

        def score(text, empty=empty, run=run, given=given):
            ids = np.zeros((1, 48), np.int32)
            ids[0, : len(text)] = text
            found = log_probabilities(feed(empty, ids, np.array([len(text)], np.int32)))
            at = (np.array([n], np.int32) for n in (len(text), given, given + NEW))
            view = Text(ids, *at, np.array(run["stops"], np.int32))
            for each in filters_of(run):
                found = each(found.astype(np.float32), view)
            return np.asarray(found)[0]

        how = {"penalty": run["length_penalty"], "early": run["early_stopping"], "stops": run["stops"]}
        want, crossed = plain_beams.beam_search(run["prompt"], NEW, WIDTH, score, **how)
        made = searched(model, run, plan)
        assert crossed >= 3 and [x.tokens for x in made] == [tokens for tokens, _ in want]
        np.testing.assert_allclose([x.score for x in made], [s for _, s in want], rtol=1e-3)
        differ += not same(made, run)
    assert differ, "int8 is told from float32"


@EACH
def test_another_rule_or_penalty_is_found(name, models):
    model = models(name)
    (run,) = (run for run in runs_of(name) if "unlike" in run)
    assert same(searched(model, run), run)
    assert not same(searched(model, run, early_stopping=run["unlike"]), run)
    assert not same(searched(model, run, length_penalty=run["length_penalty"] + 0.01), run)


def test_a_search_whose_caches_stay_is_found(models, monkeypatch):
    def still(self, beams):
        return self._rows(beams, "reorder").replace(layers=self.layers)

    monkeypatch.setattr(Cache, "reorder", still)
    fresh = jax.jit(lambda *args, chunk: searching._search(*args, chunk=chunk), static_argnames="chunk")
    monkeypatch.setattr(generating, "DONATING", fresh)
    run = runs_of(LLAMA)[0]
    assert not same(searched(models(LLAMA), run), run)
