"""A cache is a frozen, ordinary pytree; rows outside the batch are errors. `test_suite` has the transformations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import MIXED, filled, prompt_ids, tiny

import kvjax
from kvjax import CacheError, caches, sampling
from kvjax.caches.flags import ROWS

IDS = prompt_ids(1)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@kinds.first_of_each()
def test_flatten_and_unflatten_give_the_cache_back(case):
    _, cache = filled(case.model, case.plan)
    leaves, tree = jax.tree.flatten(cache)
    again = jax.tree.unflatten(tree, leaves)
    assert bits(again) == bits(cache) and again.capacity == cache.capacity == 96
    assert hash(tree) == hash(jax.tree.structure(cache))
    with pytest.raises(Exception, match="frozen|cannot assign"):
        cache.lengths = cache.lengths


@pytest.mark.corner
def test_two_classes_with_the_same_fields_are_two_structures():
    """Else one may run the program that was compiled for the other: `greedy` and `chain` both hold filters alone."""
    made = [sampling.greedy(), sampling.chain(), sampling.banned([1]), sampling.allowed([1]), sampling.forced_last([1])]
    trees = [jax.tree.structure(each) for each in made]
    assert [a == b for a in trees for b in trees] == [a is b for a in trees for b in trees]
    assert trees[0] == jax.tree.structure(sampling.greedy()) and "_class" not in repr(made)


def test_rows_outside_the_batch_are_errors():
    _, cache = filled(tiny(MIXED), caches.dense())
    outside, odd = "is outside a batch of 3", "whole numbers"
    shape = r"it must be \[n\]"
    for rows, message in (
        ([3], f"row 3 {outside}"),
        ([0, -1], f"row -1 {outside}"),
        ([[0]], shape),
        (np.zeros((0,), int), shape),
        ([0.5], odd),
    ):
        with pytest.raises(CacheError, match=message):
            cache.take(jnp.asarray(rows))
    with pytest.raises(CacheError, match="reorder: 2 rows given, the batch is 3"):
        cache.reorder([0, 1])
    flagged = jax.jit(lambda cache, rows: cache.take(rows))(cache, jnp.array([2, 3, -1]))
    np.testing.assert_array_equal(flagged.flags, [0, ROWS, ROWS])
    logits, _ = kvjax.step(tiny(MIXED), flagged, np.array([1, 2, 3]))
    np.testing.assert_array_equal(np.isnan(logits).all(axis=1), [False, True, True])
