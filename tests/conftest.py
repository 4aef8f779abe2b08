"""What every test runs under: ranks are never promoted in silence (warnings are errors by pyproject)."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import jax
import numpy as np
import pytest

MAPS = Path("/proc/self/maps")
BETWEEN, INSIDE = 25_000, 55_000
"""XLA keeps compiled programs in memory maps, of which Linux allows a process 65,530; past them it aborts. The full
suite makes more. It lets go of what it compiled between files, where nobody counts compilations; inside if it must."""

ran = itertools.count(1)


def is_quick(config):
    """Every run but that of the corners is compiled quickly: most programs here run for milliseconds."""
    return config.option.markexpr != "corner"


def pytest_configure(config):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if is_quick(config):  # read at the first compilation; a flag that a jaxlib does not know ends the process
        known = (0, 7) <= jax.version.__version_info__[:2] < (0, 13)
        emitters = " --xla_cpu_use_fusion_emitters=false" if known else ""
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + emitters
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of the processes that tests start
        jax.config.update("jax_traceback_in_locations_limit", 0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tests are compiled without LLVM's optimisations and by older emitters of XLA's CPU, which takes far less time;
    XLA's own passes, which fuse, reorder and alias, are the same. The corners run as users do, and what is `optimised`
    has LLVM's optimisations everywhere. JAX would go on using what was compiled before, so that two programs of one
    test could differ by which tests the process ran earlier: whatever was compiled goes when this changes."""
    quickly = is_quick(item.config) and not item.get_closest_marker("optimised")
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
