"""The transliterator: what a run reads, that an interrupt changes nothing, what an answer is worth, and the bundled
model's own figures."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caching import encode
from kvjax.checkpoint.source import BUNDLED
from kvjax.errors import CheckpointError, InputError
from kvjax.lm import load
from kvjax.loops.beam import beam
from kvjax.loops.host import generate
from kvjax.model import decoder
from kvjax.train import accuracy, loop, package, pairs, seq2seq
from kvjax.train.__main__ import main
from kvjax.train.dropout import dropping

TINY = seq2seq.Settings(
    steps=24,
    batch=8,
    positions=12,
    width=16,
    encoder_layers=1,
    decoder_layers=1,
    heads=2,
    ffn=16,
    lr=1e-2,
    warmup=2,
    heldout=20,
    block=4,
    eval_every=8,
)
NAME = "ar2en"
HELDOUT = Path(__file__).parent / "golden" / "ar2en-heldout.txt"
"""Every fourth of the pairs that chose the checkpoint (google/transliteration, Apache License 2.0)."""
BOUND = 0.25
"""What the character error rate of the bundled model must not pass."""


def _pairs(count: int = 120) -> list[pairs.Pair]:
    """A cipher: a is written α, and so on."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(8, size=rng.integers(2, 7)) for _ in range(count)]
    return [("".join("αβγδεζηθ"[i] for i in row), "".join("abgdezht"[i] for i in row)) for row in rows]


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "cipher.txt"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in _pairs()), encoding="utf-8")
    return path


def _train(pair_file, out, settings=TINY):
    """Without the searches of the end: they compile programs, and the bundled package is measured below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "measure", lambda lm, wanted: {"greedy": accuracy.Accuracy(0.0, 1.0)})
        return seq2seq.train(pair_file, out, settings, quiet=True)


@pytest.fixture(scope="module")
def finished(pair_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, _train(pair_file, out)


@pytest.fixture(scope="module")
def bundled():
    return load(NAME)


def _leaves(progress):
    return [np.asarray(x) for x in jax.tree.leaves((progress.state, progress.best))]


def _vocab(pair_file):
    return pairs.character_tokenizer(pairs.split_pairs(pair_file, TINY.heldout).train).get_vocab_size()


def test_a_few_steps_lower_the_loss_and_leave_a_loadable_package(finished):
    out, progress = finished
    assert progress.history[-1]["heldout"] < progress.history[0]["heldout"] - 0.05
    assert progress.history[-1]["loss"] < progress.history[0]["loss"]
    model = load(str(out / "model")).model
    assert jax.tree.structure(model.params) == jax.tree.structure(progress.best)
    for stored, best in zip(jax.tree.leaves(model.params), jax.tree.leaves(progress.best), strict=True):
        # float16 keeps 11 bits of each number above its subnormals (2**-14)
        np.testing.assert_allclose(np.asarray(stored), best, rtol=2**-11, atol=2**-25)


def test_an_interrupted_run_ends_bitwise_where_an_unbroken_one_does(finished, pair_file, tmp_path, monkeypatch):
    run, calls = seq2seq.train_block(TINY, _vocab(pair_file)), iter(range(3))

    def interrupted(state, batches):
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return run(state, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(seq2seq, "train_block", lambda *_: interrupted)
        _train(pair_file, tmp_path)
    sha256 = hashlib.sha256(pair_file.read_bytes()).hexdigest()
    assert int(loop.load(tmp_path / loop.CHECKPOINT, TINY, _vocab(pair_file), sha256).state.step) == 12
    assert not (tmp_path / "model").exists()
    with pytest.raises(CheckpointError, match=r"lr 0\.01 there, 0\.02 here"):
        _train(pair_file, tmp_path, dataclasses.replace(TINY, lr=0.02))
    resumed = _train(pair_file, tmp_path)
    for ours, theirs in zip(_leaves(resumed), _leaves(finished[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert resumed.history == finished[1].history


def test_every_pair_is_read_once_before_any_is_read_again(pair_file):
    split = pairs.split_pairs(pair_file, TINY.heldout)
    tokenizer = pairs.character_tokenizer(split.train)
    rows = pairs.rows_of(tokenizer, split.train, TINY.positions)

    def read(seed, step, steps):
        batches = pairs.block_of_batches(rows, seed=seed, step=step, steps=steps, batch=4)
        return sorted(
            tokenizer.decode(source[:n].tolist()) + " " + tokenizer.decode(target[: m - 1].tolist())
            for x in batches
            for source, n, target, m in zip(x.source, x.source_valid, x.wanted, x.target_valid, strict=True)
        )

    assert len(split.train) == 100 and len(split.heldout) == 20
    once = sorted(" ".join(pair) for pair in split.train)
    assert read(0, 0, 25) == once == read(0, 25, 25) == read(1, 0, 25)
    assert sorted(read(0, 0, 10) + read(0, 10, 15)) == once
    assert read(0, 0, 10) != read(1, 0, 10) and read(0, 0, 10) != read(0, 25, 10)


def test_columns_of_padding_change_no_loss(pair_file):
    split = pairs.split_pairs(pair_file, TINY.heldout)
    tokenizer = pairs.character_tokenizer(split.train)
    rows = pairs.rows_of(tokenizer, split.train[:6], TINY.positions)
    config = TINY.config(tokenizer.get_vocab_size())
    model = decoder(config, TINY.initial_state(config.vocab_size).params)
    columns = int(max(rows.source_valid.max(), rows.target_valid.max()))
    narrow = rows.cut(np.arange(6), columns)
    wide = seq2seq.loss(model, rows, 0.1)
    # float32 sums of other lengths
    np.testing.assert_allclose(seq2seq.loss(model, narrow, 0.1), wide, rtol=1e-6)
    # the controls: a padded column that counts, and a longer source, are seen
    more = rows._replace(target_valid=rows.target_valid + 1)
    assert abs(float(seq2seq.loss(model, more, 0.1) - wide)) > 1e-4
    more = rows._replace(source_valid=rows.source_valid + 1)
    assert abs(float(seq2seq.loss(model, more, 0.1) - wide)) > 1e-4


def test_a_uniform_model_costs_log_v_a_token_whatever_is_smoothed(pair_file):
    split = pairs.split_pairs(pair_file, TINY.heldout)
    tokenizer = pairs.character_tokenizer(split.train)
    rows = pairs.rows_of(tokenizer, split.train[:6], TINY.positions)
    config = TINY.config(tokenizer.get_vocab_size())
    params = jax.tree.map(jnp.zeros_like, TINY.initial_state(config.vocab_size).params)
    uniform = decoder(config, params)
    for smoothing in (0.0, 0.3):
        assert float(seq2seq.loss(uniform, rows, smoothing)) == pytest.approx(math.log(config.vocab_size), rel=1e-6)
    assert seq2seq.nats_per_token(uniform, rows) == pytest.approx(math.log(config.vocab_size), rel=1e-6)
    params["head"]["bias"] = params["head"]["bias"].at[pairs.EOS_ID].set(1.0)
    assert seq2seq.nats_per_token(uniform, rows) != pytest.approx(math.log(config.vocab_size), rel=1e-3)


def test_dropout_at_rate_zero_is_the_library_with_an_encoder_too(pair_file):
    split = pairs.split_pairs(pair_file, TINY.heldout)
    tokenizer = pairs.character_tokenizer(split.train)
    rows = pairs.rows_of(tokenizer, split.train[:6], TINY.positions)
    config = TINY.config(tokenizer.get_vocab_size())
    params = TINY.initial_state(config.vocab_size).params

    def both(model):
        return seq2seq.log_probabilities(model, rows)[0], encode(model, rows.source, rows.source_valid).states

    run = jax.jit(lambda rate: both(dropping(config, params, jax.random.key(1), rate)))
    for plain, kept, dropped in zip(both(decoder(config, params)), run(0.0), run(0.1), strict=True):
        # one program against another of the same sums in float32
        np.testing.assert_allclose(kept, plain, atol=1e-5 * float(jnp.abs(plain).max()))
        assert float(jnp.abs(dropped - plain).max()) > 1e-2 * float(jnp.abs(plain).max())


def test_characters_are_tokens_and_marks_are_none():
    tokenizer = pairs.character_tokenizer([("محمد", "muhammad"), ("آنا", "anna")])
    assert tokenizer.encode(" مُحَمَّــد\u200f").tokens == list("محمد")
    assert tokenizer.encode("ا\u0653نا").tokens == list("آنا")
    assert tokenizer.decode(tokenizer.encode("HAnna").ids) == "hanna"
    assert tokenizer.encode("x").ids == [pairs.UNKNOWN_ID]


def test_lines_that_are_no_pairs_are_refused(tmp_path):
    path = tmp_path / "bad.txt"
    for text, message in (("α\ta\nβ b\n", "line 2"), ("α\t\n", "line 1"), ("", "no pairs"), ("α\ta\n", "too few")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            seq2seq.train(path, tmp_path, TINY, quiet=True)
    path.write_text("α\t" + "a" * 12 + "\n" + "α\ta\n" * 60, encoding="utf-8")
    with pytest.raises(InputError, match="12 characters; the model takes 1 to 11"):
        seq2seq.train(path, tmp_path, dataclasses.replace(TINY, heldout=2), quiet=True)


@pytest.mark.parametrize(
    ("a", "b", "edits"), [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)]
)
def test_distance_counts_edits(a, b, edits):
    assert accuracy.distance(a, b) == accuracy.distance(b, a) == edits


def test_accuracy_is_over_all_characters():
    found = accuracy.accuracy(["anna", "ben"], ["anna", "bean"])
    assert found == (0.5, 1 / 8)


def test_the_record_names_the_command_that_made_it(finished):
    record = package.read_record(finished[0] / "model")
    assert record["settings"] == dataclasses.asdict(TINY)
    assert "--steps 24" in record["command"] and "--seed" not in record["command"]
    card = (finished[0] / "model" / "README.md").read_text("utf-8")
    assert record["pairs"]["sha256"] in card and record["command"] in card
    assert "| held out | greedy | 0.0000 | 1.0000 |" in card


@pytest.mark.corner
def test_the_bundled_package_is_small_and_knows_names_that_it_has_not_seen(bundled):
    assert sum(path.stat().st_size for path in (BUNDLED / NAME).iterdir()) <= 2_000_000
    wanted = pairs.read_pairs(HELDOUT)
    sources, targets = [x for x, _ in wanted], [y for _, y in wanted]
    answers = accuracy.answer(bundled, sources, beam(accuracy.BEAMS))
    assert accuracy.accuracy(answers, targets).errors <= BOUND
    # the control: the same answers, for other names
    assert accuracy.accuracy(answers, targets[1:] + targets[:1]).errors > 2 * BOUND


def test_a_name_that_is_written_in_several_ways_has_several_candidates(bundled):
    names = {"ماريا": "maria", "سميث": "smith", "آنا": "anna", "أوباما": "obama", "عبدالله": "abdallah"}
    rows = list(names) + ["آنا"] * (accuracy.BATCH - len(names))  # the program of the test above
    out = generate(bundled, rows, algorithm=beam(accuracy.BEAMS, returned=accuracy.BEAMS))
    assert out.candidates is not None
    for (source, wanted), row in zip(names.items(), out.candidates[: len(names)], strict=True):
        texts = [candidate.text for candidate in row]
        assert wanted in texts and len(set(texts)) == accuracy.BEAMS, source


def test_eval_measures_a_package_and_records_it(tmp_path, capsys):
    folder = shutil.copytree(BUNDLED / NAME, tmp_path / NAME)
    assert main(["eval", str(folder), "--text", str(HELDOUT), "--record"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = package.read_record(folder)["accuracy"][HELDOUT.name]
    card = (folder / "README.md").read_text("utf-8")
    for line, (search, one) in zip(lines, found.items(), strict=True):
        assert line.startswith(f"{search}: {one['exact']:.4f} exact, character error rate {one['errors']:.4f}")
        assert f"| {HELDOUT.name} | {search} | {one['exact']:.4f} | {one['errors']:.4f} |" in card
    assert 0.0 < found["beam 4"]["errors"] <= BOUND and set(found) == {"greedy", "beam 4"}


@pytest.mark.full
def test_the_evaluation_file_comes_out_as_the_card_says(bundled):
    if not os.environ.get("KVJAX_CORPUS"):
        pytest.skip("KVJAX_CORPUS names no folder that holds ar2en/ar2en-eval.txt")
    wanted = pairs.read_pairs(Path(os.environ["KVJAX_CORPUS"]) / "ar2en" / "ar2en-eval.txt")
    found = accuracy.measure(bundled, wanted)
    recorded = package.read_record(BUNDLED / NAME)["accuracy"]["ar2en-eval.txt"]
    assert found["beam 4"].errors <= BOUND
    for search, one in recorded.items():
        # a tie that another machine breaks otherwise moves a few of 9,659 characters
        assert found[search].errors == pytest.approx(one["errors"], abs=1e-3)
