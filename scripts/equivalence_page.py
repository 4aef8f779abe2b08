"""Writes docs/equivalence.md: which kinds of cache give the tokens of recomputing from scratch, under which algorithms.

python scripts/equivalence_page.py                      # all of it, in two processes
python scripts/equivalence_page.py --jobs 1 --out -     # to standard output
python scripts/equivalence_page.py --check              # only whether rows, refusals and the sum are in the page
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "golden"), str(ROOT / "scripts"), str(ROOT)]

import cases  # noqa: E402  (the path is set above)
import harness  # noqa: E402
import pages  # noqa: E402

from kvjax.checkpoint.families import FAMILIES  # noqa: E402
from kvjax.testing import proof  # noqa: E402
from kvjax.testing.contract import REFUSED  # noqa: E402

PAGE = ROOT / "docs" / "equivalence.md"


def configs() -> dict[str, dict[str, Any]]:
    """The first configuration of each family that parity with Transformers is proved on."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases.ALL:
        found.setdefault(case.config["model_type"], case.config)
    assert set(found) == set(FAMILIES), "a family without a case"
    return found


def units() -> list[tuple[str, str]]:
    """Section and name of every row."""
    rows = [(section, row.name) for section, (_, rows) in proof.SECTIONS.items() for row in rows]
    return rows + [("family", name) for name in configs()]


def line(unit: tuple[str, str]) -> proof.Line:
    """One row."""
    section, name = unit
    return proof.of_family(name, configs()[name]) if section == "family" else proof.of_kind(section, name)


def lines(jobs: int, quiet: bool) -> Iterable[proof.Line]:
    """All rows in order."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from tqdm(pool.map(line, units()), total=len(units()), unit="row", disable=quiet, file=sys.stderr)


def document(found: dict[str, list[proof.Line]], seconds: float) -> str:
    """The page."""
    facts = harness.facts()
    versions = ", ".join(f"{name} {facts[name]}" for name in ("kvjax", "jax", "jaxlib", "flax", "numpy", "python"))
    refused = "\n".join(refusals())
    every = [each for part in found.values() for row in part if row.exact for each in row.outcomes]
    tokens, ties = sum(each.tokens for each in every), sum(len(each.ties) for each in every)
    return f"""# The same tokens

Which caches give the tokens of recomputing from scratch, under which algorithms: all of them, compared.

`python scripts/equivalence_page.py` made this page on {facts["day"]} in {seconds / 60:.0f} minutes, on
{facts["processor"]} ({facts["cores"]} cores, {facts["system"]}), with {versions}.

A cell is how many new tokens were compared, and all are equal: with a cache, and recomputed from scratch by the same
algorithm with the same keys, in float32. {tokens:,} in all, {ties} of them ties: first differences where the recomputed
scores of the two choices differ by less than 1e-5 of the largest logit. Three prompts of 16, 7 and 1 tokens side by
side, at seeds 0, 1 and 2, each fed whole, in two uneven pieces, in three, and one by one; every row has at least 16
distinct tokens. *Worst logit* is the largest difference of a logit, over the largest logit. Approximate kinds promise
no tokens: only that difference is stated, for greedy decoding.

Columns: *greedy*; *sampled* at temperature 0.9; *penalties* with repetition and frequency penalties, no triple twice
and top-p, all of which read the text; *stops* with four ids and two sequences that end a row, and a least length;
*3 samples* of each prompt, which share it; *drafts*, greedy, looked up in the text, four at a time; *sampled drafts* of
the model's own first layer, drawn with the same noise; *4 beams*, best text and score, no pair twice; the same with
stops, a least length and another length penalty.

## Without an encoder

Two layers, the first with a window of 6, rotated keys, 4 query heads on 2 of keys.

{proof.in_markdown(found["decoder"])}

## With an encoder

Relative positions as in T5, the first layer with a window; what is kept of the text · what is kept of the source.

{proof.in_markdown(found["encoder"])}

## Families under their default plan

Random weights, the smallest configurations that parity with Transformers is shown on.

{proof.in_markdown(found["family"], proof.OF_FAMILIES)}

## What may be refused

These and no more; a test fails when the list grows.

| kind | operation | why |
|---|---|---|
{refused}
"""


def refusals() -> list[str]:
    """Lines of the last table."""
    return [f"| `{each.kind}` | {each.operation} | {each.reason} |" for each in REFUSED]


def checked(page: str) -> list[str]:
    """What is wrong with a page without running a model: rows or refusals that it lacks, a sum that is not that of its
    cells, a cell that says that tokens differ."""
    names = {name for _, name in units()}
    rows = [cells for line in page.splitlines() if (cells := line.strip("| ").split(" | "))[0] in names]
    wrong = [f"no row of {name}" for name in sorted(names - {cells[0] for cells in rows})]
    wrong += [f"no line {line}" for line in pages.missing(page, refusals())]
    cells = [cell.split(", ")[0].replace(",", "") for row in rows for cell in row[1:]]
    total = sum(int(cell) for cell in cells if cell.isdigit())
    if f" {total:,} in all" not in page.replace("\n", " "):
        wrong.append(f"the cells add up to {total:,}, which it does not say")
    return wrong + ["a cell DIFFERS"] * ("DIFFERS" in page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(PAGE), help="where to write the page; - is standard output")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default 2)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--check", action="store_true", help="run and write nothing; fail if the page is not whole")
    args = parser.parse_args(argv)
    if args.check:
        wrong = checked(PAGE.read_text("utf-8"))
        print(*wrong, sep="\n", file=sys.stderr)
        return bool(wrong)
    began, found = time.perf_counter(), {section: [] for section in (*proof.SECTIONS, "family")}
    for (section, _), row in zip(units(), lines(args.jobs, args.quiet), strict=True):
        found[section].append(row)
    page = document(found, time.perf_counter() - began)
    if args.out == "-":
        sys.stdout.write(page)
    else:
        Path(args.out).write_text(page, "utf-8")
    wrong = [text for rows in found.values() for row in rows for text in row.wrong]
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
