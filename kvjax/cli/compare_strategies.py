"""`kvjax compare`: what could be kept of a text, side by side: bytes, FLOPs, time, and whether the tokens are equal."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
from tqdm import tqdm

import kvjax
from kvjax.costs import Flops, example, textbook
from kvjax.errors import InputError
from kvjax.lm import load
from kvjax.strategies import OPERATIONS, Comparison, Row, compare, sentences, with_encoder, without_rotation
from kvjax.timing import processor

CONTEXT = 512
"""Tokens that rows have and get unless told otherwise, or as many as the model has positions."""

NEW = 32
"""New tokens unless told otherwise, or half of the model's positions."""

COMPONENTS = ("projections", "scores", "ffn", "head", "norms")
UNITS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"))


def run(args: argparse.Namespace) -> None:
    """Compares on stdout, as tables, as Markdown or as one JSON object; a progress bar on stderr."""
    lm = load(args.model, dtype=args.dtype)
    model, name = lm.model, lm.name
    room = model.max_positions or CONTEXT
    new = min(NEW, max(room // 2, 1)) if args.tokens is None else args.tokens
    context = min(room, CONTEXT) - new if args.context is None else args.context
    if context < 1:
        raise InputError(f"compare: --tokens {new} leaves no context in {room} positions; give fewer")
    if args.no_rotation or args.encoder:
        size = max(room, context + new, args.source or 0)
        like = with_encoder if args.encoder else without_rotation
        model = like(model.config, size, args.dtype or "float32")
        name += ", random, learned positions" + ", with an encoder" * args.encoder
    with tqdm(file=sys.stderr, disable=None, leave=False, dynamic_ncols=True, bar_format="{desc:<34}{bar}") as bar:

        def watch(what: str, done: int, of: int) -> None:
            bar.total, bar.n = of, done
            bar.set_description_str(what)

        made = compare(
            model,
            batch=args.batch,
            context=context,
            new=new,
            edited=min(args.edit, context),
            rounds=args.rounds,
            source=args.source,
            sources=args.sources,
            watch=watch,
        )
    about = {"model": name, "dtype": str(model.params["embed"]["table"].dtype), **machine()}
    if args.json:
        print(json.dumps(about | as_json(made)))
    else:
        print((_markdown if args.markdown else _text)(about, made))
    if made.interrupted:  # the whole rounds are written
        raise KeyboardInterrupt


def machine() -> dict[str, Any]:
    """Where and with what something was measured."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
        "kvjax": kvjax.__version__,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def as_json(made: Comparison) -> dict[str, Any]:
    """What `--json` adds to model and machine: FLOPs are of one step of all rows, seconds one figure a round."""
    return {
        "batch": made.batch,
        "context": made.context,
        "new_tokens": made.new,
        "edited": made.edited,
        "capacity": made.capacity,
        "interrupted": made.interrupted,
        "source": None if made.source is None else dataclasses.asdict(made.source),
        "strategies": [dataclasses.asdict(row) for row in made.rows],
        "sentences": sentences(made),
        "textbook": None if made.source is None else [dataclasses.asdict(line) for line in textbook()],
    }


def _tables(made: Comparison) -> list[list[Sequence[str]]]:
    """Three tables of cells, the first row their heads: bytes and tokens, FLOPs, times."""
    rows = [row for row in made.rows if row.refused is None]
    least = min(row.predicted.contractions for row in rows) / made.batch
    size, unit = next(((size, unit) for size, unit in UNITS if least >= size), (1.0, "FLOP"))

    def flops(label: str, values: Flops, note: str) -> Sequence[str]:
        parts = [getattr(values, name) for name in COMPONENTS]
        return (label, *(_short(part / made.batch / size) for part in (*parts, sum(parts))), note)

    kept = [("what is kept", "bytes predicted", "bytes of arrays", "new tokens")]
    work: list[Sequence[str]] = [(f"{unit} a token", *COMPONENTS, "all", "counted")]
    names = {"token": "a token", "step": "a step"}
    times: list[Sequence[str]] = [("milliseconds", *(names.get(name, name) for name in OPERATIONS))]
    for row in rows:
        kept.append((row.name, f"{row.predicted_nbytes:,}", f"{row.nbytes:,}", row.tokens))
        work.append(flops(row.name, row.predicted, "equal" if row.counted == row.predicted else "differ"))
        if row.counted != row.predicted:
            work.append(flops("  counted", row.counted, ""))
        times.append((row.name, *("-" if t is None else f"{1e3 * t:,.3f}" for t in map(row.median, OPERATIONS))))
    return [list(kept), work, times]


def _short(value: float) -> str:
    return f"{value:,.{2 if value < 10 else 1 if value < 1000 else 0}f}"


def _heading(about: dict[str, Any], made: Comparison) -> list[str]:
    rounds = len(next(row for row in made.rows if row.refused is None).seconds["token"])
    middle = made.config.num_layers // 2
    rows = "1 row" if made.batch == 1 else f"{made.batch} rows"
    read = ""
    if (of := made.source) is not None:
        read = f"; {of.rows} source{'s' * (of.rows > 1)} of {of.tokens} tokens in {of.slots} slots"
    return [
        f"{about['model']}, {about['dtype']}: {rows}, {made.context} tokens and {made.new} new ones{read}",
        f"times: medians of {rounds} rounds in turn; tokens in one loop, a step in a call of its own; an edit goes "
        f"back {made.edited} tokens and feeds others, resuming runs as many again from layer {middle} on",
        f"{about['device']}, {about['cores']} cores, load {about['load']}; jax {about['jax']}, "
        f"Python {about['python']}, kvjax {about['kvjax']}; {about['day']}",
    ]


def textbook_table() -> tuple[str, list[Sequence[str]], str]:
    """The textbook example of an encoder-decoder beside what circulates for it: a title, a table and a sentence."""
    lines = textbook()
    kv, outputs, both = lines[:3]
    config, batch, positions = example.TEXTBOOK, example.BATCH, example.POSITIONS
    table: list[Sequence[str]] = [("bytes", "float32", "bfloat16", "often said", "bytes a number")]
    for line in lines:
        said = "" if line.said is None else f"{line.said} MB" + " a row" * (line.share > 1)
        table.append(
            (
                line.kept,
                f"{line.float32:,}",
                f"{line.bfloat16:,}",
                said,
                "" if line.said is None else f"{line.element:.2f}",
            )
        )
    padded = lines[-1].float32 / 2**20
    return (
        f"The textbook example: width {config.width}, {config.num_layers} layers, {batch} rows, {positions} source and "
        f"{positions} target positions",
        table,
        f"K/V are {kv.float32 / outputs.float32:g} times the outputs of the layers. A number has 4 bytes in float32, 2 "
        f"in bfloat16: what is often said fits neither, it would need what the last column says. Padded to "
        f"{example.PADDED}, K/V are {padded:.1f} MiB; both together are {both.float32 / batch:,.0f} bytes a row.",
    )


def _refusals(rows: Sequence[Row]) -> list[str]:
    return [f"{row.name}: {row.refused}" for row in rows if row.refused is not None]


def _text(about: dict[str, Any], made: Comparison) -> str:
    lines = [line for text in _heading(about, made) for line in textwrap.wrap(text, 80)]
    for table in _tables(made):
        lines += ["", *_aligned(table)]
    for text in (*_refusals(made.rows), *sentences(made)):
        lines += ["", *textwrap.wrap(text, 80)]
    if made.source is not None:
        title, table, said = textbook_table()
        lines += ["", *textwrap.wrap(title, 80), "", *_aligned(table), "", *textwrap.wrap(said, 80)]
    return "\n".join(lines)


def _aligned(table: list[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rows = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in table)
    return ["  ".join(cells).rstrip() for cells in rows]


def _markdown(about: dict[str, Any], made: Comparison) -> str:
    lines = ["  \n".join(_heading(about, made))]
    for table in _tables(made):
        lines += ["", *in_markdown(table)]
    for text in (*_refusals(made.rows), *sentences(made)):
        lines += ["", text]
    if made.source is not None:
        title, table, said = textbook_table()
        lines += ["", title, "", *in_markdown(table), "", said]
    return "\n".join(lines)


def in_markdown(table: list[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head."""
    rows = [f"| {' | '.join(row)} |" for row in table]
    return [rows[0], f"|---|{'---:|' * (len(table[0]) - 1)}", *rows[1:]]


__all__ = ["run", "machine", "as_json", "textbook_table", "in_markdown"]
