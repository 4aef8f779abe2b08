"""Checks of the contract suite on what moves rows and sizes, and on a cache being an ordinary, immutable pytree."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import SOURCE, Cache
from kvjax.loops.decode import prefill, step
from kvjax.model import forward
from kvjax.testing.cases import (
    BATCH,
    CAPACITY,
    PROMPTS,
    Case,
    bits,
    equal,
    expect,
    prompt_ids,
    same,
    steps_over,
)
from kvjax.testing.programs import operate, perform

FEED = prompt_ids(8, 8)[:, :3]
MORE = np.array([4, 9, 12])
"""Prompts of another cache, whose rows are joined or inserted."""


def rows(case: Case) -> None:
    """`take`, `reorder`, `fork`, `join` and `insert` move rows exactly as stored; they decode on as they were."""
    model = case.model
    (_, cache), (_, other) = case.filled(), case.filled(7, MORE)

    @functools.cache
    def want(of_other: bool) -> np.ndarray:
        return steps_over(model, other if of_other else cache, FEED[:3])[0]

    def goes_on(moved: Cache, origin: list[int], what: str) -> None:
        """Row i of `moved` is row `origin[i]` of the cache, or from BATCH on of the other one."""
        expect(moved.batch == len(origin), f"{what}: {moved.batch} rows, not {len(origin)}")
        for row, source in enumerate(origin):
            same(moved, *((cache, what, row, source) if source < BATCH else (other, what, row, source - BATCH)))
        if moved.batch == BATCH:
            at = np.array(origin) % BATCH
            logits, _ = steps_over(model, moved, FEED[:3, at])
            for row, source in enumerate(origin):
                equal(logits[:, row], want(source >= BATCH)[:, source % BATCH], f"{what}: row {row}")

    goes_on(cache.take([2, 2, 0]), [2, 2, 0], "take")
    goes_on(cache.reorder([1, 2, 0]), [1, 2, 0], "reorder")
    for some in ([1], [0, 1, 2, 0, 1]):
        goes_on(cache.take(some), some, "take of another number of rows")
    goes_on(cache.take([0]).take([0, 0, 0]), [0, 0, 0], "take through one row")
    goes_on(cache.fork(2), [0, 0, 1, 1, 2, 2], "fork")
    goes_on(cache.fork(2).take([1, 3, 5]), [0, 1, 2], "take of a fork")
    goes_on(cache.join(other), [0, 1, 2, 3, 4, 5], "join")
    goes_on(cache.join(other).take([5, 0, 3]), [5, 0, 3], "take of joined rows")
    goes_on(cache.insert([2, 0], other.take([1, 2])), [5, 1, 4], "insert")


def release(case: Case) -> None:
    """A released row is empty and can be filled again, the others are bitwise as they were."""
    model = case.model
    _, cache = case.filled()
    want, end = steps_over(model, cache, FEED[:2])
    bare = case.empty()
    freed = cache.release([1])
    size = int(bare.lengths[1])
    expect(
        freed.lengths.tolist() == [PROMPTS[0], size, PROMPTS[2]], f"lengths {freed.lengths} after a release of row 1"
    )
    for row in (0, 2):
        same(freed, cache, "beside a released row", row)
    again = np.where(np.arange(3) == 1, PROMPTS, 0)
    logits, refilled = prefill(model, freed, prompt_ids(), again)
    first, _ = prefill(model, bare, prompt_ids(), PROMPTS)
    equal(np.asarray(logits)[1], np.asarray(first)[1], "logits of a row that was released and filled again")
    same(refilled, cache, "released and filled again")
    got, after = steps_over(model, refilled, FEED[:2])
    equal(got, want, "logits after a release")
    same(after, end, "fed on after a release")


def resize(case: Case) -> None:
    """Growing and cutting leave what is kept bitwise as it was."""
    _, cache = case.filled()
    wide = cache.resize(CAPACITY + 32)
    expect(wide.capacity == CAPACITY + 32, f"capacity {wide.capacity}")
    same(wide, cache, "grown")
    equal(np.asarray(wide.tokens)[:, CAPACITY:], np.full((BATCH, 32), -1, np.int32), "new places for tokens")
    equal(wide.resize(CAPACITY), cache, "grown and cut back")
    tight = cache.resize(16)
    same(tight, cache, "cut to the longest row")
    want, end = steps_over(case.model, cache, FEED[:3])
    got, after = steps_over(case.model, tight.resize(CAPACITY), FEED[:3])
    equal(got, want, "logits after cutting and growing")
    same(after, end, "fed on after cutting and growing")


def operations(case: Case) -> dict[str, np.ndarray]:
    """Every operation that feeds nothing, with an argument for `programs.perform` on a cache of the case's prompts."""
    back = [min(n, 8 if case.slack is None else case.slack) for n in (2, 0, 1)]
    made = {
        "take": [2, 0, 0],
        "reorder": [2, 0, 1],
        "fork": [2, 0, 1],
        "join": [5, 0, 3],
        "insert": [1, 2],
        "release": [1],
        "resize": [],
        "rewind": [n - less for n, less in zip(PROMPTS, back, strict=True)],
    }
    if case.slack is None or case.slack >= 2:
        made["keep"] = [1, 2, 2]
    return {name: np.array(argument, np.int32) for name, argument in made.items() if name not in case.refuses}


def jit_is_eager(case: Case) -> None:
    """Every operation gives under `jit` what it gives eagerly, bit by bit.

    An overlapping slice-set is right eagerly and silently wrong under jit on CPU (openxla/xla#49176).
    """
    (_, cache), (_, other) = case.filled(), case.filled(7, MORE)
    for name, argument in operations(case).items():
        compiled = operate(cache, name, jnp.asarray(argument), other)
        equal(compiled, perform(cache, name, argument, other), f"{name}: jit and eager")


def types(case: Case) -> None:
    """No operation changes structure, shapes or dtypes: nothing is compiled again; `eval_shape` tells the same."""
    _, cache = case.filled()
    same_type = [cache, step(case.model, cache, FEED[0])[1], cache.rewind(cache.lengths)]
    same_type += [cache.take([0, 1, 2])] if case.share == 1 else []  # afterwards every row has a source of its own
    same_type += [cache.reorder([2, 0, 1]), cache.resize(CAPACITY + 32).resize(CAPACITY), cache.release([0])]
    same_type.append(jax.tree.unflatten(*reversed(jax.tree.flatten(cache))))
    want: Any = jax.tree.map(_aval, case.empty())
    structure: Any = jax.tree.structure(cache)
    for each in same_type:
        expect(structure == jax.tree.structure(each), "the structure changed")
        expect(jax.tree.map(_aval, each) == want, "a shape, a dtype or a weak type changed")
    tokens = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    logits, after = jax.eval_shape(step, case.model, jax.eval_shape(lambda: cache), tokens)
    expect(
        jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache),
        "eval_shape tells other shapes",
    )


def _aval(x: Any) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.weak_type


def value(case: Case) -> None:
    """Nothing that is done with a cache changes it, or uses it up."""
    logits, cache = case.filled()
    before = bits((logits, cache))
    try:
        prefill(case.model, cache, prompt_ids(2), np.array([2, 0, 1]))
        for name, argument in operations(case).items():
            jax.block_until_ready(perform(cache, name, argument, case.filled(7, MORE)[1]))
        for node in cache.layers:
            if not node.replays:
                node.contents(cache.lengths, cache.shared)
        step(case.model, cache, FEED[0])
        expect(bits((logits, cache)) == before, "an operation changed the cache that it was given")
    except RuntimeError as error:
        if "deleted" not in str(error):
            raise
        raise AssertionError(f"an operation used the cache up that it was given: {error}") from None
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(step(case.model, cache, FEED[0])[1]) if x.size]
    expect(len(set(pointers)) == len(pointers), "two leaves of a cache are one buffer: it could not be donated")


def vmap(case: Case) -> None:
    """`vmap` over caches is a loop over them: a step, rows exchanged, a rewind, a step."""
    made = [case.filled(seed=seed)[1] for seed in range(2)]
    order, tokens = jnp.array([2, 0, 1]), jnp.asarray(FEED[:2])
    back = 0 if case.slack == 0 else 1

    def play(model: Any, cache: Cache, tokens: Any, order: Any) -> tuple[Any, Cache]:
        _, cache = step(model, cache, tokens)
        moved = cache.take(order)
        return step(model, moved.rewind(moved.lengths - back), tokens)

    logits, after = jax.jit(jax.vmap(play, in_axes=(None, 0, 0, None)))(
        case.model, jax.tree.map(lambda *x: jnp.stack(x), *made), tokens, order
    )
    logits = np.asarray(logits)
    for i, cache in enumerate(made):
        want, one = play(case.model, cache, jnp.asarray(FEED[i]), order)
        # Batched contractions sum in another order; three digits tell a wrong row or slot from that.
        close = np.allclose(logits[i], want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
        expect(close, f"cache {i}: logits under vmap differ by {np.abs(logits[i] - want).max()}")
        for what in ("lengths", "flags"):
            equal(np.asarray(getattr(after, what))[i], getattr(one, what), f"{what} under vmap")


def gradients(case: Case) -> None:
    """Gradients through prefill, step and scan are those of the uncached model, or of the case's own reference (exact
    floating kinds)."""
    if not case.exact or "grad" in case.refuses:
        return
    got, of_cache = _gradients(case)
    want = _wanted_gradients(case.of_reference())
    top = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    expect(top > 1e-4, "the gradient vanishes: this would prove nothing")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        expect(np.allclose(a, b, rtol=1e-3, atol=1e-4 * top), f"a gradient differs by {float(jnp.abs(a - b).max())}")
    expect(of_cache.lengths.dtype == jax.dtypes.float0, "lengths have a gradient")


def _small(model: Any) -> Any:
    return jax.tree.map(lambda x: x / 4 if x.ndim > 1 else x, model.params)


def _gradients(case: Case) -> tuple[Any, Any]:
    """Of the loss over a text that is prefilled, fed by a step and scanned, for parameters and cache."""
    text, target = jnp.asarray(prompt_ids(2)), jnp.asarray(prompt_ids(3))

    def loss(params: Any, cache: Cache) -> Any:
        model = case.model.replace(params=params)
        if case.config.encoder is not None:  # the source is encoded with these parameters, too
            cache = cache.replace(shared=cache.shared | {SOURCE: case.empty_for(model).shared[SOURCE]})
        logits, cache = prefill(model, cache, text[:, :9])
        found = [logits]
        logits, cache = step(model, cache, text[:, 9])

        def one(cache: Cache, token: Any) -> tuple[Cache, Any]:
            logits, cache = step(model, cache, token)
            return cache, logits

        _, rest = jax.lax.scan(one, cache, text[:, 10:].T)
        return _loss(jnp.concatenate([jnp.stack([*found, logits]), rest]).swapaxes(0, 1), target[:, 8:])

    return jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(_small(case.model), case.empty(capacity=32))


@functools.cache
def _wanted_gradients(case: Case) -> Any:
    """For parameters: without a cache, or where that is another algorithm, through the reference."""
    if case.plan != Case.reference:
        return _gradients(case)[0]
    text, target = jnp.asarray(prompt_ids(2)), jnp.asarray(prompt_ids(3))

    def loss(params: Any) -> Any:
        model = case.model.replace(params=params)
        return _loss(forward(model, text, source=case.source(model))[:, 8:], target[:, 8:])

    return jax.jit(jax.grad(loss))(_small(case.model))


def _loss(logits: Any, target: Any) -> Any:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1))


__all__ = ["rows", "release", "resize", "operations", "jit_is_eager", "types", "value", "vmap", "gradients"]
