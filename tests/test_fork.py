"""Promise: a cache is a value. Nothing that is done with it changes it; the donating twins use it up instead."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import SAMPLER, STEPS, filled, prompt_ids

import kvjax

DRAFTING = kvjax.speculate(kvjax.prompt_lookup(), drafted=2)


def snapshot(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def through_everything(model, out, cache, logits, branch, folder):
    """Every public function that takes a cache, each from the same one."""
    ids = prompt_ids(20 + branch)
    yield kvjax.prefill(model, cache, ids[:, :5])
    yield kvjax.step(model, cache, ids[:, 5])
    yield kvjax.decode(model, cache, logits, steps=STEPS, sampler=SAMPLER, seed=branch)
    yield kvjax.decode_until(model, cache, logits, max_new_tokens=6, seed=branch)
    yield kvjax.generate(model, after=out, max_new_tokens=6)
    yield kvjax.generate(model, ids[:, :5].tolist(), after=out, max_new_tokens=6)
    yield [piece.tokens for piece in kvjax.stream(model, after=out, max_new_tokens=6)]
    yield kvjax.generate(model, after=out, max_new_tokens=6, algorithm=DRAFTING)
    yield kvjax.loglikelihood(model, cache, logits, ids[:, :5])
    yield kvjax.edit(model, cache, cache.lengths - 1, cache.lengths - 1 + branch, [3 + branch, 4])
    yield kvjax.sync(model, cache, ids[:, :5])
    if cache.branches:
        yield kvjax.branched(cache, 2)
    yield cache.rewind(cache.lengths - 1 * (branch == 0))
    yield cache.take([2, branch])
    yield cache.reorder([1, branch, 2])
    yield cache.resize(300)
    yield cache.fork(2), cache.join(cache), cache.insert([branch], cache.take([2])), cache.release([branch])
    yield cache.keep(cache.lengths - 1, jnp.zeros((3, 1), jnp.int32), jnp.array([1, branch, 1]))
    yield cache.check()
    yield kvjax.save_cache(folder / "one.safetensors", cache, model)
    for node in range(len(cache.layers)):
        if not cache.replays:
            yield cache.keys(node), cache.values(node), cache.positions(node)


@kinds.mixed()
def test_a_cache_is_bitwise_unharmed_after_both_branches_of_a_fork_ran_through_everything(case, tmp_path):
    model = case.model
    prompts = [row[:n].tolist() for row, n in zip(prompt_ids(), (16, 7, 2), strict=True)]
    out = kvjax.generate(model, prompts, max_new_tokens=3, plan=case.plan)
    before = snapshot((out.cache, out.logits)), out.tokens.copy(), out.lengths.copy()
    for branch in range(2):
        for result in through_everything(model, out, out.cache, out.logits, branch, tmp_path):
            jax.block_until_ready(result.cache if isinstance(result, kvjax.Generated) else result)
    assert snapshot((out.cache, out.logits)) == before[0]
    np.testing.assert_array_equal(out.tokens, before[1])
    np.testing.assert_array_equal(out.lengths, before[2])


def test_every_public_function_that_takes_a_cache_is_in_this_test():
    takes = {
        "prefill",
        "step",
        "decode",
        "decode_until",
        "generate",
        "stream",
        "loglikelihood",
        "edit",
        "sync",
        "branched",
        "save_cache",
    }
    takes |= {"resume"}  # of a cache with a trace, in test_resume
    takes |= {"beam", "beam_search"}  # of beams, in test_beam
    public = {name for name in kvjax.__all__ if callable(getattr(kvjax, name))}
    builds = {"init_cache", "cache_nbytes", "forward", "attend", "cross_attend", "encode", "decoder", "init_params"}
    builds |= {"load", "load_cache", "score", "perplexity", "estimate", "int8_weights"}
    builds |= {"speculate", "prompt_lookup", "draft_model", "early_exit"}  # algorithms: with generate above
    types = {name for name in public if isinstance(getattr(kvjax, name), type)}
    assert public - builds - types <= takes, "a new function: let both branches run through it"
    methods = {name for name in dir(kvjax.Cache) if not name.startswith("_") and callable(getattr(kvjax.Cache, name))}
    seen = {"rewind", "take", "reorder", "resize", "check", "keys", "values", "positions", "keep"}
    seen |= {"fork", "join", "insert", "release", "trace", "recorded"}
    assert methods - {"replace", "reserve", "enough", "needed"} <= seen  # of the loops, and numbers


@pytest.mark.corner
@kinds.mixed()
def test_donating_twins_give_equal_results_and_use_the_cache_up(case):
    model, ids = case.model, prompt_ids(9)
    logits, cache = filled(model, case.plan)
    calls = {
        "prefill": lambda where, cache: where.prefill(model, cache, ids),
        "step": lambda where, cache: where.step(model, cache, ids[:, 0]),
        "decode": lambda where, cache: where.decode(model, cache, logits, steps=STEPS, sampler=SAMPLER),
    }
    elsewhere = {"decode_until", "resume", "edit", "sync"}  # in test_resume and test_edit
    assert set(calls) | elsewhere >= set(kvjax.donating.__all__)
    for name, call in calls.items():
        own = jax.tree.map(jnp.copy, cache)
        want = call(kvjax, own)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(own)), name
        for a, b in zip(*map(jax.tree.leaves, (call(kvjax.donating, own), want)), strict=True):
            few = 1e-6 if jnp.issubdtype(a.dtype, jnp.floating) else 0  # in place, a loop may be vectorised otherwise
            np.testing.assert_allclose(a, b, rtol=few, atol=few, err_msg=name)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(own)), name
    kvjax.donating.prefill(model, kvjax.init_cache(model, case.plan, batch=3, capacity=96), ids)  # a fresh one, too
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((model, logits, cache)))
