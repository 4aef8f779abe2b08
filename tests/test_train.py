"""The training room: what a run reads, that it learns, that an interrupt changes nothing, and what the loss is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.errors import CheckpointError, InputError
from kvjax.lm import load
from kvjax.model import decoder, forward
from kvjax.params import init_params
from kvjax.train import data, evaluate, lm, loop, package
from kvjax.train.__main__ import main
from kvjax.train.dropout import dropping
from kvjax.train.measure import measure

TINY = lm.Settings(
    steps=12,
    batch=4,
    micro=2,
    context=16,
    vocab=270,
    width=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ffn=32,
    lr=1e-2,
    dropout=0.15,
    recut=0.5,
    warmup=2,
    block=4,
    eval_every=4,
    heldout_chars=200,
    test_chars=300,
)
WORDS = ("the", "king", "and", "queen", "of", "night", "sing", "a", "song", "to", "morning")


def _text(seed: int = 0, words: int = 700) -> str:
    picked = np.random.default_rng(seed).choice(WORDS, words)
    return "".join(w + ("\n" if i % 7 == 6 else " ") for i, w in enumerate(picked))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "song.txt"
    path.write_bytes(_text().encode())
    return path


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, loop.train(text_file, out, TINY, quiet=True)


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _leaves(progress):
    return [np.asarray(x) for x in jax.tree.leaves((progress.state, progress.best))]


def test_a_few_steps_lower_the_loss_and_leave_a_loadable_package(finished):
    out, progress = finished
    history = progress.history
    assert history[-1]["heldout"] < history[0]["heldout"] - 0.05
    assert history[-1]["loss"] < history[0]["loss"]
    model = load(str(out / "model")).model
    for stored, best in zip(jax.tree.leaves(model.params), jax.tree.leaves(progress.best), strict=True):
        # float16 keeps 11 bits of each number above its subnormals (2**-14)
        np.testing.assert_allclose(np.asarray(stored), best, rtol=2**-11, atol=2**-25)


def _interrupting(run, after):
    calls = iter(range(after + 1))

    def interrupted(state, batches):
        if next(calls) == after - 1:
            signal.raise_signal(signal.SIGINT)
        return run(state, batches)

    return interrupted


def test_an_interrupted_run_ends_bitwise_where_an_unbroken_one_does(finished, text_file, tmp_path, monkeypatch):
    run = lm.train_block(TINY, TINY.vocab)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lm, "train_block", lambda *_: _interrupting(run, after=2))
        loop.train(text_file, tmp_path, TINY, quiet=True)
    assert int(loop.load(tmp_path / loop.CHECKPOINT, TINY, TINY.vocab, _sha256(text_file)).state.step) == 8
    assert not (tmp_path / "model").exists()
    resumed = loop.train(text_file, tmp_path, TINY, quiet=True)
    for ours, theirs in zip(_leaves(resumed), _leaves(finished[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert resumed.history == finished[1].history


def test_another_seed_begins_elsewhere_and_reads_other_windows(text_file):
    split = data.read_split(text_file, heldout_chars=TINY.heldout_chars, test_chars=TINY.test_chars)
    segmenter = data.Segmenter(data.train_tokenizer(split.train, TINY.vocab), split.train)

    def begin(seed, block=0):
        table = lm.initial_state(dataclasses.replace(TINY, seed=seed), TINY.vocab).params["embed"]["table"]
        batches = data.block_of_batches(segmenter, seed=seed, block=block, steps=2, batch=4, context=16, share=0.5)
        return np.asarray(table), batches

    for ours, again, other in zip(begin(0), begin(0), begin(1), strict=True):
        np.testing.assert_array_equal(ours, again)
        assert (ours != other).any()
    assert (begin(0)[1] != begin(0, block=1)[1]).any()


def test_a_checkpoint_of_another_run_is_refused(text_file, tmp_path):
    path = tmp_path / loop.CHECKPOINT
    loop.save(path, loop.start(TINY, TINY.vocab), TINY, _sha256(text_file))
    with pytest.raises(CheckpointError, match=r"lr 0\.01 there, 0\.02 here"):
        loop.train(text_file, tmp_path, dataclasses.replace(TINY, lr=0.02), quiet=True)
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(CheckpointError, match="remove it"):
        loop.train(text_file, tmp_path, TINY, quiet=True)


def test_training_never_sees_the_end_of_the_text(text_file, tmp_path):
    text = _text()
    changed = tmp_path / "changed.txt"
    changed.write_bytes((text[: -TINY.test_chars] + "@" * TINY.test_chars).encode())
    seen = []
    for path in (text_file, changed):
        split = data.read_split(path, heldout_chars=TINY.heldout_chars, test_chars=TINY.test_chars)
        tokenizer = data.train_tokenizer(split.train, TINY.vocab)
        segmenter = data.Segmenter(tokenizer, split.train, seed=0)
        batches = data.block_of_batches(segmenter, seed=0, block=3, steps=4, batch=4, context=16, share=0.5)
        seen.append((tokenizer.to_str(), split.heldout, batches))
        assert split.train + split.heldout + split.test == path.read_text()
        assert len(split.test) == TINY.test_chars
    assert seen[0][:2] == seen[1][:2]
    np.testing.assert_array_equal(seen[0][2], seen[1][2])
    # the control: a change in the training part is seen
    split = data.read_split(text_file, heldout_chars=TINY.heldout_chars, test_chars=TINY.test_chars)
    assert data.train_tokenizer("zebra " * 500 + split.train, TINY.vocab).to_str() != seen[0][0]


@pytest.mark.parametrize(
    "text", ["", "ROMEO:\n  O, speak again!\r\n", "naïve 東京 🎭 \x00\t", " \u200b\u0301e", "<|bos|"]
)
def test_any_string_is_encoded_and_comes_back(text):
    tokenizer = data.train_tokenizer(_text(), TINY.vocab)
    ids = tokenizer.encode(text).ids
    assert ids[0] == data.BOS_ID and data.BOS_ID not in ids[1:]
    assert tokenizer.decode(ids) == text


def test_cutting_without_dropout_is_the_tokenizer_and_with_it_the_same_text():
    text = _text()
    tokenizer = data.train_tokenizer(text, TINY.vocab)
    segmenter = data.Segmenter(tokenizer, text, drop=0.5)
    plain = segmenter.stream(np.random.default_rng(0), 0.0)
    assert plain.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    recut = segmenter.stream(np.random.default_rng(0), 1.0)
    assert len(recut) > len(plain) and tokenizer.decode(recut.tolist()) == text


def test_windows_begin_with_bos_and_repeat_no_token_within_a_pass():
    text = _text()
    tokenizer = data.train_tokenizer(text, TINY.vocab)
    segmenter = data.Segmenter(tokenizer, text)
    count = len(segmenter.stream(np.random.default_rng(0), 0.0)) // 16
    batches = data.block_of_batches(segmenter, seed=0, block=0, steps=1, batch=count, context=16, share=0.0)
    assert (batches[..., 0] == data.BOS_ID).all() and (batches[..., 1:] != data.BOS_ID).all()
    stream = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    wanted = np.bincount(stream, minlength=TINY.vocab) - np.bincount(batches[..., 1:].ravel(), minlength=TINY.vocab)
    assert (wanted >= 0).all() and wanted.sum() < 16


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40, 41])
def test_evaluation_windows_score_each_token_once(tokens):
    ids = np.arange(1, tokens + 1)
    scored = []
    for number, (inputs, targets, weight) in enumerate(evaluate.windows(ids, 8)):
        assert inputs[0] == data.BOS_ID and len(inputs) == len(targets) == 8
        scored += targets[weight > 0].tolist()
        if number:
            assert (weight > 0).argmax() == 4  # half the context before the first one scored
    assert scored == ids.tolist()


def _uniform(model, tokens):
    return jnp.zeros((*tokens.shape, 7))


def _not_quite_uniform(model, tokens):
    return jnp.zeros((*tokens.shape, 7)).at[..., 3].set(0.01)


def test_a_uniform_model_costs_log_v_a_token():
    ids = np.arange(103) % 7
    exact = 103 * math.log(7)
    # float32 sums of at most 8 equal terms: 8 roundings of 2**-24, relative
    assert evaluate.total_nll(_uniform, None, ids, 8) == pytest.approx(exact, rel=8 * 2**-24)
    assert evaluate.total_nll(_not_quite_uniform, None, ids, 8) != pytest.approx(exact, rel=8 * 2**-24)


def test_dropout_at_rate_zero_is_the_library_forward():
    config = TINY.config(270)
    params = init_params(config, jax.random.key(0))
    tokens = jnp.arange(2 * 16).reshape(2, 16) % 270
    plain = forward(decoder(config, params), tokens)
    run = jax.jit(lambda rate: forward(dropping(config, params, jax.random.key(1), rate), tokens))
    # one program against another of the same sums in float32
    np.testing.assert_allclose(run(0.0), plain, atol=1e-5 * float(jnp.abs(plain).max()))
    assert float(jnp.abs(run(0.1) - plain).max()) > 1e-2 * float(jnp.abs(plain).max())


def test_eval_measures_the_package_and_refuses_another_text(finished, text_file, tmp_path, capsys):
    folder = finished[0] / "model"
    found = measure(str(folder), text_file)
    split = data.read_split(text_file, heldout_chars=TINY.heldout_chars, test_chars=TINY.test_chars)
    stored = load(str(folder))
    direct = evaluate.nats_per_char(forward, stored.model, stored.tokenizer.backend, split.test, TINY.context)
    assert found.loss == direct and found.chars == TINY.test_chars
    other = tmp_path / "other.txt"
    other.write_text(_text(seed=1))
    with pytest.raises(InputError, match="SHA-256"):
        measure(str(folder), other)
    assert measure(str(folder), other, any_text=True).loss != found.loss
    assert main(["eval", str(folder), "--text", str(text_file)]) == 0
    assert f"{found.loss:.4f} nats per character" in capsys.readouterr().out
    assert main(["eval", str(folder), "--text", str(text_file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"nats_per_character": found.loss, "characters": found.chars, "tokens": found.tokens}
    assert main(["eval", str(folder), "--text", str(other)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_record_names_the_command_that_made_it(finished, text_file):
    record = package.read_record(finished[0] / "model")
    assert record["settings"] == dataclasses.asdict(TINY)
    assert "--steps 12" in record["command"] and "--seed" not in record["command"]
    card = (finished[0] / "model" / "README.md").read_text()
    assert record["text"]["sha256"] in card and record["command"] in card
    assert json.loads((finished[0] / "model" / "config.json").read_text())["tie_word_embeddings"] is True


def test_the_command_line_tells_errors_in_one_line(tmp_path, capsys):
    assert main(["lm", "--text", str(tmp_path / "none.txt"), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert main(["lm", "--text", str(short), "--out", str(tmp_path)]) == 1
    assert "too few" in capsys.readouterr().err
