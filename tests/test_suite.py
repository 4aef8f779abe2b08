"""Promise: every kind of cache passes the contract suite of `kvjax.testing`: a table of kinds × a list of checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import kinds
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvjax
from kvjax import caches, codecs, testing
from kvjax.testing import programs, promises

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("check", "case"), list(kinds.each_check(kinds.cases())))
def test_a_kind_of_cache_keeps_the_promise(check, case):
    check(case)


PLAIN = [case for case in kinds.cases() if case.name in ("dense", "ring", "paged and shared")]


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(PLAIN))
def test_any_sequence_of_operations_leaves_what_a_numpy_model_says(data, case):
    programs.bookkeeping(case, lambda low, high: data.draw(st.integers(low, high)), count=6)


# ---------------------------------------------------------------- what may be refused

MAY_REFUSE = {
    ("ring", "rewind"),
    ("int4_channels", "rewind"),
    ("shared_prefix", "rewind"),
    ("layer_input", "absorb"),
    ("int8", "grad"),
    ("fp8", "grad"),
    ("int4", "grad"),
    ("int4_channels", "grad"),
}


def test_the_only_cells_that_may_be_refused_are_these():
    assert {(cell.kind, cell.operation) for cell in testing.REFUSED} == MAY_REFUSE, "the list may shrink, not grow"
    assert len(testing.REFUSED) == len(MAY_REFUSE) and all(cell.reason for cell in testing.REFUSED)
    for kind, listed in (kinds.TABLE | kinds.CROSS_TABLE).items():
        for case in listed:
            own = (kind.__name__, *words(case.plan), *words(case.cross))
            found = {cell.operation for cell in testing.REFUSED if cell.kind in own}
            assert set(case.refuses) <= found, f"{case.name} refuses {case.refuses}, and may refuse {found}"
            assert case.slack is None or "rewind" in found, f"{case.name} has a slack"


def words(plan):
    """Names of kinds and codecs in a plan."""
    text = str(plan) if not isinstance(plan, tuple) else " ".join(map(str, plan))
    return [word.__name__ for word in (*caches.KINDS, *codecs.CODECS) if word.__name__ in text]


def test_what_is_refused_is_refused_with_a_reason():
    ring, rotated = kinds.TABLE[caches.ring][0], kinds.TABLE[caches.dense][0].config
    with pytest.raises(kvjax.CacheError, match="slack"):
        ring.filled()[1].rewind([16 - ring.slack - 1, 7, 1])
    with pytest.raises(kvjax.InputError, match="rotation"):
        testing.Case("absorbed", caches.layer_input(absorb=True), rotated).empty()


# ---------------------------------------------------------------- the report


def test_a_suite_that_fails_says_which_check_and_why():
    broken = testing.Case("mine", caches.ring(5), slack=0, config=kinds.FULL)  # no reference with a window
    report = testing.run_suite(broken, [promises.same_logits, promises.rewind_beyond_the_slack])
    assert not report.ok and [bool(line.error) for line in report.lines] == [True, False]
    assert max(map(len, str(report).splitlines())) <= 80
    with pytest.raises(AssertionError, match="same_logits .* FAILED"):
        report.raise_if_failed()


def test_every_check_has_a_promise_and_a_name_of_its_own():
    names = [check.__name__ for check in testing.suite]
    assert len(set(names)) == len(names) and all((check.__doc__ or "").strip().endswith(".") for check in testing.suite)


def test_importing_kvjax_does_not_import_the_kit_nor_the_kit_a_test_runner():
    code = "import sys, kvjax; assert 'kvjax.testing' not in sys.modules; kvjax.testing.suite; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not {"pytest", "hypothesis"} & set(done.stdout.split())
    assert jax.__name__ in done.stdout
