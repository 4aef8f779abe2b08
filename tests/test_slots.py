"""The primitive under every cache: tokens go to their slots, those without a slot are dropped; jit equals eager."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.caches import storage

put = jax.jit(storage.put)
SHAPES = [(1, 1, 6, 1), (1, 1, 6, 3), (1, 2, 6, 1), (3, 1, 6, 1), (3, 2, 6, 1), (3, 2, 6, 4), (2, 1, 5, 4)]
"""Rows, heads, slots, new tokens: every way that storage lays a buffer out or writes it."""


def reference(buffer, x, slots):
    """`[B, K, T, D]` with NumPy."""
    out = buffer.copy()
    for row, places in enumerate(slots):
        for token, slot in enumerate(places):
            if 0 <= slot < out.shape[2]:
                out[row, :, slot] = x[row, token]
    return out


@st.composite
def writes(draw):
    b, k, t, s = draw(st.sampled_from(SHAPES))
    wild = st.sampled_from([t, t + 1, 2**31 - 1, -1, -t, -(2**31)])
    rows = []
    for _ in range(b):
        inside = draw(st.permutations(range(t)))[:s]
        rows.append([draw(wild) if draw(st.booleans()) else slot for slot in inside])
    return (b, k, t, s), np.array(rows, np.int32), draw(st.integers(0, 2**31))


@pytest.mark.corner
@settings(max_examples=80, deadline=None, derandomize=True)
@given(writes())
def test_put_writes_what_has_a_slot_and_drops_the_rest(write):
    (b, k, t, s), slots, seed = write
    rng = np.random.default_rng(seed)
    old = rng.normal(size=(b, k, t, 2)).astype(np.float32)
    new = rng.normal(size=(b, s, k, 2)).astype(np.float32)
    want = reference(old, new, slots)
    buffer = storage.repack(jnp.asarray(old))
    assert buffer.shape == storage.empty(b, k, t, (2,), jnp.float32).shape
    got = put(buffer, new, slots)
    np.testing.assert_array_equal(storage.unpack(got, k, 1), want)
    np.testing.assert_array_equal(storage.put(buffer, jnp.asarray(new), jnp.asarray(slots)), got)


@pytest.mark.parametrize(("batch", "heads", "width"), [(3, 2, 2), (1, 2, 2), (1, 1, 2), (2, 1, 128)])
@pytest.mark.parametrize("pages", [False, True])
def test_put_as_a_tpu_does_it_writes_the_same(monkeypatch, batch, heads, width, pages):
    rng = np.random.default_rng(0)
    count = 4 if pages else batch
    buffer = storage.repack(jnp.asarray(rng.normal(size=(count, heads, 256, width)).astype(np.float32)))
    new = jnp.asarray(rng.normal(size=(batch, 1, heads, width)).astype(np.float32))
    slots = np.array([[200], [255], [2**31 - 1]], np.int32)[:batch]
    rows = jnp.asarray(np.array([[3], [0], [-1]], np.int32)[:batch]) if pages else None
    for places in (slots, slots[::-1] % 256, -slots):
        monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
        want = storage.put(buffer, new, jnp.asarray(places), rows)
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        np.testing.assert_array_equal(storage.put(buffer, new, jnp.asarray(places), rows), want)
        assert (places < 0).all() or (want != buffer).any()


@pytest.mark.corner
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_sizes_move_as_in_numpy(shape):
    b, k, t, _ = shape
    old = np.random.default_rng(0).normal(size=(b, k, t, 2)).astype(np.float32)
    buffer = storage.repack(jnp.asarray(old))
    for rows in ([0], [b - 1, 0], [0] * 3):
        want = old[rows]
        for take in (storage.take, jax.jit(storage.take, static_argnums=(2, 3))):
            np.testing.assert_array_equal(storage.unpack(take(buffer, jnp.array(rows), k, 1), k, 1), want)
    for slots in (1, t, t + 3):
        want = np.pad(old, ((0, 0), (0, 0), (0, max(slots - t, 0)), (0, 0)))[:, :, :slots]
        for resize in (storage.resize, jax.jit(storage.resize, static_argnums=(1, 2))):
            np.testing.assert_array_equal(storage.unpack(resize(buffer, slots, 1), k, 1), want)
    new = old.swapaxes(1, 2)
    np.testing.assert_array_equal(storage.pack(jnp.asarray(new)), buffer)
