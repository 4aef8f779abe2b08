"""Writes the README's picture, docs/picture.svg, and its table of measured figures, from benchmarks/results.

    python scripts/front_page.py
    python scripts/front_page.py --check        (only whether both are those of the results)

The picture shows what each way of caching keeps, and what a token then takes (`python benchmarks/strategies.py`). It is
plain SVG, so that the same results give the same bytes; its colours follow a reader's light or dark theme. The table
stands in README.md between two marks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pages

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURE, README = ROOT / "benchmarks" / "results" / "cpu", ROOT / "docs" / "picture.svg", ROOT / "README.md"
BEGIN, END = "<!-- written by scripts/front_page.py -->\n", "<!-- end -->\n"

BARS = {
    "none": ("nothing", "caches.recompute()"),
    "input, projected": ("layer inputs", "caches.layer_input()"),
    "output": ("layer outputs", "caches.output()"),
    "input, absorbed": ("layer inputs, absorbed", "caches.layer_input(absorb=True)"),
    "K/V": ("keys and values", "caches.dense()"),
    "hybrid": ("keys, values and the stream", "caches.hybrid()"),
}
"""Strategy of the results to what is kept, and the plan that keeps it."""

WIDE, TOP, STEP, LEFT, BAR, PANEL = 860, 44, 42, 232, 18, 235

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.head { font-weight: 600 } .plan { font: 11px ui-monospace, monospace; fill: #57606a }
.small { font-size: 11px; fill: #57606a }
.memory { fill: #0571b0 } .time { fill: #e08214 } line { stroke: #d0d7de }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .plan, .small { fill: #9da7b3 } line { stroke: #3d444d }
.memory { fill: #58a6d6 } .time { fill: #f0a04b } }
"""


def said(number: float) -> str:
    """Three figures at most."""
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 0.1 else f"{number:.3f}"


def panel(x: int, title: str, unit: str, kind: str, numbers: Sequence[float]) -> list[str]:
    """Bars from `x` on, as long as their numbers."""
    foot = TOP + STEP * len(numbers) - 8
    parts = [f'<text class="head" x="{x}" y="{TOP - 18}">{escape(title)}</text>']
    parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP - 8}" y2="{foot}"/>')
    for i, number in enumerate(numbers):
        y, length = TOP + STEP * i, PANEL * number / max(numbers)
        parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{max(length, 1):.1f}" height="{BAR}" rx="2"/>')
        parts.append(f'<text x="{x + length + 6:.1f}" y="{y + 14}">{said(number)} {unit}</text>')
    return parts


def picture(result: dict[str, Any]) -> str:
    """The SVG."""
    rows = {name: found[-1] for name, found in result["panels"]["decoder"]["strategies"].items() if name in BARS}
    if set(rows) != set(BARS):
        raise SystemExit(f"strategies.json has {', '.join(rows)}; the picture is of {', '.join(BARS)}")
    length, tall = rows["none"]["length"], TOP + STEP * len(BARS) + 30
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="0 0 {WIDE} {tall}" width="{WIDE}" height="{tall}">',
        f"<title>Memory and time a token by what is cached, at {length:,} positions</title><style>{STYLE}</style>",
        f'<text class="head" x="0" y="{TOP - 18}">what is cached</text>',
    ]
    for i, (name, plan) in enumerate(BARS.values()):
        y = TOP + STEP * i
        parts.append(f'<text x="0" y="{y + 9}">{escape(name)}</text>')
        parts.append(f'<text class="plan" x="0" y="{y + 24}">{escape(plan)}</text>')
    memory = [rows[name]["cache_bytes"] / 1e6 for name in BARS]
    time = [1e3 * rows[name]["loop"]["median"] for name in BARS]
    parts += panel(LEFT, f"memory at {length:,} positions", "MB", "memory", memory)
    parts += panel(LEFT + PANEL + 80, "time a token", "ms", "time", time)
    machine = f"{result['cores']} cores of an {result['processor']}, jax {result['jax']}, {result['day']}"
    foot = f"6 layers, width 512, {result['dtype']}, one row; {machine}; python benchmarks/strategies.py"
    parts.append(f'<text class="small" x="0" y="{tall - 6}">{escape(foot)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def results(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def beside(name: str, case: str, others: Sequence[str]) -> tuple[str, str, str]:
    """A line: kvjax's rate, and how many times that of each of some others it is."""
    result = results(name)
    found = next(each for each in result["cases"] if each["name"] == case)
    own = next(iter(found["rate"].values()))["median"]
    ratios = (f"{found['kvjax_is'][other]['median']:.2f} × {other}" for other in others)
    what = f"{case}, prefill" if found["part"] == "prefill" else case
    return what, f"{own:,.0f} tokens/s: {', '.join(ratios)}", result["command"]


def figures() -> str:
    """The table, and what it was measured on."""
    decode, kinds, beams, compiled = (results(name) for name in ("decode", "kinds", "beams", "compile"))
    at_length = decode["cases"]["110M, float32, batch 1, context 1024"]
    four = beams["cases"]["1 prompt, context 1,024"]
    lines = [
        (
            "110M, batch 1, context 1,024",
            f"{at_length['tokens_a_second']['median']:.0f} tokens/s: "
            f"{at_length['of_reading']:.2f} of the speed of reading measured in the same run",
            decode["command"],
        ),
        beside("peers-decode-110M", "110M, batch 1, 128 new", ("llama.cpp float32", "CTranslate2", "PyTorch dynamic")),
        beside("peers-decode-15M", "15M, batch 1, 240 new", ("llama.cpp float32", "CTranslate2", "PyTorch dynamic")),
        beside("peers-decode-15M", "15M, batch 8, 240 new", ("llama.cpp float32", "CTranslate2", "PyTorch dynamic")),
        beside("peers-prefill-15M", "15M, batch 1, 512 tokens", ("llama.cpp float32", "CTranslate2", "PyTorch")),
        beside("peers-prefill-110M", "110M, batch 1, 512 tokens", ("llama.cpp float32", "CTranslate2", "PyTorch")),
        (
            "4 beams of one prompt of 1,024 tokens",
            f"{four['once']['of_rows']['median']:.2f} of the time of 4 rows, "
            f"{four['once']['bytes'] / four['rows']['bytes']:.0%} of their memory",
            beams["command"],
        ),
        (
            "first character of the first command",
            "{first:.1f} s, the second time {again:.1f} s".format(**started(compiled)),
            compiled["command"],
        ),
    ]
    rows = [f"| {name} | {value} | `{command}` |" for name, value, command in lines]
    machine = f"{decode['cores']} cores of an {decode['processor']}, jax {decode['jax']}, Python {decode['python']}"
    head = f"Medians, float32, on {machine}; ratios are of alternating rounds in one run, above 1 is faster.\n"
    return "\n".join([head, "| what | measured | by |", "|---|---|---|", *rows]) + "\n"


def started(compiled: dict[str, Any]) -> dict[str, float]:
    """Seconds to the first character, at the first and at the second start."""
    line = compiled["command_line"]
    return {name: line[key]["median"] for name, key in (("first", "first"), ("again", "second"))}


def files() -> dict[Path, str]:
    """The picture, and the README with its table."""
    before, rest = README.read_text("utf-8").split(BEGIN)
    return {PICTURE: picture(results("strategies")), README: before + BEGIN + figures() + END + rest.split(END)[1]}


if __name__ == "__main__":
    sys.exit(pages.keep(__doc__, files, "python scripts/front_page.py"))
