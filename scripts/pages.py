"""What the scripts that write a page have in common: `--check`, which makes again what is the same on every machine."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def alike(one: str, other: str, near: float) -> bool:
    """Whether two lines are the same but for numbers, and those differ by no more than `near` of the larger one."""
    if one == other:
        return True
    if not near or NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    numbers = ([float(x.replace(",", "")) for x in NUMBER.findall(line)] for line in (one, other))
    return all(abs(a - b) <= near * max(abs(a), abs(b)) for a, b in zip(*numbers, strict=True))


def missing(page: str, made: Sequence[str], near: float = 0.0) -> list[str]:
    """Which of `made` do not stand in a page, in their order, what else there is between them left out of account.

    Args:
        page: its text.
        made: lines.
        near: see `alike`; 0 for lines that must be the same.
    """
    lines, at, lost = page.splitlines(), 0, []
    for wanted in made:
        found = next((i for i in range(at, len(lines)) if alike(lines[i], wanted, near)), None)
        if found is None:
            lost.append(wanted)
        else:
            at = found + 1
    return lost


def check(path: Path, made: Sequence[str], command: str, near: float = 0.0) -> int:
    """0 if a page has the lines; else 1, and on standard error which are not there and what makes the page again."""
    lost = missing(path.read_text("utf-8"), made, near)
    if lost or not made:
        print(f"{path} lacks, or has elsewhere, {len(lost)} lines; {command} makes it again:", file=sys.stderr)
        print(*lost, sep="\n", file=sys.stderr)
    return int(bool(lost) or not made)


def keep(about: str, made: Callable[[], Mapping[Path, str]], command: str) -> int:
    """The script of files that are the same everywhere: writes them; with `--check` it is 1 where one differs.

    Args:
        about: the script's docstring, for `--help`.
        made: gives the text of each file.
        command: what makes them again.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file would be another")
    arguments = parser.parse_args()
    for path, wanted in made().items():
        if not arguments.check:
            path.write_text(wanted, "utf-8")
        elif path.read_text("utf-8") != wanted:
            print(f"{path.name} is another: {command} makes it again", file=sys.stderr)
            return 1
    return 0


__all__ = ["alike", "missing", "check", "keep"]
