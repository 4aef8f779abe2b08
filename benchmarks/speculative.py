"""What speculation gains, and what it should gain by its parts, all measured in one run.

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
told       a random model of the 15M shape (1B on an accelerator) and drafts from the text that it will write, four in
           five of them right: the loop around calls that take what those of a real model take

The other models are the bundled ones, whose steps take a tenth of a millisecond. Five minutes on two cores.

    python benchmarks/speculative.py
    python benchmarks/speculative.py --batches 1 --drafted 2 --only draft
    python benchmarks/speculative.py --table benchmarks/results/cpu/speculative.json --plot speculative.svg
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kvjax
from kvjax import caches, costs, sampling, struct
from kvjax.caches.base import Cache
from kvjax.loops.decode import ALL, back_to
from kvjax.loops.drafters import Drafter, Drafts
from kvjax.loops.feed import feed, finish
from kvjax.loops.run import Run
from kvjax.testing import induction
from kvjax.train import draft
from kvjax.types import Array

RIGHT = 0.8
"""Share of what is told that is so."""

PASSES = 64
"""Calls in a loop that is measured."""

SAMPLERS = {"greedy": sampling.greedy(), "sampled": sampling.chain()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A drafter, and the parts of its rounds: models whose calls take v, over γ + 1 positions, and c, over one.

    No drafter: it is told what the model will write. `repeats` are loops in a round.
    """

    name: str
    model: kvjax.Model
    drafter: Any
    prompts: Callable[[int, int], np.ndarray]
    checks: kvjax.Model
    drafts: kvjax.Model | None
    last: int = 0  # drafts of a round beyond γ
    repeats: int = 5  # where a loop takes milliseconds


@struct.node
class Told(Drafter):
    """Drafts from `text[B, T]`, whatever the model said."""

    drawn = False

    text: Array

    def propose(
        self, model: Any, cache: Cache, state: Any, tokens: Any, most: Any, active: Any, drafted: int, choose: Any
    ) -> Drafts:
        """See `Drafter`."""
        at = cache.lengths[:, None] + 1 + jnp.arange(drafted, dtype=jnp.int32)[None, :]
        return Drafts(jnp.take_along_axis(self.text, jnp.minimum(at, self.text.shape[1] - 1), axis=1), None, state)

    @classmethod
    def of(cls, texts: list[list[int]], vocab: int) -> Told:
        """What will be written, but for a share of errors."""
        random, text = np.random.default_rng(0), np.asarray(texts, np.int32)
        wrong = random.random(text.shape) >= RIGHT
        return cls(jnp.asarray(np.where(wrong, (text + 1) % vocab, text)))


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

    def anything(rows: int, length: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, large.config.vocab_size, (rows, length)).astype(np.int32)

    large = harness.model_of("15M" if jax.default_backend() == "cpu" else "1B", harness.dtype_here())
    return [*found, Case("told", large, None, anything, large, None, repeats=1)]


@functools.partial(jax.jit, static_argnames=("new", "count"), donate_argnums=1)
def passes(model: kvjax.Model, cache: Cache, sampler: Any, seeds: Array, new: int, count: int) -> tuple[Array, Cache]:
    """As many calls as are measured, over `new` positions each; the cache is as long as it was."""
    rows, keys = cache.batch, jnp.repeat(sampling.row_keys(seeds), new)
    every = jnp.full((rows,), new, jnp.int32)

    def one(carry: tuple[Cache, Array], _: None) -> Any:
        cache, tokens = carry
        x, after = feed(model, cache, tokens, every)
        logits, after = finish(model, after, x, every)
        at = cache.lengths[:, None] + jnp.arange(new, dtype=jnp.int32)[None, :]
        chosen = sampler(logits.reshape(rows * new, -1), sampling.position_keys(keys, at.reshape(-1)))
        return (back_to(after, cache.lengths), chosen.reshape(rows, new)), None

    cache, tokens = lax.scan(one, (cache, jnp.zeros((rows, new), jnp.int32)), None, length=count)[0]
    return tokens, cache


def measured(case: Case, batch: int, mode: str, a: argparse.Namespace) -> dict[str, Any]:
    """Seconds of everything, in alternating rounds; and what became of the drafts."""
    sampler, prompts = SAMPLERS[mode], case.prompts(batch, a.prompt)
    seeds = np.arange(batch, dtype=np.uint32)
    states: dict[str, Any] = {}

    def loop(name: str, how: Any) -> float:
        given, total = {"max_new_tokens": a.new, "sampler": sampler, "seed": seeds, "algorithm": how}, 0.0
        for _ in range(case.repeats):
            state, wants = Run.start(case.model, prompts.tolist(), **given).state, True
            start = time.perf_counter()
            while wants:
                state = state.advance(case.model, ALL)
                jax.block_until_ready(vars(state))
                took = time.perf_counter() - start
                wants = state.look()[1].any()
            total += took / case.repeats
        states[name] = state
        return total

    def calls(model: kvjax.Model, new: int) -> Callable[[], float]:
        cache = kvjax.init_cache(model, caches.dense(), batch=batch, capacity=256)
        kept = [kvjax.prefill(model, cache, prompts)[1]]

        def go() -> Array:
            tokens, kept[0] = passes(model, kept[0], sampler, seeds, new, PASSES)
            return tokens

        return lambda: harness.seconds(go) / PASSES

    drafter = case.drafter
    if drafter is None:
        loop("plain", None)
        drafter = Told.of(states["plain"].texts(), case.model.config.vocab_size)
    algorithms = {str(n): kvjax.speculate(drafter, drafted=n) for n in [*a.drafted, None]}
    ways = {"plain": functools.partial(loop, "plain", None)}
    ways |= {name: functools.partial(loop, name, how) for name, how in algorithms.items()}
    ways |= {"step": calls(case.model, 1)} | {f"v{n}": calls(case.checks, n + 1) for n in (1, 2, 4, 8)}
    ways |= {} if case.drafts is None else {"c": calls(case.drafts, 1)}
    times = harness.rounds(ways, a.rounds)
    middle, plain = {name: harness.median(values) for name, values in times.items()}, states["plain"]
    step = middle["step"]
    c = middle["c"] / step if "c" in middle else 0.0
    found: dict[str, Any] = {"step_seconds": step, "plain_step_seconds": middle["plain"] / a.new, "seconds": times}
    for name in algorithms:
        state = states[name]
        told = state.report()
        rounds, alpha = sum(told.rounds.values()), told.acceptance
        each = {n: middle[f"v{n}"] / step + case.last * c for n in told.rounds}
        due = sum(count * (each[n] + n * c) for n, count in told.rounds.items())
        gained = harness.over(times["plain"], times[name])
        row = {
            "rounds": {str(n): count for n, count in told.rounds.items()},
            "alpha": None if np.isnan(alpha) else alpha,
            "e": a.new / rounds,
            "tokens_per_call_of_a_row": told.tokens_per_call,
            "v": sum(count * each[n] for n, count in told.rounds.items()) / rounds,
            "c": c,
            "predicted": a.new / due,
            "measured": gained,
            "of_predicted": gained["median"] * due / a.new,
            "same_tokens": state.texts() == plain.texts(),
        }
        if name != "None" and row["alpha"] is not None:
            row["e_of_alpha"] = costs.expected_tokens(int(name), alpha)
        found[name] = row
    return found


def tell(result: dict[str, Any]) -> str:
    """A line a case and a number of drafts."""
    lines = []
    for what, found in result["cases"].items():
        for name, row in found.items():
            if not isinstance(row, dict) or "e" not in row:
                continue
            numbers = [f"{row[x]:.2f}" for x in ("e", "v", "c", "predicted")]
            alpha = "-" if row["alpha"] is None else f"{row['alpha']:.2f}"
            share, drafted = f"{row['of_predicted']:.2f}", "any" if name == "None" else name
            lines.append([what, drafted, alpha, *numbers, harness.cell(row["measured"]), share])
    table = harness.table(["", "γ", "α", "E", "v", "c", "E/(v+γc)", "measured", "of it"], lines)
    return f"{harness.headline(result)}\n\n{table}"


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Measured against predicted, both on a logarithmic scale."""
    axes, kinds = figure.add_subplot(), {}
    for what, found in result["cases"].items():
        rows = [row for row in found.values() if isinstance(row, dict) and "e" in row]
        points = kinds.setdefault(what.split(",")[0], [])
        points += [(row["predicted"], row["measured"]["median"]) for row in rows]
    ends = [min(min(point) for points in kinds.values() for point in points) * 0.9]
    ends += [max(max(point) for points in kinds.values() for point in points) * 1.1]
    for share, style in ((1, "-"), (0.9, "--")):
        axes.plot(ends, [share * x for x in ends], color="0.6", linestyle=style, linewidth=0.8, zorder=0)
        axes.annotate(
            f"{share:.0%}", (ends[1], share * ends[1]), xytext=(3, -3), textcoords="offset points", fontsize=8
        )
    for (name, points), marker in zip(kinds.items(), "os^Dv<>" * 2, strict=False):
        axes.plot(*zip(*points, strict=True), marker, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = [x for x in (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8) if ends[0] <= x <= ends[1]]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel("speed-up predicted by the parts, E / (v + γc)")
    axes.set_ylabel("speed-up measured")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = harness.options(__doc__)
    for name, value in (("prompt", 64), ("new", 144)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"tokens; default {value}")
    for name, many in (("batches", [1, 4]), ("drafted", [1, 2, 4, 8]), ("exits", [2])):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=many, help=f"default {many}")
    parser.add_argument("--draft", default="shakespeare-draft", help="as kvjax.load takes it")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    a = parser.parse_args()
    if harness.shown(a, tell, draw):
        return
    if a.quick:
        a.rounds, a.drafted, a.batches, a.only = 1, [4], [1], a.only or "copying"
    result = harness.begin(a) | {"prompt": a.prompt, "new": a.new, "cases": {}}
    for case in (x for x in cases(a.draft, a.exits) if x.name.startswith(a.only)):
        for batch in a.batches:
            for mode in SAMPLERS:
                result["cases"][f"{case.name}, {batch}, {mode}"] = measured(case, batch, mode, a)
    harness.done("speculative", result, a, draw, tell(result))


if __name__ == "__main__":
    main()
