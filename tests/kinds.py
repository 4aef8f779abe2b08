"""The kinds that the promises are tested on. A new kind: its name in `caches.KINDS` or `caches.CROSS_KINDS`, and a line
here."""

from __future__ import annotations

import dataclasses

import pytest
from models import FULL, GEMMA, LEARNED, MIXED, POST, POSTNORM, RELATIVE, WINDOW, WINDOWED

from kvjax import caches, codecs, testing
from kvjax.caches import plans
from kvjax.testing import contract, drafts, edits, moves, programs, promises, sources


@dataclasses.dataclass(frozen=True)
class Case(testing.Case):
    """A case of the contract suite; `full` ones run in the full suite only."""

    full: bool = dataclasses.field(default=False, kw_only=True)


W = WINDOW
LATE = codecs.int4_channels(group=4, residual=4, slack=4)
SINKS = {"window": W, "sinks": 2}
CODES = {"exact": False, "refuses": ("grad",), "error": 0.06}
"""Errors are about three times what is measured on these models, whose logits are much wilder than a trained one's."""
TABLE = {
    caches.dense: (
        Case("dense", caches.dense()),
        Case("dense everywhere full", caches.dense(), FULL, full=True),
        Case("post norm", caches.dense(), POST, full=True),
        Case("keys un-rotated", caches.dense(rotated=False), full=True),
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
        Case("ring of keys un-rotated", caches.ring(W, slack=2, rotated=False), WINDOWED, slack=2, full=True),
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
        Case("default plan", caches.default(MIXED), slack=plans.SLACK, full=True),
        Case("gemma", caches.default(GEMMA), GEMMA, slack=plans.SLACK, full=True),
    ),
    caches.paged: (
        Case("paged", caches.paged(8), scarce=caches.paged(16, pages=3)),
        Case("paged and shared", caches.paged(8, share=2)),
        Case("pages of a pool", caches.paged(5, pages=60), full=True),
        Case("pages of keys un-rotated", caches.paged(8, share=2, rotated=False), full=True),
        Case("paged everywhere windowed", caches.paged(16, share=3), WINDOWED, full=True),
    ),
    caches.shared_prefix: (
        Case("shared prefix", caches.shared_prefix()),
        Case(
            "shared prefix and ring",
            (caches.shared_prefix(caches.ring(W, slack=4)), caches.shared_prefix()),
            slack=4,
            full=True,
        ),
        Case("shared prefix and pages", caches.shared_prefix(caches.paged(8, share=2)), full=True),
        Case("prefixes of their own", caches.shared_prefix(share=1), full=True),
    ),
    caches.recompute: (
        Case("recompute", caches.recompute(), keeps=False),
        Case("recompute beside dense", (caches.dense(), caches.recompute()), keeps=False, full=True),
    ),
    caches.layer_input: (
        Case("layer input", caches.layer_input()),
        Case("layer input absorbed", caches.layer_input(absorb=True), LEARNED, refuses=("absorb",), full=True),
    ),
    caches.traced: (
        Case("traced", (caches.traced(caches.ring(W, slack=4)), caches.traced(caches.dense())), slack=4, full=True),
    ),
    caches.output: (Case("output", caches.output(), full=True),),
    caches.hybrid: (Case("hybrid", caches.hybrid(), full=True),),
    codecs.int8: (
        Case("int8", caches.dense(store=codecs.int8()), **CODES),
        Case(
            "ring of int8", (caches.ring(W, slack=4, store=codecs.int8()),) * 2, WINDOWED, slack=4, full=True, **CODES
        ),
        Case("pages of int8", caches.paged(8, share=2, store=codecs.int8()), full=True, **CODES),
    ),
    codecs.fp8: (Case("fp8", caches.dense(store=codecs.fp8()), full=True, **CODES | {"error": 0.25}),),
    codecs.int4: (Case("int4", caches.dense(store=codecs.int4()), full=True, **CODES | {"error": 0.7}),),
    codecs.int4_channels: (
        Case(
            "int4 by channel",
            caches.dense(store=LATE),
            slack=4,
            full=True,
            **CODES | {"error": 0.25},
        ),
    ),
    codecs.plain: (Case("bfloat16", caches.dense(store=codecs.plain("bfloat16")), exact=False, error=0.02, full=True),),
}


NEAR = CODES | {"error": 0.02}
CROSS_TABLE = {
    caches.cross: (
        Case("cross", caches.dense(), RELATIVE),
        Case("cross beside a ring", (caches.ring(W, slack=4), caches.dense()), RELATIVE, slack=4, full=True),
        Case("cross beside pages", caches.paged(8, share=2), POSTNORM, share=3, full=True),
        Case("cross beside int8", caches.dense(store=codecs.int8()), POSTNORM, full=True, **NEAR),
        Case("cross of int8", caches.dense(), POSTNORM, cross=caches.cross(store=codecs.int8()), full=True, **NEAR),
        Case(
            "cross of int4 by channel",
            caches.dense(),
            POSTNORM,
            cross=caches.cross(store=LATE),
            full=True,
            **NEAR | {"error": 0.12},
        ),
    ),
    caches.encoder_output: (
        Case("absorbed", caches.dense(), POSTNORM, cross=caches.encoder_output(absorb=True), share=3),
        Case(
            "absorbed twice",
            caches.layer_input(absorb=True),
            POSTNORM,
            cross=caches.encoder_output(absorb=True),
            refuses=("absorb",),
            full=True,
        ),
        Case("projected again", caches.layer_input(), POSTNORM, cross=caches.encoder_output(), full=True),
        Case(
            "absorbed beside a trace",
            caches.traced(caches.dense()),
            POSTNORM,
            cross=caches.encoder_output(absorb=True),
            full=True,
        ),
        Case(
            "absorbed int8",
            caches.dense(),
            POSTNORM,
            cross=caches.encoder_output(absorb=True, store=codecs.int8()),
            full=True,
            **NEAR,
        ),
    ),
}
"""What may be kept of a source, beside what may be kept of the text."""


def one_layer(plan, window=None, config=FULL, **options) -> Case:
    """A case of one layer, for checks that compile much."""
    name = f"{plan} {options['cross']}" if "cross" in options else str(plan)
    return Case(name, plan, dataclasses.replace(config, num_layers=1, windows=(window,)), **options)


MUTATED = (
    one_layer(caches.ring(W, slack=2), W, slack=2),
    one_layer(caches.dense(), W),
    one_layer(caches.ring(slack=2, **SINKS), reference=caches.recompute(**SINKS), slack=2),
    one_layer(
        caches.ring(slack=2, sinks_in_cache=True, **SINKS),
        reference=caches.recompute(sinks_in_cache=True, **SINKS),
        slack=2,
    ),
    one_layer(caches.paged(8, share=2), scarce=caches.paged(16, pages=3)),
    one_layer(caches.shared_prefix()),
    one_layer(caches.recompute(), W, keeps=False),  # without a window its last token sees all keys wherever they stand
    one_layer(caches.layer_input(), W),
    one_layer(caches.layer_input(absorb=True), config=LEARNED),
    one_layer(caches.traced(caches.dense())),
    one_layer(caches.output()),
    one_layer(caches.ring(W, slack=2, store=codecs.int8()), W, slack=2, **CODES),
    one_layer(caches.dense(store=LATE), slack=4, **CODES | {"error": 0.25}),
)
"""Every kind (`hybrid()` is `traced()`), and a codec with scales per token and one per channel, as mutants see them."""

MUTATED_SOURCES = (
    one_layer(caches.dense(), config=RELATIVE),
    one_layer(caches.dense(), config=POSTNORM, cross=caches.encoder_output(absorb=True), share=3),
    one_layer(caches.dense(), config=POSTNORM, cross=caches.cross(store=codecs.int8()), **CODES),
)
"""What is kept of a source, as the mutants of it see it."""


def cases() -> list[Case]:
    """All cases of every kind."""
    every = (*caches.KINDS, *codecs.CODECS)
    missing = [kind.__name__ for kind in every if kind not in TABLE]
    assert not missing, f"tests/kinds.py has no case for {missing}"
    return [case for kind in every for case in TABLE[kind]]


def of_sources() -> list[Case]:
    """All cases of what may be kept of a source."""
    missing = [kind.__name__ for kind in caches.CROSS_KINDS if kind not in CROSS_TABLE]
    assert not missing, f"tests/kinds.py has no case for {missing}"
    return [case for kind in caches.CROSS_KINDS for case in CROSS_TABLE[kind]]


COSTLY = {
    drafts.same_with_drafts: ("ring", "paged"),
    edits.edits: ("ring", "paged and shared"),
    moves.vmap: ("ring",),
    moves.gradients: ("ring",),
    contract.sharded: (),
}
"""Checks that compile much run by default on these cases, and on the others in the full suite."""


OF_FIRSTS = {
    drafts.same_with_drafts: 2,
    edits.edits: 2,
    moves.jit_is_eager: 2,
    moves.vmap: 1,
    moves.gradients: 1,
    contract.sharded: 1,
}
"""Checks that compile most run on this many of the first cases of a kind only, also in the full suite. Edits of every
case are in test_edit.py."""


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


def each_check(cases):
    """Every check of the suite with every case, marked for the suites that it runs in."""
    for check in testing.suite:
        for case in cases:
            if check is contract.sharded and case.config.encoder is not None:
                continue  # its model attends to no source
            if case not in firsts(OF_FIRSTS.get(check)):
                continue
            left_out = case.full or case.name not in COSTLY.get(check, (case.name,))
            left_out |= case.config.encoder is not None and check not in BESIDE_A_SOURCE
            name = f"{check.__name__}-{case.name.replace(' ', '-')}"
            marks = pytest.mark.full if left_out else pytest.mark.corner if check in ELSEWHERE else ()
            yield pytest.param(check, case, id=name, marks=marks)


def firsts(count=2):
    """The first cases of every kind, of which None stands for all."""
    return [case for listed in (*TABLE.values(), *CROSS_TABLE.values()) for case in listed[:count]]


def each(only=lambda case: True, cases=cases):
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
