"""The draft model: what it learns from, that an interrupt changes nothing, and the bundled one's acceptance."""

from __future__ import annotations

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CheckpointError, InputError, caches, sampling
from kvjax.checkpoint.source import BUNDLED
from kvjax.train import data, draft, lm, package
from kvjax.train.measure import measure

SMALL = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn": 16}
TINY = draft.Settings(steps=8, warmup=2, block=4, eval_every=4, batch=2, micro=2, lr=0.02, **SMALL)
"""Vocabulary and context are the target's."""
TARGET = lm.Settings(vocab=270, context=24, **SMALL)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A package of a random model that is sure of itself."""
    folder = tmp_path_factory.mktemp("target") / "song"
    config = TARGET.config(270)
    params = kvjax.init_params(config, jax.random.key(0))
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 20
    tokenizer = data.train_tokenizer("the king and the queen of the night sing a song\n" * 20, 270)
    record = {"text": {"name": "", "sha256": "", "train_chars": 0, "heldout_chars": 0, "test_chars": 0}}
    record |= {"settings": dataclasses.asdict(TARGET), "command": "", "train_seconds": 0.0, "best_step": 0}
    record |= {"machine": "", "versions": {}, "temperature": 1.0}
    package.write_package(folder, params, config, tokenizer, record)
    return folder


@pytest.fixture(scope="module")
def finished(target, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft, "ROWS", draft.HELDOUT_ROWS)
        return out, draft.train(str(target), out, TINY, quiet=True)


def test_a_run_lowers_the_loss_and_leaves_a_draft_with_the_tokenizer_of_its_target(finished, target):
    out, progress = finished
    assert progress.history[-1]["loss"] < progress.history[0]["loss"] - 0.05
    assert progress.history[-1]["heldout"] < progress.history[0]["heldout"]
    made, model = kvjax.load(out / "model"), kvjax.load(target)
    assert made.tokenizer.backend.to_str() == model.tokenizer.backend.to_str()
    assert (made.bos_id, made.eos_ids) == (model.bos_id, model.eos_ids)
    assert made.model.config.max_positions == 24
    record = package.read_record(out / "model")
    assert record["target"] == {"name": "song", "model_sha256": package.read_record(target)["model_sha256"]}
    assert record["command"].startswith("python -m kvjax.train draft song --out DIR --steps 8 --batch 2")
    card = (out / "model" / "README.md").read_text()
    assert record["command"] in card and f"| drawn | {record['acceptance']['drawn']:.4f} |" in card
    with pytest.raises(InputError, match="not trained on a text"):
        measure(str(out / "model"), target)


def test_an_interrupted_run_ends_bitwise_where_an_unbroken_one_does(finished, target, tmp_path, monkeypatch):
    def interrupted(self, vocab_size):
        def block(state, batches):
            signal.raise_signal(signal.SIGINT)
            return lm.train_block(self, vocab_size, draft.loss)(state, batches)

        return block

    monkeypatch.setattr(draft, "ROWS", draft.HELDOUT_ROWS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(draft.Settings, "train_block", interrupted)
        draft.train(str(target), tmp_path, TINY, quiet=True)
    assert not (tmp_path / "model").exists()
    resumed = draft.train(str(target), tmp_path, TINY, quiet=True)
    assert resumed.history == finished[1].history
    for ours, theirs in zip(*(jax.tree.leaves((x.state, x.best)) for x in (resumed, finished[1])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_checkpoint_for_another_target_is_refused(finished, target, tmp_path):
    changed = tmp_path / "other"
    changed.mkdir()
    for path in target.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    record = package.read_record(target) | {"model_sha256": "0" * 64}
    package.write_json(changed / package.RECORD, record)
    with pytest.raises(CheckpointError, match="another run"):
        draft.train(str(changed), finished[0], TINY, quiet=True)
    with pytest.raises(InputError, match="begins a text with id None"):
        draft.train("induction", tmp_path, TINY, quiet=True)


def test_what_a_model_writes_is_what_decode_draws_and_comes_with_the_logits_it_was_drawn_from(target):
    model = kvjax.load(target).model
    seeds = draft.seeds_of(3, rows=8)
    tokens, logits = draft.written(model, seeds, 24)
    cache = kvjax.init_cache(model, caches.dense(), batch=8, capacity=24)
    first, cache = kvjax.prefill(model, cache, np.full((8, 1), data.BOS_ID))
    plain = kvjax.decode(model, cache, first, steps=23, sampler=sampling.chain(), seed=np.asarray(seeds))[0]
    np.testing.assert_array_equal(tokens, np.concatenate([np.full((8, 1), data.BOS_ID), plain], axis=1))
    whole = kvjax.forward(model, tokens)
    # float32 sums in another order, one layer
    np.testing.assert_allclose(logits, whole, atol=2e-5 * float(jnp.abs(whole).max()))
    other = np.asarray(draft.written(model, draft.seeds_of(4, rows=8), 24)[0])
    assert (np.asarray(tokens) != other).mean() > 0.5


def test_acceptance_is_the_overlap_of_the_two_distributions(target):
    model = kvjax.load(target).model
    tokens, logits = draft.written(model, draft.seeds_of(3, rows=8), 24)
    drawn, greedy = draft.acceptance(model, tokens, logits)
    assert float(drawn) == pytest.approx(1.0, abs=1e-5) and float(greedy) == 1.0
    assert float(draft.loss(model, (tokens, logits))) == pytest.approx(0.0, abs=1e-5)
    other = jnp.roll(logits, 1, axis=-1)
    p, q = (np.exp(np.asarray(jax.nn.log_softmax(x), np.float64)) for x in (logits, other))
    drawn, greedy = draft.acceptance(model, tokens, other)
    assert float(drawn) == pytest.approx(np.minimum(p, q).sum(-1).mean(), abs=1e-5) and float(greedy) == 0.0
    assert float(draft.loss(model, (tokens, other))) == pytest.approx((q * np.log(q / p)).sum(-1).mean(), rel=1e-4)


def test_the_bundled_draft_guesses_more_than_half_of_what_its_target_says_at_a_seventh_of_its_size():
    folder, own = BUNDLED / "shakespeare-draft", BUNDLED / "shakespeare"
    assert (folder / "model.safetensors").stat().st_size < 500_000
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (own / name).read_bytes()
    record = package.read_record(folder)
    assert record["target"] == {"name": "shakespeare", "model_sha256": package.read_record(own)["model_sha256"]}
    target, small = (kvjax.load(name).model for name in ("shakespeare", "shakespeare-draft"))
    assert record["settings"] == dataclasses.asdict(dataclasses.replace(draft.Settings(), vocab=768, context=256))
    tokens, logits = draft.written(target, draft.seeds_of(draft.EVALUATION_SEED, rows=8), 256)
    drawn, greedy = map(float, draft.acceptance(small, tokens, logits))
    # 8 of the 128 texts of the card
    assert drawn == pytest.approx(record["acceptance"]["drawn"], abs=0.03) and drawn > 0.7
    assert greedy == pytest.approx(record["acceptance"]["greedy"], abs=0.05) and greedy > 0.55
    shifted = float(draft.acceptance(small, tokens, jnp.roll(logits, 1, axis=1))[0])
    assert shifted < 0.4  # the guess for the token before
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 768
