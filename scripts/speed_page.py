"""Writes docs/speed.md: the tables of the benchmarks' committed results, each with the command that makes it again.

python scripts/speed_page.py
python scripts/speed_page.py --check        (only whether the page is that of the results)
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pages

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
PAGE, RESULTS = ROOT / "docs" / "speed.md", ROOT / "benchmarks" / "results"

PARTS = (
    ("decode", "decode", "Decoding with a dense cache", "tell"),
    ("prefill", "prefill", "Prefill", "tell"),
    ("peers-decode-*", "peers", "Decoding beside others", "shown"),
    ("peers-prefill-*", "peers", "Prefill beside others", "shown"),
    ("peers-seq2seq-*", "peers", "Encoder and decoder beside others", "shown"),
    ("kinds", "kinds", "Kinds of cache, and growing", "tell"),
    ("means", "means", "Ways to multiply", "tell"),
    ("beams", "beams", "Beams", "tell"),
    ("speculative", "speculative", "Speculation", "tell"),
    ("edit", "edit", "Edits", "tell"),
    ("compile", "compile", "Starting", "tell"),
    ("weights", "weights", "Weights", "table"),
)
"""File of results, the script that makes it, a title, and the script's function that tells it."""

INTRO = """# Speed

Written by `python scripts/speed_page.py` from [benchmarks/results](../benchmarks/results), which the commands below
write. Times are of the machine that a table names, which others share: what holds are ratios within a run, and another
processor has others. What a device reads and multiplies is measured in the same run. Why things are as they are stands
in [decisions.md](decisions.md), "Speed"; what a model will cost in [estimate.md](estimate.md).

A share of reading above 1 says that the machine was slower while its limit was measured than while the model ran: it
is shared, and beside others their threads were there.
"""


def page() -> str:
    """All that there are results for."""
    made = [INTRO]
    for name, script, title, tell in PARTS:
        paths = sorted(RESULTS.glob(f"*/{name}.json"))
        if paths:
            made.append(f"## {title}\n")
        for path in paths:
            result = json.loads(path.read_text("utf-8"))
            told = getattr(importlib.import_module(script), tell)(result)
            made.append(f"`{result['command']}`\n\n```\n{told}\n```\n")
    return "\n".join(made)


if __name__ == "__main__":
    sys.exit(pages.keep(__doc__, lambda: {PAGE: page()}, "python scripts/speed_page.py"))
