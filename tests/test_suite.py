"""Promise: every kind of cache passes the contract suite of `kvjax.testing`: a table of kinds × a list of checks."""

from __future__ import annotations

import os
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
from kvjax.testing import contract, moves, programs, promises, sources

ROOT = Path(__file__).resolve().parent.parent
COSTLY = {moves.vmap: ("ring",), moves.gradients: ("ring",), contract.sharded: ()}
"""Checks that compile much run by default on these cases, and on the others in the full suite."""


BESIDE_A_SOURCE = (
    promises.same_logits,
    promises.unused_slots,
    moves.rows,
    programs.bookkeeping,
    sources.source_stays,
    sources.refused_source,
    sources.own_source,
)
"""Checks that run by default beside a source as well: those on which it bears most."""


ELSEWHERE = (promises.same_logits, promises.rewind, promises.unused_slots, moves.rows, moves.jit_is_eager, moves.vmap)
"""Checks that run on other versions of jax as well."""


def each_check():
    for check in testing.suite:
        for case in (*kinds.cases(), *kinds.of_sources()):
            left_out = case.full or case.name not in COSTLY.get(check, (case.name,))
            left_out |= case.config.encoder is not None and check not in BESIDE_A_SOURCE
            name = f"{check.__name__}-{case.name.replace(' ', '-')}"
            marks = pytest.mark.full if left_out else pytest.mark.corner if check in ELSEWHERE else ()
            yield pytest.param(check, case, id=name, marks=marks)


@pytest.mark.parametrize(("check", "case"), list(each_check()))
def test_a_kind_of_cache_keeps_the_promise(check, case):
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2])
@kinds.each(lambda case: case.exact, lambda: [*kinds.cases(), *kinds.of_sources()])
def test_tokens_and_programs_are_equal_at_the_other_seeds(case, seed):
    promises.same_tokens(case, (seed,))
    programs.any_program(case, (seed,), count=24)


PLAIN = [case for case in kinds.cases() if case.name in ("dense", "ring", "paged and shared")]


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(PLAIN))
def test_any_sequence_of_operations_leaves_what_a_numpy_model_says(data, case):
    programs.bookkeeping(case, lambda low, high: data.draw(st.integers(low, high)), count=6)


@pytest.mark.full
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name.replace(" ", "-")) for c in kinds.cases() if c.keeps])
def test_any_long_sequence_of_operations_does_too(case):
    @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data):
        programs.bookkeeping(case, lambda low, high: data.draw(st.integers(low, high)), count=12)

    run()


EIGHT = """
import jax, sys
from kvjax import caches, codecs
from kvjax.testing import Case, sharded
from kvjax.testing.cases import FULL, WINDOWED
jax.config.update("jax_numpy_rank_promotion", "raise")
assert len(jax.devices()) == 8
for case in (
    Case("dense", caches.dense(), FULL),
    Case("ring", caches.ring(6, slack=2), WINDOWED),
    Case("int8", caches.dense(store=codecs.int8()), FULL, exact=False),
):
    if case.name in sys.argv[1:]:
        sharded.sharded(case)
        text = sharded.compiled(case).as_text()
        assert "all-gather" not in text and "all-to-all" not in text, case.name
        assert "all-reduce" in text, "nothing is split: this would prove nothing"
        print(case.name, "equal on 4 x 2 devices")
"""


@pytest.mark.corner
@pytest.mark.parametrize("names", [("ring",), pytest.param(("dense", "int8"), marks=pytest.mark.full)], ids="-".join)
def test_sharded_over_rows_and_heads_of_eight_devices_the_tokens_are_those_of_one(names):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", EIGHT, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("equal on 4 x 2 devices") == len(names)


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
