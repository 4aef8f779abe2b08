"""Writes docs/costs.md: what `kvjax compare` prints on this machine, the textbook integers among it, and what
`benchmarks/cross_attention.py` found."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvjax import cli
from kvjax.cli.compare_strategies import in_markdown

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "costs.md"
RESULTS = ROOT / "benchmarks" / "results"
DECODER = ("kvjax compare --rounds 9 --markdown", "kvjax compare --no-rotation --batch 8 --rounds 9 --markdown")
ENCODER = ("kvjax compare --encoder --batch 4 --rounds 5 --markdown",)
INTRO = """# What a cache costs

Written by `python scripts/costs_page.py`. The formulas are in the docstrings of `kvjax.costs`;
`tests/test_sentences.py` holds them, and what is often said instead, to their numbers. The textbook example is in the
second section.

## A decoder, side by side
"""
SOURCE = """## With an encoder

Keys and values of the source are made once; or its states stand in for them, absorbed, or projected again.
"""
LOOP = """## What a compiler takes out of a loop

`python benchmarks/cross_attention.py` decodes {steps} tokens from a source of {source} positions with a model of
{layers} + {layers} layers and width {width}: one call of `kvjax.donating.step` a token, and all in one
`kvjax.donating.decode`. Projected again with every call, the source's keys and values do not change in the loop: the
last columns count the products that make them inside the compiled loop and outside of it. Times are medians of
{rounds} rounds in turn, and the machine was busy: only ratios within one table mean something.
"""


def printed(command: str) -> str:
    """What a command of ours writes."""
    made = io.StringIO()
    with contextlib.redirect_stdout(made):
        if code := cli.main(command.split()[1:]):
            raise SystemExit(code)
    return f"    {command}\n\n{made.getvalue()}"


def loops() -> list[str]:
    """Tables of the benchmark, one for each device and version of JAX, and what they say."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*/cross_attention-*.json"))]
    return [LOOP.format(**found[0]["arguments"]), *map(_loop, found)] if found else []


def _loop(result: dict[str, Any]) -> str:
    facts = result["facts"]
    table: list[Sequence[str]] = [
        ("milliseconds a token", "source bytes", "a call each", "one loop", "products inside", "outside")
    ]
    ratios = []
    for case, rows in result["cases"].items():
        for name, row in rows.items():
            times = (f"{1e3 * row['median'][way]:.2f}" for way in ("stepwise", "looped"))
            places = (str(row[f"projections_{where}"]) for where in ("in_the_loop", "outside"))
            table.append((f"{case}, {name}", f"{row['source_bytes']:,}", *times, *places))
        kept = rows["projected once"]["median"]
        for name in ("projected again", "absorbed"):
            both = (f"{rows[name]['median'][way] / kept[way]:.1f}" for way in ("stepwise", "looped"))
            ratios.append(f"{case}, {name}: {' and '.join(both)}")
    where = f"{facts['processor']}, {facts['cores']} cores, load {facts['load']:.1f} to {result['load_at_end']:.1f}"
    return "\n".join(
        [
            f"jax {facts['jax']}, Python {facts['python']}; {where}; {facts['day']}",
            "",
            *in_markdown(table),
            "",
            f"Times of keys and values projected once, a call each and in one loop: {'; '.join(ratios)}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, help="where to write the page")
    path = parser.parse_args().out
    page = [INTRO, *map(printed, DECODER), SOURCE, *map(printed, ENCODER), *loops()]
    path.write_text("\n".join(page).rstrip() + "\n", "utf-8")


if __name__ == "__main__":
    main()
