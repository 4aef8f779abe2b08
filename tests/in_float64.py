"""Run with JAX_ENABLE_X64=1 by test_float64.py: every kind against its reference, position by position, in float64,
log-probabilities of given tokens against the forward pass, and drafts."""

from __future__ import annotations

import sys

import jax
import kinds
import numpy as np

import kvjax
from kvjax import caches
from kvjax.testing import Case, edits, promises
from kvjax.testing.cases import PROMPTS, WINDOWED, prompt_ids


def likelihoods(case) -> float:
    """The largest difference of log-probabilities, of the largest."""
    logits, cache = case.filled()
    new, both, worst = prompt_ids(1), np.zeros((3, 32), np.int32), 0.0
    found = np.asarray(kvjax.loglikelihood(case.model, cache, logits, new, chunk=5)[0].logprobs)
    for row, n in enumerate(PROMPTS):
        both[row, : n + 16] = [*prompt_ids()[row, :n], *new[row]]
    table = np.asarray(jax.nn.log_softmax(kvjax.forward(case.model, both, PROMPTS + 16), axis=-1))
    for row, n in enumerate(PROMPTS):
        want = table[row, n - 1 : n + 15][np.arange(16), new[row]]
        worst = max(worst, float(np.max(np.abs(found[row] - want)) / np.max(np.abs(want))))
    assert found.dtype == np.float64 and worst <= 1e-12, worst
    return worst


def edited() -> float:
    """The largest difference of logits after edits of a ring, and of windowed layers with a trace."""
    ring = next(case for case in kinds.cases() if case.name == "ring")
    windowed, worst = Case("windowed", caches.hybrid(), WINDOWED), 0.0
    each = edits.Edit(np.array([3, 8]), np.array([5, 9]), prompt_ids(6, 2, 2), np.array([2, 1]))
    for case in (ring, windowed):
        texts = prompt_ids(5, 2, 64).tolist()
        _, cache = kvjax.prefill(case.model, case.empty(2), *edits.padded(texts))
        logits, cache = kvjax.edit(case.model, cache, *each)
        want, _ = kvjax.prefill(case.model, case.empty(2), *edits.padded(each.of(texts)))
        worst = max(worst, edits.near(case, np.asarray(logits), np.asarray(want), case.name))
    return worst


def drafts(case) -> None:
    """Speculation, by rejection, of a draft that is the model: everything is kept."""
    for drafter in (kvjax.prompt_lookup(2), kvjax.draft_model(case.model)):
        options = {"sampler": kvjax.sampling.chain(), "algorithm": kvjax.speculate(drafter, drafted=2)}
        out = kvjax.generate(case.model, prompt_ids(3, 2).tolist(), max_new_tokens=8, **options)
    assert out.speculated.acceptance == 1 and out.logits.dtype == np.float64, out.speculated


def main(full: bool) -> None:
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert jax.config.jax_enable_x64
    print(f"log-likelihoods: {likelihoods(kinds.cases()[0]):.1e}")
    print(f"edits: {edited():.1e}")
    drafts(kinds.cases()[0])
    for case in (*kinds.cases(), *(kinds.of_sources() if full else ())):
        if case.exact and (full or not case.full):
            print(f"{case.name}: {promises.same_logits(case):.1e}")


main("full" in sys.argv[1:])
