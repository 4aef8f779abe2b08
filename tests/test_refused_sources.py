"""What cannot be a source, or is no longer one: said on the host, and under `jit` never forgotten."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import caches
from kvjax.caches.flags import COUNT, NO_SOURCE, ROWS
from kvjax.errors import CacheError, InputError
from kvjax.ops.positions import Relative
from kvjax.testing.cases import RELATIVE, VOCAB, tiny

MODEL = tiny(RELATIVE)


def ids(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, columns)).astype(np.int32)


@pytest.fixture(scope="module")
def shared():
    """Two sources that two rows each read, and a prompt of five tokens in each row."""
    source = kvjax.encode(MODEL, ids(2, 7), np.array([7, 3]))
    cache = kvjax.init_cache(MODEL, source=source, batch=4, capacity=16)
    return source, kvjax.prefill(MODEL, cache, ids(4, 5))[1]


def test_more_real_tokens_than_columns_are_flagged_and_padding_is_not_taken_for_text():
    tokens = ids(2, 9)
    source = jax.jit(lambda valid: kvjax.encode(MODEL, tokens, valid))(jnp.array([12, 9]))
    assert source.flags.tolist() == [COUNT | NO_SOURCE, 0]
    good = kvjax.encode(MODEL, tokens)
    cache = kvjax.init_cache(MODEL, source=good, capacity=32)
    after = jax.jit(lambda valid: kvjax.prefill(MODEL, cache, tokens, valid)[1])(jnp.array([12, 9]))
    assert after.flags.tolist() == [COUNT, 0] and after.lengths.tolist() == [0, 9]


def test_a_row_that_strays_to_another_source_stays_flagged_after_a_rewind(shared):
    _, cache = shared
    stray = jax.jit(lambda cache, rows: cache.reorder(rows))(cache, jnp.array([2, 1, 2, 3]))
    assert stray.flags.tolist() == [ROWS, 0, 0, 0]
    logits, again = kvjax.step(MODEL, stray.rewind(4), ids(4, 1)[:, 0])
    assert bool(again.flags[0]) and np.isnan(logits[0]).all() and np.isfinite(logits[1:]).all()
    with pytest.raises(CacheError, match="another"):
        cache.reorder([2, 1, 2, 3])


@pytest.mark.parametrize("forget", [lambda cache: cache.rewind(0), lambda cache: cache.release([1])])
def test_a_row_from_nowhere_has_no_source_also_when_its_text_is_dropped(shared, forget):
    _, cache = shared
    taken = forget(jax.jit(lambda cache, rows: cache.take(rows))(cache, jnp.array([0, 9])))
    logits, after = kvjax.step(MODEL, taken, ids(2, 1)[:, 0])
    assert after.flags.tolist() == [0, NO_SOURCE] and np.isnan(logits[1]).all() and np.isfinite(logits[0]).all()


STATES = jnp.ones((2, 6, RELATIVE.encoder.width))
GOOD = kvjax.Source(STATES, jnp.array([6, 2]), jnp.zeros((2,), jnp.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": jnp.array([0, 2])}, "row 0 of the source has length 0, not from 1 to 6"),
        ({"lengths": jnp.array([6, 7])}, "row 1 of the source has length 7"),
        ({"lengths": jnp.array([6])}, r"lengths of the source are int32\[1\], not int32\[2\]"),
        ({"lengths": jnp.array([6.0, 2.0])}, "lengths of the source are float32"),
        ({"lengths": [6, 2]}, "lengths of the source is no array"),
        ({"states": STATES[0]}, "states of the source"),
        ({"states": STATES.astype(jnp.int32)}, "states of the source"),
        ({"states": STATES[..., :3]}, "width 3"),
    ],
)
def test_a_source_made_by_hand_is_looked_at(change, message):
    source = dataclasses.replace(GOOD, **change)
    for use in (
        lambda: kvjax.init_cache(MODEL, source=source, capacity=8),
        lambda: kvjax.forward(MODEL, ids(2, 3), source=source),
    ):
        with pytest.raises(InputError, match=message):
            use()
    with pytest.raises(InputError, match="must be a kvjax.Source"):
        kvjax.init_cache(MODEL, source=STATES, capacity=8)


def test_under_jit_its_rows_are_flagged_and_its_padding_counts_for_nothing():
    @jax.jit
    def fed(source):
        cache = kvjax.init_cache(MODEL, cross=caches.encoder_output(store=jnp.float16), source=source, capacity=8)
        return kvjax.prefill(MODEL, cache, jnp.asarray(ids(2, 3)))[1].flags

    bad = GOOD.replace(lengths=jnp.array([7, 2]), states=STATES.at[1, 2:].set(1e6))
    assert fed(bad).tolist() == [NO_SOURCE, 0]
    assert bool(fed(GOOD.replace(states=STATES.at[1, 1].set(1e6)))[1])
    assert np.isnan(jax.jit(kvjax.forward)(MODEL, jnp.asarray(ids(2, 3)), source=bad)[0]).all()


@pytest.mark.parametrize("layers", [(0, 0), (0, 7)])
def test_a_model_that_reads_its_source_twice_or_at_no_layer_of_its_own_is_told_so(layers):
    def apply(params, config, cache, tokens, valid):
        x = params[tokens]
        y, cache = kvjax.attend(cache, 0, q=x[:, :, None], kv=(x[:, :, None],) * 2)
        for layer in layers:
            y = y + kvjax.cross_attend(cache, layer, q=y, kv=lambda states: (states[:, :, None],) * 2)
        return y[:, :, 0] @ params.T, cache

    model = kvjax.Model(jnp.ones((5, RELATIVE.encoder.width)), None, apply)
    with pytest.raises(InputError, match="twice at layer 0|at layer 7, but it has 1 layers"):
        kvjax.init_cache(model, source=GOOD, capacity=8)


@pytest.mark.parametrize(
    ("options", "said"), [((16, 8), "8 distances"), ((1, 9), "at least 2"), ((2, 9, True), "even")]
)
def test_buckets_of_distances_must_be_possible(options, said):
    with pytest.raises(InputError, match=said):
        Relative(*options)
