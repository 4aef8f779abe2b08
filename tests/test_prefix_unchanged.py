"""Promise: changing a suffix leaves every intermediate of the prefix bitwise unchanged; so it may be cached."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from models import BATCH, CAPACITY, MIXED, prompt_ids, tiny

import kvjax
from kvjax import caches, struct
from kvjax.caches.base import Kind
from kvjax.caches.dense import Dense

SITES = ("embedding", "after_self_attention", "after_ffn")


@struct.node
class Bidirectional(Dense):
    """Broken: every key looks as if it stood at the start."""

    def extend(self, h, project, span, shared):
        views, node = super().extend(h, project, span, shared)
        return tuple(v.replace(positions=jnp.where(v.positions < CAPACITY, 0, v.positions)) for v in views), node


@dataclasses.dataclass(frozen=True)
class BidirectionalKind(Kind):
    def init(self, shape, batch, capacity):
        made = caches.dense().init(shape, batch, capacity)
        return Bidirectional(made.k, made.v, capacity, True)


def intermediates(plan, ids):
    """Everything recorded after one prefill, by name, `[B, T, …]` each."""
    model = tiny(MIXED)
    _, cache = kvjax.prefill(model, kvjax.init_cache(model, plan, batch=BATCH, capacity=CAPACITY), ids)
    found = {}
    for layer in range(len(cache.layers)):
        for site in SITES if layer == 0 else SITES[1:]:
            found[f"{site} {layer}"] = np.asarray(cache.trace(layer, site))
        found[f"keys {layer}"] = np.asarray(cache.keys(layer)).swapaxes(1, 2)
        found[f"values {layer}"] = np.asarray(cache.values(layer)).swapaxes(1, 2)
    return found


def changed(plan, at):
    """Names of intermediates before `at` that another suffix from `at` on changes."""
    ids = prompt_ids()
    other = ids.copy()
    other[:, at:] = (other[:, at:] + 1 + prompt_ids(5)[:, at:] % 90) % 96
    assert (other[:, at:] != ids[:, at:]).all()
    before, after = intermediates(plan, ids), intermediates(plan, other)
    assert len(before) == 1 + 2 * 4
    for name in before:
        assert (before[name][:, at:16] != after[name][:, at:16]).any(), f"{name}: the change did not reach it"
    return [name for name in before if before[name][:, :at].tobytes() != after[name][:, :at].tobytes()]


@pytest.mark.parametrize("at", [1, 7, 15])
def test_changing_a_suffix_leaves_every_prefix_intermediate_bitwise_unchanged(at):
    assert changed(caches.hybrid(), at) == []


def test_with_a_bidirectional_mask_it_does_not():
    found = changed(caches.traced(BidirectionalKind()), 7)
    assert set(found) == {f"{name} 1" for name in ("keys", "values", *SITES[1:])} | {f"{s} 0" for s in SITES[1:]}
