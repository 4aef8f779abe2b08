"""What may not be rewound is an error on the host and a flag under `jit`; that it is bitwise right, `test_suite`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import CAPACITY, MIXED, PROMPTS, fed, filled, prompt_ids, tiny

import kvjax
from kvjax import CacheError, caches
from kvjax.caches.flags import REWIND
from kvjax.testing.cases import steps_over

KEPT = prompt_ids(3, 10)[:, :3]  # [10 steps, B], fed in the end
DROPPED = prompt_ids(4, 8)[:, :3]


def ring():
    model, plan = tiny(MIXED), (caches.ring(6, slack=4), caches.dense())
    _, cache = filled(model, plan)
    return model, cache  # lengths 16, 7, 1


def test_a_rewind_beyond_the_slack_is_an_error_on_the_host():
    model, cache = ring()
    cache.rewind([12, 3, 0])
    with pytest.raises(CacheError, match=r"row 0 to length 11 is 5 behind .* \(16\).* keeps 4.*slack"):
        cache.rewind([11, 7, 1])
    back = cache.rewind([14, 7, 1])
    with pytest.raises(CacheError, match="row 0 to length 11 is 5 behind"):
        back.rewind([11, 7, 1])
    with pytest.raises(CacheError, match="row 0 to length 11"):  # a resize does not bring back what is lost
        back.resize(14).rewind([11, 7, 1])
    _, back = steps_over(model, back, KEPT[:1])
    with pytest.raises(CacheError, match="row 0 to length 11 is 5 behind"):
        back.rewind([11, 7, 1])


def test_a_rewind_beyond_the_slack_is_flagged_under_jit():
    model, cache = ring()
    back = jax.jit(lambda cache, to: cache.rewind(to))(cache, jnp.array([11, 5, 0]))
    np.testing.assert_array_equal(back.flags, [REWIND, 0, 0])
    logits, after = kvjax.step(model, back, KEPT[0])
    assert np.isnan(logits[0]).all() and not np.isnan(logits[1:]).any()
    want, _ = kvjax.step(model, cache.rewind([12, 5, 0]), KEPT[0])
    assert np.asarray(logits[1:]).tobytes() == np.asarray(want[1:]).tobytes()
    with pytest.raises(CacheError, match="row 0.*rewound further"):
        after.check()


@kinds.each()
def test_lengths_are_absolute_and_mistakes_are_errors(case):
    _, cache = filled(case.model, case.plan)
    for wrong, row in (([17, 7, 1], 0), ([16, -1, 1], 1), (-1, 0), (cache.lengths + 1, 0), ([16, 7, 2], 2)):
        with pytest.raises(CacheError, match=rf"row {row} to length -?\d+, but the row has {PROMPTS[row]} tokens"):
            cache.rewind(jnp.asarray(wrong))
    flagged = jax.jit(lambda cache, to: cache.rewind(to))(cache, jnp.array([17, 7, -1]))
    np.testing.assert_array_equal(flagged.flags, [REWIND, 0, REWIND])
    np.testing.assert_array_equal(cache.rewind(cache.lengths).lengths, PROMPTS)
    with pytest.raises(CacheError, match="lengths"):
        cache.rewind(jnp.array([1, 2]))
    with pytest.raises(CacheError, match="lengths"):
        cache.rewind(jnp.array([1.5, 2.0, 1.0]))


def test_a_rewind_clears_flags_and_a_full_cache_goes_on():
    model, full = tiny(MIXED), np.full(3, CAPACITY)
    logits, cache = fed(model, caches.dense(), full)
    bad, cache = kvjax.step(model, cache, KEPT[0])
    assert np.isnan(bad).all()
    back = cache.rewind(CAPACITY - 1)
    assert not np.asarray(back.flags).any()
    again, _ = kvjax.step(model, back, cache.tokens[:, -1])
    np.testing.assert_allclose(again, logits, rtol=1e-3, atol=1e-3)
