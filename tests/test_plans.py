"""Plans: which kind each layer gets, and what is refused before anything is allocated."""

import pytest
from models import FULL, MIXED, WINDOW, tiny

import kvjax
from kvjax import caches


def layouts(plan, config=MIXED):
    cache = kvjax.init_cache(tiny(config), plan, batch=1, capacity=32)
    return [type(node).__name__ for node in cache.layers]


def test_a_plan_is_one_kind_or_one_a_layer_or_one_for_windows():
    assert layouts(caches.dense()) == ["Dense", "Dense"]
    assert layouts((caches.dense(), caches.ring(WINDOW))) == ["Dense", "Ring"]
    chosen = caches.per_layer(local=caches.ring(WINDOW), full=caches.dense())
    assert layouts(chosen) == layouts(None) == layouts(caches.default(MIXED)) == ["Ring", "Dense"]
    assert layouts(chosen, FULL) == ["Dense", "Dense"]
    assert layouts((caches.recompute(), chosen)) == ["Recompute", "Dense"]


@pytest.mark.parametrize(
    "plan, message",
    [
        ((caches.dense(),) * 3, "3 kinds for 2 layers"),
        (caches.dense, "call it, as in caches.dense"),
        ("dense", "'dense' is no kind of cache"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, message):
    with pytest.raises(kvjax.InputError, match=message):
        kvjax.init_cache(tiny(MIXED), plan, batch=1, capacity=32)


def test_per_layer_takes_kinds():
    with pytest.raises(kvjax.InputError, match="no kind of cache"):
        caches.per_layer(local=caches.ring, full=caches.dense())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: caches.traced(caches.dense), "traced: .* is no kind of cache"),
        (lambda: caches.parse("traced(5)"), "traced: 5 is no kind of cache"),
        (lambda: caches.dense(rotated="False"), "rotated must be True or False, not 'False'"),
        (lambda: caches.paged(8, rotated=1), "rotated must be True or False, not 1"),
        (lambda: caches.ring(6, sinks_in_cache=None), "sinks_in_cache must be True or False"),
        (lambda: caches.layer_input(absorb="no"), "absorb must be True or False"),
        (lambda: caches.parse("ring(-5)"), "window must be a whole number of at least 1, not -5"),
        (lambda: caches.parse(caches.dense()), "is no text"),
    ],
)
def test_arguments_of_kinds_are_looked_at(make, message):
    with pytest.raises(kvjax.InputError, match=message):
        make()
