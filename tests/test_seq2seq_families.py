"""T5, BART, mBART and MarianMT agree with Hugging Face Transformers, with and without a cache (tests/golden)."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import caches
from kvjax.lm import load, read_config

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import parity
from parity import cases

NAMES = [case.name for case in cases.SEQ2SEQ]
CHUNKS = (9, 30)  # fed at once; the rest of the random tokens step by step
LIMIT = 2 * parity.TOLERANCE  # through a cache sums run in another order, on models chosen to be sensitive


@functools.cache
def golden(name):
    return parity.read(name)


def model_of(name, seed, folder):
    parity.write_folder(folder, golden(name)[0], seed)
    return load(folder, strict=True).model


def compared(model, name, seed=0, change=lambda source: source):
    meta, arrays = golden(name)
    source = change(kvjax.encode(model, *parity.sources(meta, seed)))
    return parity.compare(kvjax.forward(model, *parity.batch(arrays, seed, meta), source=source), arrays, seed)


def assert_parity(model, name, seed):
    error, same = compared(model, name, seed)
    assert error <= parity.TOLERANCE, f"max|d|/max|logit| {error:.1e}"
    assert same, "greedy ids differ"


@pytest.mark.parametrize("name", ["t5", "t5_v11", "bart", "marian"])
def test_logits_of_ragged_targets_and_sources_equal_the_reference_at_every_position(name, tmp_path):
    assert_parity(model_of(name, 0, tmp_path), name, 0)


@pytest.mark.full
@pytest.mark.parametrize("seed", cases.SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_reference_at_every_seed(name, seed, tmp_path):
    assert_parity(model_of(name, seed, tmp_path), name, seed)


def rows_of(model, name, seed, rows, plan, cross, capacity):
    """An empty cache over the sources of these rows of `parity.batch`."""
    tokens, lengths = parity.sources(golden(name)[0], seed)
    source = kvjax.encode(model, tokens[rows], lengths[rows])
    return kvjax.init_cache(model, plan, source=source, cross=cross, capacity=capacity)


def assert_greedy(model, name, seed, plan=None, cross=None):
    """64 greedy steps after a forced prefix, beside a row with another source and another prefix."""
    meta, arrays = golden(name)
    random, ragged = parity.texts(meta, seed)
    cache = rows_of(model, name, seed, [1, 2], plan, cross, cases.PROMPT + cases.STEPS)
    logits, cache = kvjax.prefill(model, cache, *parity.padded([random[: cases.PROMPT], ragged[0]]))
    found, _, cache = kvjax.decode(model, cache, logits, steps=cases.STEPS)
    np.testing.assert_array_equal(found[0], arrays[f"{seed}/greedy_ids"])
    cache.check()


def test_sixty_four_greedy_steps_after_a_forced_prefix_equal_the_reference(tmp_path):
    assert_greedy(
        model_of("marian_separate", 0, tmp_path), "marian_separate", 0, cross=caches.encoder_output(absorb=True)
    )


@pytest.mark.full
@pytest.mark.parametrize("seed", cases.SEEDS)
@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_greedy_steps_at_every_seed_equal_the_reference(name, seed, tmp_path):
    assert_greedy(model_of(name, seed, tmp_path), name, seed)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "plan", "cross"),
    [
        ("t5_v11", caches.paged(8), caches.encoder_output(absorb=True)),
        ("bart", caches.recompute(), caches.encoder_output()),
    ],
    ids=["paged-absorbed", "none-again"],
)
def test_greedy_steps_through_other_kinds_equal_the_reference(name, plan, cross, tmp_path):
    assert_greedy(model_of(name, 1, tmp_path), name, 1, plan, cross)


def assert_chunks(model, name, plan, cross):
    """The random tokens and a ragged row, in two chunks and then step by step, against the reference's logits."""
    meta, arrays = golden(name)
    random, ragged = parity.texts(meta, 0)
    cache = rows_of(model, name, 0, [0, 4], plan, cross, cases.RANDOM)
    expected, found, last = arrays["0/random"], [], None
    texts = np.zeros((2, cases.RANDOM), np.int32)
    texts[0], texts[1, : len(ragged[2])] = random, ragged[2]
    start = 0
    for stop in (*np.cumsum(CHUNKS), *range(sum(CHUNKS) + 1, cases.RANDOM + 1)):
        left = max(0, min(stop, len(ragged[2])) - start)  # the other row ends before this one
        logits, cache = kvjax.prefill(model, cache, texts[:, start:stop], np.array([stop - start, left], np.int32))
        found.append((stop - 1, np.asarray(logits[0])))
        last = np.asarray(logits[1]) if left else last
        start = stop
    pairs = [(logits, expected[place]) for place, logits in found] + [(last, arrays["0/ragged"][2])]
    worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)
    assert worst <= LIMIT, f"max|d|/max|logit| {worst:.1e}"
    cache.check()


def test_chunks_and_steps_past_the_largest_distance_give_the_reference_logits(tmp_path):
    """T5: a query's distance to keys of its own chunk, of earlier ones and of sources far away."""
    assert_chunks(model_of("t5", 0, tmp_path), "t5", caches.dense(), caches.cross())


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("t5_v11", caches.paged(8)),
        ("t5", caches.layer_input(absorb=True)),
        ("mbart", caches.dense()),
    ],
)
def test_chunks_and_steps_through_other_kinds_give_the_reference_logits(name, plan, tmp_path):
    assert_chunks(model_of(name, 0, tmp_path), name, plan, caches.encoder_output(absorb=True))


def test_all_buckets_and_distances_beyond_the_largest_occur_in_what_is_compared():
    config = read_config(golden("t5")[0]["config"], strict=True)[1]
    for stack, length in ((config, cases.RANDOM), (config.encoder, cases.SOURCES[0])):
        positions, steps = stack.positions, np.arange(length)
        numbers = positions.bias({"table": jnp.arange(positions.buckets)[:, None]})
        ahead = steps[None, :] - steps[:, None]
        seen = ahead <= 0 if stack is config else ahead < length
        found = np.asarray(numbers(jnp.asarray(steps)[:, None], jnp.asarray(steps)[None, :])[0])[seen]
        never = {positions.buckets // 2} if positions.bidirectional else set()  # ahead by nothing
        assert set(found.tolist()) == set(range(positions.buckets)) - never
        assert length - 1 > positions.max_distance


# Negative controls: details that are easy to get wrong; each must fail the check that the right one passes.
def changed(model, **fields):
    return kvjax.decoder(dataclasses.replace(model.config, **fields), model.params)


def encoder_changed(model, **fields):
    return changed(model, encoder=dataclasses.replace(model.config.encoder, **fields))


def params_changed(model, path, change):
    params = jax.tree.map(lambda x: x, model.params)
    node = params
    for name in path.split("/")[:-1]:
        node = node[name]
    node[path.split("/")[-1]] = change(node[path.split("/")[-1]])
    return kvjax.decoder(model.config, params)


def buckets_of_the_encoder_in_the_decoder(model):
    return changed(model, positions=dataclasses.replace(model.config.positions, bidirectional=True))


def buckets_of_the_decoder_in_the_encoder(model):
    return encoder_changed(model, positions=dataclasses.replace(model.config.encoder.positions, bidirectional=False))


def largest_distance_one_more(model):
    positions = model.config.positions
    return changed(model, positions=dataclasses.replace(positions, max_distance=positions.max_distance + 1))


def unscaled_logits(model):
    return changed(model, logit_scale=1.0)


def exact_gelu(model):
    return changed(model, activation=kvjax.ops.activations.gelu)


def positions_without_offset(model):  # as if the first two rows of the table were not left out
    return params_changed(model, "positions/table", lambda table: jnp.roll(table, 1, axis=0))


def encoder_positions_without_offset(model):
    return params_changed(model, "encoder/positions/table", lambda table: jnp.roll(table, 1, axis=0))


def no_embedding_norm(model):
    return changed(model, embed_norm=False)


def no_logit_bias(model):
    return params_changed(model, "head/bias", jnp.zeros_like)


def unscaled_embedding(model):
    return changed(model, embed_scale=1.0)


def interleaved_waves(model):
    return changed(model, positions=dataclasses.replace(model.config.positions, interleaved=True))


def keys_and_values_of_the_source_swapped(model):
    return params_changed(model, "layers/1/cross/kv/kernel", lambda kernel: jnp.roll(kernel, kernel.shape[1] // 2, 1))


def norms_swapped(model):
    return params_changed(model, "layers/0/cross_norm", lambda _: model.params["layers"]["0"]["ffn_norm"])


full = functools.partial(pytest.param, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        full("t5", buckets_of_the_encoder_in_the_decoder),
        full("t5", buckets_of_the_decoder_in_the_encoder),
        full("t5", largest_distance_one_more),
        full("t5", unscaled_logits),
        full("t5_v11", exact_gelu),
        ("bart", positions_without_offset),
        ("bart", encoder_positions_without_offset),
        full("bart", no_embedding_norm),
        ("bart", no_logit_bias),
        ("bart", keys_and_values_of_the_source_swapped),
        ("bart", norms_swapped),
        full("marian", unscaled_embedding),
        full("marian_separate", interleaved_waves),
    ],
)
def test_the_parity_check_fails_for_a_model_with_one_wrong_detail(name, mutant, tmp_path):
    error, _ = compared(mutant(model_of(name, 0, tmp_path)), name)
    assert error > 2 * LIMIT


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_the_parity_check_fails_for_the_source_of_another_row_and_for_padding(name, tmp_path):
    model = model_of(name, 0, tmp_path)

    def padding_seen(source):
        return source.replace(lengths=jnp.full_like(source.lengths, source.states.shape[1]))

    def other_row(source):
        return jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), source)

    for change in (padding_seen, other_row):
        assert compared(model, name, change=change)[0] > 2 * LIMIT
