"""`kvjax translate`: source texts go in, what a model with an encoder makes of them comes out, batch by batch."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from kvjax.cli.startup import load_lm, one_line
from kvjax.errors import InputError
from kvjax.lm import LM
from kvjax.loops.algorithms import Candidate
from kvjax.loops.beam import Beam, beam
from kvjax.loops.run import Run


class Line(NamedTuple):
    """A source and where it comes from, for messages."""

    text: str
    where: str


def run(args: argparse.Namespace) -> None:
    """Translates as the arguments say; candidates, or one JSON object a source, on stdout as they are made."""
    many = not args.text or args.text == ["-"]
    if args.text and args.file is not None:
        raise InputError("translate: give either TEXT or --file")
    count = (1 if many else args.beams) if args.candidates is None else args.candidates
    if count > args.beams:
        raise InputError(f"translate: --candidates {count} is more than --beams {args.beams}; a beam gives one each")
    done = 0
    with contextlib.ExitStack() as kept_open:
        lines, total = _lines(args, kept_open) if many else (iter(list(_given(args.text))), len(args.text))
        lm = load_lm(args)
        if lm.model.encode is None:
            raise InputError(
                f"translate: model {lm.name!r} has no encoder, it continues a text: kvjax generate --model {args.model}"
            )
        began, shown = time.perf_counter(), many and sys.stderr is not None and sys.stderr.isatty()
        bar = kept_open.enter_context(tqdm(total=total, unit=" lines", file=sys.stderr, disable=not shown))
        for batch, found in translated(lm, lines, beam(args.beams, returned=count), args):
            written = []
            for line, candidates in zip(batch, found, strict=True):
                done += 1
                written.append(_shown(line, candidates, args.json, apart=count > 1 and done > 1))
            with tqdm.external_write_mode():
                sys.stdout.write("".join(written))
                sys.stdout.flush()  # what is done is out before the next batch begins
            bar.update(len(batch))
    if not args.json:
        seconds = time.perf_counter() - began
        sys.stderr.write(f"{done:,} source{'s' * (done != 1)} in {seconds:.2f} s, {args.beams} beams\n")


def translated(
    lm: LM, lines: Iterable[Line], search: Beam, args: argparse.Namespace
) -> Iterator[tuple[list[Line], list[list[Candidate]]]]:
    """Batches of lines with the candidates of each, in order; none for a blank line. What is wrong with a line is
    raised after those before it."""
    size = 0
    for batch in _batches(lm, lines, args.batch):
        sources = [ids for _, ids in batch if ids]
        found: Iterator[list[Candidate]] = iter(())
        if sources:
            size = max(size, len(batch))
            full = sources + sources[-1:] * (size - len(sources))  # of one size: another would compile again
            found = iter(candidates_of(lm, full, search, args))
        yield [line for line, _ in batch], [next(found) if ids else [] for _, ids in batch]


def _encoded(lm: LM, line: Line) -> list[int]:
    ids, limit = lm.encode(line.text), getattr(lm.model.config.encoder, "max_positions", None)
    if not lm.text_tokenizer().encode_bare(line.text):
        raise InputError(f"translate: {line.where}, {line.text[:40]!r}, has nothing the tokenizer knows")
    if limit is not None and len(ids) > limit:
        raise InputError(f"translate: {line.where} has {len(ids)} tokens, the encoder has {limit} positions")
    return ids


def candidates_of(lm: LM, sources: list[list[int]], search: Beam, args: argparse.Namespace) -> list[list[Candidate]]:
    """Of each source, best first."""
    made = Run.start(
        lm,
        sources,
        after=None,
        max_new_tokens=args.max_new_tokens,
        sampler=None,
        seed=None,
        plan=args.cache,
        stop_ids=None,
        algorithm=search,
        cross=args.cross,
    )
    for made in made.chunks(1):  # looks up between chunks, so that an interrupt is heard
        pass
    return made.candidates() or []


def _batches(lm: LM, lines: Iterable[Line], size: int) -> Iterator[list[tuple[Line, list[int]]]]:
    """Lines and their ids, none for a blank one."""
    rest, wrong = iter(lines), None
    while wrong is None:
        batch: list[tuple[Line, list[int]]] = []
        try:
            for line in itertools.islice(rest, size):
                batch.append((line, _encoded(lm, line) if line.text.strip() else []))
        except InputError as error:
            wrong = error
        if batch:
            yield batch
        elif wrong is None:
            return
    raise wrong


def _given(texts: list[str]) -> Iterator[Line]:
    for i, text in enumerate(texts, 1):
        if text == "-":
            raise InputError("translate: - reads standard input and goes with no other TEXT")
        if not text.strip():
            raise InputError(f"translate: TEXT {i} is empty")
        yield Line(text, f"TEXT {i}")


def _lines(args: argparse.Namespace, kept_open: contextlib.ExitStack) -> tuple[Iterator[Line], int | None]:
    """Lines of a file and how many, or of standard input as they come."""
    file = args.file
    if file is None or file == "-":
        if sys.stdin is None:
            raise InputError("translate: standard input is closed; give TEXT or --file")
        if file is None and not args.text and sys.stdin.isatty():
            raise InputError("translate: nothing to translate; give TEXT, --file, or lines on standard input")
        return decoded(getattr(sys.stdin, "buffer", sys.stdin), "standard input"), None
    try:
        with Path(file).open("rb") as once:
            total = sum(1 for _ in once)
        return decoded(kept_open.enter_context(Path(file).open("rb")), file), total
    except OSError as error:
        raise InputError(f"translate: cannot read {file}: {error.strerror or error}") from error


def decoded(stream: IO[Any], name: str) -> Iterator[Line]:
    """Lines of bytes or text, as they come, without their line breaks.

    Raises:
        InputError: one is not UTF-8.
    """
    for number, raw in enumerate(stream, 1):
        where = f"line {number} of {name}"
        try:
            text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        except UnicodeDecodeError as error:
            raise InputError(f"translate: {where} is not UTF-8 text: {error.reason}") from error
        yield Line((text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n"), where)


def _shown(line: Line, candidates: list[Candidate], as_json: bool, apart: bool) -> str:
    if as_json:
        made = [{"text": x.text, "score": x.score, "stop": x.stop} for x in candidates]
        return json.dumps({"source": line.text, "candidates": made}) + "\n"
    rows = [f"{one_line(each.text or '')}\t{each.score:.4f}\n" for each in candidates]
    return "\n" * apart + ("".join(rows) or "\n")  # a blank line for a blank line


__all__ = ["run", "translated", "decoded", "Line"]
