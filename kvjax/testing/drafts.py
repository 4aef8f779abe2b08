"""A check of the contract suite on speculation: drafts, right and wrong, change nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.caches.base import Cache
from kvjax.loops import verified
from kvjax.loops.decode import ALL, Progress, decode
from kvjax.loops.drafters import Choose, Drafter, Drafts
from kvjax.model import Model
from kvjax.stopping import stops_of
from kvjax.testing.cases import Case, expect
from kvjax.testing.promises import BOTH, LONG
from kvjax.types import Array

STEPS, DRAFTED = 40, 4


@struct.node
class Script(Drafter):
    """Drafts `tokens[B, T]`, what each row will say if all is right, but for `wrong[B, T]` bool, and for `none[B, T]`
    bool, where it has nothing to propose."""

    tokens: Array
    wrong: Array
    none: Array

    drawn = False

    def propose(
        self,
        model: Model,
        cache: Cache,
        state: Any,
        tokens: Array,
        most: Array,
        active: Array,
        drafted: int,
        choose: Choose,
    ) -> Drafts:
        """See `Drafter`."""
        at = cache.lengths[:, None] + 1 + jnp.arange(drafted, dtype=jnp.int32)[None, :]
        pick = lambda x: jnp.take_along_axis(x, at, axis=1, mode="clip")  # noqa: E731
        said = jnp.where(pick(self.wrong), (pick(self.tokens) + 1) % 7, pick(self.tokens))
        return Drafts(jnp.where(pick(self.none), -1, said), None, state)


def same_with_drafts(case: Case) -> None:
    """Drafts, right, wrong and missing, of every row its own: the tokens of decoding one at a time, greedy and sampled;
    right drafts are kept. Rings too, whatever their slack."""
    if not case.exact:
        return
    first, cache = case.filled()
    want = np.asarray(decode(case.model, cache, first, steps=LONG.steps, sampler=BOTH, seed=[0, 1, 2])[0])[:, :STEPS]
    begun = np.asarray(cache.lengths)
    text = np.zeros((cache.batch, cache.capacity + DRAFTED), np.int32)
    for row, start in enumerate(begun):
        text[row, start : start + STEPS] = want[row]
    at, rows = np.arange(text.shape[1])[None, :], np.arange(cache.batch)[:, None]
    script = Script(jnp.asarray(text), jnp.asarray((at + rows) % 7 == 3), jnp.asarray((at + rows) % 11 == 5))
    ends = begun + np.array([STEPS, 1, STEPS - 3], np.int32)
    state = _run(case.model, cache, first, script, ends)
    got, lengths = np.asarray(state.cache.tokens).copy(), np.asarray(state.cache.lengths)
    got[np.arange(cache.batch), lengths] = np.asarray(state.pending)
    expect((np.asarray(state.cache.flags) == 0).all(), f"flags {np.asarray(state.cache.flags)}")
    expect((np.asarray(state.emitted) == ends).all(), f"rows of {np.asarray(state.emitted)} tokens, not {ends}")
    for row, (start, end) in enumerate(zip(begun, ends, strict=True)):
        made = got[row, start:end]
        expect((made == want[row, : end - start]).all(), f"row {row}: {made.tolist()}, not {want[row].tolist()}")
    kept, calls = np.asarray(state.tally.kept), np.asarray(state.tally.calls)
    expect((kept + calls + 1 >= ends - begun).all(), f"{kept} drafts kept in {calls} calls")
    expect(calls[0] < STEPS // 2, f"{calls[0]} calls for {STEPS} tokens: right drafts were not kept")


@jax.jit
def _run(model: Model, cache: Cache, logits: Array, script: Script, ends: Array) -> verified.Speculation:
    state = verified.begin(script, Progress.begin(cache, logits), None, drafted=DRAFTED)
    seeds, stops = jnp.arange(3, dtype=jnp.uint32), jax.tree.map(jnp.asarray, stops_of("testing"))
    given = BOTH, seeds, stops, ends, ends, jnp.int32(ALL)
    return verified.advance(model, state, script, *given, drafted=DRAFTED, rounds=4, rejects=False)


__all__ = ["Script", "same_with_drafts"]
