"""The proof in tables: every kind, codec and family is in it, what it refuses is on the list, and broken plans fail."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from models import ONE_LAYER_WINDOWED, WINDOW, tiny

from kvjax import CacheError, caches, codecs
from kvjax.testing import REFUSED, mutants, proof

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import equivalence_page as page_script

PAGE = page_script.PAGE.read_text("utf-8")
NAMES = [each.name for each in proof.ALGORITHMS]
BY_NAME = {mutant.name: mutant for mutant in mutants.MUTANTS}


def kinds_in(plan):
    """Names of kinds and codecs anywhere in a plan."""
    if isinstance(plan, tuple):
        return {name for each in plan for name in kinds_in(each)}
    if not dataclasses.is_dataclass(plan):
        return set()
    inner = {name for field in dataclasses.fields(plan) for name in kinds_in(getattr(plan, field.name))}
    return inner | {str(plan).split("(")[0]}


def test_every_kind_codec_and_family_is_in_the_tables():
    rows = [row for _, rows in proof.SECTIONS.values() for row in rows]
    found = set().union(*(kinds_in(row.plan) | kinds_in(row.cross) for row in rows))
    every = {each.__name__ for each in (*caches.KINDS, *caches.CROSS_KINDS, *codecs.CODECS)}
    assert every - found <= {"plain", "hybrid"}, "plain is written as its dtype, and hybrid() is traced()"
    assert {name for section, name in page_script.units() if section == "family"} == set(page_script.FAMILIES)


def test_the_page_has_every_row_and_says_that_all_are_equal():
    lines = PAGE.splitlines()
    for section, name in page_script.units():
        cells = [line.split(" | ")[1:-1] for line in lines if line.startswith(f"| {name} | ")]
        assert cells, f"{name} is not in docs/equivalence.md: run scripts/equivalence_page.py"
        if section == "family":
            assert all(cell.replace(",", "").isdigit() for cell in cells[0])
            continue
        row = next(row for row in proof.SECTIONS[section][1] if row.name == name)
        if cells[0][0].startswith("refused"):
            assert any(f"refused: {each.operation} {each.reason}" == cells[0][0] for each in REFUSED)
        elif row.exact:
            tokens = [int(cell.split(" ")[0].rstrip(",").replace(",", "")) for cell in cells[0]]
            assert len(tokens) == len(NAMES) and min(tokens) >= 3 * 3 * 4 * 16
        else:
            assert cells[0][0] == "approximate"
    assert "DIFFERS" not in PAGE and f"| | {' | '.join(NAMES)} | worst logit |" in PAGE
    for each in REFUSED:
        assert f"| `{each.kind}` | {each.operation} | {each.reason} |" in PAGE


def test_a_refused_row_is_on_the_list_and_any_other_error_is_raised():
    line = proof.of_kind("decoder", "layer input, absorbed")
    assert line.refused in REFUSED and line.refused.kind == "layer_input" and not line.wrong
    assert "refused: absorb across a rotation" in proof.in_markdown([line])
    with pytest.raises(CacheError, match="the page pool was exhausted"):
        proof.proved(tiny(ONE_LAYER_WINDOWED), proof.Row("scarce", caches.paged(8, pages=3)), splits=[(16,)], seeds=[0])


@pytest.mark.full
def test_a_row_of_the_tables_is_equal_under_every_algorithm():
    line = proof.of_kind("encoder", "ring, dense · absorbed")
    assert not line.wrong and len(line.outcomes) == len(NAMES)


@pytest.mark.full
def test_a_family_is_equal_under_its_default_plan():
    assert not proof.of_family("mistral", page_script.configs()["mistral"]).wrong


@pytest.mark.full
def test_a_broken_plan_fails_whatever_the_algorithm():
    """The others are in `test_equivalence`; recomputing the scores of beams that differ takes most of the time."""
    chosen = [proof.ALGORITHMS[at] for at in (2, 5, 8)]
    plan = BY_NAME["mask < for <="](caches.ring(WINDOW, slack=2))
    line = proof.proved(tiny(ONE_LAYER_WINDOWED), proof.Row("broken", plan), chosen, seeds=[0], splits=[(5, 11)])
    assert all(any(not x.tie for x in each.differences) for each in line.outcomes)
    assert "DIFFERS" in proof.in_markdown([line], chosen)
