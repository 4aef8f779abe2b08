"""Writes docs/costs.md: what `kvjax compare` prints on this machine, the textbook integers among it, and what
`benchmarks/cross_attention.py` found.

python scripts/costs_page.py
python scripts/costs_page.py --check     (only whether the page has the bytes, FLOPs and loops; no times)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

import pages  # noqa: E402  (the path is set above)

from kvjax import cli, costs  # noqa: E402
from kvjax.checks import bucket  # noqa: E402
from kvjax.cli.compare_strategies import CONTEXT, NEW, _tables, in_markdown, textbook_table  # noqa: E402
from kvjax.cli.options import build_parser  # noqa: E402
from kvjax.lm import load  # noqa: E402
from kvjax.strategies import kept, runs  # noqa: E402

PAGE = ROOT / "docs" / "costs.md"
RESULTS = ROOT / "benchmarks" / "results"
DECODER = ("kvjax compare --rounds 9 --markdown", "kvjax compare --no-rotation --batch 8 --rounds 9 --markdown")
ENCODER = ("kvjax compare --encoder --batch 4 --rounds 5 --markdown",)
INTRO = """# What a cache costs

What to keep of a text and of a source, side by side: bytes, FLOPs and time.

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
last columns count the products that make them inside the compiled loop and outside of it. On a CPU there is none
inside: XLA projects once before the loop, and the gain of keeping K/V is in steps of their own, and in beams and calls
that go on. Times and FLOPs stand against keys and values projected once; FLOPs are as `kvjax.costs` predicts them where
a loop projects once. Medians of {rounds} rounds in turn on a machine with much else to do: only ratios within one table
mean something.
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
    facts, arguments = result["facts"], result["arguments"]
    table: list[Sequence[str]] = [
        ("", "source bytes", "ms a call each", "ms one loop", "times", "in one loop", "FLOPs", "in one loop", "inside")
        + ("outside",)
    ]
    for (case, rows), shape in zip(result["cases"].items(), ((1, 1), (4, 4), (4, 1)), strict=True):
        work = predicted(arguments, *shape)
        for name, row in rows.items():
            times = [row["median"][way] for way in ("stepwise", "looped")]
            kept = [rows["projected once"]["median"][way] for way in ("stepwise", "looped")]
            ratios = (
                f"{a / b:.1f}" for a, b in zip((*times, *work[name]), (*kept, *work["projected once"]), strict=True)
            )
            places = (str(row[f"projections_{where}"]) for where in ("in_the_loop", "outside"))
            cells = (f"{row['source_bytes']:,}", *(f"{1e3 * t:.2f}" for t in times), *ratios, *places)
            table.append((f"{case}, {name}", *cells))
    where = f"{facts['processor']}, {facts['cores']} cores, load {facts['load']:.1f} to {result['load_at_end']:.1f}"
    return "\n".join(
        [f"jax {facts['jax']}, Python {facts['python']}; {where}; {facts['day']}", "", *in_markdown(table), ""]
    )


def predicted(arguments: dict[str, int], batch: int, sources: int) -> dict[str, tuple[float, float]]:
    """FLOPs of a token, the head left out: a call each, and in one loop that projects once."""
    sizes = {"num_layers": arguments["layers"], "width": arguments["width"], "ffn_width": 4 * arguments["width"]}
    heads = arguments["width"] // 64
    stack = dataclasses.replace(costs.TEXTBOOK, encoder=None, windows=(), query_heads=heads, kv_heads=heads, **sizes)
    config, source = dataclasses.replace(stack, encoder=stack), arguments["source"]
    own = dataclasses.replace(costs.kv_flops(config, slots=arguments["steps"], batch=batch), head=0).contractions
    once = own + costs.cross_flops(config, source=source, batch=batch).contractions
    absorbed = own + costs.cross_absorbed_flops(config, source=source, batch=batch).contractions
    again = costs.projecting_flops(config, source=source, rows=sources).contractions
    return {
        "projected once": (once, once),
        "projected again": (once + again, once + again / arguments["steps"]),
        "absorbed": (absorbed, absorbed),
    }


def sure(command: str) -> list[str]:
    """Lines of a comparison that are the same everywhere: bytes and FLOPs, as predicted and, so it says, as found."""
    args = build_parser().parse_args(command.split()[1:])
    model = load(args.model).model
    size = model.max_positions or CONTEXT
    if args.no_rotation or args.encoder:
        model = (kept.with_encoder if args.encoder else kept.without_rotation)(model.config, size)
    source = (args.batch, bucket(size - NEW, most=size)) if args.encoder else None
    rows = []
    for strategy in kept.WITH_SOURCE if args.encoder else kept.STRATEGIES:
        if strategy.name != kept.ABSORBED or model.layer_shapes()[0].absorbs:
            nbytes, flops = runs.predicted(strategy, model, batch=args.batch, capacity=size, source=source)
            rows.append(runs.Row(strategy.name, None, nbytes, nbytes, flops, flops, {}, "equal"))
    made = runs.Comparison(model.config, args.batch, size - NEW, NEW, args.edit, size, tuple(rows))
    return [f"    {command}", *(line for table in _tables(made)[:2] for line in in_markdown(table))]


def main() -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE, help="where to write the page")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page would say otherwise")
    arguments = parser.parse_args()
    path = arguments.out
    if arguments.check:
        title, table, said = textbook_table()
        made = [*INTRO.splitlines(), *(line for command in DECODER for line in sure(command)), *SOURCE.splitlines()]
        made += [*sure(*ENCODER), title, *in_markdown(table), said, *"\n".join(loops()).splitlines()]
        return pages.check(path, made, "python scripts/costs_page.py")
    page = [INTRO, *map(printed, DECODER), SOURCE, *map(printed, ENCODER), *loops()]
    path.write_text("\n".join(page).rstrip() + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
