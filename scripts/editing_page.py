"""What approximate edits cost, as docs/editing.md says it: copying after an edit, and drift of keys that are turned.

    python scripts/editing_page.py             # print the page
    python scripts/editing_page.py --write     # docs/editing.md and docs/drift.svg; pip install 'kvjax[plots]'
    python scripts/editing_page.py --check     # only whether the page has what replacing and drift come to here

A text of the bundled model `induction` is a random block and its beginning once more, up to an edit that was made there
already; then the block itself is edited. What follows is determined: the token behind the edit in the block.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts"), str(ROOT)]

import drift  # noqa: E402  (the path is set above)
import harness  # noqa: E402
import numpy as np  # noqa: E402
import pages  # noqa: E402

import kvjax  # noqa: E402
from kvjax import approximate, caches  # noqa: E402
from kvjax.testing import induction  # noqa: E402

ROWS, CAPACITY = 256, 128
NEAR = 0.15  # of a figure with two digits, in another version or on another processor
EDITS = ("replace", "insert", "delete")
DOCUMENT, PLOT = ROOT / "docs" / "editing.md", ROOT / "docs" / "drift.svg"


class Texts(NamedTuple):
    """Texts `[B, CAPACITY]` of `lengths[B]` tokens, whose range from `start` to `stop` becomes `new[B, n]`; after that
    `follows[B]` comes next."""

    tokens: np.ndarray
    lengths: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    new: np.ndarray
    follows: np.ndarray


def texts(edit: str, rows: int = ROWS, seed: int = induction.EVALUATION_SEED) -> Texts:
    """Random blocks, each with one token replaced, inserted or deleted."""
    rng = np.random.default_rng((seed, EDITS.index(edit)))
    made: dict[str, list[Any]] = {name: [] for name in Texts._fields}
    for _ in range(rows):
        period = int(rng.integers(induction.PERIODS[0], induction.PERIODS[1] + 1))
        drawn = rng.permutation(induction.VOCAB)[: period + 1]
        block, other = drawn[:period], drawn[period]
        at = int(rng.integers(4, period - 4))
        stop, new = {"replace": (at + 1, [other]), "insert": (at, [other]), "delete": (at + 1, [])}[edit]
        text = [*block, *block[:at], *new]
        made["tokens"].append(np.pad(text, (0, CAPACITY - len(text))))
        for name, value in (("lengths", len(text)), ("start", at), ("stop", stop), ("follows", block[stop])):
            made[name].append(value)
        made["new"].append(np.array(new, np.int32))
    return Texts(**{name: np.stack(x).astype(np.int32) for name, x in made.items()})


def right(logits: Any, given: Texts) -> float:
    """Share of rows whose largest logit is that of what follows."""
    return float((np.asarray(logits).argmax(axis=-1) == given.follows).mean())


def copied(model: kvjax.Model, plan: Any, given: Texts, refreshed: Any, **options: Any) -> dict[str, float]:
    """How often the right token comes next after a splice, and how far its distribution is from the exact one."""
    cache = kvjax.init_cache(model, plan, batch=len(given.lengths), capacity=CAPACITY)
    _, cache = kvjax.prefill(model, cache, given.tokens, given.lengths)
    edited = approximate.splice(model, cache, given.start, given.stop, given.new, **options)
    if np.any(refreshed):
        edited = approximate.refresh(model, edited.cache, given.start + given.new.shape[1], refreshed)
    return {"right": right(edited.logits, given), "kl": float(edited.divergence(model).kl.mean())}


def exact(model: kvjax.Model, given: Texts) -> float:
    """The same when all from the edit on is computed again."""
    cache = kvjax.init_cache(model, batch=len(given.lengths), capacity=CAPACITY)
    _, cache = kvjax.prefill(model, cache, given.tokens, given.lengths)
    by, places = given.new.shape[1] - (given.stop - given.start), np.arange(CAPACITY)[None, :]
    rest = np.take_along_axis(given.tokens, np.clip(places + given.stop[:, None], 0, CAPACITY - 1), axis=1)
    rest = np.concatenate([given.new, rest[:, : CAPACITY - given.new.shape[1]]], axis=1)
    logits, _ = kvjax.prefill(model, cache.rewind(given.start), rest, given.lengths + by - given.start)
    return right(logits, given)


def measured(rows: int = ROWS, edits: Sequence[str] = EDITS) -> list[dict[str, Any]]:
    """One row of the table for each way to edit."""
    model, made = induction.induction_model(), {edit: texts(edit, rows) for edit in edits}
    table = [{"how": "all that follows computed again", **{e: {"right": exact(model, x)} for e, x in made.items()}}]
    for what, plan, options, counts in (
        ("spliced, keys turned", caches.dense(), {}, (0, 1, 2, 4)),
        ("spliced, keys left turned as they were", caches.dense(), {"rerotate": False}, (0, 1)),
        ("spliced, keys kept un-turned", caches.dense(rotated=False), {}, (0, 1)),
    ):
        for n in counts:
            how = what if not n else f"the same, {n} token{'s' * (n > 1)} behind the edit refreshed"
            table.append({"how": how, **{e: copied(model, plan, x, n, **options) for e, x in made.items()}})
    return table


def times() -> str:
    """What benchmarks/edit.py found, of every device that it was saved for; empty where it was not."""
    parts = []
    for path in sorted(harness.RESULTS.glob("*/edit.json")):
        found = json.loads(path.read_text("utf-8"))
        parts.append(f"""
## Time: edits against a prefill, {path.parent.name}

`{found["command"]}`, on {found["day"]}, on {found["processor"]} ({found["system"]}), jax {found["jax"]}:
the {found["shape"]} shape, {found["dtype"]}, a text of {found["tokens"]:,} tokens of which eight are replaced, inserted
or deleted; medians of {found["rounds"]} rounds. *Measured* is the share of a prefill's time, *predicted* the share of
its FLOPs.

| | | milliseconds | measured | predicted | measured ÷ predicted |
|---|---|---:|---:|---:|---:|""")
        for row in found["rows"]:
            known = "| |" if row["predicted"] is None else f"{row['predicted']:.1%} | {row['over']['median']:.2f} |"
            ms, share = 1e3 * row["edit"]["median"], row["share"]["median"]
            parts.append(f"| {row['case']} | {row['what']} | {ms:,.1f} | {share:.1%} | {known}")
    return "\n".join(parts) + "\n" if parts else ""


def cells(row: dict[str, Any], edit: str) -> list[str]:
    """Two cells of the table."""
    kl = row[edit].get("kl")
    return [f"{100 * row[edit]['right']:.1f} %", "" if kl is None else f"{max(kl, 0.0):.1e}"]


def checked() -> int:
    """Whether the page has, as near as another machine comes, what replacing and the drift of keys come to."""
    page = DOCUMENT.read_text("utf-8").splitlines()
    short = ["|".join(line.split("|")[:4]).rstrip() for line in page]  # of the table, its first two columns
    made = [f"| {row['how']} | " + " | ".join(cells(row, "replace")) for row in measured(edits=("replace",))]
    lost = pages.missing("\n".join(short), [line.rstrip() for line in made], NEAR)
    drifted = drift.table(drift.measured()).splitlines()
    # Errors in float32 are the rounding of whatever the compiler made of the sums, and nothing else.
    sure = [line for line in drifted if "`float32`" not in line]
    lost += pages.missing("\n".join(page), sure, NEAR)
    if lost:
        print("docs/editing.md lacks; python scripts/editing_page.py --write makes it again:", file=sys.stderr)
        print(*lost, sep="\n", file=sys.stderr)
    return int(bool(lost))


def page(rows: list[dict[str, Any]], drifted: str) -> str:
    """What `docs/editing.md` says."""
    facts = harness.facts()
    versions = ", ".join(f"{name} {facts[name]}" for name in ("kvjax", "jax", "numpy", "python"))
    lines = ["| | replaced | KL | inserted | KL | deleted | KL |", "|---|" + "---:|" * 6]
    for row in rows:
        lines.append(f"| {row['how']} | " + " | ".join(cell for edit in EDITS for cell in cells(row, edit)) + " |")
    table = "\n".join(lines)
    shortest, longest = induction.PERIODS
    return f"""# What an approximate edit costs

How far an approximate edit is from feeding the new text, where that shows, and what it costs in time.

`python scripts/editing_page.py --write` made this file, on {facts["day"]}, on
{facts["processor"]} ({facts["system"]}), with {versions}.

`kvjax.approximate.splice` computes only the tokens that are new. What stands behind them keeps keys and values that
knew the old text. How much that is worth depends on how much they say of it.

## Copying: where it goes wrong

The bundled model `induction` copies random blocks. A text here is a block of {shortest} to {longest} different tokens
and its beginning once more, in which one token has been replaced, inserted or deleted; then the block itself is edited
the same way, and the token that comes next stands right behind the edit. {ROWS} texts of each sort; the share of them
where it has the largest logit, and the mean KL(exact ‖ approximate) of the next-token distribution, in nats.

{table}

The key by which the model finds that token says which token stood before it. Spliced, it says the old one, and what is
copied is nearly always wrong. One token computed again puts it right, since that is all that this model keeps of a text
in the keys of the next token; other models keep more, further behind. Keys left turned as they were are one position
off where the length changed. Ask `Approximated.divergence`, or take `kvjax.edit`, which is exact.

## Drift: keys that are turned again and again

A key that is stored turned to its position is turned when it moves. {drift.KEYS} random keys of width {drift.WIDTH},
moved by one position a time, as a context shift does for every new token; the norm of the error over the norm of the
keys.

![Relative error of keys by the number of shifts](drift.svg)

{drifted}

The error grows with the number of shifts, not with its root: what turns by less than half a step of the store is
rounded back to where it was, as slow pairs of channels are in bfloat16, and rounding to codes makes keys a little
longer each time, without end. So shift seldom and far (`shift(model, cache, drop)` turns every key once, whatever
`drop` is), or keep keys as they are projected:
`caches.dense(rotated=False)`, `caches.paged(rotated=False)` and `caches.layer_input()` move them as they are.
{times()}"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="What approximate edits cost.",
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="write docs/editing.md and docs/drift.svg")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page would be another")
    args = parser.parse_args(argv)
    if args.check:
        return checked()
    drifted = drift.measured()
    text = page(measured(), drift.table(drifted))
    if args.write:
        DOCUMENT.write_text(text, "utf-8")
        drift.plot(drifted, PLOT)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
