"""Promise: where drafts are drawn, what comes out follows the model, whatever the draft says."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.stats import chisquare

import kvjax
from kvjax import caches, sampling
from kvjax.config import Config
from kvjax.loops import verified
from kvjax.loops.decode import ALL, Progress
from kvjax.params import init_params
from kvjax.sampling import rejection
from kvjax.stopping import stops_of

VOCAB, ROWS, PROMPT, STEPS, DRAFTED = 8, 50_000, (3, 5), 4, 2
TOY = Config(VOCAB, 2, 16, query_heads=2, kv_heads=1, head_dim=8, ffn_width=16, tied=False, head_bias=True)
SEEDS = range(5)
WARM = sampling.chain(sampling.temperature(0.8))


@functools.cache
def toy(seed):
    """Random and wild; all logits lie about -80, as those of GPT-2 do, which changes no distribution."""
    params = init_params(TOY, jax.random.key(seed), jnp.float32)
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    params["head"] = params["head"] | {"bias": jnp.full((VOCAB,), -80.0)}
    return kvjax.decoder(TOY, params)


MODEL = toy(0)
DRAFTERS = {"model": kvjax.draft_model(toy(1)), "exit": kvjax.early_exit(1)}


def distributions(model, texts):
    """`[n, V]`, of what follows each text, under the sampler."""
    return np.asarray(jax.nn.softmax(WARM.law(kvjax.forward(model, np.asarray(texts))[:, -1])), np.float64)


@functools.cache
def law():
    """`[V, V]`, of the second and third new token together: exactly, over all texts."""
    first = distributions(MODEL, [PROMPT])[0]
    pairs = list(itertools.product(range(VOCAB), repeat=2))
    second = distributions(MODEL, [(*PROMPT, a) for a in range(VOCAB)])
    third = distributions(MODEL, [(*PROMPT, a, b) for a, b in pairs]).reshape(VOCAB, VOCAB, VOCAB)
    return np.einsum("a,ab,abc->bc", first, second, third)


def smallest(drafter, seed, program):
    """The chance that a law as far off as what came out, or further, is seen where all is right."""
    state = program(MODEL, drafter, jnp.arange(ROWS, dtype=jnp.uint32) + np.uint32(seed * ROWS))
    assert not np.asarray(state.cache.flags).any()
    made = np.asarray(state.cache.tokens)[:, len(PROMPT) + 1 : len(PROMPT) + 3]
    seen = np.bincount(made[:, 0] * VOCAB + made[:, 1], minlength=VOCAB**2)
    want = law().ravel() * ROWS
    rare = want < 5
    seen, want = (np.append(x[~rare], x[rare].sum()) for x in (seen, want))
    if want[-1] == 0:
        assert seen[-1] == 0, "what cannot be was made"
        seen, want = seen[:-1], want[:-1]
    return chisquare(seen, want * seen.sum() / want.sum()).pvalue


def speculating():
    """A program of its own: what is patched is traced."""

    @jax.jit
    def run(model, drafter, seeds):
        cache = kvjax.init_cache(model, caches.dense(), batch=ROWS, capacity=8)
        prompt = jnp.broadcast_to(jnp.asarray(PROMPT), (ROWS, 2))
        logits, cache = kvjax.prefill(model, cache, prompt)
        state = verified.begin(drafter, Progress.begin(cache, logits), None, drafted=DRAFTED)
        ends = cache.lengths + STEPS
        stops = jax.tree.map(jnp.asarray, stops_of("test"))
        given = WARM, seeds, stops, ends, ends, jnp.int32(ALL)
        return verified.advance(model, state, drafter, *given, drafted=DRAFTED, rounds=1, rejects=True)

    return run


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("model", (0,)),
        pytest.param("model", SEEDS, marks=[pytest.mark.full, pytest.mark.optimised]),
        pytest.param("exit", SEEDS, marks=[pytest.mark.full, pytest.mark.optimised]),
    ],
    ids=("one", "model", "exit"),
)
def test_the_law_is_that_of_the_model_and_the_draft_is_far_from_it(name, seeds):
    texts = [(*PROMPT, a) for a in range(VOCAB)]
    if name == "model":
        apart = 0.5 * np.abs(distributions(MODEL, texts) - distributions(toy(1), texts)).sum(1)
        assert apart.min() >= 0.2, apart
    program = speculating()
    found = [smallest(DRAFTERS[name], seed, program) for seed in seeds]
    print(found)
    assert min(found) > 1e-3


def by_argmax(p, q, drafts, coins):
    return drafts == jnp.argmax(p, axis=1)


def from_target(p, q):
    return p


def one_too_few(cache, lengths):
    """Keeps a draft that was not kept, or forgets what replaced it."""
    return rewind(cache, jnp.minimum(lengths + 1, cache.lengths))


def in_bfloat16(law):
    return softmax(lax.reduce_precision(law, exponent_bits=8, mantissa_bits=7))  # XLA drops a cast there and back


rewind, softmax = verified.back_to, rejection.probabilities
WRONG = {
    "accepted by argmax": {"accepts": by_argmax},
    "replaced from the target": {"residual": from_target},
    "rewind off by one": {"back_to": one_too_few},
    "draft in bfloat16": {"drafted_with": in_bfloat16},
}


@pytest.mark.full
@pytest.mark.optimised
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_seen_on_every_seed(name, monkeypatch):
    for which, mutant in WRONG[name].items():
        monkeypatch.setattr(verified, which, mutant)
    program = speculating()
    found = [smallest(DRAFTERS["model"], seed, program) for seed in SEEDS]
    print(found)
    assert max(found) < 1e-9


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 50.0])
def test_what_is_kept_and_what_replaces_it_add_up_to_the_target(scale):
    rng = np.random.default_rng(0)
    p, q = (jax.nn.softmax(jnp.asarray(scale * rng.normal(size=(64, 8)), jnp.float32)) for _ in range(2))
    p, q = p.at[::7].set(q[::7]), q.at[3].set(jnp.eye(8)[2])  # equal laws, and a certain draft
    p = p.at[5].set(jnp.eye(8)[1])
    coins = (jnp.arange(1000) + 0.5) / 1000
    kept = q * jnp.minimum(1, p / jnp.where(q > 0, q, 1))
    rest = rejection.residual(p, q)
    rest = rest / rest.sum(1, keepdims=True)
    both = kept + (1 - kept.sum(1, keepdims=True)) * rest
    np.testing.assert_allclose(both, p, atol=1e-6)
    assert float(jnp.abs(kept + (1 - kept.sum(1, keepdims=True)) * p - p).max()) > 1e-3 or scale == 0
    for row, token in ((0, 1), (1, 4), (3, 2), (5, 1)):  # the chance that `accepts` gives is q's share of that
        share = np.mean([bool(x) for x in rejection.accepts(*_many(p[row], q[row], token, coins))])
        want = min(1.0, float(p[row, token]) / max(float(q[row, token]), 1e-30))
        assert abs(share - want) <= 2e-3


def _many(p, q, token, coins):
    rows = coins.shape[0]
    return jnp.tile(p, (rows, 1)), jnp.tile(q, (rows, 1)), jnp.full(rows, token), coins
