"""The contract of a cache expresses the hard cases of `benchmarks/`: kinds against references, and broken twins."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).resolve().parent.parent / "benchmarks")


@pytest.fixture(scope="module")
def cases():
    sys.path.insert(0, BENCHMARKS)
    try:
        import contract_cases
    finally:
        sys.path.remove(BENCHMARKS)
    return contract_cases


FAST = ("keys stored un-rotated",)  # pages, int8 and trees of drafts are in the contract suite
ALL = (
    *FAST,
    "tree drafts",
    "ring of int8, chunks longer than the window",
    "paged, one table",
    "absorbed layer input",
    "absorbed cross-attention",
    "sinks with positions in the cache",
    "shared prefix and suffix",
)


@pytest.mark.parametrize("name", FAST)
def test_a_hard_case_gives_what_its_reference_gives(cases, name):
    found = cases.CASES[name](False, False)
    assert max(found.values()) <= cases.EXACT, found


def test_every_case_is_listed(cases):
    assert set(ALL) == set(cases.CASES)


@pytest.mark.full
@pytest.mark.parametrize("name", ["tree drafts"])  # the others have become kinds, which go through the contract suite
def test_a_hard_case_holds_through_rewind_take_and_growth(cases, name):
    found = cases.CASES[name](False, True)
    assert max(found.values()) <= cases.EXACT, found


@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
def test_a_broken_twin_fails_the_same_check(cases, name):
    found = cases.CASES[name](True, False)
    assert max(found.values()) > cases.BROKEN, found


@pytest.mark.full
@pytest.mark.parametrize("name", ["sinks with positions in the cache", "tree drafts"])
def test_a_hard_case_holds_when_attention_goes_in_blocks_of_queries(cases, name, monkeypatch):
    import jax

    from kvjax.ops import attention

    monkeypatch.setattr(attention, "BLOCK", 4)
    monkeypatch.setattr(attention, "BLOCKWISE_ABOVE", 8)
    jax.clear_caches()  # programs made with the other sizes
    found = cases.CASES[name](False, False)
    jax.clear_caches()
    assert max(found.values()) <= cases.EXACT, found
