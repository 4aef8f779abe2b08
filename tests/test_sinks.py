"""Promise: sinks with positions inside the cache are StreamingLLM's: every score with its own two positions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FULL, filled, prompt_ids, tiny
from naive import gap, run

import kvjax
from kvjax import InputError, caches, struct
from kvjax.caches.base import EMPTY, Kind, Tree
from kvjax.caches.sinks import SinksInCache
from kvjax.loops.feed import feed, finish

SEE = {"window": 6, "sinks": 3}
VALID = np.array([16, 9, 2])
EXACT = 1e-5


def worst(plan, steps=12):
    """Against scores computed one by one: the prompt's last logits, and every generated token and the last logits."""
    model = tiny(FULL)
    first, cache = filled(model, plan, valid=VALID)
    tokens, last, cache = kvjax.decode(model, cache, first, steps=steps)
    cache.check()
    found = []
    for row, n in enumerate(VALID):
        text = np.concatenate([prompt_ids(0, 3)[row, :n], np.asarray(tokens)[row]])
        want, _ = run(model, text, window=SEE["window"], sinks=SEE["sinks"], in_cache=True)
        found += [gap(first[row], want[n - 1]), gap(last[row], want[-1])]
        found.append(float((want[n - 1 : -1].argmax(axis=1) != np.asarray(tokens)[row]).any()))
    return max(found)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(caches.ring(sinks_in_cache=True, **SEE), id="ring"),
        pytest.param(
            caches.ring(sinks_in_cache=True, slack=4, rotated=False, **SEE), id="un-rotated", marks=pytest.mark.full
        ),
        pytest.param(caches.recompute(sinks_in_cache=True, **SEE), id="recompute"),
    ],
)
def test_every_score_has_its_own_two_positions(plan):
    assert worst(plan) <= EXACT


@struct.node
class InText(SinksInCache):
    """Broken: sinks are read at their positions in the text."""

    def extend(self, h, project, span, shared):
        (first, *near), node = super().extend(h, project, span, shared)
        return (first.replace(query_positions=None), *near), node


@dataclasses.dataclass(frozen=True)
class InTextKind(Kind):
    def init(self, shape, batch, capacity):
        made = caches.ring(sinks_in_cache=True, **SEE).init(shape, batch, capacity)
        return InText(made.k, made.v, made.recent, made.sinks)


def test_sinks_at_their_positions_in_the_text_are_found():
    assert worst(InTextKind()) > 1e-2


def test_it_takes_the_bytes_of_a_ring_with_sinks_and_rewinds_by_its_slack():
    model = tiny(FULL)
    inside, text = (caches.ring(slack=2, sinks_in_cache=x, **SEE) for x in (True, False))
    sizes = [kvjax.cache_nbytes(model, plan, batch=2, capacity=64) for plan in (inside, text)]
    assert sizes[0] == sizes[1] == kvjax.cache_nbytes(model, inside, batch=2, capacity=128) - 2 * 64 * 4
    _, cache = filled(model, inside, valid=VALID)
    assert cache.max_rewind == 2
    at = np.asarray(cache.positions(0))
    for row, n in enumerate(VALID):
        assert sorted(at[row][at[row] != EMPTY]) == sorted({*range(min(3, n)), *range(max(0, n - 6), n)})


def test_a_path_of_a_tree_that_moves_up_among_the_sinks_is_kept():
    model, plan = tiny(FULL), caches.ring(sinks_in_cache=True, slack=8, **SEE)
    start = np.array([16, 1, 2])
    _, cache = filled(model, plan, valid=start)
    depths = jnp.array([[0, 0, 1, 1, 2, 2]], jnp.int32)
    sees = np.eye(6, dtype=bool)
    for i, parent in enumerate((-1, -1, 0, 1, 2, 3)):
        sees[i] |= sees[parent] if parent >= 0 else False
    drafts = prompt_ids(4, 3, 6)
    fed = draft(model, cache, jnp.asarray(drafts), Tree(depths, jnp.asarray(sees)[None]))
    kept = fed.keep(cache.lengths, np.array([[1, 3, 5]] * 3), np.array([3, 3, 2]))
    want, alone = kvjax.prefill(model, cache, drafts[:, [1, 3, 5]], [3, 3, 2])
    np.testing.assert_array_equal(kept.lengths, alone.lengths)
    for layer in (0, 1):
        for row, n in enumerate(np.asarray(kept.lengths)):
            held = [at_positions(c, layer, row, {*range(3), *range(int(n) - 6, int(n))}) for c in (kept, alone)]
            assert held[0].keys() == held[1].keys()
            for p in held[0]:
                np.testing.assert_allclose(held[0][p], held[1][p], rtol=1e-4, atol=1e-4)
    next_ids = np.array([1, 2, 3])
    np.testing.assert_allclose(
        kvjax.step(model, kept, next_ids)[0], kvjax.step(model, alone, next_ids)[0], rtol=1e-4, atol=1e-3
    )


def at_positions(cache, layer, row, wanted):
    """Keys `[K, D]` by their positions."""
    at, keys = np.asarray(cache.positions(layer))[row], np.asarray(cache.keys(layer))[row]
    return {int(p): keys[:, slot] for slot, p in enumerate(at) if int(p) in wanted}


@jax.jit
def draft(model, cache, tokens, tree):
    valid = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
    x, cache = feed(model, cache, tokens, valid, tree)
    return finish(model, cache, x, valid)[1]


def test_wrong_numbers_are_clear_errors():
    with pytest.raises(InputError, match="caches.ring: sinks must be a whole number of at least 1"):
        caches.ring(6, sinks_in_cache=True)
    with pytest.raises(InputError, match="sinks_in_cache needs a window"):
        caches.recompute(sinks=2, sinks_in_cache=True)
    with pytest.raises(InputError, match="caches.recompute: sinks must be a whole number of at least 1"):
        caches.recompute(window=4, sinks_in_cache=True)
