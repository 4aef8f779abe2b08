"""The kinds that the promises are tested on. A new kind: its name in `caches.KINDS`, and a line here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from models import FULL, GEMMA, LEARNED, MIXED, POST, WINDOW, WINDOWED, tiny

from kvjax import caches, codecs
from kvjax.caches import plans
from kvjax.config import Config


@dataclasses.dataclass(frozen=True)
class Case:
    """A plan, a model that it is exact on, and the reference that it must equal.

    Args:
        name: for people.
        plan: under test.
        config: of the model.
        reference: computes the same from scratch.
        keeps: whether there are keys and values to look at.
        slack: tokens that a row can be rewound; None is any number.
        full: runs in the full suite only.
        exact: whether it equals the reference; codes of few bits do not, and keep the other promises bitwise.
    """

    name: str
    plan: Any
    config: Config = MIXED
    reference: Any = caches.recompute()
    keeps: bool = True
    slack: int | None = None
    full: bool = False
    exact: bool = True

    @property
    def model(self):
        return tiny(self.config)


W = WINDOW
GROUPS = codecs.int4_channels(4, residual=3, slack=4)
SINKS = {"window": W, "sinks": 2}
TABLE = {
    caches.dense: (
        Case("dense", caches.dense()),
        Case("dense everywhere full", caches.dense(), FULL, full=True),
        Case("post norm", caches.dense(), POST, full=True),
        Case("int8", caches.dense(store=codecs.int8()), exact=False),
        Case("fp8", caches.dense(store=codecs.fp8()), exact=False, full=True),
        Case("int4", caches.dense(store=codecs.int4()), exact=False, full=True),
        Case("int4 channels", caches.dense(store=GROUPS), slack=4, exact=False),
        Case("float16", caches.dense(store="float16"), exact=False, full=True),
    ),
    caches.ring: (
        Case("ring", (caches.ring(W, slack=4), caches.dense()), slack=4),
        Case(
            "sinks",
            (caches.ring(W, slack=4), caches.ring(W, sinks=2, slack=3)),
            reference=(caches.recompute(), caches.recompute(**SINKS)),
            slack=3,
        ),
        Case("ring everywhere", caches.ring(W, slack=2), WINDOWED, slack=2, full=True),
        Case("ring without slack", caches.ring(W), WINDOWED, slack=0, full=True),
        Case("ring wider than the window", caches.ring(W + 3, slack=1), WINDOWED, slack=1, full=True),
        Case("sinks everywhere", caches.ring(slack=1, **SINKS), FULL, caches.recompute(**SINKS), slack=1, full=True),
        Case("per layer", caches.per_layer(local=caches.ring(W, slack=4), full=caches.dense()), slack=4, full=True),
        Case(
            "sinks in cache",
            caches.ring(slack=2, sinks_in_cache=True, **SINKS),
            FULL,
            caches.recompute(sinks_in_cache=True, **SINKS),
            slack=2,
            full=True,
        ),
        Case("ring of int8", caches.ring(W, slack=2, store=codecs.int8()), WINDOWED, slack=2, exact=False, full=True),
        Case("default plan", caches.default(MIXED), slack=plans.SLACK, full=True),
        Case("gemma", caches.default(GEMMA), GEMMA, slack=plans.SLACK, full=True),
    ),
    caches.paged: (
        Case("paged", caches.paged(8)),
        Case("paged and shared", caches.paged(8, share=2)),
        Case("pages of a pool", caches.paged(5, pages=60), full=True),
        Case("paged everywhere windowed", caches.paged(16, share=3), WINDOWED, full=True),
    ),
    caches.recompute: (
        Case("recompute", caches.recompute(), keeps=False),
        Case("recompute beside dense", (caches.dense(), caches.recompute()), keeps=False, full=True),
    ),
    caches.layer_input: (
        Case("layer input", caches.layer_input()),
        Case("layer input absorbed", caches.layer_input(absorb=True), LEARNED, full=True),
    ),
    caches.traced: (
        Case("traced", (caches.traced(caches.ring(W, slack=4)), caches.traced(caches.dense())), slack=4, full=True),
    ),
    caches.output: (Case("output", caches.output(), full=True),),
    caches.hybrid: (Case("hybrid", caches.hybrid(), full=True),),
}


def cases() -> list[Case]:
    """All cases of every kind."""
    missing = [kind.__name__ for kind in caches.KINDS if kind not in TABLE]
    assert not missing, f"tests/kinds.py has no case for {missing}"
    return [case for kind in caches.KINDS for case in TABLE[kind]]


def each(only=lambda case: True):
    """Runs a test on every case, on some of them in the full suite only."""
    marks = {True: (pytest.mark.full,), False: ()}
    params = [
        pytest.param(case, marks=marks[case.full], id=case.name.replace(",", "").replace(" ", "-"))
        for case in cases()
        if only(case)
    ]
    return pytest.mark.parametrize("case", params)


def first_of_each(default=None):
    """Runs a test on one case a kind; by default on these kinds only, and on the others in the full suite."""
    cases()
    params = [
        pytest.param(
            TABLE[kind][0],
            id=kind.__name__,
            marks=pytest.mark.full if TABLE[kind][0].full or (default and kind not in default) else (),
        )
        for kind in caches.KINDS
    ]
    return pytest.mark.parametrize("case", params)


def mixed():
    """Runs a test on a ring beside dense layers; on the other kinds in the full suite."""
    return first_of_each((caches.ring,))
