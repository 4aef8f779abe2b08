"""What an edit costs: its share of the time of a prefill, over the share of the FLOPs that `kvjax.costs` predicts.

    python benchmarks/edit.py
    python benchmarks/edit.py --tokens 4096 --window 256 --rounds 9
    python benchmarks/edit.py --table benchmarks/results/cpu/edit.json --plot edit.svg

Eight tokens in a text are replaced, inserted or deleted at 10, 50 and 90 % of it. Edits are exact (`kvjax.edit`, with
the cache used up) in a model that sees everything, and in one with windows: dense, dense beside a trace, and a ring.
What follows an edit is fed in chunks of `prefill`'s sizes, so that edits share programs: what runs, with that padding,
is predicted beside what must run. Last, `kvjax.approximate.splice`, which computes the new tokens only, so that what it
reads takes longer than its FLOPs: there is no prediction. Rounds of prefill and edit alternate. The 15M shape, on an
accelerator 1B. Four minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import harness
import jax
import numpy as np

import kvjax
from kvjax import approximate, caches, costs
from kvjax.config import Config
from kvjax.loops import rework

CHANGED = 8
PLACES = (0.1, 0.5, 0.9)
SLACK = 16


class Edit(NamedTuple):
    """`start:stop` of a text of `length` tokens becomes `new` others."""

    name: str
    length: int
    start: int
    stop: int
    new: int


class Case(NamedTuple):
    """A model, a plan, how it is edited, and what `costs.edit_positions` must know of it."""

    name: str
    model: kvjax.Model
    plan: Any
    edit: Callable[..., Any]
    known: dict[str, Any] | None


def edits(tokens: int) -> Iterator[Edit]:
    """Of texts that are at most `tokens` long, before and after."""
    for place in PLACES:
        at = int(place * tokens)
        yield Edit(f"replace at {place:.0%}", tokens, at, at + CHANGED, CHANGED)
        yield Edit(f"insert at {place:.0%}", tokens - CHANGED, at, at, CHANGED)
        yield Edit(f"delete at {place:.0%}", tokens, at, at + CHANGED, 0)


def cases(wide: kvjax.Model, window: int) -> list[Case]:
    """What is compared."""
    config: Config = wide.config
    seen = kvjax.decoder(dataclasses.replace(config, windows=(window,) * config.num_layers), wide.params)
    exact = kvjax.donating.edit
    rings = {"rings": ((window, SLACK),) * config.num_layers}
    return [
        Case("full attention", wide, caches.dense(), exact, {}),
        Case(f"window {window}", seen, caches.dense(), exact, {}),
        Case(f"window {window}, traced", seen, caches.hybrid(), exact, {"recorded": True, "shown": True}),
        Case(f"ring {window}", seen, caches.ring(window, slack=SLACK), exact, rings),
        Case("spliced", wide, caches.dense(), approximate.splice, None),
    ]


def wanted(case: Case, edit: Edit) -> tuple[int, ...] | None:
    """Of each layer, positions that must run again; None where nothing is predicted."""
    if case.known is None:
        return None
    text = {name: value for name, value in edit._asdict().items() if name != "name"}
    return costs.edit_positions(case.model.config.windows, **text, **case.known)


def computed(case: Case, edit: Edit, cache: kvjax.Cache) -> tuple[int, ...] | None:
    """The same of those that run, padding included."""
    if case.known is None:
        return None
    more = edit.new - (edit.stop - edit.start)
    ends = (edit.start, edit.start + edit.new, edit.length + more, more)
    return rework.plan(case.model, cache, *(np.asarray([x], np.int32) for x in ends)).columns


def predicted(case: Case, positions: tuple[int, ...] | None, tokens: int) -> float | None:
    """FLOPs of positions of each layer over those of a prefill of `tokens`."""
    if case.known is None or positions is None:
        return None
    config, slots, whole = case.model.config, tokens, tokens
    if "rings" in case.known:  # a chunk reads the ring and itself
        slots, whole = (sum(case.known["rings"][0]) + n for n in (max(positions), tokens))
    prefill = costs.kv_flops(config, slots=whole, queries=tokens)
    return costs.edit_flops(config, positions, slots=slots).contractions / prefill.contractions


def measured(case: Case, edit: Edit, ids: np.ndarray, rounds: int) -> dict[str, Any]:
    """Seconds of both, and the share of each round."""
    slots = ids.shape[1]
    empty = kvjax.init_cache(case.model, case.plan, batch=1, capacity=slots)
    _, cache = kvjax.prefill(case.model, empty, ids[:, : edit.length])
    new = ids[:, : edit.new]
    copy = jax.jit(lambda x: jax.tree.map(lambda a: a + 0, x))  # it will be used up
    ways = {
        "prefill": lambda cache: kvjax.donating.prefill(case.model, cache, ids),
        "edit": lambda cache: case.edit(case.model, cache, edit.start, edit.stop, new),
    }
    made = {"prefill": functools.partial(copy, empty), "edit": functools.partial(copy, cache)}
    took = harness.rounds(
        {name: functools.partial(harness.seconds, run, made[name]) for name, run in ways.items()}, rounds
    )
    share = harness.over(took["edit"], took["prefill"])
    found: dict[str, Any] = {name: harness.spread(values) for name, values in took.items()} | {"share": share}
    for name, over, positions in (
        ("predicted", "over", wanted(case, edit)),
        ("computed", "over_computed", computed(case, edit, cache)),
    ):
        due = predicted(case, positions, slots)
        found |= {name: due, over: None if due is None else {k: v / due for k, v in share.items()}}
    return found


def tell(result: dict[str, Any]) -> str:
    """A line an edit."""
    lines = []
    for row in result["rows"]:
        said = []
        for name, over in (("predicted", "over"), ("computed", "over_computed")):
            due = row.get(name)
            said += ["", ""] if due is None else [f"{due:.1%}", harness.cell(row[over])]
        took = harness.cell({k: 1e3 * v for k, v in row["edit"].items()}, ".1f")
        lines.append([row["case"], row["what"], took, f"{row['share']['median']:.1%}", *said])
    head = ["", "", "ms", "share of a prefill", "predicted", "over that", "with padding", "over that"]
    text = f"{result['shape']}, {result['dtype']}, {result['tokens']:,} tokens"
    return f"{harness.headline(result)}\n{text}\n\n{harness.table(head, lines)}"


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Shares of a prefill, measured against predicted."""
    axes, rows = figure.add_subplot(), [row for row in result["rows"] if row["predicted"] is not None]
    for name, marker in zip(dict.fromkeys(row["case"] for row in rows), "osD^v", strict=False):
        own = [row for row in rows if row["case"] == name]
        at, middle = [100 * row["predicted"] for row in own], [100 * row["share"]["median"] for row in own]
        ends = [[100 * abs(row["share"][end] - row["share"]["median"]) for row in own] for end in ("least", "most")]
        axes.errorbar(at, middle, yerr=ends, fmt=marker, markersize=4, elinewidth=0.8, label=name)
    ends = [f(100 * row["predicted"] for row in rows) for f in (min, max)]
    for over, style in ((1, "-"), (1.25, "--")):
        axes.plot(ends, [over * x for x in ends], color="0.6", linestyle=style, linewidth=0.8, zorder=0)
        where = {"xytext": (4, -3), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"{over:g}", (ends[1], over * ends[1]), **where)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("FLOPs of an edit, % of a prefill's")
    axes.set_ylabel("its time, % of a prefill's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--shape", choices=list(harness.SHAPES), help="15M on a CPU, else 1B")
    parser.add_argument("--dtype", choices=list(harness.DTYPES), help="float32 on a CPU, else bfloat16")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text, a power of two; default 2,048")
    parser.add_argument("--window", type=int, default=128, help="of the model with windows, in positions; default 128")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    a = parser.parse_args()
    if harness.shown(a, tell, draw):
        return
    if a.quick:
        a.tokens, a.window, a.rounds, a.only = 256, 16, 1, a.only or "full"
    a.shape, a.dtype = a.shape or harness.sizes(a.quick)[0], a.dtype or harness.dtype_here()
    model = harness.model_of(a.shape, a.dtype)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, a.tokens)).astype(np.int32)
    about = {"shape": a.shape, "dtype": a.dtype, "tokens": a.tokens, "window": a.window}
    result: dict[str, Any] = harness.begin(a) | about | {"rows": []}
    for case in (x for x in cases(model, a.window) if x.name.startswith(a.only)):
        for edit in edits(a.tokens):
            result["rows"].append({"case": case.name, "what": edit.name} | measured(case, edit, ids, a.rounds))
    harness.done("edit", result, a, draw, tell(result))


if __name__ == "__main__":
    main()
