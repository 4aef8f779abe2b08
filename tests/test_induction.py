"""The copying task and its bundled model: it copies with its cache, and not without what the cache should keep."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FULL, tiny

import kvjax
from kvjax import InputError, caches
from kvjax.checkpoint.source import BUNDLED
from kvjax.testing import induction
from kvjax.train import induction as training
from kvjax.train import package
from kvjax.train.measure import measure

ROWS, LENGTH = 8, 192
WIDE = dataclasses.replace(FULL, max_positions=256)
CHANCE = 1 / induction.PERIODS[0]
"""Of a model that knows the block and not its order."""


@pytest.fixture(scope="module")
def model():
    return induction.induction_model()


def accuracy(model, plan, **options):
    return induction.copy_accuracy(model, plan, rows=ROWS, length=LENGTH, **options)


@pytest.mark.corner
def test_the_bundled_model_copies_from_a_dense_cache_and_not_from_a_ring_that_is_too_short(model):
    assert accuracy(model, caches.dense()) >= 0.99
    assert accuracy(model, caches.dense(), seed=1) >= 0.99
    assert accuracy(model, caches.ring(12)) < 2 * CHANCE


def test_every_token_from_the_second_repeat_on_is_copied_without_a_cache_too(model):
    nats, right = induction.copy_loss(model, *induction.copy_task(induction.EVALUATION_SEED, 16, 256))
    assert nats < 0.1 and right >= 0.99
    nats, right = induction.copy_loss(tiny(WIDE), *induction.copy_task(induction.EVALUATION_SEED, 16, 256))
    assert nats > 3 and right < 2 * CHANCE


def test_a_prefill_in_chunks_copies_as_well(model):
    assert accuracy(model, caches.dense(), chunk=32) == accuracy(model, caches.dense())


def test_what_follows_is_what_followed_before():
    tokens, follows = induction.copy_task(3, 50, 200)
    periods = 199 - follows.sum(axis=1)
    assert set(periods) > {16, 48} - {16, 48} and 16 <= periods.min() and periods.max() <= 48
    for row, seen in zip(tokens, follows, strict=True):
        for t in np.flatnonzero(seen):
            before = np.flatnonzero(row[: t - 1] == row[t - 1])
            assert set(row[before + 1]) == {row[t]}
        assert not np.isin(row[~seen][1:-1], row[0]).any(), "and nothing is determined before"
    again, other = (induction.copy_task(seed, 50, 200)[0] for seed in (3, 4))
    assert (again == tokens).all() and (other != tokens).any()


def test_predictions_are_those_of_a_model_without_a_cache(model):
    tokens, _ = induction.copy_task(5, ROWS, LENGTH)
    found = np.asarray(induction.predictions(model, caches.dense(), tokens))
    wanted = np.asarray(kvjax.forward(model, tokens[:, :-1]))[:, induction.PROMPT - 1 :]
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, atol=2e-5 * largest)  # float32 sums in another order, two layers
    assert np.abs(found[:, :-1] - wanted[:, 1:]).max() > 0.1 * largest  # a prediction for another token


def test_divergence_is_nothing_for_dense_and_much_for_a_lost_cache(model):
    tokens, _ = induction.copy_task(induction.EVALUATION_SEED, ROWS, LENGTH)
    assert abs(induction.divergence(model, caches.dense(), tokens)) < 1e-6
    assert induction.divergence(model, caches.ring(12), tokens) > 1
    uniform = model.replace(params=jax.tree.map(jnp.zeros_like, model.params))
    assert abs(induction.divergence(uniform, caches.ring(12), tokens)) < 1e-6  # there is nothing to lose


def changed(model, name, by):
    """One layer's projection times `by`, without the division that makes up for it."""
    layers = dict(model.params["layers"])
    attn = dict(layers["1"]["attn"], qkv={"kernel": layers["1"]["attn"]["qkv"]["kernel"] * by})
    layers["1"] = dict(layers["1"], attn=attn)
    return model.replace(params=dict(model.params, layers=layers))


@pytest.mark.parametrize("pair", [0, 7])
def test_a_planted_outlier_leaves_the_function_as_it_is(model, pair):
    tokens, _ = induction.copy_task(5, ROWS, LENGTH)
    plain = np.asarray(kvjax.forward(model, tokens))
    planted = induction.plant_outlier(model, 1, pair)
    keys = lambda m: np.asarray(m.params["layers"]["1"]["attn"]["qkv"]["kernel"])  # noqa: E731
    ratio = keys(planted) / keys(model)
    c = model.config
    at = c.query_heads * c.head_dim
    assert np.allclose(ratio[:, at + pair], 20) and np.allclose(ratio[:, at + pair + c.head_dim // 2], 20)
    assert np.allclose(ratio[:, pair], 1 / 20) and np.allclose(ratio[:, -c.kv_heads * c.head_dim :], 1)
    assert (~np.isclose(ratio, 1)).any(axis=0).sum() == 2 * (c.query_heads + c.kv_heads)
    # two more roundings of each product of a score
    np.testing.assert_allclose(kvjax.forward(planted, tokens), plain, atol=2e-5 * np.abs(plain).max())
    broken = changed(model, "qkv", np.where(np.isclose(ratio[0], 1 / 20), 1.0, ratio[0])[None, :])
    assert np.abs(np.asarray(kvjax.forward(broken, tokens)) - plain).max() > 1e-2 * np.abs(plain).max()


@pytest.mark.parametrize("layer, pair, factor", [(2, 0, 20.0), (0, 8, 20.0), (0, -1, 20.0), (0, 0, 0.0)])
def test_an_outlier_that_has_no_place_is_refused(model, layer, pair, factor):
    with pytest.raises(InputError, match=r"layer \S+ of 2, pair \S+ of 8"):
        induction.plant_outlier(model, layer, pair, factor)


def test_a_model_with_norms_of_its_keys_has_no_outlier():
    with pytest.raises(InputError, match="qk_norm"):
        induction.plant_outlier(tiny(dataclasses.replace(FULL, qk_norm=kvjax.config.RMSNorm())), 0, 0)


@pytest.mark.parametrize("prompt, chunk", [(0, None), (LENGTH, None), (8, 0)])
def test_a_prompt_that_leaves_nothing_is_refused(model, prompt, chunk):
    with pytest.raises(InputError, match="prompt"):
        induction.predictions(model, caches.dense(), np.zeros((1, LENGTH), np.int32), prompt=prompt, chunk=chunk)


class Letters:
    """A tokenizer of one letter a token, two for what the vocabulary lacks."""

    def encode(self, text):
        return [0] + [i for letter in text for i in ([ord(letter) - 31] if ord(letter) > 96 else [1, 2])]

    def decode(self, ids):
        return "".join(chr(max(i, 1) + 31) for i in ids)


def test_nats_per_character_are_those_of_the_scored_halves():
    lm = kvjax.LM(tiny(FULL), Letters(), bos_id=0)
    text = "before we proceed any further, hear me speak. " * 4
    found = induction.nats_per_char(lm, caches.dense(), text, context=32, rows=4)
    ids = np.array(lm.encode(text)[1:])
    count = (len(ids) - 16) // 16 // 4 * 4
    tokens = np.array([[0, *ids[at : at + 32]] for at in range(0, count * 16, 16)])
    logits = np.asarray(jax.nn.log_softmax(kvjax.forward(lm.model, tokens[:, :-1]), axis=-1))
    nats = -np.take_along_axis(logits[:, 16:], tokens[:, 17:, None], axis=-1).astype(np.float64)
    assert found == pytest.approx(nats.sum() / (16 * count), rel=1e-5)  # float32 logits
    other = -np.take_along_axis(logits[:, 15:-1], tokens[:, 16:-1, None], axis=-1)
    assert found != pytest.approx(other.sum() / (16 * count), rel=1e-3)  # the window one token further back
    with pytest.raises(InputError, match="too few"):
        induction.nats_per_char(lm, caches.dense(), text[:40], context=32, rows=4)


SMALL = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn": 16}
TINY = dataclasses.replace(
    training.SETTINGS, steps=8, warmup=2, block=4, eval_every=4, batch=2, micro=2, context=80, **SMALL
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LENGTHS", (72,))
        return out, training.train(out, TINY, quiet=True)


@pytest.mark.full
def test_a_run_lowers_the_loss_and_leaves_a_package_without_a_tokenizer(trained):
    out, progress = trained
    assert progress.history[-1]["loss"] < progress.history[0]["loss"] + 0.05 and progress.best_step in (4, 8)
    lm = kvjax.load(out / "model")
    assert lm.tokenizer is None and lm.eos_ids == () and lm.bos_id is None
    assert lm.model.config.max_positions == 80
    record = package.read_record(out / "model")
    assert record["command"] == "python -m kvjax.train induction --out DIR --steps 8"
    assert record["command"] in (out / "model" / "README.md").read_text()
    with pytest.raises(InputError, match="not trained on a text"):
        measure(str(out / "model"), Path("any.txt"))


def test_training_and_evaluation_never_read_the_same_text():
    held = {tuple(row) for row in induction.copy_task(training.HELDOUT_SEED, 64, 64)[0]}
    held |= {tuple(row) for row in induction.copy_task(induction.EVALUATION_SEED, 64, 64)[0]}
    read = {tuple(row) for step in range(0, 200, 20) for row in induction.copy_task((0, 1 + step), 320, 64)[0]}
    assert len(held) == 128 and not held & read


def test_the_bundled_model_is_small_and_says_how_it_was_made():
    folder = BUNDLED / "induction"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000
    record = package.read_record(folder)
    assert record["settings"] == dataclasses.asdict(training.SETTINGS) and min(record["copy_accuracy"].values()) >= 0.99
    assert record["task"]["evaluation_seed"] == induction.EVALUATION_SEED
    lm = kvjax.load("induction")
    assert lm.tokenizer is None and lm.model.config.vocab_size == induction.VOCAB
    with pytest.raises(InputError, match="no tokenizer"):
        lm.encode("To be")
