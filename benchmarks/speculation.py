"""What speculation gains on the bundled models, and what it should gain by its parts, all measured in one run.

E          tokens for each call of the model, of all rows: rows that are done wait for the others
α          share of the drafts that were looked at and kept
v          time of a call of the model over γ + 1 positions, against one over a single position
c          the same of a draft
E/(v+γc)   how much faster that makes it (Leviathan et al. 2023, 2211.17192); in calls of each γ where γ is chosen
measured   time of the loop that `generate` runs on the device, without speculation against with it; where γ is
           chosen, with what the host does between two of its calls
of it      measured against E/(v+γc): what the loop around the calls leaves

v and c are of loops that do nothing but feed tokens, choose one at every position and rewind. Drafts of an early exit
have gone through the first layers: there v is the rest of the layers, and one more draft, as the last is fed too.

copying    `prompt_lookup()`: `induction` goes on with blocks that repeat
lookup     the same: `shakespeare` goes on with a piece of its own text, repeated
draft      `draft_model` of the bundled draft: `shakespeare` goes on with texts that it drew
exit n     `early_exit(n)`, on the same

python benchmarks/speculation.py
python benchmarks/speculation.py --batches 1 --drafted 2 --only draft
python benchmarks/speculation.py --quick                 (one number of drafts, few rounds, prints only)
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kvjax
from kvjax import caches, costs, sampling
from kvjax.caches.base import Cache
from kvjax.loops.decode import ALL, back_to
from kvjax.loops.feed import feed, finish
from kvjax.loops.run import Run
from kvjax.testing import induction
from kvjax.train import draft
from kvjax.types import Array

PASSES = 64
"""Calls in a measured loop."""

SAMPLERS = {"greedy": sampling.greedy(), "sampled": sampling.chain()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A drafter, and the parts of its rounds: models whose calls take v, over γ + 1 positions, and c, over one."""

    name: str
    model: kvjax.Model
    drafter: Any
    prompts: Callable[[int, int], np.ndarray]
    checks: kvjax.Model
    drafts: kvjax.Model | None
    last: int = 0  # drafts of a round beyond γ


def layers(model: kvjax.Model, first: int, last: int) -> kvjax.Model:
    """A model of some of the layers, with embedding and head."""
    config = dataclasses.replace(model.config, num_layers=last - first, windows=model.config.windows[first:last])
    kept = {str(i - first): model.params["layers"][str(i)] for i in range(first, last)}
    return kvjax.decoder(config, model.params | {"layers": kept})


def cases(draft_name: str, exits: list[int]) -> list[Case]:
    """All of them."""
    target, copies = kvjax.load("shakespeare").model, induction.induction_model()
    small, depth = kvjax.load(draft_name).model, target.config.num_layers

    def drew(rows: int, length: int) -> np.ndarray:
        return np.asarray(draft.written(target, draft.seeds_of(draft.EVALUATION_SEED, rows=rows), length)[0])

    def blocks(rows: int, length: int) -> np.ndarray:
        return induction.copy_task(induction.EVALUATION_SEED, rows, length)[0]

    def repeats(rows: int, length: int) -> np.ndarray:
        return np.tile(drew(rows, 1 + length // 4)[:, 1:], 4)

    lookup = kvjax.prompt_lookup()
    found = [
        Case("copying", copies, lookup, blocks, copies, None),
        Case("lookup", target, lookup, repeats, target, None),
        Case("draft", target, kvjax.draft_model(small), drew, target, small),
    ]
    for n in exits:
        rest, own = layers(target, n, depth), layers(target, 0, n)
        found.append(Case(f"exit {n}", target, kvjax.early_exit(n), drew, rest, own, last=1))
    return found


@partial(jax.jit, static_argnames="new")
def passes(model: kvjax.Model, cache: Cache, sampler: Any, seeds: Array, new: int) -> Array:
    """As many calls as are measured, over `new` positions each."""
    rows, keys = cache.batch, jnp.repeat(sampling.row_keys(seeds), new)
    every = jnp.full((rows,), new, jnp.int32)

    def one(carry: tuple[Cache, Array], _: None) -> Any:
        cache, tokens = carry
        x, after = feed(model, cache, tokens, every)
        logits, after = finish(model, after, x, every)
        at = cache.lengths[:, None] + jnp.arange(new, dtype=jnp.int32)[None, :]
        chosen = sampler(logits.reshape(rows * new, -1), sampling.position_keys(keys, at.reshape(-1)))
        return (back_to(after, cache.lengths), chosen.reshape(rows, new)), None

    return lax.scan(one, (cache, jnp.zeros((rows, new), jnp.int32)), None, length=PASSES)[0][1]


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measured(case: Case, batch: int, mode: str, a: argparse.Namespace) -> dict[str, Any]:
    """Seconds of everything, in alternating rounds; and what became of the drafts."""
    sampler, prompts = SAMPLERS[mode], case.prompts(batch, a.prompt)
    seeds = np.arange(batch, dtype=np.uint32)

    def loop(how: Any) -> tuple[float, Any]:
        given = {"max_new_tokens": a.new, "sampler": sampler, "seed": seeds, "algorithm": how}
        state, wants = Run.start(case.model, prompts.tolist(), **given).state, True
        start = time.perf_counter()
        while wants:
            state = state.advance(case.model, ALL)
            jax.block_until_ready(vars(state))
            took = time.perf_counter() - start
            wants = state.look()[1].any()
        return took, state

    def calls(model: kvjax.Model, new: int) -> Callable[[], Any]:
        cache = kvjax.init_cache(model, caches.dense(), batch=batch, capacity=256)
        cache = kvjax.prefill(model, cache, prompts)[1]
        return lambda: passes(model, cache, sampler, seeds, new)

    ways = {n: kvjax.speculate(case.drafter, drafted=n) for n in [*a.drafted, None]}
    parts = {"step": calls(case.model, 1)} | {f"v{n}": calls(case.checks, n + 1) for n in (1, 2, 4, 8)}
    parts |= {} if case.drafts is None else {"c": calls(case.drafts, 1)}
    times: dict[str, list[float]] = {str(x): [] for x in ("plain", *ways, *parts)}
    for turn in range(a.rounds + 1):  # the first compiles
        plain_took, plain = loop(None)
        made = {name: loop(how) for name, how in ways.items()}
        took = {"plain": plain_took} | {str(name): out[0] for name, out in made.items()}
        took |= {name: seconds(run) / PASSES for name, run in parts.items()}
        for name, value in took.items():
            times[name] += [value] if turn else []
    middle = {name: harness.median(values) for name, values in times.items()}
    step = middle["step"]
    c = middle["c"] / step if "c" in middle else 0.0
    found: dict[str, Any] = {"step_seconds": step, "plain_step_seconds": middle["plain"] / a.new, "seconds": times}
    for name, (_, state) in made.items():
        told = state.report()
        rounds, alpha = sum(told.rounds.values()), told.acceptance
        each = {n: middle[f"v{n}"] / step + case.last * c for n in told.rounds}
        due = sum(count * (each[n] + n * c) for n, count in told.rounds.items())
        row = {
            "rounds": {str(n): count for n, count in told.rounds.items()},
            "alpha": None if np.isnan(alpha) else alpha,
            "e": a.new / rounds,
            "tokens_per_call_of_a_row": told.tokens_per_call,
            "v": sum(count * each[n] for n, count in told.rounds.items()) / rounds,
            "c": c,
            "predicted": a.new / due,
            "measured": middle["plain"] / middle[str(name)],
            "same_tokens": state.texts() == plain.texts(),
        }
        if name is not None and row["alpha"] is not None:
            row["e_of_alpha"] = costs.expected_tokens(name, alpha)
        found[str(name)] = row | {"of_predicted": row["measured"] / row["predicted"]}
    return found


def show(what: str, found: dict[str, Any], drafted: list[Any]) -> None:
    for n in [*drafted, None]:
        row = found[str(n)]
        alpha = "-" if row["alpha"] is None else f"{row['alpha']:.2f}"
        numbers = "".join(f"{row[x]:{w}.2f}" for x, w in (("e", 6), ("v", 6), ("c", 6), ("predicted", 9)))
        rest = f"{row['measured']:9.2f}{row['of_predicted']:7.2f}"
        print(f"{what:24}{n or 'any':>3}{alpha:>6}{numbers}{rest}", flush=True)


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 7), ("prompt", 64), ("new", 144)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    for name, many in (("batches", [1, 4]), ("drafted", [1, 2, 4, 8]), ("exits", [2])):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=many, help=f"default {many}")
    parser.add_argument("--draft", default="shakespeare-draft", help="as kvjax.load takes it")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument("--quick", action="store_true", help="2 drafts, 3 rounds, one row; prints only")
    parser.add_argument("--no-save", action="store_true", help="print only")
    a = parser.parse_args()
    if a.quick:
        a.rounds, a.drafted, a.batches, a.no_save = 3, [2], [1], True
    began, found = harness.facts(), {}
    print(f"{'':24}{'γ':>3}{'α':>6}{'E':>6}{'v':>6}{'c':>6}{'E/(v+γc)':>9}{'measured':>9}{'of it':>7}")
    for case in (x for x in cases(a.draft, a.exits) if x.name.startswith(a.only)):
        for batch, mode in ((b, m) for b in a.batches for m in SAMPLERS):
            what = f"{case.name}, {batch}, {mode}"
            found[what] = measured(case, batch, mode, a)
            show(what, found[what], a.drafted)
    result = {"facts": began, "load_at_end": harness.facts()["load"], "arguments": vars(a), "cases": found}
    if not a.no_save:
        print(harness.save(f"speculation-{began['jax']}", result))


if __name__ == "__main__":
    main()
