"""Negative controls: every mutant dies in every kind it applies to, and every check kills at least one mutant."""

from __future__ import annotations

import jax
import kinds
import pytest
from models import WINDOW

from kvjax import caches, testing
from kvjax.testing import drafts, edits, moves, mutants, programs, promises, sources
from kvjax.testing.mutants import MUTANTS, NOTHING
from kvjax.testing.sharded import sharded

RING, PAGES, SOURCE = kinds.MUTATED[0], kinds.MUTATED[4], kinds.MUTATED_SOURCES[0]
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
OF_SOURCES = tuple(mutant for mutant in MUTANTS if mutant.name.startswith("source: "))
QUICK = ("start + 1", "valid + 1", "mask < for <=", "rewind off by one", "rows swapped", "flag never set")

KILLED_BY = {
    promises.same_logits: "window - 1",
    promises.rewind: "rewind a no-op",
    promises.idle_rows: "write clamped",
    promises.past_capacity: "valid + 1",
    promises.rewind_beyond_the_slack: "flag never set",
    promises.runs_out: "flag never set",
    sources.source_stays: "source: fork copies",
    sources.refused_source: "source: refused without a flag",
    sources.own_source: "source: the next row's",
    promises.neighbours: "a neighbour's keys",
    promises.ragged_rewind: "rewind off by one",
    moves.types: "another dtype after a rewind",
    moves.release: "rewind a no-op",
    moves.resize: "empty once it grew",
    promises.unused_slots: "unused slots seen",
    moves.rows: "take = identity",
    moves.value: "take uses its cache up",
    moves.jit_is_eager: "rows swapped under jit",
    programs.any_program: "key position + 1",
    programs.bookkeeping: "start - 1",
    edits.edits: "rewind a no-op",
    promises.same_tokens: "mask < for <=",
    promises.scan_is_the_step_loop: "a state that Python keeps",
    drafts.same_with_drafts: "rewind off by one",
    moves.vmap: "rows swapped under jit",
    sharded: "stale positions",
    moves.gradients: "gradient stopped",
}
"""A mutant that each check kills, in a ring, in pages or beside a source."""


@pytest.fixture
def forgotten():
    """Programs of mutants are of no use to any other test, and take gigabytes."""
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", QUICK)
def test_a_mutant_of_a_ring_dies(name):
    assert mutants.killers(RING, testing.suite, (BY_NAME[name],)).get(name), f"{name} survives, or does not apply"


@pytest.mark.parametrize("name", ["source: padding seen", "source: that of row 0"])
def test_a_mutant_of_a_source_dies(name):
    assert mutants.killers(SOURCE, testing.suite, (BY_NAME[name],)).get(name), f"{name} survives, or does not apply"


@pytest.mark.full
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in kinds.MUTATED_SOURCES])
def test_every_mutant_of_a_source_dies_where_it_applies(case, forgotten):
    found = mutants.killers(case, testing.suite, OF_SOURCES)
    print(*(f"{name}: {check}" for name, check in found.items()), sep="\n")
    assert [name for name, check in found.items() if check is None] == [] and len(found) >= 6


@pytest.mark.full
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in kinds.MUTATED])
def test_every_mutant_dies_in_every_kind_it_applies_to(case, forgotten):
    found = mutants.killers(case, testing.suite)
    print(*(f"{name}: {check}" for name, check in found.items()), sep="\n")
    assert [name for name, check in found.items() if check is None] == []
    assert len(found) >= 10, "a mutant that applies to nothing proves nothing"


@pytest.mark.full
@pytest.mark.parametrize("check", testing.suite, ids=lambda check: check.__name__)
def test_every_check_kills_a_mutant(check):
    case = PAGES if check is promises.runs_out else SOURCE if KILLED_BY[check].startswith("source: ") else RING
    assert mutants.kills(check, BY_NAME[KILLED_BY[check]].of(case)), KILLED_BY[check]
    assert not mutants.kills(check, NOTHING.of(case)), "it kills what is merely wrapped"


def test_every_check_has_a_mutant_to_kill():
    assert set(KILLED_BY) == set(testing.suite) and set(KILLED_BY.values()) <= set(BY_NAME)


def test_a_mutant_says_where_it_applies():
    applied = {case.name: {m.name for m in MUTANTS if m.applies(case)} for case in kinds.MUTATED}
    beside = [{m.name for m in MUTANTS if m.applies(case)} for case in kinds.MUTATED_SOURCES]
    assert set().union(*beside) >= {mutant.name for mutant in OF_SOURCES}, "a mutant that applies nowhere"
    assert not set().union(*applied.values()) & {mutant.name for mutant in OF_SOURCES}
    scales = {name for name, found in applied.items() if "a neighbour's scale" in found}
    coded = {name for name in applied if any(word in name for word in ("int8", "int4", "fp8", "absorb"))}
    assert scales == coded
    assert "window - 1" not in applied[str(caches.paged(8, share=2))]
    assert "window - 1" in applied[str(caches.ring(WINDOW, slack=2))]
    early = {name for name, found in applied.items() if "a page released too early" in found}
    assert early == {str(caches.paged(8, share=2))}
