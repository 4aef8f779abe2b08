"""The proof in tables: kind × algorithm on two models, and family × default plan (`scripts/equivalence_page.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kvjax import caches, codecs, sampling
from kvjax.caching import encode, source_limits
from kvjax.errors import CacheError, InputError
from kvjax.lm import read_config
from kvjax.loops.drafters import early_exit, prompt_lookup
from kvjax.loops.speculative import speculate
from kvjax.model import Model, decoder
from kvjax.params import init_params
from kvjax.testing.algorithms import beam, drafted, greedy, sampled, until
from kvjax.testing.cases import MIXED, RELATIVE, SOURCES, WINDOW, prompt_ids, tiny
from kvjax.testing.contract import REFUSED, Refusal
from kvjax.testing.equivalence import SEEDS, Against, Outcome, check_equivalence

STOPS, STOPPED = (7, 23, 40, 58), ((11, 12), (3, 4, 5))
NEVER = ((0, 0, 0, 0),)
"""A sequence that stops nothing here: stops of one shape are one program."""


def drawn(
    penalty: float = 1.0, frequency: float = 0.0, ngram: int = 0, least: int = 0, p: float = 1.0, heat: float = 0.9
) -> Any:
    """One structure whatever the numbers, so that they are one program; as they are, only the temperature counts."""
    return sampling.chain(
        sampling.repetition_penalty(penalty),
        sampling.frequency_penalty(frequency),
        sampling.no_repeat_ngram(ngram),
        sampling.min_new_tokens(least),
        sampling.temperature(heat),
        sampling.top_p(p),
    )


def ranked(ngram: int, least: int) -> tuple[Any, ...]:
    """The same for beams, which on random models say one thing again and again."""
    return sampling.no_repeat_ngram(ngram), sampling.min_new_tokens(least)


EXIT = speculate(early_exit(1), drafted=4, same_tokens=True)
ALGORITHMS = (
    greedy(),
    until(drawn(), stop_sequences=NEVER, name="sampled"),
    until(drawn(1.3, 0.2, 3, 0, 0.95), stop_sequences=NEVER, name="penalties"),
    until(drawn(least=32), stop_ids=STOPS, stop_sequences=STOPPED, name="stops"),
    sampled(samples=3),
    drafted(speculate(prompt_lookup(2), drafted=4), name="drafts"),
    drafted(
        speculate(early_exit(1), drafted=4, same_tokens=True), drawn(), stop_sequences=NEVER, name="sampled drafts"
    ),
    beam(4, filters=ranked(2, 0), stop_sequences=NEVER),
    beam(4, filters=ranked(2, 32), stop_ids=STOPS, stop_sequences=NEVER, length_penalty=0.5, name="4 beams, stops"),
)
"""What the tables of kinds have a column for."""

OF_FAMILIES = (
    until(drawn(heat=1.5), stop_sequences=NEVER, name="sampled"),
    until(drawn(1.3, 0.2, 3, 0, 0.95, heat=1.5), stop_sequences=NEVER, name="penalties"),
)
"""What the table of families has a column for: random models that are greedy repeat themselves."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A plan in a table.

    Args:
        name: what the page calls it.
        plan, reference: see `testing.against`.
        cross: what is kept of the source; None without one.
        exact: whether it gives the tokens of its reference; else only how far its logits are off is stated.
    """

    name: str
    plan: Any
    reference: Any = caches.recompute()
    cross: Any = None
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class Line:
    """What became of a row.

    Args:
        name: of the row.
        exact: as the row says.
        outcomes: one for each algorithm; none where it was refused.
        refused: why it cannot be; None where it can.
    """

    name: str
    exact: bool
    outcomes: tuple[Outcome, ...]
    refused: Refusal | None = None

    @property
    def wrong(self) -> tuple[str, ...]:
        """What is not as promised, in words; of an approximation only logits that are no numbers."""
        if not self.exact:
            return tuple(f"{self.name}: logits differ by {x.worst}" for x in self.outcomes if not np.isfinite(x.worst))
        return tuple(f"{self.name}, {each.algorithm}: {text}" for each in self.outcomes for text in each.wrong)


SLACKED = caches.ring(WINDOW, slack=4)
SINKS: dict[str, Any] = {"window": WINDOW, "sinks": 2}
SHARED = caches.paged(8, share=2)
EVERY = caches.recompute()
DECODER = (
    Row("default: ring, dense", None),
    Row("dense", caches.dense()),
    Row("dense, keys un-rotated", caches.dense(rotated=False)),
    Row("ring, dense", (SLACKED, caches.dense())),
    Row("ring, ring with sinks", (SLACKED, caches.ring(**SINKS)), (EVERY, caches.recompute(**SINKS))),
    Row(
        "ring, ring with sinks in the cache",
        (SLACKED, caches.ring(sinks_in_cache=True, **SINKS)),
        (EVERY, caches.recompute(sinks_in_cache=True, **SINKS)),
    ),
    Row("paged", caches.paged(8)),
    Row("paged, shared", SHARED),
    Row("shared prefix", caches.shared_prefix()),
    Row("layer input", caches.layer_input()),
    Row("layer input, absorbed", caches.layer_input(absorb=True)),
    Row("traced ring, traced dense", (caches.traced(SLACKED), caches.traced(caches.dense()))),
    Row("output", caches.output()),
    Row("hybrid", caches.hybrid()),
    Row("recompute beside dense", (caches.dense(), EVERY)),
    Row("dense, float16", caches.dense(store="float16"), exact=False),
    Row("dense, bfloat16", caches.dense(store="bfloat16"), exact=False),
    Row("dense, int8", caches.dense(store=codecs.int8()), exact=False),
    Row("dense, fp8", caches.dense(store=codecs.fp8()), exact=False),
    Row("dense, int4", caches.dense(store=codecs.int4()), exact=False),
    Row("dense, int4 by channel", caches.dense(store=codecs.int4_channels(4, residual=4)), exact=False),
    Row(
        "ring of int8, paged int8",
        (caches.ring(WINDOW, store=codecs.int8()), caches.paged(8, store=codecs.int8())),
        exact=False,
    ),
)
"""Kinds beside a model without an encoder: rotated keys, a window in the first of two layers."""

_SELF = {
    "dense": caches.dense(),
    "ring, dense": (SLACKED, caches.dense()),
    "paged, shared": SHARED,
}
_CROSS = {
    "K/V once": caches.cross(),
    "absorbed": caches.encoder_output(absorb=True),
    "projected again": caches.encoder_output(),
}
ENCODER = (
    *(Row(f"{own} · {of}", plan, cross=cross) for own, plan in _SELF.items() for of, cross in _CROSS.items()),
    Row("layer input, absorbed · absorbed", caches.layer_input(absorb=True), cross=_CROSS["absorbed"]),
    Row("traced · K/V once", caches.traced(caches.dense()), cross=_CROSS["K/V once"]),
    Row("dense · K/V in int8", caches.dense(), cross=caches.cross(store=codecs.int8()), exact=False),
    Row(
        "dense · absorbed, int8",
        caches.dense(),
        cross=caches.encoder_output(absorb=True, store=codecs.int8()),
        exact=False,
    ),
    Row("dense, int8 · K/V once", caches.dense(store=codecs.int8()), cross=caches.cross(), exact=False),
)
"""What is kept of the text, and of the source, with an encoder: relative positions, as T5 has them."""
SECTIONS = {"decoder": (tiny(MIXED), DECODER), "encoder": (tiny(RELATIVE, 13), ENCODER)}
"""Models whose greedy text does not soon repeat, and their rows."""


def proved(
    model: Model, row: Row, algorithms: Sequence[Any] = ALGORITHMS, seeds: Sequence[int] = SEEDS, splits: Any = None
) -> Line:
    """A row under all algorithms; an approximation under the first.

    Args:
        model: any.
        row: what is tried.
        algorithms, seeds, splits: see `check_equivalence`.

    Raises:
        CacheError, InputError: the plan was refused, and not for one of the reasons in `testing.REFUSED`.
    """
    source = None if model.encode is None else encode(model, _sources(model), SOURCES)
    chosen = tuple(algorithms) if row.exact else tuple(algorithms)[:1]
    plans = {row.name: Against(row.plan, row.reference)}
    try:
        report = check_equivalence(model, plans, chosen, seeds=seeds, splits=splits, source=source, cross=row.cross)
    except (CacheError, InputError) as error:
        for each in REFUSED:
            if each.kind in str(error) and each.operation in str(error):
                return Line(row.name, row.exact, (), each)
        raise
    return Line(row.name, row.exact, report.outcomes)


def of_kind(section: str, name: str, **options: Any) -> Line:
    """A row of `SECTIONS`, by name; options as `proved` has them."""
    model, rows = SECTIONS[section]
    return proved(model, next(row for row in rows if row.name == name), **options)


def of_family(name: str, hf: Mapping[str, Any], **options: Any) -> Line:
    """A checkpoint's family under its default plan, with random weights.

    Args:
        name: for people.
        hf: its config.json.
        options: as `proved` has them.
    """
    config = read_config(dict(hf))[1]
    params = init_params(config, jax.random.key(0))
    model = decoder(config, jax.tree_util.tree_map_with_path(_larger, params))
    return proved(model, Row(name, None), **({"algorithms": OF_FAMILIES} | options))


def _larger(path: Any, x: Any) -> Any:
    # Tables less than the rest: a token that sees most of all itself is repeated.
    return x if x.ndim < 2 else x * (5 if "table" in jax.tree_util.keystr(path) else 20)


def _sources(model: Model) -> np.ndarray:
    return prompt_ids(11, len(SOURCES), vocab=source_limits(model)[1] or 2)


def in_markdown(lines: Sequence[Line], algorithms: Sequence[Any] = ALGORITHMS) -> str:
    """A table: of each plan and algorithm how many tokens were equal, and how far the logits were apart at most."""
    names = [each.name for each in algorithms]
    found = [f"| | {' | '.join(names)} | worst logit |", "|---|" + "---:|" * (len(names) + 1)]
    for line in lines:
        if line.refused is not None:
            cells = [f"refused: {line.refused.operation} {line.refused.reason}", *[""] * len(names)]
        else:
            cells = [_cell(line, each) for each in line.outcomes]
            cells += [""] * (len(names) - len(cells)) + [f"{max(each.worst for each in line.outcomes):.1e}"]
        found.append(f"| {line.name} | {' | '.join(cells)} |")
    return "\n".join(found)


def _cell(line: Line, outcome: Outcome) -> str:
    if not line.exact:
        return "approximate"
    ties = f", {len(outcome.ties)} ties" if outcome.ties else ""
    return f"{'' if outcome.ok else 'DIFFERS '}{outcome.tokens:,}{ties}"


__all__ = [
    "ALGORITHMS",
    "OF_FAMILIES",
    "DECODER",
    "ENCODER",
    "SECTIONS",
    "Row",
    "Line",
    "proved",
    "of_kind",
    "of_family",
    "in_markdown",
]
