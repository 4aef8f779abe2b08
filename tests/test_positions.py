"""Kinds of positions against their formulas, written out number by number."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from naive import bucket

from kvjax.ops.attention import EMPTY
from kvjax.ops.positions import Relative, Sinusoidal


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (6, 7)])
def test_relative_positions_read_the_bucket_of_each_distance(both, buckets, far):
    kind = Relative(buckets, far, bidirectional=both)
    table = np.random.default_rng(0).normal(size=kind.shapes(16, 3)["table"]).astype(np.float32)
    query, key = np.arange(300), np.arange(300)
    found = np.asarray(kind.bias({"table": jnp.asarray(table)})(jnp.asarray(query)[:, None], jnp.asarray(key)[None]))
    want = np.array([[table[bucket(int(k - q), buckets, far, both)] for k in key] for q in query]).transpose(2, 0, 1)
    np.testing.assert_array_equal(found, want)
    used = {bucket(d, buckets, far, both) for d in range(-299, 300)}
    assert used == set(range(buckets)) - ({buckets // 2} if both else set()), "some bucket is never read"


def test_an_empty_slot_is_far_away_and_its_distance_does_not_overflow():
    kind = Relative(bidirectional=True)
    bias = kind.bias({"table": jnp.arange(32.0)[:, None]})
    assert bias(jnp.asarray([0, 5000]), jnp.asarray([EMPTY, EMPTY])).tolist() == [[31.0, 31.0]]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_are_those_of_the_paper(interleaved, width):
    at = np.array([[0, 1, 2, 700], [5, 6, 7, 8]], np.int32)
    kind = Sinusoidal(interleaved=interleaved)
    found = np.asarray(kind.embed({}, jnp.ones((2, 4, width)), jnp.asarray(at)))
    half = (width + 1) // 2
    for row, column in np.ndindex(at.shape):
        for i in range(width):
            wave = i // 2 if interleaved else i % half
            angle = at[row, column] / 10_000 ** (2 * wave / width)
            sine = i % 2 == 0 if interleaved else i < half
            want = 1 + (math.sin(angle) if sine else math.cos(angle))
            # an angle of 700 in float32 is right to 3e-5
            assert abs(found[row, column, i] - want) < 1e-4, (row, column, i)
