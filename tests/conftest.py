"""What every test runs under: ranks are never promoted in silence (warnings are errors by pyproject)."""

from __future__ import annotations

import jax
import numpy as np
import pytest


def pytest_configure(config):
    jax.config.update("jax_numpy_rank_promotion", "raise")


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
