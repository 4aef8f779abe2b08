"""What every test runs under: ranks are never promoted in silence (warnings are errors by pyproject)."""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

MAPS = Path("/proc/self/maps")
BETWEEN, INSIDE = 25_000, 55_000
"""XLA keeps compiled programs in memory maps, of which Linux allows a process 65,530; past them it aborts. The full
suite makes more. It lets go of what it compiled between files, where nobody counts compilations; inside if it must."""

ran = itertools.count(1)


def pytest_configure(config):
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tests of many programs that each run for milliseconds (`quickly`, and all of the full suite but for `optimised`)
    are compiled without LLVM's optimisations, which round otherwise; XLA's own passes, which fuse, reorder and alias,
    are the same. JAX would go on using what was compiled before, so that two programs of one test could differ by
    which tests the process ran earlier: whatever was compiled goes when this changes."""
    full = item.config.option.markexpr == "full" and not item.get_closest_marker("optimised")
    quickly = full or item.get_closest_marker("quickly") is not None
    if quickly != jax.config.values["jax_disable_most_optimizations"]:
        jax.config.update("jax_disable_most_optimizations", quickly)
        jax.clear_caches()


def pytest_runtest_teardown(item, nextitem):
    inside = nextitem is not None and nextitem.path == item.path
    if MAPS.exists() and (not inside or next(ran) % 16 == 0):
        with MAPS.open("rb") as lines:
            if sum(1 for _ in lines) > (INSIDE if inside else BETWEEN):
                jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pytest_terminal_summary(terminalreporter):
    """Says how many tests against the reference models ran: none is no failure, but it must not go unseen."""
    outcomes = {
        outcome: sum("oracle" in report.keywords for report in terminalreporter.stats.get(outcome, []))
        for outcome in ("passed", "failed", "skipped")
    }
    if any(outcomes.values()):
        ran = outcomes["passed"] + outcomes["failed"]
        terminalreporter.write_line(f"oracle tests: {ran} ran, {outcomes['skipped']} skipped (see KVJAX_ORACLES)")
