"""The contract suite: every check that a kind of cache has to pass, and what a kind may refuse."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvjax.errors import KvjaxError
from kvjax.testing import edits, moves, programs, promises, sources
from kvjax.testing.cases import Case
from kvjax.testing.drafts import same_with_drafts
from kvjax.testing.sharded import sharded

Check = Callable[[Case], object]

suite: list[Check] = [
    promises.same_logits,
    promises.rewind,
    promises.idle_rows,
    promises.past_capacity,
    promises.rewind_beyond_the_slack,
    promises.runs_out,
    sources.source_stays,
    sources.refused_source,
    sources.own_source,
    promises.neighbours,
    promises.ragged_rewind,
    moves.types,
    moves.release,
    moves.resize,
    promises.unused_slots,
    moves.rows,
    moves.value,
    moves.jit_is_eager,
    programs.any_program,
    programs.bookkeeping,
    edits.edits,
    promises.same_tokens,
    promises.scan_is_the_step_loop,
    same_with_drafts,
    moves.vmap,
    sharded,
    moves.gradients,
]
"""Every check, cheapest first: `check(case)` raises AssertionError; its docstring is the promise. A check that does not
apply to a case, such as the tokens of an approximation, passes."""


class Refusal(NamedTuple):
    """What a kind may refuse to do.

    Args:
        kind: a kind or a codec, by name.
        operation: what it refuses.
        reason: why nobody could do it.
    """

    kind: str
    operation: str
    reason: str


REFUSED = (
    Refusal("ring", "rewind", "beyond the stated slack: what was there has been overwritten"),
    Refusal("shared_prefix", "rewind", "into the prefix that other rows share"),
    Refusal("layer_input", "absorb", "across a rotation, or a norm of each key: it is not linear in what is kept"),
    Refusal("int4_channels", "rewind", "beyond the stated slack: what was read exactly is codes by then"),
    Refusal("int8", "grad", "codes are integers"),
    Refusal("fp8", "grad", "codes are bits in integers"),
    Refusal("int4", "grad", "codes are integers"),
    Refusal("int4_channels", "grad", "codes are integers"),
)
"""The only cells of kind × operation that may be refused; a test fails when the list grows."""


@dataclasses.dataclass(frozen=True)
class Line:
    """What one check gave.

    Args:
        check: its name.
        seconds: that it took, compiling included.
        error: what is wrong, or None.
    """

    check: str
    seconds: float
    error: str | None


@dataclasses.dataclass(frozen=True)
class SuiteReport:
    """What `run_suite` found; `str(report)` is a table of at most 80 columns.

    Args:
        case: its name.
        lines: one for each check.
    """

    case: str
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not any(line.error for line in self.lines)

    def raise_if_failed(self) -> SuiteReport:
        """Itself.

        Raises:
            AssertionError: with the table, if a check failed.
        """
        if not self.ok:
            raise AssertionError(f"run_suite\n{self}")
        return self

    def __str__(self) -> str:
        found = [self.case]
        for line in self.lines:
            found.append(f"  {line.check:<26} {line.seconds:>6.1f} s  {'FAILED' if line.error else 'passed'}")
            if line.error:
                text = " ".join(line.error.split())
                found.append(f"    {text if len(text) <= 76 else text[:75] + '…'}")
        return "\n".join(found)


def run_suite(case: Case, checks: Sequence[Check] | None = None) -> SuiteReport:
    """Runs the contract suite on a kind of cache.

    Args:
        case: a plan with the kind, and what it promises; `testing.Case("mine", my_kind())` is enough for one that is
            exact, keeps everything and rewinds to anywhere.
        checks: `testing.suite` if None.

    Returns:
        A report; `print(report)`, `report.ok`, `report.raise_if_failed()`. Errors that are not the checks' or kvjax's,
        such as a TypeError inside the kind, are raised.
    """
    lines = []
    for check in suite if checks is None else checks:
        began, error = time.perf_counter(), None
        try:
            check(case)
        except (AssertionError, KvjaxError) as wrong:
            error = str(wrong) or type(wrong).__name__
        lines.append(Line(check.__name__, time.perf_counter() - began, error))
    return SuiteReport(case.name, tuple(lines))


__all__ = ["suite", "run_suite", "SuiteReport", "Line", "Check", "REFUSED", "Refusal"]
