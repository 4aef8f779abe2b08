"""What an edit costs: its share of the time of a prefill, over the share of the FLOPs that `kvjax.costs` predicts.

    python benchmarks/editing.py
    python benchmarks/editing.py --quick --no-save         # a small model and a short text: only whether it runs
    python benchmarks/editing.py --tokens 4096 --window 256 --rounds 9

Eight tokens in a text are replaced, inserted or deleted at 10, 50 and 90 % of it. Edits are exact (`kvjax.edit`, with
the cache used up) in a model that sees everything, and in one with windows: dense, dense beside a trace, and a ring.
Last, `kvjax.approximate.splice`, which computes the new tokens only, so that what it reads takes longer than its FLOPs:
there is no prediction. Rounds of prefill and edit alternate; times are medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import harness
import jax
import numpy as np

import kvjax
from kvjax import approximate, caches, costs
from kvjax.config import Config

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


def cases(config: Config, window: int) -> list[Case]:
    """What is compared."""
    narrow = dataclasses.replace(config, windows=(window,) * config.num_layers)
    wide, seen = (kvjax.decoder(c, kvjax.init_params(c, jax.random.key(0))) for c in (config, narrow))
    exact = kvjax.donating.edit
    rings = {"rings": ((window, SLACK),) * config.num_layers}
    return [
        Case("full attention", wide, caches.dense(), exact, {}),
        Case(f"window {window}", seen, caches.dense(), exact, {}),
        Case(f"window {window}, traced", seen, caches.hybrid(), exact, {"recorded": True, "shown": True}),
        Case(f"ring {window}", seen, caches.ring(window, slack=SLACK), exact, rings),
        Case("spliced", wide, caches.dense(), approximate.splice, None),
    ]


def predicted(case: Case, edit: Edit, tokens: int) -> float | None:
    """FLOPs of the edit over those of a prefill of `tokens`; None where nothing is predicted."""
    if case.known is None:
        return None
    config, text = case.model.config, {name: value for name, value in edit._asdict().items() if name != "name"}
    positions = costs.edit_positions(config.windows, **text, **case.known)
    slots = whole = tokens
    if "rings" in case.known:  # a chunk reads the ring and itself
        slots, whole = (sum(case.known["rings"][0]) + n for n in (max(positions), tokens))
    prefill = costs.kv_flops(config, slots=whole, queries=tokens)
    return costs.edit_flops(config, positions, slots=slots).contractions / prefill.contractions


def seconds(run: Callable[..., Any], *args: Any) -> float:
    """Of one run, to the end of it on the device."""
    began = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - began


def measured(case: Case, edit: Edit, ids: np.ndarray, rounds: int) -> dict[str, float]:
    """Medians of alternating rounds, in seconds."""
    slots = ids.shape[1]
    empty = kvjax.init_cache(case.model, case.plan, batch=1, capacity=slots)
    _, cache = kvjax.prefill(case.model, empty, ids[:, : edit.length])
    new = ids[:, : edit.new]
    copy = lambda x: jax.block_until_ready(jax.tree.map(lambda a: a + 0, x))  # noqa: E731
    took: dict[str, list[float]] = {"prefill": [], "edit": []}
    for _ in range(rounds + 1):  # the first compiles
        took["prefill"].append(seconds(kvjax.donating.prefill, case.model, copy(empty), ids))
        took["edit"].append(seconds(case.edit, case.model, copy(cache), edit.start, edit.stop, new))
    return {name: harness.median(times[1:]) for name, times in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value, said in (
        ("layers", 6, "of the model"),
        ("width", 288, "of its stream; heads have 48 channels"),
        ("tokens", 2048, "of the text, a power of two"),
        ("window", 128, "of the model with windows, in positions"),
        ("rounds", 5, "of which medians are taken"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{said} (default {value:,})")
    parser.add_argument("--quick", action="store_true", help="2 layers of width 96, 256 tokens, window 16, 3 rounds")
    parser.add_argument("--no-save", action="store_true", help="print only")
    a = parser.parse_args()
    if a.quick:
        a.layers, a.width, a.tokens, a.window, a.rounds = 2, 96, 256, 16, 3
    config = Config(32_000, a.layers, a.width, a.width // 48, a.width // 48, 48, 8 * a.width // 3)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, a.tokens)).astype(np.int32)
    print(f"{'share of a prefill':36}{'ms':>9}{'measured':>11}{'predicted':>12}{'over':>8}")
    rows = []
    for case in cases(config, a.window):
        print(case.name)
        for edit in edits(a.tokens):
            took = measured(case, edit, ids, a.rounds)
            share, wanted = took["edit"] / took["prefill"], predicted(case, edit, a.tokens)
            over = None if wanted is None else share / wanted
            rows.append(
                {"case": case.name, "what": edit.name, **took, "share": share, "predicted": wanted, "over": over}
            )
            said = "" if wanted is None else f"{wanted:12.1%}{over:8.2f}"
            print(f"    {edit.name:32}{1e3 * took['edit']:9.2f}{share:11.1%}{said}", flush=True)
    if not a.no_save:
        print(harness.save("editing", {"facts": harness.facts(), "arguments": vars(a), "rows": rows}))


if __name__ == "__main__":
    main()
