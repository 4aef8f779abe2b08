"""The command `kvjax`: one module a subcommand, errors in one line, exit codes that scripts can read."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from kvjax.cli import startup
from kvjax.cli.options import build_parser
from kvjax.errors import InputError, KvjaxError

OK, FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
"""Exit codes; the last two as shells count them, 128 and the signal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: without the program's name; None takes the process's own.

    Returns:
        0; 1 for an error, in one line on stderr, or where `doctor` found something to fail; 2 for wrong usage; 130 when
        interrupted; 141 when nobody reads on.
    """
    if sys.stderr is None:  # closed: what goes there is let go
        sys.stderr = open(os.devnull, "w")
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse: help and version are 0, wrong usage is 2
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        if sys.stdout is None:
            raise InputError("standard output is closed")
        with startup.prepared(args):
            code: int = args.run(args) or OK
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed(args, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        _forget_stdout()
        return PIPE_CLOSED
    except Exception as error:  # whatever it is, a user of the command line sees one line
        name = "" if isinstance(error, KvjaxError) else f"{type(error).__name__}: "
        return _failed(args, f"error: {name}{error}", FAILED)
    return code


def _failed(args: argparse.Namespace, message: str, code: int) -> int:
    if args.debug:
        traceback.print_exc()
    sys.stderr.write(f"kvjax: {startup.one_line(message)}\n")
    return code


def _forget_stdout() -> None:
    # The interpreter flushes stdout once more when it ends, and would complain.
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no real file behind it
        pass


__all__ = ["main"]
