"""A trained model whose text is published: stories260K by the author of llama2.c, where KVJAX_ORACLES says it is."""

import hashlib
import json
import os
from pathlib import Path

import pytest

import kvjax
from kvjax import caches
from kvjax.lm import load

GOLDEN = Path(__file__).resolve().parent / "golden"
pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def oracle():
    if not os.environ.get("KVJAX_ORACLES"):
        pytest.skip("KVJAX_ORACLES is not set: the oracle models are not here")
    return Path(os.environ["KVJAX_ORACLES"]) / "stories260K"


@pytest.fixture(scope="module")
def stories():
    return json.loads((GOLDEN / "stories260K.json").read_text())


def test_the_oracle_is_the_file_whose_ids_are_kept_here(oracle, stories):
    assert hashlib.sha256((oracle / "model.safetensors").read_bytes()).hexdigest() == stories["sha256"]


@pytest.mark.parametrize(
    "plan", [caches.dense(), pytest.param(caches.ring(512), marks=pytest.mark.full)], ids=["dense", "ring"]
)
def test_greedy_text_of_the_oracle_is_the_published_one(oracle, stories, plan):
    lm = load(oracle, strict=True)
    assert (lm.bos_id, lm.eos_ids) == (1, (2,))
    published, zoo = stories["greedy_ids"], stories["zoo_greedy_ids"]
    out = kvjax.generate(lm, ["", stories["zoo_prompt"]], max_new_tokens=len(published) - 1, plan=plan)
    assert out.prompts == [published[:1], stories["zoo_prompt_ids"]]
    assert out.prompts[0] + out.tokens[0].tolist() == published
    assert (out.prompts[1] + out.tokens[1].tolist())[: len(zoo)] == zoo
    assert out.text[0] == lm.decode(published)


def test_the_oracles_tokenizer_reads_and_writes_as_published(oracle, stories):
    lm = load(oracle)
    assert lm.encode(stories["zoo_prompt"]) == stories["zoo_prompt_ids"]
    ids = stories["greedy_ids"]
    stream = lm.tokenizer.stream(ids[:1])
    text = "".join([stream.push(i) for i in ids[1:]] + [stream.finish()])
    assert text == lm.decode(ids)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
