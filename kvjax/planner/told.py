"""An estimate as text: tables that fit a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvjax.planner.crossings import Crossing
from kvjax.planner.devices import Device

if TYPE_CHECKING:
    from kvjax.planner.estimates import Estimate, Kept

WIDTH = 80
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def table(made: Estimate) -> str:
    """All of it."""
    lines = textwrap.wrap(_title(made), WIDTH) + [""]
    lines += aligned(_bytes(made)) + [""] + aligned(_step(made))
    for rows in (_crossings(made.crossings), _strategies(made)):
        lines += ["", *aligned(rows)]
    refused = list(dict.fromkeys(kept.refused for kept in made.strategies if kept.refused))
    for text in [f"-: {reason}" for reason in refused] + [_figures(made.device)]:
        lines += ["", *textwrap.wrap(text, WIDTH)]
    return "\n".join(lines)


def short(value: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 4.51 GFLOP; "never" for None."""
    if value is None:
        return "never"
    size, prefix = next(((size, prefix) for size, prefix in UNITS if abs(value) >= size), (1, ""))
    scaled = value / size
    digits = 0 if abs(scaled) >= 100 or scaled == int(scaled) else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:,.{digits}f} {prefix}{unit}".rstrip()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    first, rest = widths[0], widths[1:]
    return [
        "  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], rest, strict=True))]).rstrip()
        for row in rows
    ]


def _title(made: Estimate) -> str:
    weights = f"{made.dtype}, matrices int8" if made.int8 else made.dtype
    rows = f"{made.batch:,} row{'s' * (made.batch > 1)} of {made.context:,} slots"
    source = "" if made.source is None else f", a source of {made.source:,} slots each"
    return f"{made.model}, {made.parameters:,} parameters, {weights}; {rows}{source}; {made.plan}; {made.device.name}"


def _bytes(made: Estimate) -> list[tuple[str, str]]:
    about = "" if made.compiled else ", about"
    verdict = "fits" if made.fits else "does not fit"
    return [
        ("bytes", ""),
        ("weights", f"{made.weights:,}"),
        ("cache", f"{made.cache:,}"),
        (f"temporaries of a step{about}", f"{made.temporaries:,}"),
        (f"all: {verdict}", f"{made.nbytes:,}"),
        ("memory of the device", f"{made.device.memory:,}"),
        (f"most rows of {made.context:,} slots", f"{made.largest_batch:,}"),
        (f"most slots of {made.batch:,} row{'s' * (made.batch > 1)}", f"{made.largest_context:,}"),
    ]


def _step(made: Estimate) -> list[tuple[str, str]]:
    step, balance = made.step, made.device.flops_of(made.dtype) / made.device.bandwidth
    rows = [
        ("a step", ""),
        ("FLOPs", short(step.flops.contractions, "FLOP")),
        ("weights read", short(step.weights, "B")),
        ("cache read", short(step.cache, "B")),
        ("intensity; balance of the device", f"{step.intensity:.2f}; {balance:.1f} FLOP/B"),
        ("bound by", {"FLOPs": "FLOPs", "weights": "reading weights", "cache": "reading the cache"}[step.bound]),
        ("at the limit", f"{_seconds(step.limit)}, {short(made.batch / step.limit)} tokens/s"),
    ]
    if step.expected is not None:
        rows.append(("to be expected", f"{_seconds(step.expected)}, {short(made.batch / step.expected)} tokens/s"))
    return rows


def _crossings(found: Sequence[Crossing]) -> list[tuple[str, str, str, str]]:
    rows = [("crossovers", "at", "here", "")]
    for each in found:
        mark = "" if each.at is None else "from " if each.above else "up to "
        here = "" if each.here is None else _amount(each.here, each.unit)
        verdict = {True: "yes", False: "no", None: ""}[each.holds]
        rows.append((each.what, mark + _amount(each.at, each.unit), here, verdict))
    return rows


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return "never"
    if unit == "bytes/s":
        return short(value, "B/s")
    return f"{math.ceil(value) if value >= 100 else round(value, 1):,} {unit}"


def _strategies(made: Estimate) -> list[tuple[str, ...]]:
    expected = made.step.expected is not None
    head = ("what is kept", "bytes", "fits", "FLOPs", "a step reads", "at most", "expected")
    rows: list[tuple[str, ...]] = [head if expected else head[:-1]]
    for kept in made.strategies:
        rows.append(_kept(kept, made.batch)[: len(rows[0])])
    return rows


def _kept(kept: Kept, batch: int) -> tuple[str, ...]:
    if kept.step is None:
        return (kept.name, *("-" * 6))
    step, fits = kept.step, "yes" if kept.fits else "no"
    expected = "" if step.expected is None else f"{short(batch / step.expected)}/s"
    reads, flops = short(step.weights + step.cache, "B"), short(step.flops.contractions)
    return (kept.name, short(kept.nbytes, "B"), fits, flops, reads, f"{short(batch / step.limit)}/s", expected)


def _seconds(value: float) -> str:
    return f"{1e3 * value:,.3g} ms" if value < 1 else f"{value:,.3g} s"


def _figures(device: Device) -> str:
    rates = ", ".join(f"{short(rate, 'FLOP/s')} in {name}" for name, rate in device.flops)
    host = "" if device.host is None else f", {short(device.host, 'B/s')} from the host"
    said = "" if device.rates else " At the limit is what no program can pass; what one reaches is not in a datasheet."
    return f"{device.name}: {short(device.bandwidth, 'B/s')}, {rates}{host}; {device.source}.{said}"


__all__ = ["table", "aligned", "short"]
